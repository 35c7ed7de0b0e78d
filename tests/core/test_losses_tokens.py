"""STD: errors of tokens, weighed by the attention that they receive."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base.diagnostics import InputError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AttentionSite, make_term, tap
from vdqc.engine.losses.maps import saliency
from vdqc.engine.losses.reduction import Reduction
from vdqc.engine.losses.tokens import TokenDistillation
from vdqc.testing.harness import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
HELP = runpy.run_path(str(Path(__file__).with_name("loss_context.py")))
SITE, context, dense_map = HELP["SITE"], HELP["context"], HELP["dense_map"]


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
