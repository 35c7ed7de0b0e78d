"""Loss terms: the invariants of each paper's term, the grammar, and how much memory maps take."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import (
    AttentionSite,
    LossContext,
    LossTerm,
    loss_text,
    make_term,
    parse,
    tap,
    total,
)
from vdqc.engine.losses.divergence import kl, relation_kl
from vdqc.engine.losses.maps import SalientAxis, map_error, pool, probabilities, saliency
from vdqc.engine.losses.memory import MemoryRelation
from vdqc.engine.losses.reduction import Reduction
from vdqc.engine.losses.relation import FrameRelation
from vdqc.engine.losses.tokens import TokenDistillation
from vdqc.testing.harness import assert_close, tensors

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
SITE = "attn:attention"
ALL = "block+msad{stride=3,salient=2}+std+tmd+trd{window=1}+mtrd"


def context(
    *,
    seed: int = 0,
    noise: float = 0.1,
    heads: int = 2,
    length: int = 12,
    width: int = 4,
    frames: FrameMap | None = None,
    site: AttentionSite | None = None,
    **fields: Any,
) -> LossContext:
    """A block of ``length`` tokens with one self-attention; the student is the teacher + noise."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    taps = {tap(SITE, kind): draw(2, heads, length, width) for kind in ("query", "key")}
    out = draw(2, length, 6)
    values: dict[str, Any] = {
        "fp_out": out,
        "q_out": (out + noise * draw(*out.shape)).requires_grad_(),
        "fp_taps": taps,
        "q_taps": {n: (v + noise * draw(*v.shape)).requires_grad_() for n, v in taps.items()},
        "frames": FrameMap.of(3, length // 3) if frames is None else frames,
        "attention": {SITE: site or AttentionSite()},
        "timestep": 500.0,
        "sample": 0,
        **fields,
    }
    return LossContext("blocks.0", **values)


def dense_map(query: Tensor, key: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)


def full_map_error(ctx: LossContext) -> Tensor:
    maps = [
        dense_map(taps[tap(SITE, "query")], taps[tap(SITE, "key")])
        for taps in (ctx.fp_taps, ctx.q_taps)
    ]
    return (maps[1] - maps[0]).square().mean()


# -- the grammar and the sum ------------------------------------------------------------------


def test_text_both_ways() -> None:
    text = "block+2*msad{global=0.001,local=auto}+100*tmd{reduction=sum}+auto*mtrd{seed=3}"
    assert loss_text(parse(text)) == text
    nested = text.replace("{", "(").replace("}", ")").replace(",local", ";local")
    assert loss_text(parse(nested)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the loss at ''"),
        ("block+", "cannot read the loss at ''"),
        ("blok", "did you mean 'block'"),
        ("msad{strid=2}", "did you mean 'stride'"),
        ("auto*block", "sets the scale"),
        ("block+block", "given twice"),
        ("block{reduction=max}", "did you mean 'mean'"),
        ("block+msad{global=much}", "expected a number of at least 0 or auto, got much"),
        ("msad{stride=0}", "msad.stride: expected 1 or more, got 0"),
        ("std{low=2}", "expected 0 <= low <= high"),
        ("tmd{temperature=0}", "tmd.temperature: expected a number above 0"),
        ("trd{window=0}", "trd.window: expected 1 or more"),
        ("mtrd{gate=2}", "mtrd.gate: expected 0 ... 1"),
        ("nan*block", "expected a weight of at least 0"),
    ],
)
def test_bad_text_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r".") as caught:
        parse(text)
    assert message in "\n".join((str(caught.value), *caught.value.diagnostic.notes))


def test_auto_is_the_ratio_of_first_losses() -> None:
    terms = parse("3*block+auto*tmd")
    state: dict[str, Tensor] = {}
    first, parts = total(terms, context(state=state))
    assert float(first) == pytest.approx(2 * 3 * parts["block"])
    second, parts_2 = total(terms, context(state=state, noise=0.2))
    ratio = 3 * parts["block"] / parts["tmd"]
    assert float(second) == pytest.approx(3 * parts_2["block"] + ratio * parts_2["tmd"])


