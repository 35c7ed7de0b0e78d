"""sparsify: which attentions, which masks, at which density; and what it refuses."""

import functools
import math
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import video_mask
from vdqc.base.block_mask import expand, kept_blocks
from vdqc.base.diagnostics import ConfigError, Diagnostics, InputError, OrderError
from vdqc.base.mask_budget import assign
from vdqc.base.numerics import sqnr_db
from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.base.target import TARGETS
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_rule
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.ir.sparse_ops import SPARSE_ATTENTION, plain
from vdqc.lowering.lower import lower
from vdqc.lowering.prepare import prepare
from vdqc.lowering.select import KernelChoice, choose
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.quant import Quant
from vdqc.passes.sparsify import Budget, Heads, Scores, Sparsify
from vdqc.testing.harness import assert_close, remarks, run

POLICIES = st.sampled_from(
    [
        "svg{density=0.5,block=16}",
        "tile{density=0.5,block=16}",
        "radial{density=0.6,block=16,sinks=1}",
        "topk{density=0.5,block=16}",
        "mass{density=0.4,block=16,mass=0.5}",
        "dense{density=1,block=16}",
    ]
)


class Block(nn.Module):
    """Self-attention over a video's tokens, then attention to text."""

    attend = staticmethod(nn.functional.scaled_dot_product_attention)

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out, self.to_kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = (self.split(layer(x)) for layer in (self.to_q, self.to_k, self.to_v))
        x = x + self.to_out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        k, v = (self.split(part) for part in self.to_kv(text).chunk(2, -1))
        return x + self.attend(self.split(x), k, v).transpose(1, 2).flatten(2)


class Video(nn.Module):
    """[B, C, F, H, W] to [B, tokens, width]; a timestep scales the tokens."""

    def __init__(self, layers: int = 2, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(1, width, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) * (1 + timestep[:, None, None] / 1000)
        for block in self.blocks:
            tokens = block(tokens, text)
        return tokens


def sample(frames: int, time: float, batch: int = 2, length: int = 3, size: int = 8) -> Sample:
    torch.manual_seed(int(time))
    call = {
        "x": torch.randn(batch, 1, frames, size, size + 4),
        "timestep": torch.full((batch,), time),
        "text": torch.randn(batch, length, 16),
    }
    return Sample(call, timestep=time)


SAMPLES = [sample(6, 900.0), sample(7, 400.0, 3, 5, 12), sample(6, 100.0)]


@functools.cache
def _annotated(scheme: str, layers: int) -> Graph:
    torch.manual_seed(0)
    graph = capture(Video(layers).eval(), SAMPLES)
    ctx = Context(SAMPLES, rules=(parse_rule(scheme),))
    PassManager([Canonicalize(), Annotate(keep="nothing")], probe=False).run(graph, ctx)
    return graph


def video(scheme: str = "none", layers: int = 2) -> tuple[Graph, Context]:
    """An annotated graph to edit, and a context that has said nothing yet."""
    return _annotated(scheme, layers).clone(), Context(SAMPLES, rules=(parse_rule(scheme),))


def sparse_nodes(graph: Graph) -> list[Any]:
    return [node for node in graph.nodes if node.target is SPARSE_ATTENTION]


def test_rewrites_self_attention_alone() -> None:
    graph, ctx = video()
    (record,) = run(graph, Sparsify(density=0.5, block=16), ctx=ctx)
    assert record.rewrites == 2
    assert [code for _, code in remarks(ctx)].count("cross-attention") == 2
    (first, _) = sparse_nodes(graph)
    frames, per_frame, words, before, width = first.args[5]
    assert (words, before) == (0, 0)
    tokens = first.args[0].meta["val"].shape[2]
    assert frames.meta["val"] * per_frame.meta["val"] == tokens  # for every size
    assert isinstance(width.meta["val"], torch.SymInt)
    names = [site.name for site in graph.sites(kind=SiteKind.ATTENTION)]
    assert names == [f"blocks.{i}:attention{n}" for i in range(2) for n in ("", "#2")]


def test_attention_that_is_written_out_gets_sparse_too() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)

    torch.manual_seed(0)
    model = Video()
    for block in model.blocks:
        block.attend = attend
    graph, ctx = capture(model.eval(), SAMPLES), Context(SAMPLES)
    PassManager([Canonicalize(), Annotate()], probe=False).run(graph, ctx)
    (record,) = run(graph, Sparsify(density=1.0, block=16), ctx=ctx)
    assert record.rewrites == 2
    expected = model(**SAMPLES[1].inputs)
    assert_close(graph.run(**SAMPLES[1].inputs)[0], expected)


