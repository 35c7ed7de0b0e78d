"""Norm, rotary embedding and codes of queries and keys in one kernel: before and after."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.target import TARGETS
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_rule
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.lowering.lower import lower
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.quant import Quant
from vdqc.passes.sparsify import Scores, Sparsify

F32, BF16 = torch.float32, torch.bfloat16


class Attention(nn.Module):
    """Self-attention over a video's tokens, with a norm (``across`` heads or each) and RoPE."""

    def __init__(self, width: int, heads: int, norm: str) -> None:
        super().__init__()
        self.patch = nn.Conv3d(1, width, (1, 2, 2), (1, 2, 2))
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        size = width if norm == "across" else width // heads
        self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in range(2))
        self.heads, self.norm = heads, norm

    def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        x = norm(x) if self.norm == "across" else x
        x = x.unflatten(-1, (self.heads, -1))
        x = norm(x) if self.norm == "each" else x
        a, b = x.unflatten(-1, (2, -1)).unbind(-2)
        a, b = a.float(), b.float()
        return torch.cat([(a * cos - b * sin).to(x.dtype), (a * sin + b * cos).to(x.dtype)], -1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) * (1 + timestep[:, None, None] / 1000)
        x = x.to(self.to_q.weight.dtype)
        half = x.shape[-1] // self.heads // 2
        angles = torch.arange(x.shape[1])[:, None] * 0.9 ** torch.arange(half)
        cos, sin = (table[None, :, None] for table in (angles.cos(), angles.sin()))
        q = self.rotated(self.to_q(x), self.norms[0], cos, sin).transpose(1, 2)
        k = self.rotated(self.to_k(x), self.norms[1], cos, sin).transpose(1, 2)
        v = self.to_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).flatten(2))


class Joined(Attention):
    """As diffusers turns: ``x cos + partner(x) sin`` with tables as wide as a head, text behind.

    ``form``: ``alone`` without text; ``joined`` with text of its own; ``sliced`` with the last
    tokens as text.
    """

    def __init__(self, form: str, pairs: bool) -> None:
        super().__init__(128, 2, "each")
        self.form, self.pairs = form, pairs

    def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        if self.form == "alone":
            return self.turned(norm(x), cos, sin)
        cos, sin = cos[:, :-7], sin[:, :-7]
        if self.form == "joined":
            return torch.cat([self.turned(norm(x[:, :-7]), cos, sin), x[:, -7:]], 1)
        x = norm(x)
        return torch.cat([self.turned(x[:, :-7], cos, sin), x[:, -7:]], 1)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (torch.cat([table, 0.9 * table], -1) for table in (cos, sin))
        if self.pairs:
            a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            partner = torch.stack([-b, a], -1).flatten(3)
        else:
            a, b = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
            partner = torch.cat([-b, a], -1)
        return (x.float() * cos + partner.float() * sin).to(x.dtype)


class Swapped(Attention):
    """Turned behind the swap of heads and tokens, [B, H, T, D].

    ``form``: ``alone``; ``assigned`` to the tokens behind the text; ``joined`` text in front, too,
    each with a norm of its own.
    """

    def __init__(self, form: str, norm: str = "each") -> None:
        super().__init__(128, 2, norm)
        self.form = form

    def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        cos, sin = (torch.cat([t, 0.9 * t], -1).transpose(1, 2) for t in (cos, sin))
        if self.form == "joined":
            x = torch.cat([x[:, :, :7].tanh(), norm(x[:, :, 7:])], 2)
        else:
            x = norm(x)
        if self.form == "alone":
            return self.turned(x, cos, sin).transpose(1, 2)
        x[:, :, 7:] = self.turned(x[:, :, 7:], cos[:, :, 7:], sin[:, :, 7:])
        return x.transpose(1, 2)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        partner = torch.stack([-b, a], -1).flatten(3)
        return (x.float() * cos + partner.float() * sin).to(x.dtype)


class Complex(Attention):
    """Pairs as complex numbers, text in front with angles of its own."""

    def __init__(self) -> None:
        super().__init__(128, 2, "each")

    def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        table = torch.complex(cos, sin).squeeze(0)
        x = norm(x.unflatten(-1, (self.heads, -1)))
        text, video = (self.turned(x[:, s], table[s]) for s in (slice(0, 7), slice(7, None)))
        return torch.cat([text, video], 1)

    def turned(self, x: Tensor, table: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * table).flatten(3).type_as(x)