def test_auto_waits_for_a_first_loss_that_is_not_zero() -> None:
    terms, state = parse("block+auto*tmd"), {}
    assert float(total(terms, context(state=state, noise=0))[0]) == 0
    loss, parts = total(terms, context(state=state))
    assert float(loss) == pytest.approx(2 * parts["block"])


@pytest.mark.parametrize("text", ALL.split("+"))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_term_that_is_not_finite_names_itself(text: str, bad: float) -> None:
    ctx = context()
    with torch.no_grad():
        ctx.q_out[0, 0, 0] = bad
        ctx.q_taps[tap(SITE, "query")][0, 0, 0, 0] = bad
    name = str(make_term(text.partition("{")[0], text.partition("{")[2].rstrip("}")))
    with pytest.raises(InputError, match=r"blocks.0: loss term") as caught:
        total(parse(text), ctx)
    assert f"loss term '{name}' is" in str(caught.value)
    assert caught.value.diagnostic.code == "loss-not-finite"
    assert "quantised" in caught.value.diagnostic.notes[0]


@pytest.mark.parametrize("text", ALL.split("+"))
def test_zero_without_quantisation_and_a_gradient_with_it(text: str) -> None:
    assert float(total(parse(text), context(noise=0))[0]) == 0
    ctx = context()
    total(parse(text), ctx)[0].backward()
    touched = [v.grad for v in (ctx.q_out, *ctx.q_taps.values()) if v.grad is not None]
    assert touched
    assert all(float(grad.abs().sum()) > 0 for grad in touched)


@settings(max_examples=3)
@given(st.integers(0, 2**31))
def test_every_term_has_the_gradient_of_its_value(seed: int) -> None:
    ctx = context(seed=seed)

    def loss(out: Tensor, query: Tensor) -> Tensor:
        taps = {**ctx.q_taps, tap(SITE, "query"): query}
        fresh = context(seed=seed, q_out=out, q_taps=taps)
        return total(parse(ALL), fresh)[0]

    assert torch.autograd.gradcheck(
        loss, (ctx.q_out, ctx.q_taps[tap(SITE, "query")]), fast_mode=True
    )


def test_half_precision_is_summed_in_float32() -> None:
    out = torch.full((1, 4, 4), 300.0, dtype=torch.float16)
    ctx = context(fp_out=out, q_out=-out)
    assert float(total(parse("block"), ctx)[0]) == 360_000  # beyond float16


# -- block ------------------------------------------------------------------------------------


def test_outputs_count_element_by_element() -> None:
    ctx = context(fp_rest=(torch.zeros(2, 5, 6),), q_rest=(torch.ones(2, 5, 6),))
    whole = (ctx.q_out - ctx.fp_out).square().sum() + 60
    assert_close(total(parse("block"), ctx)[0], whole / (2 * 17 * 6))
    assert_close(total(parse("block{reduction=row}"), ctx)[0], whole / (2 * 17))
    assert_close(total(parse("block{reduction=sum}"), ctx)[0], whole)


# -- attention maps: saliency and MSAD --------------------------------------------------------


@given(tensors(2, 3, 13, 5, dtype=torch.float64), st.integers(1, 14), st.integers(0, 2**31))
def test_chunked_saliency_is_the_dense_one(query: Tensor, rows: int, seed: int) -> None:
    key = torch.randn(query.shape, generator=torch.Generator().manual_seed(seed)).double()
    dense = dense_map(query, key)
    received = saliency(query, key, rows=rows)
    assert float((received - dense.sum((1, 2))).abs().max()) < 1e-12
    assert torch.allclose(received.sum(1), torch.full((2,), 3 * 13.0).double(), atol=1e-11)
    emitted = saliency(query, key, rows=rows, axis=SalientAxis.EMITTED)
    assert float((emitted - dense.square().sum((1, 3))).abs().max()) < 1e-12