def test_leaves_alone_what_has_no_frames() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    calls = [Sample({"x": torch.randn(2, 2, n, 8)}) for n in (32, 48)]
    graph = capture(Plain().eval(), calls)
    ctx = Context(calls)
    PassManager([Canonicalize(), Annotate()], probe=False).run(graph, ctx)
    before = str(graph)
    run(graph, Sparsify(), ctx=ctx)
    assert str(graph) == before
    assert [code for _, code in remarks(ctx)] == ["no-frames", "nothing-sparse"]
    (warning,) = (d for d in ctx.diagnostics if d.code == "no-frames")
    assert "let two samples differ" in warning.notes[0]


def test_density_one_changes_nothing() -> None:
    graph, ctx = video()
    expected = graph.run(**SAMPLES[1].inputs)[0]
    run(graph, Sparsify(density=1.0, block=16), ctx=ctx)
    assert_close(graph.run(**SAMPLES[1].inputs)[0], expected)


def test_dense_sites_and_dense_steps() -> None:
    graph, ctx = video()
    expected = [graph.run(**s.inputs)[0] for s in SAMPLES]
    option = Sparsify(density=0.4, block=16, dense="blocks.0*", dense_steps=0.34)
    (record,) = run(graph, option, ctx=ctx)
    assert record.rewrites == 1
    found = [graph.run(**s.inputs)[0] for s in SAMPLES]
    assert_close(found[0], expected[0])  # the noisiest of three steps
    assert all(not torch.allclose(a, b) for a, b in zip(found[1:], expected[1:], strict=True))
    assert record.facts["effective_density"] > record.facts["mask_density"]


@pytest.mark.parametrize("policy", ["svg", "tile", "radial", "topk", "mass"])
@pytest.mark.parametrize("heads", ["calibrated", "online"])
def test_lowered_is_the_compressed_graph_at_every_size(policy: str, heads: str) -> None:
    graph, ctx = video()
    run(graph, Sparsify(policy=policy, density=0.5, block=16, heads=Heads(heads)), ctx=ctx)
    expected = [graph.run(**s.inputs)[0] for s in SAMPLES]
    choices = {c.site: c for c in lower(graph, TARGETS["cpu"], ctx.diagnostics)}
    choice = choices["blocks.0:attention"]
    assert choice.kernel == "sparse_attention"
    assert "density=0." in choice.why
    assert choice.predicted_us > 0
    for s, wanted in zip(SAMPLES, expected, strict=True):
        assert_close(graph.run(**s.inputs)[0], wanted)


def test_compiles_once_for_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graph, ctx = video(layers=1)
    run(graph, Sparsify(density=0.5, block=16), ctx=ctx)
    lower(graph, TARGETS["cpu"], ctx.diagnostics)
    counter = CompileCounterWithBackend("aot_eager")
    program = prepare(graph.module, TARGETS["cpu"])
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    for s in SAMPLES:
        inputs = graph.signature.bind((), s.inputs)
        with torch.no_grad():
            assert_close(compiled(*inputs)[0], graph.run_inputs(inputs)[0])
    assert counter.frame_count == 1


def test_with_quantised_linears() -> None:
    graph, ctx = video("w8a8")
    run(graph, Quant(), Sparsify(density=0.5, block=16), ctx=ctx)
    assert graph.stage is Stage.COMPRESSED
    assert sum(node.target is FAKE_QUANTIZE for node in graph.nodes) > 4
    expected = graph.run(**SAMPLES[0].inputs)[0]
    lower(graph, TARGETS["cpu"], ctx.diagnostics)
    assert_close(graph.run(**SAMPLES[0].inputs)[0], expected)