class Flat(Attention):
    """Turned before heads are told apart, each head with angles of its own."""

    def __init__(self, batched: bool) -> None:
        super().__init__(192, 3, "across")
        self.batched = batched

    def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
        x = norm(x)
        steps = torch.arange(3)[:, None] + 1.0
        cos, sin = ((t[:, :, 0, None] * steps / 4).flatten(2) for t in (cos, sin))
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
        if self.batched:
            cos, sin = (t.expand(x.shape[0], -1, -1) for t in (cos, sin))
        a, b = x.unflatten(2, (-1, 2)).unbind(-1)
        partner = torch.stack([-b, a], -1).flatten(2)
        x = (x.float() * cos + partner.float() * sin).to(x.dtype)
        return x.unflatten(-1, (self.heads, -1))


def compressed(
    norm: str, dtype: torch.dtype, *more: Any, model: nn.Module | None = None
) -> tuple[Graph, Sample]:
    torch.manual_seed(0)
    model = model or Attention(128, 2, norm)
    model.eval()
    with torch.no_grad():
        for parameter in model.get_submodule("norms").parameters():
            parameter.uniform_(0.5, 1.5)
    samples = [
        Sample({"x": torch.randn(b, 1, *size).to(dtype), "timestep": torch.full((b,), t)}, t)
        for b, size, t in ((2, (5, 8, 12), 900.0), (3, (4, 12, 16), 100.0))
    ]
    graph = capture(model.to(dtype), samples)
    context = Context(samples, rules=(parse_rule("w8a8"),))
    passes = [Canonicalize(), Annotate(keep="nothing"), Quant(), *more]
    PassManager(passes, probe=False).run(graph, context)
    return graph, samples[0]


def calls(graph: Graph, name: str) -> list[fx.Node]:
    return [n for n in graph.nodes if str(n.target) == f"vdqc_kernels.{name}.default"]


def output(graph: Graph, sample: Sample) -> Tensor:
    value: Tensor = graph.run(**sample.inputs)[0]
    return value


def chain(text: str) -> list[str]:
    """Ops from the query's norm to attention, without their operands."""
    ops = [found[1] for found in re.finditer(r"= (?:aten|vdqc_kernels|vdqc)\.?(\w+)\(", text)]
    start = next(i for i, op in enumerate(ops) if op in ("rms_norm", "rope", "rope_quantize"))
    return ops[start : next(i for i, op in enumerate(ops) if "attention" in op) + 1]


