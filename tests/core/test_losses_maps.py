"""Attention maps: saliency, MSAD, and how much memory maps take."""

from __future__ import annotations

import runpy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdqc.base.diagnostics import InputError
from vdqc.engine.frames import FrameMap
from vdqc.engine.losses import AttentionSite, LossContext, make_term, parse, tap, total
from vdqc.engine.losses.maps import SalientAxis, kept_keys, map_error, pool, probabilities, saliency
from vdqc.testing.harness import assert_close, tensors

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
HELP = runpy.run_path(str(Path(__file__).with_name("loss_context.py")))
SITE, context, dense_map = HELP["SITE"], HELP["context"], HELP["dense_map"]


def full_map_error(ctx: LossContext) -> Tensor:
    maps = [
        dense_map(taps[tap(SITE, "query")], taps[tap(SITE, "key")])
        for taps in (ctx.fp_taps, ctx.q_taps)
    ]
    return (maps[1] - maps[0]).square().mean()


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
        torch.zeros(mask.shape).masked_fill(~mask, -1e4),
    ):
        fp = {**padded.fp_taps, tap(SITE, "mask"): masked}
        query, key = fp[tap(SITE, "query")], fp[tap(SITE, "key")]
        whole = probabilities(query, key, None, masked)
        cut = dense_map(query[:, :, :9], key[:, :, :9])
        assert_close(whole[:, :, :9, :9], cut, torch.float64)
        assert kept_keys(masked, 2).tolist() == mask[:, 0, 0].tolist()
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
