"""program.json: the same text, the same bits, and nothing from outside the tables."""

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base.diagnostics import ArtifactError
from vdqc.ir import program
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample
from vdqc.ir.value_types import TypeReader
from vdqc.ir.verifier import verify
from vdqc.testing.architectures import ARCHITECTURES


class Tiny(nn.Module):
    """Sizes, scalars, dtypes, several values, a table that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.register_buffer("table", torch.arange(8, dtype=torch.int64))

    def forward(self, x: Tensor, scale: float = 0.5) -> Tensor:
        B, T, _ = x.shape
        for block in self.blocks:
            x = torch.nn.functional.gelu(block(x), approximate="tanh")
        first, second = x.split([3, 5], dim=-1)
        mask = torch.zeros(T, T, dtype=x.dtype).masked_fill(torch.eye(T) == 0, float("-inf"))
        mixed = torch.softmax(mask, -1) @ torch.cat([second, first], -1)
        return mixed.reshape(B * T, 8).to(torch.float64) * scale + self.table


@pytest.fixture(scope="module")
def graph() -> Graph:
    samples = [Sample({"x": torch.randn(shape)}) for shape in [(2, 3, 8), (4, 5, 8)]]
    return capture(Tiny().eval(), samples)


def weights(graph: Graph) -> dict[str, Tensor]:
    return {name: graph.param(name) for name in graph.param_names()}


def again(graph: Graph) -> Graph:
    return program.from_json(json.loads(program.dumps(graph)), weights(graph), graph.origin)


def test_text_sites_and_bits_survive(graph: Graph) -> None:
    twin = again(graph)
    verify(twin)
    assert str(twin) == str(graph)
    assert program.dumps(twin) == program.dumps(graph)
    assert twin.signature == graph.signature
    assert [site.name for site in twin.sites()] == [site.name for site in graph.sites()]
    assert [block.name for block in twin.blocks()] == ["blocks.0", "blocks.1"]
    for shape in [(2, 3, 8), (1, 7, 8)]:
        x = torch.randn(shape)
        assert torch.equal(graph.run(x)[0], twin.run(x)[0])


def test_every_stage_survives(graph: Graph) -> None:
    for stage in Stage:
        other = graph.clone()
        other.stage = stage
        twin = again(other)
        assert twin.stage is stage
        assert [s.name for s in twin.sites()] == [s.name for s in graph.sites()]


def test_a_read_graph_can_be_edited(graph: Graph) -> None:
    twin = again(graph)
    site = twin.site("blocks.0")
    doubled = twin.call(torch.ops.aten.mul.Tensor, site.input, 2.0, before=site.node)
    twin.set_operand(site.node, 0, doubled)
    twin.clean()
    verify(twin)
    assert "s0" in str(doubled.meta["val"].shape[0].node.expr)


def test_free_and_tied_weights_survive(graph: Graph) -> None:
    twin = graph.clone()
    twin.set_param("blocks.0.bias", torch.ones(8), free=True)
    stored = weights(twin)
    del stored["blocks.1.bias"]
    text = program.dumps(twin, {"blocks.1.bias": "blocks.0.bias"})
    found = program.from_json(json.loads(text), stored)
    assert found.free == {"blocks.0.bias"}
    assert torch.equal(found.param("blocks.1.bias"), torch.ones(8))


@pytest.mark.parametrize("name", ["wan-t2v", "ltx"])
def test_real_architectures_compute_the_same_bits(name: str) -> None:
    architecture = ARCHITECTURES[name]
    original = capture(architecture.build(), architecture.samples())
    twin = again(original)
    assert str(twin) == str(original)
    for call in (architecture.inputs(seed=3), architecture.inputs(B=3, L=13, seed=4)):
        for expected, actual in zip(original.run(**call), twin.run(**call), strict=True):
            assert torch.equal(expected, actual)


NUMBERS = st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.text()
OPERANDS = st.recursive(
    NUMBERS
    | st.sampled_from([torch.bfloat16, torch.int8, torch.strided, torch.channels_last])
    | st.sampled_from([torch.device("cpu"), torch.device("cuda", 1), complex(1, float("inf"))]),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=8,
)


@given(OPERANDS)
def test_operands_survive(operand: Any) -> None:
    data = json.loads(json.dumps(program.encode(operand), allow_nan=False))
    found = program.decode(data, {})
    assert found == operand
    assert type(found) is type(operand)


def test_nan_survives() -> None:
    assert program.decode(program.encode(float("nan")), {}) != 0
    assert str(program.decode(program.encode([float("nan")]), {})) == "[nan]"


@given(st.integers(2, 9), st.integers(2, 9))
def test_types_mean_what_they_say(a: int, b: int) -> None:
    reader = TypeReader({"s0": a, "s7": b})
    tensor = reader.value("bf16[s0, 4*s7, (s0 + s7)//2, Mod(s0, 2), 3]")
    assert tensor.dtype == torch.bfloat16
    sizes = [size if isinstance(size, int) else size.node.hint for size in tensor.shape]
    assert sizes == [a, 4 * b, (a + b) // 2, a % 2, 3]
    assert str(tensor.shape[0]) == "s0"
    assert reader.value("?") is None
    assert reader.value("f32[]").shape == ()
    assert [value.dtype for value in reader.value("[i64[2], f32[s7]]")] == [
        torch.int64,
        torch.float32,
    ]


def edited(graph: Graph, change: Any) -> dict[str, Any]:
    data = copy.deepcopy(json.loads(program.dumps(graph)))
    change(data)
    return data


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(entry for entry in data["nodes"] if entry["op"] == op)


LINEAR = "aten.linear.default"
HOSTILE = {
    "op outside the namespaces": lambda d: node(d, LINEAR).update(op="os.system.default"),
    "python function outside the table": lambda d: node(d, LINEAR).update(op="operator.attrgetter"),
    "attribute instead of op": lambda d: node(d, LINEAR).update(op="aten.__class__.__init__"),
    "op that writes": lambda d: node(d, LINEAR).update(op="aten.add_.Tensor"),
    "op that opens files": lambda d: node(d, LINEAR).update(op="aten.from_file.default"),
    "op that does not exist": lambda d: node(d, LINEAR).update(op="aten.linearr.default"),
    "kernel that does not exist": lambda d: node(d, LINEAR).update(op="vdqc_kernels.no.default"),
    "method call": lambda d: node(d, LINEAR).update(op="call_method"),
    "code in a node name": lambda d: node(d, LINEAR).update(name="x = __import__('os')"),
    "code in an argument name": lambda d: node(d, LINEAR).update(kwargs={"a=1, **b": 1}),
    "code in a weight name": lambda d: node(d, "get_attr").update(weight="a');import os#"),
    "a quote in a weight name": lambda d: node(d, "get_attr").update(weight='a");import os#'),
    "weight that is a method": lambda d: node(d, "get_attr").update(weight="forward"),
    "weight behind an attribute": lambda d: node(d, "get_attr").update(weight="__class__.x"),
    "weight that is not there": lambda d: node(d, "get_attr").update(weight="other.weight"),
    "value that is not there": lambda d: node(d, LINEAR).update(args=[{"node": "later"}]),
    "operand of no kind": lambda d: node(d, LINEAR).update(args=[{"eval": "1"}]),
    "dtype that is a function": lambda d: node(d, LINEAR).update(args=[{"dtype": "load"}]),
    "name used twice": lambda d: d["nodes"].insert(1, d["nodes"][0]),
    "no output": lambda d: d["nodes"].pop(),
    "input that the signature has not": lambda d: d["nodes"].insert(
        0, {"name": "y", "op": "placeholder", "type": "f32[2]"}
    ),
    "code in a type": lambda d: node(d, LINEAR).update(type="f32[__import__('os')]"),
    "no nodes": lambda d: d.pop("nodes"),
    "unknown stage": lambda d: d.update(stage="finished"),
    "list instead of object": lambda d: d.update(nodes=[[]]),
    "deep nesting": lambda d: node(d, LINEAR).update(args=[json.loads("[" * 900 + "]" * 900)] * 2),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_refused(graph: Graph, what: str) -> None:
    stored = weights(graph)
    for name in ("forward", "__class__.x"):
        stored[name] = torch.ones(1)
    data = edited(graph, HOSTILE[what])
    with pytest.raises(ArtifactError) as error:
        program.from_json(data, stored)
    assert error.value.diagnostic.code == "artifact"