@given(st.integers(0, 2**31), st.integers(1, 13))
def test_saliency_moves_with_the_tokens(seed: int, rows: int) -> None:
    random = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 2, 11, 4, generator=random).double()
    order = torch.randperm(11, generator=random)
    moved = saliency(query[:, :, order], key[:, :, order], rows=rows)
    assert_close(moved, saliency(query, key, rows=rows)[:, order])


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 5, 40]))
def test_stride_one_is_the_full_map(seed: int, salient: int) -> None:
    ctx = context(seed=seed)
    term = make_term("msad", f"global=1,local=0,stride=1,salient={salient}")
    assert_close(term(ctx), full_map_error(ctx))


@given(st.integers(0, 2**31), st.integers(1, 30))
def test_all_rows_are_the_full_map(seed: int, beyond: int) -> None:
    ctx = context(seed=seed)
    term = make_term("msad", f"global=0,local=1,salient={11 + beyond}")
    assert_close(term(ctx), full_map_error(ctx))


@given(st.integers(0, 2**31), st.integers(1, 14))
def test_pooling_is_the_average_of_neighbours_in_ceil_mode(seed: int, stride: int) -> None:
    value = torch.randn(1, 2, 12, 4, generator=torch.Generator().manual_seed(seed)).double()
    pooled, kept = pool(value, stride)
    wanted = torch.stack([part.mean(2) for part in value.split(stride, 2)], 2)
    assert_close(pooled, wanted)
    assert bool(kept.all())


def test_text_is_not_pooled_and_video_not_across_it() -> None:
    frames = FrameMap.of(2, 5, text=3, text_first=True)
    ctx = context(length=13, frames=frames, site=AttentionSite(frames=frames))
    value = ctx.fp_taps[tap(SITE, "query")]
    pooled, _ = pool(value, 4, [(0, 3, False), (3, 13, True)])
    assert pooled.shape[2] == 3 + 3
    assert torch.equal(pooled[:, :, :3], value[:, :, :3])
    assert_close(pooled[:, :, 3], value[:, :, 3:7].mean(2))
    with_segments = make_term("msad", "local=0,stride=4")(ctx)
    without = make_term("msad", "local=0,stride=4,segments=false")(ctx)
    assert float(with_segments) != pytest.approx(float(without))


def test_salient_rows_are_those_of_the_float_model_once_per_sample() -> None:
    term = make_term("msad", "global=0,local=1,salient=3")
    state: dict[str, Tensor] = {}
    ctx = context(state=state)
    received = saliency(ctx.fp_taps[tap(SITE, "query")], ctx.fp_taps[tap(SITE, "key")])
    index = received.topk(3, 1).indices
    maps = [
        dense_map(taps[tap(SITE, "query")], taps[tap(SITE, "key")])
        for taps in (ctx.fp_taps, ctx.q_taps)
    ]
    squares = (maps[1] - maps[0]).square()
    wanted = squares.gather(2, index[:, None, :, None].expand(-1, 2, -1, 12)).mean()
    assert_close(term(ctx), wanted)
    (name,) = state
    assert_close(state[name], received)
    kept = state[name].clone()
    term(context(seed=1, state=state))  # the same sample: the saliency is not measured again
    assert torch.equal(state[name], kept)
    term(context(seed=1, state=state, sample=1))
    assert len(state) == 2


def test_padding_leaves_the_map_of_what_is_there() -> None:
    padded = context()
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[..., 9:] = False
    short = {n: v[:, :, :9] for n, v in padded.fp_taps.items()}
    for masked in (
        mask,
        mask.expand(2, 1, 12, 12),
        torch.zeros(mask.shape).masked_fill(~mask, -1e9),
    ):
        fp = {**padded.fp_taps, tap(SITE, "mask"): masked}
        query, key = fp[tap(SITE, "query")], fp[tap(SITE, "key")]
        whole = probabilities(query, key, None, masked)
        cut = dense_map(query[:, :, :9], key[:, :, :9])
        assert_close(whole[:, :, :9, :9], cut, torch.float64)
    ctx = context(fp_taps={**padded.fp_taps, tap(SITE, "mask"): mask})
    cropped = context(
        length=9, fp_taps=short, q_taps={n: v[:, :, :9] for n, v in padded.q_taps.items()}
    )
    term = make_term("msad", "global=1,local=0,stride=4,reduction=sum")
    # 12 tokens make as many groups as 9 do, 3: the last holds one token instead of four
    assert_close(term(ctx), term(cropped))


