import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from vdqc.base.diagnostics import Diagnostics, LoweringError
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.packing import packed_bytes
from vdqc.base.target import TARGETS
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample
from vdqc.lowering.lower import lower
from vdqc.lowering.prepare import prepare
from vdqc.lowering.rules import factor_scales
from vdqc.lowering.select import choose
from vdqc.testing.harness import annotated

CPU = TARGETS["cpu"]


def _helper() -> ModuleType:
    path = Path(__file__).with_name("compressed.py")
    spec = importlib.util.spec_from_file_location("compressed_graphs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HELP = _helper()
_CAPTURED: dict[torch.dtype, tuple[Graph, Sample]] = {}


def wan(dtype: torch.dtype) -> tuple[Graph, Sample]:
    if dtype not in _CAPTURED:
        _CAPTURED[dtype] = HELP.wan(dtype)
    graph, sample = _CAPTURED[dtype]
    return graph.clone(), sample


def output(graph: Graph, sample: Sample) -> torch.Tensor:
    value: torch.Tensor = graph.run(**sample.inputs)[0]
    return value


KERNELS = {
    "w8a8": "int8_linear",
    "w4a8": "packed_linear",
    "w4a8-g16": "packed_linear",
    "w3a6-asym": "packed_linear",
    "w8a8-static": "int8_linear",
    "w4a16-g16": "weight_only_linear",
    "w6a6": "packed_linear",
    "w2a8": "packed_linear",
    "w5a8-asym-tensor": "packed_linear",
    "w7a7-aasym-static": "packed_linear",
    "w8a8-wasym": "int8_linear",
    "w4a8-g16-asym": "group_linear",
    "w8a8-g16": "group_linear",
}


@pytest.mark.parametrize("scheme", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_lowered_equals_compressed(scheme: str, dtype: torch.dtype) -> None:
    graph, sample = wan(dtype)
    original = output(graph, sample)
    HELP.compress(graph, scheme, progressive=True)
    compressed = output(graph, sample)
    diagnostics = Diagnostics()
    choices = lower(graph, CPU, diagnostics)
    lowered = output(graph, sample)
    # a float sum in another order can push a value over the edge between two codes
    flips = relative_error(compressed, original) / 50
    assert relative_error(lowered, compressed) < max(TOLERANCE[dtype], flips)
    assert graph.stage is Stage.LOWERED
    assert {c.kernel for c in choices if ".to_q" in c.site} == {KERNELS[scheme]}
    assert not [entry for entry in diagnostics if entry.severity == "warning"]
    prepared = prepare(graph.module, CPU)(*graph.signature.bind((), sample.inputs))[0]
    assert relative_error(prepared, lowered) < TOLERANCE[dtype]


def test_weights_are_packed_and_the_float_ones_gone() -> None:
    graph, _ = wan(torch.float32)
    HELP.compress(graph, "w4a8")
    lower(graph, CPU, Diagnostics())
    name = "blocks.0.attn1.to_q"
    assert f"{name}.weight" not in graph.param_names()
    packed = graph.param(f"{name}.kernel.weight")
    assert packed.dtype == torch.uint8
    assert packed.shape == (64, packed_bytes(4, 64))
    assert "vdqc.fake" not in str(graph)


def test_peers_share_one_quantisation() -> None:
    graph, _ = wan(torch.float32)
    HELP.compress(graph, "w8a8", "blocks.0.attn1.to_[qkv]")
    lower(graph, CPU, Diagnostics())
    assert str(graph).count("quantize_rows") == 1
    assert str(graph).count("int8_linear") == 3


def test_a_site_without_a_kernel_runs_in_aten_with_a_warning() -> None:
    graph, sample = wan(torch.float32)
    HELP.compress(graph, "fp8", "blocks.0.ffn.*")
    compressed = output(graph, sample)
    diagnostics = Diagnostics()
    choices = {choice.site: choice for choice in lower(graph, CPU, diagnostics)}
    assert choices["blocks.0.ffn.net.2"].fallback
    warned = [entry for entry in diagnostics if entry.severity == "warning"]
    assert [entry.site for entry in warned] == ["blocks.0.ffn.net.0.proj", "blocks.0.ffn.net.2"]
    assert "fp8_e4m3 is not an integer format" in warned[0].message
    assert relative_error(output(graph, sample), compressed) < TOLERANCE[torch.float32]


def test_a_float_graph_lowers_to_itself_but_for_attention() -> None:
    graph, sample = wan(torch.float32)
    HELP.compress(graph, "none", "nothing")
    before = output(graph, sample)
    graph.stage = Stage.ANNOTATED
    choices = lower(graph, CPU, Diagnostics())
    assert {choice.kernel for choice in choices} == {"aten"}
    assert torch.equal(output(graph, sample), before)


def test_on_a_gpu_a_convolution_is_priced_at_the_rate_of_its_dtype() -> None:
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        model, x = nn.Conv2d(512, 512, 3).to(dtype), torch.randn(1, 512, 66, 66, dtype=dtype)
        (choice,) = choose(annotated(model, x), TARGETS["sm90"])
        times.append(choice.predicted_us - TARGETS["sm90"].call_us)
    peak = TARGETS["sm90"].peak
    assert times[0] == pytest.approx(times[1] * peak["bf16"] / peak["fp32"])


def test_choose_leaves_the_graph_alone() -> None:
    graph, _ = wan(torch.bfloat16)
    HELP.compress(graph, "w8a8")
    text = str(graph)
    chosen = {choice.site: choice for choice in choose(graph, CPU)}
    assert str(graph) == text
    assert chosen["blocks.0.attn1.to_q"].kernel == "int8_linear"
    assert "aten.linear in float at" in chosen["blocks.0.attn1.to_q"].runner_up
    assert chosen["blocks.0.attn1:attention"].kernel == "attention"
    assert chosen["blocks.0.attn1.to_q"].predicted_us > 0


def test_a_captured_graph_is_refused() -> None:
    graph, _ = wan(torch.float32)
    with pytest.raises(LoweringError, match="expected a graph at annotated or compressed"):
        lower(graph, CPU, Diagnostics())


def test_group_scales_factor_into_whole_multiples_or_not() -> None:
    base = torch.rand(6, 1) + 0.1
    multiples = torch.randint(1, 19, (6, 8)).float()
    multiples[:, 0] = 18
    found = factor_scales(base * multiples, 18)
    assert found is not None
    assert torch.allclose(found[0][:, None] * found[1], base * multiples, rtol=1e-6)
    assert int(found[1].max()) <= 18
    assert factor_scales(torch.rand(6, 8) + 0.1, 18) is None
