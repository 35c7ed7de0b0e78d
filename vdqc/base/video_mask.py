"""The mask of one call of a video attention: from a policy, sizes, and for some queries and keys.

=========== ========================= ========================================================
layout      5 integers                frames, tokens of a frame, text tokens, 1 if text comes
                                      first, tokens in a row of a frame (0: unknown)
heads       int64[H] or None          which of the policy's masks each head gets; None: decided
                                      here, by the outputs of 64 queries
dense       bool[] or None            True: everything attends to everything in this call
valid       bool[B, T] or None        text keys that are no padding; keys of the video all count
order       int64[O, T]               token at each place, for every order that heads may need
place       int64[O, T]               place of each token: the inverse
which       int64[B|1, H]             which order a head's tokens take
starts ...  see ``block_mask``        in that order
=========== ========================= ========================================================

Static masks depend on sizes alone: they are made once per size and kept. Sizes of the results
follow from the sizes of the operands, so that a compiler needs to know nothing else: ``ids`` has
room for every block of every row of every static mask.

Error: none; densities are never exceeded. Where a density cannot be reached at these sizes, a head
attends to everything.
Source: Xi et al., Sparse VideoGen, arXiv 2502.01776, sections 4.1 and 4.2 (heads, online choice);
masks from sizes: ``vdqc.base.mask_policies``; from queries and keys: ``vdqc.base.best_blocks``.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from vdqc.base.best_blocks import Selection, best_blocks, blocks_per_row, row_width, video_rows
from vdqc.base.block_mask import (
    BlockMask,
    block_means,
    blocks,
    choose,
    full_mask,
    valid_block_means,
)
from vdqc.base.diagnostics import InputError
from vdqc.base.mask_policies import (
    POLICIES,
    Layout,
    classify_heads,
    frame_order,
    inverse,
    sampled_rows,
)
from vdqc.base.sparsity import MASKS, MaskPolicy

#: Queries whose outputs decide which mask a head gets, online.
SAMPLED = 64


class VideoMask(NamedTuple):
    """What the module's text says."""

    order: Tensor
    place: Tensor
    which: Tensor
    starts: Tensor
    counts: Tensor
    ids: Tensor


@final
@dataclass(frozen=True)
class StaticMasks:
    """Every mask that a head may get, and the orders that they are for."""

    order: Tensor
    place: Tensor
    index: Tensor
    masks: tuple[BlockMask, ...]
    room: int


def video_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: Sequence[int],
    policy: str,
    scale: float,
    select: Selection | None = None,
    valid: Tensor | None = None,
) -> VideoMask:
    """The mask for one call; query, key, value are [B, H, T, ...] in the order of the video.

    ``select`` chooses blocks by their means, as ``best_blocks`` does.
    """
    parsed = MaskPolicy.parse(policy)
    shape = as_layout(layout, parsed)
    if shape.tokens != query.shape[2] or key.shape[2] != query.shape[2]:
        raise InputError(
            f"expected {shape.tokens} tokens for {shape}, got {query.shape[2]} queries and "
            f"{key.shape[2]} keys"
        )
    if valid is not None and list(valid.shape) != [query.shape[0], query.shape[2]]:
        raise InputError(
            f"valid: expected {[query.shape[0], query.shape[2]]}, got {list(valid.shape)}"
        )
    if MASKS[parsed.name]:
        found = _static(parsed, shape, query.device)
        choice = _choice(found, query, key, value, heads, shape, scale, valid)
        mask = choose(found.masks, choice)
        ids = torch.nn.functional.pad(mask.ids, (0, found.room - mask.ids.numel()))
        orders = (found.order.clone(), found.place.clone(), found.index[choice])
        result = VideoMask(*orders, mask.starts, mask.counts, ids)
    else:
        result = _chosen(parsed, shape, query, key, scale, select or best_blocks, valid)
    if dense is None:
        return result
    # every mask's ids begin with a row of all of them
    columns = blocks(shape.tokens, parsed.block)
    return result._replace(
        starts=result.starts.masked_fill(dense, 0),
        counts=result.counts.masked_fill(dense, columns),
    )