def test_masks_of_fewer_axes_broadcast_as_in_attention() -> None:
    ctx = context()
    band = torch.ones(12, 12, dtype=torch.bool).tril(3)
    results = []
    for mask in (band, band[None, None]):
        for name in ("msad", "std"):
            taps = {**ctx.fp_taps, tap(SITE, "mask"): mask}
            results.append(float(make_term(name)(context(fp_taps=taps))))
    assert results[:2] == results[2:]
    assert results[0] != float(make_term("msad")(ctx))


def test_grouped_queries_share_their_keys() -> None:
    query, key = torch.randn(1, 4, 6, 3).double(), torch.randn(1, 2, 6, 3).double()
    assert_close(
        probabilities(query, key, None, None), dense_map(query, key.repeat_interleave(2, 1))
    )


def test_auto_parts_are_as_large_as_the_block_error() -> None:
    ctx = context()
    block = total(parse("block"), ctx)[0]
    both = make_term("msad", "global=auto,local=auto,stride=2,salient=4")(ctx)
    assert_close(both, 2 * block)


def test_a_block_without_self_attention_is_refused() -> None:
    ctx = context(site=AttentionSite(cross=True))
    for name in ("msad", "std"):
        with pytest.raises(InputError, match=r"blocks.0: loss term .* expected self-attention"):
            make_term(name)(ctx)


