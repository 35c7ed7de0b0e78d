"""Block masks chosen at run time from the means of query and key blocks, without waiting.

================= ========================= ==================================================
q_means, k_means  float[B, H, R|C, D]       ``vdqc.base.block_mask.block_means``
keep              key blocks of a row, at least; what is always on counts
mass              a row keeps blocks until their probability (softmax over all blocks) reaches
                  this; 0 for ``keep`` alone
text_rows         leading, trailing query blocks that keep everything
always_keys       leading, trailing key blocks that every query block keeps
block_q, block_k  sizes of blocks: the diagonal is kept; 0, 0 if queries and keys are of other
                  tokens
result            starts, counts i32[B, H, R], ids i32[C + B H r W]: a mask as in
                  ``vdqc.base.block_mask``; r rows that are no text, W ids of room for each
================= ========================= ==================================================

Blocks are ranked: what is always on first, then by score, equal scores by place. A row keeps the
first n of its ranking. The sizes of the result do not depend on what is in the operands, so
nothing waits for the device: W = keep, or C if ``mass`` is used.

Error: with ``keep`` none: the same blocks on every target. With ``mass`` the sum of probabilities
is rounded (float32), which may move one block of a row.
Source: Zhang et al., Jenga, arXiv 2505.16864, section 3.2 (probability, at least top-k, text
always on); Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.base.block_mask import blocks
from vdqc.base.diagnostics import InputError
from vdqc.kernels.base import define

Mask = tuple[Tensor, Tensor, Tensor]


def block_mask_topk(
    q_means: Tensor,
    k_means: Tensor,
    scale: float,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The truth: sort, then take the first n."""
    scores = _scores(q_means, k_means, scale)
    rows, columns = scores.shape[-2:]
    _, width = _room(rows, columns, keep, mass, text_rows, always_keys, block_q, block_k)
    lead, tail = text_rows
    place = torch.arange(columns, device=scores.device)
    own = torch.arange(lead, rows - tail, device=scores.device)[:, None]
    always = (place < always_keys[0]) | (place >= columns - always_keys[1])
    if block_k:
        first, last = own * block_q // block_k, ((own + 1) * block_q - 1) // block_k
        always = always | ((place >= first) & (place <= last))
    inside = scores[..., lead : rows - tail, :]
    rank = (
        inside.masked_fill(always, float("inf")).sort(dim=-1, descending=True, stable=True).indices
    )
    count = always.sum(-1).clamp_min(min(keep, columns)).expand(inside.shape[:-1])
    if mass > 0:
        reached = torch.softmax(inside, -1).gather(-1, rank).cumsum(-1) < mass
        count = torch.maximum(count, (reached.sum(-1) + 1).clamp_max(columns))
    spare = torch.arange(width, device=scores.device) >= count[..., None]
    ids = rank[..., :width].masked_fill(spare, columns).sort(-1).values
    return _assembled(ids.masked_fill(spare, 0), count, columns, lead, tail)


def _assembled(ids: Tensor, count: Tensor, columns: int, lead: int, tail: int) -> Mask:
    """The mask of all rows from ``ids[B, H, r, W]`` and counts of those that are no text."""
    batch, heads, inner, width = ids.shape
    shape = (batch, heads, lead + inner + tail)
    counts = torch.full(shape, columns, dtype=torch.int32, device=ids.device)
    starts = torch.zeros(shape, dtype=torch.int32, device=ids.device)
    own = slice(lead, lead + inner)
    counts[..., own] = count
    order = torch.arange(batch * heads * inner, dtype=torch.int32, device=ids.device)
    starts[..., own] = columns + width * order.reshape(batch, heads, inner)
    everything = torch.arange(columns, dtype=torch.int32, device=ids.device)
    return starts, counts, torch.cat([everything, ids.flatten().to(torch.int32)])


def _scores(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """f32[B, H, R, C]; NaN ranks last."""
    scores = (q_means.float() @ k_means.float().mT) * scale
    return scores.masked_fill_(scores.isnan(), float("-inf"))


def _room(
    rows: int,
    columns: int,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block_q: int,
    block_k: int,
) -> tuple[int, int]:
    """Rows that are no text, and ids of room for each."""
    if len(text_rows) != 2 or len(always_keys) != 2 or min(*text_rows, *always_keys) < 0:
        raise InputError(f"expected leading and trailing blocks, got {text_rows}, {always_keys}")
    if sum(text_rows) > rows or sum(always_keys) > columns:
        raise InputError(
            f"expected at most {rows} rows and {columns} keys, got {text_rows}, {always_keys}"
        )
    if keep < 1 or not 0 <= mass <= 1 or (block_q > 0) != (block_k > 0):
        raise InputError(f"expected keep >= 1 and mass in 0 ... 1, got {keep} and {mass}")
    if mass > 0:
        return rows - sum(text_rows), columns
    diagonal = blocks(block_q, block_k) + (block_q % block_k > 0) if block_k else 0
    return rows - sum(text_rows), min(columns, max(keep, sum(always_keys) + diagonal))


def _cuda(
    q_means: Tensor,
    k_means: Tensor,
    scale: float,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from vdqc.kernels.gpu import block_mask

    rows, columns = q_means.shape[2], k_means.shape[2]
    args = (keep, mass, text_rows, always_keys, block_q, block_k)
    if columns > block_mask.MAX_COLUMNS:
        return block_mask_topk(q_means, k_means, scale, *args)
    _, width = _room(rows, columns, *args)
    return block_mask.chosen(_scores(q_means, k_means, scale), width, *args)


def _fake(
    q_means: Tensor,
    k_means: Tensor,
    scale: float,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, columns = *q_means.shape[:3], k_means.shape[2]
    inner, width = _room(rows, columns, keep, mass, text_rows, always_keys, block_q, block_k)
    starts = q_means.new_empty((batch, heads, rows), dtype=torch.int32)
    ids = starts.new_empty(columns + batch * heads * inner * width)
    return starts, torch.empty_like(starts), ids


BLOCK_MASK_TOPK = define("block_mask_topk", reference=block_mask_topk, fake=_fake, cuda=_cuda)
