"""The mask of one call of a video attention, and the order of tokens that it is for.

================= =============================== ============================================
query, key, value float[B, H, T, D | E]           in the order of the video
heads             int64[H], None                  which mask of the policy each head gets; None:
                                                  decided by the outputs of 64 queries
dense             bool[], None                    True: everything attends to everything
layout            5 integers                      frames, tokens of a frame, text tokens, 1 if
                                                  text comes first, tokens in a row of a frame
policy            text                            ``vdqc.base.sparsity.MaskPolicy``
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The truth: ``vdqc.base.video_mask.video_mask``."""
    return tuple(masks.video_mask(query, key, value, heads, dense, layout, policy, scale))  # type: ignore[return-value]


def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
) -> Parts:
    args = (query, key, value, heads, dense, layout, policy, scale, _best_blocks)
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
        return masks.best_blocks(q_means, k_means, scale, *args, block)
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
) -> Parts:
    sizes = masks.video_mask_sizes(query, heads, layout, policy)
    dtypes = (torch.int64,) * 3 + (torch.int32,) * 3
    made = (query.new_empty(size, dtype=d) for size, d in zip(sizes, dtypes, strict=True))
    return tuple(made)  # type: ignore[return-value]


VIDEO_MASK = define("video_mask", reference=video_mask, fake=_fake, cuda=_cuda)


def dense_mask(starts: Tensor, counts: Tensor, ids: Tensor, block: int, query: Tensor) -> Tensor:
    """bool[B|1, H|1, T, T]: the mask written out, for attention that takes no other."""
    kept = kept_blocks(starts, counts, ids, counts.shape[-1])
    return expand(kept, block, block, query.shape[2], query.shape[2])


def _fake_dense(starts: Tensor, counts: Tensor, ids: Tensor, block: int, query: Tensor) -> Tensor:
    tokens = query.shape[2]
    return query.new_empty([*counts.shape[:2], tokens, tokens], dtype=torch.bool)


DENSE_MASK = define("dense_mask", reference=dense_mask, fake=_fake_dense)