def video_mask_sizes(
    query: Tensor, heads: Tensor | None, layout: Sequence[Any], policy: str
) -> Any:
    """Shapes of what ``video_mask`` returns, also for symbolic sizes: six lists."""
    parsed = MaskPolicy.parse(policy)
    batch, count, tokens = query.shape[:3]
    rows = (tokens + parsed.block - 1) // parsed.block
    orders = _orders(parsed)
    if MASKS[parsed.name]:
        first = 1 if heads is not None or len(parsed.masks) == 1 else batch
        ids = len(parsed.masks) * (rows + rows * rows)
    else:
        first = batch
        inner, width = video_rows(layout, rows, parsed), row_width(layout, rows, parsed)
        ids = rows + batch * count * inner * width
    if parsed.name == "dense":
        first, ids = 1, rows
    mask = [first, count, rows]
    return [orders, tokens], [orders, tokens], [first, count], mask, mask, [ids]


def density(layout: Sequence[int], policy: str, heads: Tensor | None = None) -> float:
    """Share of block pairs that are computed at these sizes; of ``mass`` the least.

    Heads that are decided online count as the mean of their masks.
    """
    parsed = MaskPolicy.parse(policy)
    if not parsed.masks:
        return 1.0 if parsed.name == "dense" else parsed.densities[0]
    masks = _static(parsed, as_layout(layout, parsed), torch.device("cpu")).masks
    shares = torch.tensor([mask.density() for mask in masks])
    return float(shares[heads.cpu().long()].mean() if heads is not None else shares.mean())


def reachable(layout: Sequence[int], policy: str) -> None:
    """Raise InputError if a static mask of ``policy`` cannot have its density at these sizes."""
    parsed = MaskPolicy.parse(policy)
    shape = as_layout(layout, parsed)
    for name, share in parsed.masks:
        if share < 1:
            POLICIES[name].mask(shape, share, parsed.block, parsed.block, "cpu")
    if parsed.looks:
        rows = blocks(shape.tokens, parsed.block)
        least = sum(shape.always_keys(parsed.block)) + 1
        keep = blocks_per_row(list(layout), rows, parsed)
        if keep < min(least, rows):
            raise InputError(
                f"a density of {parsed.densities[0]:g} keeps {keep} of {rows} key blocks, expected "
                f"at least {least}: text, first frames and the diagonal take that much",
                "choose a higher density, or smaller blocks",
                code="density",
            )


def as_layout(layout: Sequence[int], policy: MaskPolicy) -> Layout:
    """The five integers as ``Layout``."""
    frames, per_frame, text, first, width = (int(size) for size in layout)
    return Layout(frames, per_frame, text, bool(first), width, min(policy.sinks, frames))


def reorder(x: Tensor, order: Tensor, index: Tensor) -> Tensor:
    """Tokens of x[B, H, T, D] by ``order[index[b, h]]``; also undoes it, given the places."""
    rows = order[index].unsqueeze(-1).expand(*x.shape[:2], -1, x.shape[-1])
    return x.gather(2, rows)


def valid_keys_first(
    order: Tensor, index: Tensor, valid: Tensor, video: int
) -> tuple[Tensor, Tensor]:
    """The order of the keys of each sample: text that is valid before text that is not.

    order int64[O, T] and index int64[B|1, H] as in ``VideoMask``, whose text follows ``video``
    tokens of video. Gives int64[B O, T] and int64[B, H]. Blocks with text are kept in every row of
    a mask, so that it is for this order too; the first ``valid.sum(1)`` keys are the valid ones.
    """
    orders, tokens = order.shape
    batch = valid.shape[0]
    text = torch.argsort((~valid[:, video:]).to(torch.uint8), dim=1, stable=True) + video
    ahead = torch.arange(video, device=order.device).expand(batch, -1)
    places = torch.cat([ahead, text], 1)[:, None].expand(-1, orders, -1)
    moved = order.expand(batch, -1, -1).gather(2, places)
    step = torch.arange(batch, device=index.device)[:, None] * orders
    return moved.reshape(batch * orders, tokens), index.expand(batch, -1) + step