@pytest.mark.parametrize("norm", ["across", "each", "none"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_norm_and_rotation_become_one_kernel(norm: str, dtype: torch.dtype) -> None:
    graph, sample = compressed(norm, dtype)
    expected = output(graph, sample)
    lower(graph, TARGETS["sm90"], Diagnostics())
    found = calls(graph, "rope")
    kinds = {"across": "rms_across", "each": "rms", "none": "none"}
    assert [node.args[1] for node in found] == [kinds[norm]] * 2, str(graph)
    assert not [n for n in graph.nodes if "rms_norm" in str(n.target)]
    assert relative_error(output(graph, sample), expected) < max(TOLERANCE[dtype], 0.01)


@pytest.mark.parametrize(
    ("form", "pairs"), [("alone", True), ("alone", False), ("joined", True), ("sliced", True)]
)
def test_heads_times_cosines_plus_partners_times_sines(form: str, pairs: bool) -> None:
    graph, sample = compressed("each", BF16, model=Joined(form, pairs))
    expected, before = output(graph, sample), str(graph)
    lower(graph, TARGETS["sm90"], Diagnostics())
    found = calls(graph, "rope")
    assert [node.args[1] for node in found] == ["rms"] * 2, before + str(graph)
    assert [node.args[8] for node in found] == [pairs] * 2
    assert [node.args[5].meta["val"].shape[-1] for node in found] == [64] * 2
    for name in ("neg", "stack"):
        assert not [n for n in graph.nodes if n.target is getattr(torch.ops.aten, name).default]
    assert relative_error(output(graph, sample), expected) < 0.01


@pytest.mark.parametrize(
    ("form", "norm", "start"),
    [("alone", "rms", "0"), ("assigned", "rms", "7"), ("joined", "none", "7")],
)
def test_heads_that_come_before_tokens(form: str, norm: str, start: str) -> None:
    graph, sample = compressed("each", BF16, model=Swapped(form))
    expected, before = output(graph, sample), str(graph)
    lower(graph, TARGETS["sm90"], Diagnostics())
    found = calls(graph, "rope")
    assert [node.args[1] for node in found] == [norm] * 2, before + str(graph)
    assert [str(node.args[7]) for node in found] == [start] * 2
    left = {str(n.target) for n in graph.nodes}
    assert not left & {"aten.neg.default", "aten.stack.default", "aten.slice_scatter.default"}
    assert relative_error(output(graph, sample), expected) < 0.01


def test_pairs_as_complex_numbers() -> None:
    graph, sample = compressed("each", BF16, model=Complex())
    expected, before = output(graph, sample), str(graph)
    lower(graph, TARGETS["sm90"], Diagnostics())
    assert [node.args[8] for node in calls(graph, "rope")] == [True] * 4, before + str(graph)
    assert not [n for n in graph.nodes if "view_as_complex" in str(n.target)]
    assert relative_error(output(graph, sample), expected) < 0.01


@pytest.mark.parametrize("batched", [False, True])
def test_heads_with_angles_of_their_own(batched: bool) -> None:
    graph, sample = compressed("across", BF16, model=Flat(batched))
    expected, before = output(graph, sample), str(graph)
    lower(graph, TARGETS["sm90"], Diagnostics())
    found = calls(graph, "rope")
    assert [node.args[0].meta["val"].shape[2:] for node in found] == [(1, 64)] * 2, before
    assert [node.args[5].meta["val"].ndim for node in found] == [3 if batched else 2] * 2
    assert not [n for n in graph.nodes if n.target is torch.ops.aten.stack.default]
    assert relative_error(output(graph, sample), expected) < 0.01


def test_heads_that_several_share_are_turned_once() -> None:
    class Shared(Complex):
        def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
            table = torch.complex(cos.double(), sin.double()).squeeze(0)
            first = norm(x.unflatten(-1, (self.heads, -1)))[:, :, :1]
            return self.turned(first, table).repeat_interleave(2, 2)

    graph, sample = compressed("each", BF16, model=Shared())
    expected = output(graph, sample)
    lower(graph, TARGETS["sm90"], Diagnostics())
    found = calls(graph, "rope")
    assert len(found) == 2, str(graph)
    assert {node.args[5].meta["val"].dtype for node in found} == {F32}
    assert relative_error(output(graph, sample), expected) < 0.01


def test_what_else_reads_keeps_the_rotation_apart() -> None:
    class Watched(Swapped):
        def rotated(self, x: Tensor, norm: nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
            kept = norm(x.unflatten(-1, (self.heads, -1)).transpose(1, 2))
            cos, sin = (torch.cat([t, t], -1).transpose(1, 2) for t in (cos, sin))
            return (self.turned(kept, cos, sin) + kept.mean()).transpose(1, 2)

    graph, _ = compressed("each", BF16, model=Watched("alone"))
    lower(graph, TARGETS["sm90"], Diagnostics())
    assert not calls(graph, "rope")


def test_the_text_before_and_after() -> None:
    graph, _ = compressed("across", BF16)
    before = chain(str(graph))
    gone = {"rms_norm", "unbind", "cat", "sub", "add"}
    assert gone < set(before)
    lower(graph, TARGETS["sm90"], Diagnostics())
    after = chain(str(graph))
    assert after.count("rope") == 2
    assert not gone & set(after), str(graph)
    table = r"%\d+ = aten.select\(%\d+, 0, 0\) : f32\[[^,]*, 32\]"
    assert len(re.findall(table, str(graph))) == 4
    kernel = r"rope\(%\d+, 'rms_across', @norms.0.weight, None, 1e-06, %\d+, %\d+, 0, False, 128\)"
    assert re.search(kernel, str(graph)), str(graph)


def test_a_program_for_a_cpu_is_left_to_the_compiler() -> None:
    graph, _ = compressed("across", BF16)
    lower(graph, TARGETS["cpu"], Diagnostics())
    assert not calls(graph, "rope")


@pytest.mark.parametrize(
    ("policy", "fused"), [("radial", True), ("tile", True), ("svg", True), ("topk", False)]
)
def test_codes_for_integer_scores_come_from_the_rotation(policy: str, fused: bool) -> None:
    """Where the mask does not look at queries and keys; ``tile`` and ``svg`` move tokens too."""
    option = Sparsify(policy=policy, density=0.7, block=64, scores=Scores.INT8)
    graph, sample = compressed("across", BF16, option)
    expected = output(graph, sample)
    lower(graph, TARGETS["sm90"], Diagnostics())
    assert calls(graph, "sparse_attention_int8"), str(graph)
    ready = calls(graph, "rope_quantize")
    assert len(ready) == (2 if fused else 0), str(graph)
    assert len(calls(graph, "rope")) == (0 if fused else 2)
    if fused:  # keys less their mean, queries as they are
        assert sorted(bool(node.args[9]) for node in ready) == [False, True]
    assert relative_error(output(graph, sample), expected) < 0.02