class Memory(TorchDispatchMode):
    """The largest tensor any op makes, and the most that lives at once, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.count(value, known)
        return result

    def count(self, value: Tensor, known: set[int]) -> None:
        storage = value.untyped_storage()
        key = storage._cdata
        if key in known or key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes() // value.element_size()
        self.largest = max(self.largest, value.numel())
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def test_the_full_map_never_exists() -> None:
    heads, length, width, stride, salient = 2, 640, 4, 16, 64
    pooled = -(-length // stride)
    bound = heads * (pooled**2 + salient * length)
    taps = {tap(SITE, kind): torch.randn(1, heads, length, width) for kind in ("query", "key")}
    students = {n: (v + 0.1 * torch.randn_like(v)).requires_grad_() for n, v in taps.items()}
    out = torch.randn(1, length, 2)
    term = make_term("msad", f"stride={stride},salient={salient}")
    ctx = context(fp_taps=taps, q_taps=students, fp_out=out, q_out=out + 1, frames=None)
    with Memory() as memory:
        term(ctx).backward()
    assert memory.largest <= bound / 8
    assert memory.peak <= bound
    assert bound < heads * length**2 / 5
    with Memory() as dense:  # the instrument does see a full map
        map_error(*[tuple(t.values()) for t in (taps, students)], rows=length).backward()
    assert dense.largest == heads * length**2
    assert dense.peak > 4 * bound


# -- STD ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("shape", [(2, 12, 6), (2, 6, 3, 4), (2, 6, 3, 2, 2)])
def test_equal_weights_are_the_plain_error_bit_for_bit(
    shape: tuple[int, ...], reduction: Reduction
) -> None:
    out = torch.randn(shape)
    ctx = context(fp_out=out, q_out=out + 0.1 * torch.randn(shape))
    plain = make_term("block", f"reduction={reduction}")(ctx)
    assert torch.equal(make_term("std", f"low=1,reduction={reduction}")(ctx), plain)


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 2))
def test_weights_span_their_range_and_move_with_tokens(seed: int, low: float, more: float) -> None:
    term = TokenDistillation(low=low, high=low + more)
    ctx = context(seed=seed, frames=FrameMap.of(1, 12))
    (weights,) = term.weights(ctx)
    assert torch.allclose(weights.amin(1), torch.full((2,), low), atol=1e-6)
    assert torch.allclose(weights.amax(1), torch.full((2,), low + more), atol=1e-6)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    moved = context(fp_taps={n: v[:, :, order] for n, v in ctx.fp_taps.items()})
    assert torch.allclose(term.weights(moved)[0], weights[:, order], atol=1e-5)


def test_weights_follow_the_attention_received() -> None:
    ctx = context()
    received = dense_map(ctx.fp_taps[tap(SITE, "query")], ctx.fp_taps[tap(SITE, "key")]).sum((1, 2))
    least, most = received.amin(1, keepdim=True), received.amax(1, keepdim=True)
    wanted = 0.5 + 0.5 * (received - least) / (most - least)
    assert_close(TokenDistillation().weights(ctx)[0], wanted, torch.float32)
    error = (ctx.q_out - ctx.fp_out).square().sum(-1)
    assert_close(make_term("std")(ctx), (wanted * error).mean(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_even_attention_weighs_all_tokens_high(dtype: torch.dtype) -> None:
    taps = {tap(SITE, kind): torch.ones(2, 3, 12, 4, dtype=dtype) for kind in ("query", "key")}
    ctx = context(fp_taps=taps)
    assert torch.equal(TokenDistillation().weights(ctx)[0], torch.ones(2, 12))
    faint = {name: 1e-4 * torch.randn_like(value) for name, value in taps.items()}
    ctx = context(fp_taps=faint)  # less apart than rounding: no order to make weights of
    assert torch.equal(TokenDistillation().weights(ctx)[0], torch.ones(2, 12))


def test_text_and_video_are_compared_with_their_own() -> None:
    frames = FrameMap.of(2, 4, text=4)
    ctx = context(frames=frames, site=AttentionSite(frames=frames))
    (weights,) = TokenDistillation().weights(ctx)
    for part in (weights[:, :8], weights[:, 8:]):
        assert torch.allclose(part.amin(1), torch.tensor(0.5))
        assert torch.allclose(part.amax(1), torch.tensor(1.0))
    (together,) = TokenDistillation(segments=False).weights(ctx)
    assert not torch.allclose(together, weights)
    assert torch.allclose(together.amax(1), torch.tensor(1.0))


def test_two_streams_of_a_joint_attention() -> None:
    frames = FrameMap.of(2, 4, text=4, text_first=True)
    whole = context(frames=frames, site=AttentionSite(frames=frames))
    video, text = (v.detach()[:, 4:] for v in (whole.fp_out, whole.q_out)), whole.fp_out[:, :4]
    fp_video, q_video = video
    ctx = context(
        site=AttentionSite(frames=frames),
        **{"fp_out": fp_video, "q_out": q_video, "fp_rest": (text,), "q_rest": (text + 1,)},
    )
    one, two = TokenDistillation().weights(ctx)
    (joined,) = TokenDistillation().weights(whole)
    assert torch.allclose(torch.cat((two, one), 1), joined)
    assert float(make_term("std")(ctx)) > 0


@pytest.mark.parametrize("extent", ["frame", "time"])
def test_attention_within_frames_or_over_time(extent: str) -> None:
    query, key = torch.randn(2, 2, 3, 4, 2, 5).double()  # [B, F, S, H, D], the output's token order
    received = torch.empty(2, 3, 4).double()
    lead = query.transpose(1, 2) if extent == "time" else query
    other = key.transpose(1, 2) if extent == "time" else key
    taps = {
        tap(SITE, kind): value.flatten(0, 1).transpose(1, 2)
        for kind, value in (("query", lead), ("key", other))
    }
    sums = saliency(taps[tap(SITE, "query")], taps[tap(SITE, "key")])
    for at in range(len(sums)):
        sample, place = divmod(at, 4 if extent == "time" else 3)
        if extent == "time":
            received[sample, :, place] = sums[at]
        else:
            received[sample, place] = sums[at]
    ctx = context(fp_taps=taps, site=AttentionSite(extent=extent))
    term = TokenDistillation(segments=False)
    wanted = term.scaled(received.flatten(1)).float()
    assert torch.allclose(term.weights(ctx)[0], wanted)


def test_attention_over_other_tokens_is_refused() -> None:
    ctx = context(fp_out=torch.zeros(2, 7, 6), q_out=torch.zeros(2, 7, 6))
    with pytest.raises(InputError, match=r"self-attention over the 7 tokens of the output"):
        make_term("std")(ctx)
    site = AttentionSite(frames=FrameMap.of(3, 4))  # known before any block runs
    reason = make_term("std").misfit({SITE: site}, None, ctx.fp_out)
    assert reason == "expected self-attention over the 7 tokens of the output, got [{12}]"
    assert not make_term("std").misfit({SITE: site}, None, torch.zeros(2, 12, 6))


# -- TMD ----------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from([0.5, 1.0, 2.0]))
def test_frame_relation_gradient_is_the_difference(seed: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    fp, q = torch.randn(2, 2, 5, 5, generator=random).double() * scale
    q.requires_grad_()
    kl(fp, q, Reduction.SUM).backward()
    assert q.grad is not None
    assert float((q.grad - (q.softmax(-1) - fp.softmax(-1))).abs().max()) < 1e-10


@given(st.integers(0, 2**31))
def test_frame_relation_ignores_the_length_of_frames(seed: int) -> None:
    ctx = context(seed=seed)
    random = torch.Generator().manual_seed(seed)
    gains = torch.rand(3, generator=random).double() + 0.1
    scaled = ctx.q_out.detach() * gains.repeat_interleave(4)[:, None]
    term = make_term("tmd")
    assert_close(term(context(seed=seed, q_out=scaled)), term(ctx))
    only_scaled = context(seed=seed, q_out=ctx.fp_out * gains.repeat_interleave(4)[:, None])
    assert float(term(only_scaled)) == pytest.approx(0, abs=1e-12)
    assert float(term(ctx)) > 1e-9


@given(st.integers(0, 2**31))
def test_frame_relation_moves_with_the_frames(seed: int) -> None:
    ctx = context(seed=seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    tokens = FrameMap.of(3, 4).members[order].flatten()
    moved = context(fp_out=ctx.fp_out[:, tokens], q_out=ctx.q_out[:, tokens])
    term = FrameRelation()
    relation = term.relation(ctx.q_out, ctx.frames)
    assert_close(term.relation(moved.q_out, ctx.frames), relation[:, order][:, :, order])
    assert_close(term(moved), term(ctx))
    rows = relation.softmax(-1).sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=1e-12)


def test_frames_of_a_video_are_its_frame_axis() -> None:
    """The released code's reshape takes 8 frames of one channel for one frame."""
    constant = torch.rand(1, 1, 6, 1, 1).double().expand(1, 4, 6, 2, 2) + 0.5
    relation = FrameRelation().relation(constant, None)
    assert_close(relation, torch.ones(1, 6, 6).double())
    moving = torch.randn(1, 4, 6, 2, 2).double()
    paper, code = FrameRelation(), make_term("tmd", "compat=code")
    vectors = torch.nn.functional.normalize(moving.permute(0, 2, 1, 3, 4).flatten(2), dim=-1)
    assert_close(paper.relation(moving, None), vectors @ vectors.mT)
    assert not torch.allclose(code.relation(moving, None), paper.relation(moving, None))  # type: ignore[attr-defined]