def run_plan(option: Sparsify, target: str) -> dict[str, KernelChoice]:
    """What ``explain`` finds out of ``option`` on the graph of ``_bfloat16``."""
    graph, calls = _bfloat16(quantised=False)
    graph = graph.clone()
    run(graph, option.planned(), ctx=Context(calls))
    return {c.site: c for c in choose(graph, TARGETS[target], planned=True)}


@functools.cache
def _bfloat16(quantised: bool = True) -> tuple[Graph, list[Sample]]:
    torch.manual_seed(0)
    model = Video(layers=1, width=128, heads=2).eval()
    with torch.no_grad():
        model.blocks[0].to_k.bias[::16] += 20  # channels that are large in every key
    calls = [
        Sample(
            {k: v.bfloat16() for k, v in s.inputs.items()}
            | {"text": torch.randn(len(s.inputs["text"]), 3 + i, 128).bfloat16()},
            timestep=s.timestep,
        )
        for i, s in enumerate(SAMPLES[:2])
    ]
    graph = capture(model.bfloat16(), calls)
    ctx = Context(calls, rules=(parse_rule("w8a8"),))
    passes = [Canonicalize(), Annotate(keep="nothing"), *([Quant()] if quantised else [])]
    PassManager(passes, probe=False).run(graph, ctx)
    return graph, calls


@pytest.mark.parametrize(
    ("target", "kernel"), [("cpu", "sparse_attention"), ("sm90", "sparse_attention_int8")]
)
@pytest.mark.parametrize("policy", ["svg", "topk"])
def test_scores_from_codes(target: str, kernel: str, policy: str) -> None:
    graph, calls = _bfloat16()[0].clone(), _bfloat16()[1]
    plain = graph.clone()
    option = Sparsify(policy=policy, density=0.7, block=64)
    run(plain, option, ctx=Context(calls))
    run(graph, replace(option, scores=Scores.INT8), ctx=Context(calls))
    expected = [graph.run(**s.inputs)[0] for s in calls]
    for s, own in zip(calls, expected, strict=True):
        assert sqnr_db(own, plain.run(**s.inputs)[0]) > 30
    planned = run_plan(replace(option, scores=Scores.INT8), target)
    choices = {c.site: c for c in lower(graph, TARGETS[target], Diagnostics())}
    found = choices["blocks.0:attention"]
    assert (found.kernel, found.cost) == (kernel, planned["blocks.0:attention"].cost)
    assert sum(n.target is FAKE_QUANTIZE for n in graph.nodes) == 0
    for s, wanted in zip(calls, expected, strict=True):
        assert sqnr_db(graph.run(**s.inputs)[0], wanted) > 30


def test_scores_from_codes_need_a_graph_that_may_lose_precision() -> None:
    option = Sparsify(density=0.5, block=16, scores=Scores.INT8)
    with pytest.raises(OrderError, match="'sparsify' runs at compressed, but the passes before it"):
        PassManager([Canonicalize(), Annotate(), option, Quant()])


def test_mask_on_while_training() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 96, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    heads, rest = torch.tensor([0, 1]), ([6, 16, 0, 0, 4], "svg{density=0.5,block=16}", 0.3)
    loss = SPARSE_ATTENTION(q, k, v, heads, None, *rest).square().sum()
    wanted = torch.autograd.grad(plain(q, k, v, heads, None, *rest).square().sum(), (q, k, v))
    for found, grad in zip(torch.autograd.grad(loss, (q, k, v)), wanted, strict=True):
        assert_close(found, grad)