# -- static masks ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _static(policy: MaskPolicy, layout: Layout, device: torch.device) -> StaticMasks:
    """Masks and orders of one policy at one size; kept, so never given away without a copy."""
    orders: list[Tensor] = []
    where: dict[Any, int] = {}
    masks, index = [], []
    for name, share in policy.masks:
        found = POLICIES[name]
        if found.order not in where:
            where[found.order] = len(orders)
            orders.append(found.order(layout, device))
        index.append(where[found.order])
        masks.append(_mask_or_full(policy, layout, name, share, device))
    order = torch.stack(orders)
    place = torch.stack([inverse(row) for row in orders])
    count = blocks(layout.tokens, policy.block)
    room = len(masks) * (count + count**2)
    return StaticMasks(order, place, torch.tensor(index, device=device), tuple(masks), room)


def _mask_or_full(
    policy: MaskPolicy, layout: Layout, name: str, share: float, device: torch.device
) -> BlockMask:
    size = policy.block
    if share < 1:
        try:
            return POLICIES[name].mask(layout, share, size, size, device)
        except InputError as error:
            if error.diagnostic.code != "density":
                raise
            warnings.warn(f"attends to everything at {layout}: {error}", stacklevel=2)
    everything = full_mask(layout.tokens, layout.tokens, block_q=size, block_k=size, device=device)
    return everything


def _orders(policy: MaskPolicy) -> int:
    return max(1, len({POLICIES[name].order for name, _ in policy.masks}))


def _choice(
    found: StaticMasks,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    layout: Layout,
    scale: float,
    valid: Tensor | None,
) -> Tensor:
    if heads is not None:
        return heads.reshape(1, -1)
    if len(found.masks) == 1:
        return torch.zeros(1, query.shape[1], dtype=torch.long, device=query.device)
    orders = found.order[found.index].unbind()
    candidates = list(zip(orders, found.masks, strict=True))
    rows = sampled_rows(layout, SAMPLED, query.device)
    with torch.no_grad():
        return classify_heads(query, key, value, scale, candidates, rows, valid)[0]


# -- masks from queries and keys ---------------------------------------------------------------


def _chosen(
    policy: MaskPolicy,
    layout: Layout,
    query: Tensor,
    key: Tensor,
    scale: float,
    select: Selection,
    valid: Tensor | None,
) -> VideoMask:
    batch, heads, tokens = query.shape[:3]
    order = frame_order(layout, query.device)[None]
    index = torch.zeros(batch, heads, dtype=torch.long, device=query.device)
    if policy.name == "dense":
        full = full_mask(
            tokens, tokens, block_q=policy.block, block_k=policy.block, device=query.device
        )
        shape = (1, heads, -1)
        starts, counts = full.starts.repeat(1, heads, 1), full.counts.expand(shape).contiguous()
        return VideoMask(order, order.clone(), index[:1], starts, counts, full.ids)
    rows = blocks(tokens, policy.block)
    sizes = [layout.frames, layout.tokens_per_frame, layout.text, int(layout.text_first), 0]
    with torch.no_grad():
        if valid is None:
            key_means = block_means(key, policy.block)
        else:
            first = 0 if layout.text_first else layout.video
            key_means = valid_block_means(key, policy.block, valid, first)
        mask = select(
            block_means(query, policy.block),
            key_means,
            scale,
            blocks_per_row(sizes, rows, policy),
            policy.mass,
            list(layout.text_blocks(policy.block)),
            list(layout.always_keys(policy.block)),
            policy.block,
        )
    return VideoMask(order, order.clone(), index, *mask)