def test_frames_of_tokens_and_of_a_video_agree() -> None:
    fp, q = torch.randn(2, 2, 6, 3, 2, 2).double()
    video = context(fp_out=fp, q_out=q)
    tokens = [value.flatten(2).transpose(1, 2) for value in (fp, q)]
    for major in (True, False):
        a, b = (
            tokens
            if major
            else (v.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2) for v in tokens)
        )
        ctx = context(fp_out=a, q_out=b, frames=FrameMap.of(3, 4, major=major))
        assert_close(make_term("tmd")(ctx), make_term("tmd")(video))


def test_text_tokens_are_in_no_frame() -> None:
    ctx = context()
    text = torch.randn(2, 5, 6).double()
    longer = context(
        fp_out=torch.cat((ctx.fp_out, text), 1),
        q_out=torch.cat((ctx.q_out, -text), 1),
        frames=FrameMap.of(3, 4, text=5),
    )
    assert_close(make_term("tmd")(longer), make_term("tmd")(ctx))


def test_reductions_of_a_relation() -> None:
    ctx = context()
    whole, row, mean = (
        float(make_term("tmd", f"reduction={r}")(ctx)) for r in ("sum", "row", "mean")
    )
    assert row == pytest.approx(whole / 6)  # two samples of three frames
    assert mean == pytest.approx(whole / 18)


