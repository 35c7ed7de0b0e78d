import pytest
import torch

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.scheme import QuantScheme
from vdqc.base.target import TARGETS
from vdqc.engine.pass_manager import Context, PassManager, Rule
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.lowering.lower import lower
from vdqc.lowering.prepare import compile_blocks, gelu_tanh, prepare
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.quant import Quant
from vdqc.passes.rotate import Rotate
from vdqc.testing.architectures import ARCHITECTURES

CPU = TARGETS["cpu"]


def lowered(name: str, dtype: torch.dtype, scheme: str = "w8a8") -> tuple[Graph, Sample]:
    architecture = ARCHITECTURES[name]
    samples = architecture.samples(dtype)
    graph = capture(architecture.build(0, dtype), samples)
    ctx = Context(samples, CPU, rules=(Rule("*", QuantScheme.parse(scheme)),))
    PassManager([Canonicalize(), Annotate(), Rotate(), Quant()], probe=False).run(graph, ctx)
    lower(graph, CPU, Diagnostics())
    return graph, samples[0]


@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video"])
def test_prepared_equals_lowered(name: str) -> None:
    graph, sample = lowered(name, torch.float32)
    expected = graph.run(**sample.inputs)
    program = prepare(graph.module, CPU)
    found = program(*graph.signature.bind((), sample.inputs))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 3e-4  # codes may flip where sums run in another order


def test_equal_blocks_are_instances_of_one_class_and_share_the_weights() -> None:
    graph, _ = lowered("wan-t2v", torch.float32)
    program = prepare(graph.module, CPU)
    blocks = [child for name, child in program.named_children() if name.startswith("blocks_")]
    assert len(blocks) == 2
    assert type(blocks[0]) is type(blocks[1])
    own = graph.param("blocks.1.ffn.net.2.kernel.weight")
    held = blocks[1].get_buffer("ffn.net.2.kernel.weight")
    assert held.data_ptr() == own.data_ptr()


def test_one_compilation_serves_every_block_and_timestep() -> None:
    from torch._dynamo.utils import counters

    graph, sample = lowered("wan-t2v", torch.bfloat16)
    program = prepare(graph.module, CPU)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(program, backend="aot_eager", fullgraph=True)
    for timestep in (900.0, 20.0):
        inputs = {**sample.inputs, "timestep": torch.full_like(sample.inputs["timestep"], timestep)}
        found = program(*graph.signature.bind((), inputs))[0]
        expected = graph.run(**inputs)[0]
        assert relative_error(found, expected) < TOLERANCE[torch.bfloat16]
    assert counters["stats"]["unique_graphs"] <= 3  # before, block, after
    torch._dynamo.reset()


def test_the_whole_program_compiles_without_breaks() -> None:
    graph, sample = lowered("wan-t2v", torch.float32)
    program = prepare(graph.module, CPU)
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    found = compiled(*graph.signature.bind((), sample.inputs))[0]
    assert relative_error(found, graph.run(**sample.inputs)[0]) < 3e-4
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gelu_is_the_tanh_form(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-1e4, 0.0, 1e4])]).to(dtype)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(gelu_tanh(x), expected, atol=1e-6, rtol=TOLERANCE[dtype])