def test_bad_input() -> None:
    graph, ctx = video()
    with pytest.raises(InputError, match=r"blocks\.0:attention.*density of at least"):
        run(graph, Sparsify(density=0.13, block=16, sinks=1), ctx=ctx)
    for options, word in [
        ({"policy": "svgg"}, "svg"),
        ({"density": 0.0}, "densities"),
        ({"policy": "topk", "budget": Budget.CALIBRATED}, "chooses"),
        ({"dense_steps": 1.0}, "dense_steps"),
        ({"dense_steps": 1.0}, "expected 0 up to, not including, 1, got 1"),
        ({"mass": 0.5}, "mass"),
        ({"mass": math.nan}, "mass"),
        ({"policy": "mass", "mass": math.nan}, "mass"),
        ({"policy": "mass", "mass": -0.5}, "mass"),
    ]:
        with pytest.raises(ConfigError, match=word):
            Sparsify(**options)
    tiny = Context([sample(2, 5.0, size=4)])
    with pytest.warns(UserWarning, match="attends to everything"):
        run(graph, Sparsify(density=0.25, block=128), ctx=tiny)
    assert "samples-too-small" in {code for _, code in remarks(tiny)}
    assert all(node.args[3] is None for node in sparse_nodes(graph))  # heads decide online


@given(
    policy=POLICIES,
    frames=st.integers(1, 5),
    height=st.integers(1, 4),
    text=st.booleans(),
    first=st.booleans(),
    seed=st.integers(0, 9),
)
def test_masks_follow_sizes(
    policy: str, frames: int, height: int, text: bool, first: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layout = [frames, 8 * height, 11 if text else 0, int(first), 8]
    tokens = frames * 8 * height + layout[2]
    q, k, v = (torch.randn(2, 3, tokens, 4) for _ in range(3))
    with warnings.catch_warnings(action="ignore"):  # a density out of reach keeps everything
        mask = video_mask.video_mask(q, k, v, None, None, layout, policy, 0.5)
    sizes = video_mask.video_mask_sizes(q, None, layout, policy)
    assert [list(part.shape) for part in mask] == [[int(n) for n in size] for size in sizes]
    parsed = MaskPolicy.parse(policy)
    kept = kept_blocks(mask.starts, mask.counts, mask.ids, mask.counts.shape[-1])
    assert bool((kept.sum(-1) >= 1).all())  # no query is without keys
    assert bool(kept.diagonal(dim1=-2, dim2=-1).all())  # every token sees its own block
    if text:  # and text sees and is seen by everything
        wide = expand(kept, parsed.block, parsed.block, tokens, tokens)
        words = slice(0, 11) if first else slice(tokens - 11, tokens)
        assert bool(wide[..., words, :].all())
        assert bool(wide[..., :, words].all())
    for row, place in zip(mask.order, mask.place, strict=True):
        assert torch.equal(row[place], torch.arange(tokens))


@given(density=st.floats(0.2, 1.0), seed=st.integers(0, 99))
def test_a_budget_is_kept_and_spent_where_it_helps(density: float, seed: int) -> None:
    torch.manual_seed(seed)
    policy = MaskPolicy("svg", (0.2, 0.4, 0.8), 16)
    errors = {name: torch.rand(6, 4).double().sort(0, descending=True).values for name in "ab"}
    shares = {name: torch.tensor([0.2, 0.2, 0.4, 0.4, 0.8, 0.8]).double() for name in "ab"}
    plans = assign(policy, errors, shares, density, 2)
    spent = sum(plan.density for plan in plans.values()) / 2
    assert spent <= density + 1e-6
    total = 0.0
    for name, plan in plans.items():
        chosen = [policy.masks.index(plan.policy.masks[int(head)]) for head in plan.heads]
        total += float(errors[name][chosen, torch.arange(4)].sum())
    lowest = sum(float(errors[name][:2].min(0).values.sum()) for name in "ab")
    assert total <= lowest + 1e-12


@given(
    name=st.sampled_from(sorted(MASKS)),
    density=st.floats(0.01, 1),
    block=st.sampled_from([64, 128, 1_000_000]),
    sinks=st.integers(0, 2),
    mass=st.floats(0.1, 1),
)
def test_policy_text_reads_back(
    name: str, density: float, block: int, sinks: int, mass: float
) -> None:
    density, mass = float(f"{density:g}"), float(f"{mass:g}") if name == "mass" else 0.0
    policy = MaskPolicy(name, (density,), block, sinks, mass)
    assert MaskPolicy.parse(str(policy)) == policy
