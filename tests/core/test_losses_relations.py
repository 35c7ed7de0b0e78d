"""Relations of frames (TMD), of pixels over steps (TRD), and to a memory of pixels (MTRD)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import LossTerm, make_term
from vdqc.engine.losses.divergence import kl, relation_kl
from vdqc.engine.losses.memory import MemoryRelation
from vdqc.engine.losses.reduction import Reduction
from vdqc.engine.losses.relation import FrameRelation
from vdqc.testing.harness import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
HELP = runpy.run_path(str(Path(__file__).with_name("loss_context.py")))
context = HELP["context"]


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


def test_branches_of_guidance_have_windows_of_their_own() -> None:
    state: dict[str, Tensor] = {}
    term = make_term("trd")
    values = [
        float(term(context(sample=n, trajectory=0, step=n // 2, branch=n % 2, state=state)))
        for n in range(4)
    ]
    assert [value > 0 for value in values] == [False, False, True, True]


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
