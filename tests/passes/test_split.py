from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.base.branches import leading_factors
from vdqc.base.diagnostics import ConfigError, OrderError
from vdqc.engine.block_module import boundary_key
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_passes, parse_rule
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.passes.allocate import Allocate, Method
from vdqc.passes.annotate import Annotate, Keep
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.quant import Quant
from vdqc.passes.smooth import Smooth
from vdqc.passes.split import Branch, Gain, Init, Placement, Split
from vdqc.passes.table import PASSES
from vdqc.testing.harness import (
    annotated,
    assert_equivalent,
    assert_ir,
    context,
    models,
    remarks,
    run,
)

TQE = Split(branch=Branch.TQE)
OOLRI = Split(branch=Branch.OOLRI, rank=2)


class One(nn.Module):
    """One linear."""

    def __init__(self, width: int = 16, rows: int = 8, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(width, rows)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


# svd --------------------------------------------------------------------------------------------


def test_svd_takes_the_leading_part_out_of_the_weight() -> None:
    model, x = One(), torch.randn(3, 16)
    graph = annotated(model, x, scheme="w4a8")
    (record,) = run(graph, Split(rank=2), ctx=context(x, model=model))
    assert_ir(
        graph,
        """
        graph (%x: f32[s0, 16]) @annotated {
          %0 = aten.matmul(@fc.branch_up, @fc.branch_down) : f32[8, 16]
          %1 = aten.sub(@fc.weight, %0) : f32[8, 16]
          %2 = aten.linear(%x, @fc.branch_down) : f32[s0, 2]
          %3 = aten.linear(%2, @fc.branch_up) : f32[s0, 8]
          %4 = aten.linear(%x, %1, @fc.bias) : f32[s0, 8]  # site fc w4a8
          %5 = aten.add(%4, %3) : f32[s0, 8]
          return [%5]
        }
        """,
    )
    assert record.facts["branches"]["fc"] == {"rank": 2, "bytes": 4 * 2 * 24, "rounds": 1}
    total = graph.output.all_input_nodes[0]
    assert (boundary_key(total), boundary_key(graph.site("fc").node)) == ("fc", None)


@settings(max_examples=4)
@given(models(), st.integers(1, 40), st.booleans(), st.booleans())
def test_svd_is_exact(
    case: tuple[nn.Module, list[Tensor]], rank: int, smooth: bool, learn: bool
) -> None:
    model, inputs = case
    passes = [Split(rank=rank, learn=learn), *([Smooth()] if smooth else [])]
    assert_equivalent(model, inputs, *passes, scheme="w4a4")


def outliers(seed: int, tokens: int = 256, width: int = 128) -> Tensor:
    """Rows in which every 32nd channel is forty times the others."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x[:, ::32] *= 40
    return x


def sqnr(graph: Graph, x: Tensor, expected: Tensor) -> float:
    return numerics.sqnr_db(graph.run(x)[0].detach(), expected.detach())


def compressed(model: nn.Module, x: Tensor, scheme: str, *passes: Any) -> tuple[Graph, Any]:
    graph = annotated(model, x, scheme=scheme)
    records = run(graph, *passes, ctx=context(x, model=model, scheme=scheme))
    return graph, records


@pytest.mark.parametrize("seed", range(3))
def test_svd_beats_rounding_alone_at_equal_bits(seed: int) -> None:
    """Smoothing moves the outliers of activations into the weight, the branch takes them out."""
    model, x = One(128, 128, seed), outliers(seed)
    expected = model(x)
    plain, _ = compressed(model, x, "w6a4", Smooth(), Quant())
    # rank 8 of float32 would cost 4 bits a weight; as 16-bit numbers it costs 2: 4 + 2 = 6
    branch, _ = compressed(model, x, "w4a4", Smooth(), Split(rank=8), Quant())
    rtn, _ = compressed(model, x, "w6a4", Quant())
    assert sqnr(branch, x, expected) > sqnr(plain, x, expected) + 1
    assert sqnr(branch, x, expected) > sqnr(rtn, x, expected) + 6


def test_rounds_do_not_raise_the_output_error() -> None:
    model, x = One(64, 64), outliers(0, width=64)
    expected = model(x)
    once, _ = compressed(model, x, "w3a16", Split(rank=4), Quant())
    often, records = compressed(model, x, "w3a16", Split(rank=4, rounds=50), Quant())
    assert records[0].facts["branches"]["fc"]["rounds"] > 1
    assert sqnr(often, x, expected) > sqnr(once, x, expected)


# oolri ------------------------------------------------------------------------------------------


def test_oolri_starts_at_the_best_of_its_rank() -> None:
    model, x = One().double(), torch.randn(5, 16).double()
    graph = annotated(model, x, scheme="w2a8-asym")
    ctx = context(x, model=model)
    run(graph, Quant(), ctx=ctx)
    weight, quantised = graph.param("fc.weight"), graph.evaluate(graph.site("fc").weight)
    run(graph, OOLRI, ctx=ctx)
    up, down = graph.param("fc.branch_up"), graph.param("fc.branch_down")
    error, up, down = (weight - quantised).detach(), up.detach(), down.detach()
    least = torch.linalg.svdvals(error)[2:].square().sum()
    left = (error - up @ down).square().sum()
    assert float((left - least).abs() / least) < 1e-10
    assert {"fc.branch_up", "fc.branch_down"} <= graph.free
    reader = next(n for n in graph.nodes if str(n.args[1:2]) == "(fc_branch_down,)")
    assert reader.args[0] is graph.inputs[0]  # the float input, not its codes


@settings(max_examples=5)
@given(st.integers(0, 2**31), st.sampled_from(["w2a16", "w3a16-asym", "w4a16-g8"]))
def test_full_rank_gives_the_float_layer(seed: int, scheme: str) -> None:
    model, x = One(seed=seed).double(), torch.randn(5, 16).double()
    graph = annotated(model, x, scheme=scheme)
    ctx = context(x, model=model)
    run(graph, Quant(), Split(branch=Branch.OOLRI, rank=8), ctx=ctx)
    assert numerics.relative_error(graph.run(x)[0], model(x)) < 1e-10


def test_inside_the_quantiser_hardly_a_code_moves() -> None:
    model, x = One(512, 256), torch.randn(5, 512)
    nn.init.normal_(model.fc.weight)
    graph = annotated(model, x, scheme="w4a16")
    run(graph, Quant())
    before = graph.evaluate(graph.site("fc").weight)
    inner = Split(branch=Branch.OOLRI, rank=32, placement=Placement.INNER)
    (record,) = run(graph, inner)
    after = graph.evaluate(graph.site("fc").weight).detach()
    assert float((after != before).float().mean()) < 0.005
    assert record.facts["branches"]["fc"]["bytes"] == 0
    assert "aten.add" not in str(graph).split("aten.linear")[1]
    up = graph.param("fc.branch_inside_up")
    grad = torch.autograd.grad(graph.run(x)[0].square().sum(), up)[0]
    assert float(grad.abs().max()) > 0


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_branch_inside_and_one_beside_are_two(inner_first: bool) -> None:
    x = torch.randn(5, 16)
    graph = annotated(One(), x, scheme="w3a16")
    run(graph, Quant())
    inner = Split(branch=Branch.OOLRI, rank=2, placement=Placement.INNER)
    order = [inner, TQE] if inner_first else [TQE, inner]
    run(graph, order[0])
    before = graph.run(x)[0]
    run(graph, order[1])
    if inner_first:  # a token-aware branch starts at nothing
        assert torch.equal(graph.run(x)[0], before)
    kinds = ("branch", "branch_inside")
    assert {f"fc.{kind}_{leaf}" for kind in kinds for leaf in ("up", "down")} <= graph.free
    ctx = context(x)
    assert [record.rewrites for record in run(graph, *order, ctx=ctx)] == [0, 0]
    assert remarks(ctx) == [("fc", "already-split")] * 2


def test_parts_of_a_layer_of_mixed_rows_get_their_branch() -> None:
    model, x = One(128, 80), torch.randn(300, 128)
    with torch.no_grad():
        model.fc.weight[::4, 3] += 2.0  # rows of one outlier want more bits
    graph = annotated(model, x, scheme="w3a16-asym")
    run(graph, Allocate(method=Method.ROWS), Quant(), ctx=context(x))
    parts = [site.name for site in graph.sites()]
    assert len(parts) == 3
    before = graph.run(x)[0]
    inner = Split(branch=Branch.OOLRI, rank=1, placement=Placement.INNER)
    (record,) = run(graph, inner)
    assert sorted(record.facts["branches"]) == sorted(parts)
    after = graph.run(x)[0]
    assert float(((after - before).norm() / before.norm()).detach()) < 0.2


# tqe --------------------------------------------------------------------------------------------

FRAMES, SIDE, WIDTH = 3, 4, 16


class Video(nn.Module):
    """Attention over the tokens of all frames, text after (or before) them, then a linear."""

    def __init__(self, text_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.text_first = text_first
        self.patch = nn.Conv3d(2, WIDTH, (1, 2, 2), (1, 2, 2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.patch(video).flatten(2).transpose(1, 2)
        x = torch.cat([text, x] if self.text_first else [x, text], dim=1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 1, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x)


def clip(frames: int = FRAMES, height: int = 4, width: int = 8, text: int = 7) -> Sample:
    generator = torch.Generator().manual_seed(frames)
    video = torch.randn(2, 2, frames, height, width, generator=generator)
    video = video * torch.arange(1, frames + 1)[:, None, None]
    return Sample({"video": video, "text": torch.randn(2, text, WIDTH, generator=generator)})


def video_graph(text_first: bool, *passes: Any) -> tuple[Graph, Context]:
    samples = [clip(), clip(4, 6, 12, 9)]
    graph = capture(Video(text_first).eval(), samples)
    ctx = Context(samples=samples, rules=(parse_rule("w4a4"),))
    PassManager([Canonicalize(), Annotate(keep=Keep.NOTHING), *passes]).run(graph, ctx)
    return graph, ctx


def test_tqe_changes_nothing_before_it_is_trained() -> None:
    sample = clip()
    before, _ = video_graph(False, Quant())
    after, ctx = video_graph(False, Quant(), TQE)
    assert torch.equal(after.run(**sample.inputs)[0], before.run(**sample.inputs)[0])
    assert "no-frames" not in [code for _, code in remarks(ctx)]
    branch = [after.param(f"out.branch_{leaf}") for leaf in ("up", "down", "gain")]
    assert sum(p.numel() for p in branch) == WIDTH + WIDTH + FRAMES
    assert {f"out.branch_{leaf}" for leaf in ("up", "down", "gain")} <= after.free
    assert not branch[0].any()
    assert float(branch[1].detach().abs().max()) > 0


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("frames", [FRAMES, 2 * FRAMES])
def test_tokens_get_the_gain_of_their_frame(text_first: bool, frames: int) -> None:
    graph, _ = video_graph(text_first, Quant(), Split(branch=Branch.TQE, init=Init.SVD))
    graph.set_param("out.branch_gain", torch.tensor([2.0, 3.0, 5.0]), free=True)
    sample = clip(frames, 4, 12, 5)
    seen: dict[str, Tensor] = {}
    site = graph.site("out")
    inputs = graph.signature.bind((), sample.inputs)
    graph.run_inputs(inputs, lambda node, value: seen.update({node.name: value}))
    q, partial = seen[site.input.name], seen[site.node.name]
    gains = torch.tensor([2.0, 3.0, 5.0]).repeat_interleave(frames // FRAMES)
    gains = gains.repeat_interleave(2 * 6)
    words = torch.ones(5)
    gains = torch.cat([words, gains] if text_first else [gains, words])
    narrow = q @ graph.param("out.branch_down").T * gains[:, None]
    expected = partial + narrow @ graph.param("out.branch_up").T
    torch.testing.assert_close(seen[graph.output.all_input_nodes[0].name], expected)


def test_frames_may_be_permuted_together_with_their_gains() -> None:
    graph, _ = video_graph(False, Quant(), Split(branch=Branch.TQE, init=Init.SVD))
    sample, order = clip(), torch.tensor([2, 0, 1])
    turned = {**sample.inputs, "video": sample.inputs["video"][:, :, order]}
    gain = torch.tensor([2.0, 3.0, 5.0])

    def outputs(inputs: Any, gain: Tensor) -> Tensor:
        graph.set_param("out.branch_gain", gain)
        graph.set_param("qkv.branch_gain", gain)
        return graph.run(**inputs)[0][:, : FRAMES * 8].unflatten(1, (FRAMES, 8))

    # attention does not know the order of its keys, and quantisers see one token at a time
    straight = outputs(sample.inputs, gain)[:, order]
    torch.testing.assert_close(outputs(turned, gain[order]), straight, rtol=1e-4, atol=1e-5)


def test_gain_one_is_an_ordinary_branch_of_rank_one() -> None:
    passes = [Quant(), Split(branch=Branch.TQE, init=Init.SVD, gain=Gain.ONES)]
    plain = [Quant(), Split(branch=Branch.TQE, init=Init.SVD, gain=Gain.NONE)]
    inputs = clip().inputs
    one, none = video_graph(False, *passes)[0], video_graph(False, *plain)[0]
    torch.testing.assert_close(one.run(**inputs)[0], none.run(**inputs)[0], rtol=1e-6, atol=1e-6)
    assert "upsample" not in str(none)


def test_svd_start_reaches_the_least_error_of_rank_one() -> None:
    graph, _ = video_graph(False, Quant(), Split(branch=Branch.TQE, init=Init.SVD))
    site = graph.site("out")
    error = graph.param("out.weight") - graph.evaluate(site.weight)
    up, down = leading_factors(error, 1)
    found = graph.param("out.branch_up") @ graph.param("out.branch_down")
    torch.testing.assert_close(found.detach(), (up @ down).detach(), rtol=1e-4, atol=1e-6)


def test_gains_start_where_quantisation_turns_frames_of_little_weight() -> None:
    graph, _ = video_graph(False, Quant(), TQE)
    (fixed,) = {str(s.scheme) for s in graph.sites("qkv")}
    assert fixed == "w4a4"
    gain = graph.param("qkv.branch_gain").detach()
    assert gain.tolist() == sorted(gain.tolist(), reverse=True)  # later frames are larger
    assert float(gain.min()) > 0


def test_tokens_of_no_frame_have_gain_one_with_a_remark() -> None:
    model, x = One(), torch.randn(3, 5, 16)
    graph = annotated(model, x, scheme="w4a8")
    ctx = context(x, model=model)
    run(graph, Quant(), TQE, ctx=ctx)
    assert remarks(ctx) == [("fc", "no-frames")]
    assert "fc.branch_gain" not in graph.param_names()


# bad input --------------------------------------------------------------------------------------


def test_the_order_is_checked_before_a_model_is_loaded() -> None:
    for early in ("split{branch=tqe},quant", "split{branch=oolri},quant", "quant,split"):
        passes = parse_passes(f"canonicalize,annotate,{early}", PASSES)
        with pytest.raises(OrderError, match="'split' runs at"):
            PassManager(passes)
    for text in ("split{rank=0}", "split{rounds=0}"):
        with pytest.raises(ConfigError, match="expected 1 or more, got 0"):
            parse_passes(text, PASSES)
    assert str(parse_passes("split{branch=tqe}", PASSES)[0]) == "split{branch=tqe}"


def test_ranks_are_cut_and_a_second_branch_is_refused() -> None:
    model, x = One(), torch.randn(3, 16)
    graph = annotated(model, x, scheme="w4a8")
    ctx = context(x, model=model)
    run(graph, Split(rank=99), ctx=ctx)
    assert graph.param("fc.branch_up").shape == (8, 8)
    assert [record.rewrites for record in run(graph, Split(), ctx=ctx)] == [0]
    assert remarks(ctx) == [("fc", "branch-rank"), ("fc", "already-split")]


def test_a_second_branch_of_one_kind_is_left_out() -> None:
    x = torch.randn(3, 16)
    graph = annotated(One(), x, scheme="w4a16")
    ctx = context(x)
    run(graph, Quant(), TQE, ctx=ctx)
    assert [record.rewrites for record in run(graph, TQE, ctx=ctx)] == [0]
    assert ("fc", "already-split") in remarks(ctx)


def test_sites_in_float_are_left_alone() -> None:
    graph = annotated(One(), torch.randn(3, 16), scheme="none")
    before = str(graph)
    assert [record.rewrites for record in run(graph, Split())] == [0]
    assert str(graph) == before