@pytest.mark.parametrize(
    ("frames", "out", "message"),
    [
        (FrameMap.of(3, 3), torch.zeros(2, 12, 6), "a frame for each of 12 tokens, the map has 9"),
        (FrameMap.of(1, 12), torch.zeros(2, 12, 6), "at least two frames, got 1"),
        (FrameMap.of(3, 4), torch.zeros(2, 12, 2, 2), "a token to frame map"),
    ],
)
def test_missing_frames_are_one_clear_error(frames: FrameMap, out: Tensor, message: str) -> None:
    ctx = context(frames=frames, fp_out=out, q_out=out)
    with pytest.raises(InputError, match=message):
        make_term("tmd")(ctx)


def test_frames_of_unequal_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"frames of equally many tokens, got \[3, 1\]"):
        _ = FrameMap(torch.tensor([0, 0, 0, 1])).members


# -- TRD ----------------------------------------------------------------------------------------


def steps(term: LossTerm, count: int, state: dict[str, Tensor], **fields: Any) -> list[float]:
    return [
        float(term(context(seed=n, sample=n, step=n, trajectory=0, state=state, **fields)))
        for n in range(count)
    ]


@given(st.integers(0, 2**31))
def test_pixel_relation_ignores_the_length_of_pixels(seed: int) -> None:
    ctx = context(seed=seed)
    gains = torch.rand(2, 12, 1, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    scaled = context(seed=seed, q_out=ctx.q_out.detach() * gains)
    term = make_term("trd", "window=1")
    assert_close(term(scaled), term(ctx))


def test_a_window_of_one_smooths_nothing() -> None:
    ctx = context()
    maps = [
        (lambda f: f @ f.mT)(torch.nn.functional.normalize(out, dim=-1))
        for out in (ctx.fp_out, ctx.q_out)
    ]
    logs = [value.log_softmax(-1) for value in maps]
    wanted = (logs[0].exp() * (logs[0] - logs[1])).sum()
    assert_close(make_term("trd", "window=1")(ctx), wanted)


def test_a_window_averages_consecutive_steps() -> None:
    state: dict[str, Tensor] = {}
    term = make_term("trd", "window=3")
    values = steps(term, 7, state)
    assert [value > 0 for value in values] == [False, False, True] * 2 + [False]
    outs = [context(seed=n) for n in range(3)]
    mean = context(
        fp_out=sum(c.fp_out for c in outs) / 3,
        q_out=sum(c.q_out.detach() for c in outs) / 3,
    )
    assert values[2] == pytest.approx(float(make_term("trd", "window=1")(mean)))


def test_a_window_starts_anew_with_another_trajectory() -> None:
    state: dict[str, Tensor] = {}
    term = make_term("trd")
    calls = [(0, 0), (1, 0), (1, 1), (1, 2), (1, 4), (1, 5)]
    values = [
        float(term(context(sample=n, trajectory=t, step=s, state=state)))
        for n, (t, s) in enumerate(calls)
    ]
    assert [value > 0 for value in values] == [False, False, True, False, False, True]


def test_gradient_reaches_the_student_unless_as_in_the_released_code() -> None:
    for compat, flows in (("paper", True), ("code", False)):
        state: dict[str, Tensor] = {}
        term = make_term("trd", f"compat={compat}")
        term(context(sample=0, state=state))
        last = context(seed=1, sample=1, state=state)
        loss = term(last)
        assert float(loss) > 0
        assert loss.requires_grad is flows


@given(st.integers(0, 2**31), st.sampled_from([1, 30, 1000]))
def test_chunked_relations_are_the_dense_ones(seed: int, chunk: int) -> None:
    random = torch.Generator().manual_seed(seed)
    a, b, c, d = torch.randn(4, 2, 9, 4, generator=random).double()
    dense = kl(a @ b.mT / 0.3, c @ d.mT / 0.3, Reduction.ROW)
    assert_close(relation_kl((a, b), (c, d), 0.3, Reduction.ROW, chunk), dense)


# -- MTRD ---------------------------------------------------------------------------------------


def test_banks_are_first_in_first_out_and_one_per_timestep() -> None:
    term = MemoryRelation(capacity=5, pixels=2, bank=8)
    state: dict[str, Tensor] = {}
    for visit in range(4):
        ctx = context(seed=visit, state=state, timestep=float(visit % 2))
        before = term.banks(ctx).get(f"{ctx.timestep}")
        term(ctx)
        after = term.banks(ctx)[f"{ctx.timestep}"]
        assert len(after) == min(5, 4 * (visit // 2 + 1))  # two pixels of each of two samples
        if before is not None:
            assert torch.equal(after[: 5 - 4], before[-1:])  # the oldest have left
        pixels = torch.nn.functional.normalize(ctx.fp_out, dim=-1).flatten(0, 1)
        new = after[-4:]
        assert torch.allclose((new @ pixels.T).amax(1), torch.ones(4).double())
        assert torch.allclose(new.norm(dim=1), torch.ones(4).double())
    assert list(term.banks(ctx)) == ["0.0", "1.0"]


def test_no_gradient_enters_a_bank() -> None:
    state: dict[str, Tensor] = {}
    ctx = context(state=state)
    ctx.fp_out.requires_grad_()
    MemoryRelation()(ctx).backward()
    assert ctx.q_out.grad is not None
    assert ctx.fp_out.grad is None
    assert not any(value.requires_grad for value in state.values())


def test_draws_depend_on_seed_and_calls_alone() -> None:
    def values(seed: int, split: int = 0) -> list[float]:
        state: dict[str, Tensor] = {}
        found = []
        for n in range(4):
            term = MemoryRelation(pixels=2, bank=3, seed=seed)
            if n == split:  # as a checkpoint does
                state = {key: value.clone() for key, value in state.items()}
            found.append(float(term(context(seed=n, state=state, timestep=float(n % 2)))))
        return found

    assert values(0) == values(0, split=2)
    assert values(0) != values(1)


def test_the_gate_guards_what_a_full_bank_holds() -> None:
    state: dict[str, Tensor] = {}
    term = MemoryRelation(capacity=4, pixels=2, gate=0.0)
    ctx = context(state=state)
    term(ctx)
    (full,) = term.banks(ctx).values()
    term(context(seed=5, state=state))
    assert torch.equal(term.banks(ctx)["500.0"], full)


def test_banks_per_frame() -> None:
    state: dict[str, Tensor] = {}
    term = MemoryRelation(per_frame=True, pixels=2)
    ctx = context(state=state)
    assert float(term(ctx)) > 0
    assert list(term.banks(ctx)) == ["500.0|0", "500.0|1", "500.0|2"]
    with pytest.raises(InputError, match=r"mtrd.*a token to frame map"):
        term(context(fp_out=torch.zeros(2, 6, 2, 2), q_out=torch.zeros(2, 6, 2, 2)))


def test_the_bank_is_what_pixels_are_compared_with() -> None:
    term = MemoryRelation(pixels=12, bank=1000, temperature=0.5)
    ctx = context()
    value = term(ctx)
    (bank,) = term.banks(ctx).values()
    logs = [
        (torch.nn.functional.normalize(out, dim=-1) @ bank.T / 0.5).log_softmax(-1)
        for out in (ctx.fp_out, ctx.q_out)
    ]
    wanted = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert_close(value, wanted)
