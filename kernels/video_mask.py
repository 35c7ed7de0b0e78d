"""The mask of one call of a video attention, and the order of tokens that it is for.

================= =============================== ============================================
query, key, value float[B, H, T, D | E]           in the order of the video
heads             int64[H], None                  which mask of the policy each head gets; None:
                                                  decided by the outputs of 64 queries
dense             bool[], None                    True: everything attends to everything
layout            5 integers                      frames, tokens of a frame, text tokens, 1 if
                                                  text comes first, tokens in a row of a frame
policy            text                            ``vdqc.base.sparsity.MaskPolicy``
valid             bool[B, T], None                text keys that are no padding; the video's all
                                                  count
result            order, place int64[O, T], index int64[B|1, H], starts, counts i32[B|1, H, R],
                  ids i32[N]                      ``vdqc.base.video_mask``
================= =============================== ============================================

Static masks are made once per size and copied out afterwards; sizes of the results follow from
those of the operands, so nothing waits for the device.

Error: none; with ``mass`` as in ``block_mask_topk``.
Source: as ``vdqc.base.video_mask``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.base import video_mask as masks
from vdqc.base.best_blocks import best_blocks
from vdqc.base.block_mask import expand, kept_blocks
from vdqc.kernels.base import define

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def video_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The truth: ``vdqc.base.video_mask.video_mask``."""
    args = (query, key, value, heads, dense, layout, policy, scale, None, valid)
    return tuple(masks.video_mask(*args))  # type: ignore[return-value]


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    valid: Tensor | None = None,
) -> Parts:
    args = (query, key, value, heads, dense, layout, policy, scale, _best_blocks, valid)
    return tuple(masks.video_mask(*args))  # type: ignore[return-value]


def _best_blocks(
    q_means: Tensor,
    k_means: Tensor,
    scale: float,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from vdqc.kernels.gpu import block_mask

    args = (keep, mass, text_rows, always_keys)
    columns = k_means.shape[2]
    if columns > block_mask.MAX_COLUMNS:
        return best_blocks(q_means, k_means, scale, *args, block)
    scores = (q_means.float() @ k_means.float().mT) * scale
    width = columns if mass > 0 else min(columns, max(keep, sum(always_keys) + 1))
    return block_mask.chosen(
        scores.masked_fill_(scores.isnan(), float("-inf")), width, *args, block, block
    )


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    valid: Tensor | None = None,
) -> Parts:
    sizes = masks.video_mask_sizes(query, heads, layout, policy)
    dtypes = (torch.int64,) * 3 + (torch.int32,) * 3
    made = (query.new_empty(size, dtype=d) for size, d in zip(sizes, dtypes, strict=True))
    return tuple(made)  # type: ignore[return-value]


VIDEO_MASK = define(
    "video_mask",
    reference=video_mask,
    fake=_fake,
    cuda=_cuda,
    # masks are made at the first call of a size, and dropped when sizes are many: Inductor runs the
    # op between two graphs
    tags=(torch.Tag.cudagraph_unsafe,),
)


def key_order(order: Tensor, index: Tensor, valid: Tensor, video: int) -> tuple[Tensor, Tensor]:
    """int64[B O, T], int64[B, H]: the order of keys in which padded text comes last.

    For attention that takes a number of keys; ``vdqc.base.video_mask.valid_keys_first``.
    """
    return masks.valid_keys_first(order, index, valid, video)


def _fake_order(order: Tensor, index: Tensor, valid: Tensor, video: int) -> tuple[Tensor, Tensor]:
    batch = valid.shape[0]
    moved = order.new_empty([batch * order.shape[0], order.shape[1]])
    return moved, index.new_empty([batch, index.shape[1]])


KEY_ORDER = define("key_order", reference=key_order, fake=_fake_order)


def dense_mask(
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    block: int,
    query: Tensor,
    key_length: Tensor | None = None,
) -> Tensor:
    """bool[B|1, H|1, T, T]: the mask written out, for attention that takes no other.

    Keys from ``key_length`` i32[B] on do not exist.
    """
    tokens = query.shape[2]
    kept = kept_blocks(starts, counts, ids, counts.shape[-1])
    mask = expand(kept, block, block, tokens, tokens)
    if key_length is None:
        return mask.contiguous()  # a slice of whole blocks until here
    exists = torch.arange(tokens, device=query.device) < key_length[:, None]
    return mask & exists[:, None, None, :]


def _fake_dense(
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    block: int,
    query: Tensor,
    key_length: Tensor | None = None,
) -> Tensor:
    tokens = query.shape[2]
    batch = counts.shape[0] if key_length is None else query.shape[0]
    return query.new_empty([batch, counts.shape[1], tokens, tokens], dtype=torch.bool)


DENSE_MASK = define("dense_mask", reference=dense_mask, fake=_fake_dense)
