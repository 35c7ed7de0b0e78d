"""Branches, rows of several widths and binary planes run through kernels as the graph says."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.target import TARGETS
from vdqc.engine.recipe import parse_passes
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind, set_note
from vdqc.lowering.lower import lower
from vdqc.lowering.prepare import prepare
from vdqc.passes.table import PASSES
from vdqc.sites import site_rows, with_kernels
from vdqc.testing.harness import AdaLNBlock, annotated, context, run

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


def block(dtype: torch.dtype) -> tuple[Graph, Sample]:
    """One DiT block, annotated, and its example."""
    if dtype not in _CAPTURED:
        torch.manual_seed(0)
        model = AdaLNBlock(32, heads=2, affine=True).to(dtype)
        x, y = torch.randn(2, 10, 32, dtype=dtype), torch.randn(2, 32, dtype=dtype)
        _CAPTURED[dtype] = annotated(model, x, y), Sample({"x": x, "y": y})
    graph, sample = _CAPTURED[dtype]
    return graph.clone(), sample


def output(graph: Graph, sample: Sample) -> Tensor:
    value: Tensor = graph.run(**sample.inputs)[0]
    return value.detach()


def linears(graph: Graph) -> list[str]:
    """Kernels behind the sites, by name of the op."""
    return [str(node.target).split(".")[1] for node in graph.nodes if "_linear" in str(node.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "scheme",
    ["w2+1a6", "w3+2a8-aasym", "w1+2a8-wasym", "w2+1a8-g16", "w3+1a16", "w8+1a8-static"],
)
def test_planes_run_through_kernels(scheme: str, dtype: torch.dtype) -> None:
    graph, sample = block(dtype)
    original = output(graph, sample)
    HELP.compress(graph, scheme, "*", progressive=True)
    compressed = output(graph, sample)
    diagnostics = Diagnostics()
    lower(graph, CPU, diagnostics)
    lowered = output(graph, sample)
    flips = relative_error(compressed, original) / 50
    assert relative_error(lowered, compressed) < max(TOLERANCE[dtype], flips)
    assert not [entry for entry in diagnostics if entry.severity == "warning"]
    prepared = prepare(graph.module, CPU)(*graph.signature.bind((), sample.inputs))[0]
    assert relative_error(prepared, lowered) < max(TOLERANCE[dtype], flips)


RECIPES = {
    "smooth,split{rank=4},quant": "w4a4",
    "split{rank=3},quant": "w4a8-g16-asym",
    "quant,split{branch=oolri,rank=2}": "w3a8",
    "quant,split{branch=oolri,rank=2}  ": "w4a16-g16",
    "quant,split{branch=oolri,rank=2,placement=inner}": "w3a8",
    "quant,split{branch=tqe,init=svd}": "w3a6-asym",
    "allocate,quant": "w3a8-asym",
    "allocate{method=planes,choice=row},quant,split{branch=oolri,rank=1}": "w3a6-asym",
    "split{rank=2},allocate{search=error,budget=3.5},quant,gptq": "w3a8",
    "allocate{method=layers,budget=4.5},quant": "w4a16",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_lower_to_what_they_compute(text: str) -> None:
    scheme = RECIPES[text]
    graph, sample = block(torch.float32)
    original = output(graph, sample)
    ctx = context(scheme=scheme)
    ctx.samples = [sample]
    for site in graph.sites(kind=SiteKind.LINEAR):
        set_note(site.node, scheme=scheme)
    records = run(graph, *parse_passes(f"{text.strip()},fold", PASSES), ctx=ctx)
    rows = site_rows(graph, records)
    compressed = output(graph, sample)
    choices = lower(graph, CPU, ctx.diagnostics)
    lowered = output(graph, sample)
    flips = relative_error(compressed, original) / 50
    assert relative_error(lowered, compressed) < max(TOLERANCE[torch.float32], flips)
    prepared = prepare(graph.module, CPU)(*graph.signature.bind((), sample.inputs))[0]
    assert relative_error(prepared, lowered) < TOLERANCE[torch.float32]
    kernels = {row.name: row for row in with_kernels(rows, choices) if row.bits is not None}
    owned = tuple(f"{name}.kernel." for name in kernels)
    packed = sum(
        graph.param(name).numel() * graph.param(name).itemsize
        for name in graph.param_names()
        if (name.startswith(owned) and not name.endswith(".bias"))
        or ".branch_" in name
        or name.startswith("learned.")
    )
    assert packed == sum(row.bytes or 0 for row in kernels.values())
    weights = sum(row.bytes_float or 0 for row in kernels.values()) / 4
    assert 8 * packed / weights == pytest.approx(
        sum((row.bits or 0) * (row.bytes_float or 0) / 4 for row in kernels.values()) / weights,
        abs=1e-3,
    )


def test_gains_of_frames_run_beside_the_kernel() -> None:
    graph, sample = HELP.wan(torch.float32)
    original = output(graph, sample)
    ctx = context(scheme="w4a6")
    ctx.samples = [sample]
    run(graph, *parse_passes("annotate,quant,split{branch=tqe,init=svd}", PASSES), ctx=ctx)
    compressed = output(graph, sample)
    assert len([name for name in graph.param_names() if name.endswith("branch_gain")]) == 16
    lower(graph, CPU, ctx.diagnostics)
    assert str(graph).count("down=") == 20
    prepared = prepare(graph.module, CPU)(*graph.signature.bind((), sample.inputs))[0]
    flips = relative_error(compressed, original) / 50
    for found in (output(graph, sample), prepared):
        assert relative_error(found, compressed) < max(TOLERANCE[torch.float32], flips)


class One(nn.Module):
    """One linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def doubled(passes: str, scheme: str) -> tuple[Graph, Tensor, Tensor]:
    """A lowered graph in float64, its input, and what the compressed one computed."""
    model, x = One().double(), torch.randn(7, 24, dtype=torch.float64)
    graph = annotated(model, x, scheme=scheme)
    run(graph, *parse_passes(passes, PASSES), ctx=context(x, model=model, scheme=scheme))
    expected = graph.run(x)[0].detach()
    lower(graph, CPU, Diagnostics())
    assert graph.stage is Stage.LOWERED
    return graph, x, expected


@pytest.mark.parametrize(
    ("passes", "scheme", "kernels"),
    [
        ("quant", "w2+1a6", ["packed_linear"] * 2),
        ("quant", "w2+2a6-asym", ["packed_linear"] * 3),
        ("quant", "w3+2a8-g8", ["group_linear"] * 2 + ["packed_linear"]),
        ("quant", "w3+1a16-g8", ["weight_only_linear"] * 2),
        ("quant,split{branch=oolri,rank=2}", "w2+1a6", ["packed_linear"] * 2),
        ("allocate,quant", "w4a8-asym", None),
        ("quant,split{branch=tqe,init=svd}", "w8a8", ["int8_linear"]),
    ],
)
def test_integers_give_what_float64_gives(
    passes: str, scheme: str, kernels: list[str] | None
) -> None:
    graph, x, expected = doubled(passes, scheme)
    assert relative_error(graph.run(x)[0], expected) < 1e-10
    if kernels is not None:
        assert linears(graph) == kernels


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a8-g8-asym", "w4a16"])
def test_a_branch_joins_the_kernel_that_has_room_for_it(scheme: str) -> None:
    graph, x, expected = doubled("split{rank=2},quant", scheme)
    text = str(graph)
    fused = scheme in ("w8a8", "w4a8")
    assert ("down=" in text) is fused
    assert ("aten.add" in text) is not fused
    assert relative_error(graph.run(x)[0], expected) < 1e-10


def test_other_sums_are_no_branches() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return self.a(x) + self.b(torch.relu(x))

    x = torch.randn(4, 8)
    graph = annotated(Sum(), x, scheme="w8a8")
    run(graph, *parse_passes("quant", PASSES))
    expected = graph.run(x)[0]
    lower(graph, CPU, Diagnostics())
    assert "down=" not in str(graph)
    assert relative_error(graph.run(x)[0], expected) < TOLERANCE[torch.float32]


def test_ranks_that_a_gpu_kernel_has_no_room_for_stay_beside_it() -> None:
    h100 = TARGETS["sm90"]
    for rank, fused in ((1, True), (2, False), (16, True)):
        model = nn.Sequential(nn.Linear(64, 32))
        graph = annotated(model, torch.randn(4, 64), scheme="w8a8")
        passes = parse_passes(f"split{{rank={rank}}},quant", PASSES)
        run(graph, *passes)
        lower(graph, h100, Diagnostics())
        assert ("down=" in str(graph)) is fused
        assert len(graph.sites(kind=SiteKind.LINEAR)) == 1
