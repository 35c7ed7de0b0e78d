"""Key blocks chosen by the scores of block means: which they are, and how many a row keeps.

=============== =====================================================================
q_means         float[B, H, R, D]     means of the blocks of queries
k_means         float[B, H, C, D]     and of keys
keep            key blocks that a row of video keeps, at least
mass            0, or the share of probability that a row's blocks reach
=============== =====================================================================

Rows of text keep everything, and so does every row the blocks that are always on. How many blocks
that makes follows from sizes alone, in arithmetic that symbolic sizes follow too.

Error: none; the density holds unless ``mass``, or what is always on, takes more.
Source: Zhang et al., Jenga, arXiv 2505.16864, section 3.2 (mass).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdqc.base.sparsity import MaskPolicy

#: Densities are whole numbers of these parts, so that sizes are integer arithmetic.
PARTS = 10_000

#: (q_means, k_means, scale, keep, mass, text_rows, always_keys, block) -> starts, counts, ids
Selection = Callable[..., tuple[Tensor, Tensor, Tensor]]


def best_blocks(
    q_means: Tensor,
    k_means: Tensor,
    scale: float,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks by the scores of their means: first what is always on, then the best.

    A row keeps ``keep`` blocks at least, and with ``mass`` as many as their probability takes; text
    rows keep all. The same result as ``vdqc_kernels.block_mask_topk``.
    """
    scores = (q_means.float() @ k_means.float().mT) * scale
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    rows, columns = scores.shape[-2:]
    lead, tail = text_rows
    inside = scores[..., lead : rows - tail, :]
    column = torch.arange(columns, device=scores.device)
    own = torch.arange(lead, rows - tail, device=scores.device)[:, None]
    always = (column == own) | (column < always_keys[0]) | (column >= columns - always_keys[1])
    ranked = (
        inside.masked_fill(always, float("inf")).sort(dim=-1, descending=True, stable=True).indices
    )
    count = always.sum(-1).clamp_min(min(keep, columns)).expand(inside.shape[:-1])
    width = min(columns, max(keep, sum(always_keys) + 1))
    if mass > 0:
        width = columns
        reached = torch.softmax(inside, -1).gather(-1, ranked).cumsum(-1) < mass
        count = torch.maximum(count, (reached.sum(-1) + 1).clamp_max(columns))
    spare = torch.arange(width, device=scores.device) >= count[..., None]
    ids = ranked[..., :width].masked_fill(spare, columns).sort(dim=-1).values.masked_fill(spare, 0)
    head = scores.shape[:-2]
    counts = torch.full((*head, rows), columns, dtype=torch.int32, device=scores.device)
    starts = torch.zeros_like(counts)
    counts[..., lead : rows - tail] = count
    line = torch.arange(count.numel(), dtype=torch.int32, device=scores.device)
    starts[..., lead : rows - tail] = columns + width * line.reshape(count.shape)
    return starts, counts, torch.cat([column.to(torch.int32), ids.flatten().to(torch.int32)])


def blocks_per_row(layout: Sequence[Any], rows: Any, policy: MaskPolicy) -> Any:
    """Key blocks per video row, so that all rows together have the density; one at least."""
    inner = video_rows(layout, rows, policy)
    pairs = rows * rows * round(policy.densities[0] * PARTS) // PARTS
    inner_or_one = torch.sym_max(inner, 1)
    return torch.sym_max(1, torch.sym_min(rows, (pairs - (rows - inner) * rows) // inner_or_one))


def row_width(layout: Sequence[Any], rows: Any, policy: MaskPolicy) -> Any:
    """Room for the key blocks of one video row: as many as it may keep at most."""
    if policy.mass > 0:
        return rows
    always = sum(_always(layout, policy)) + 1
    return torch.sym_min(rows, torch.sym_max(blocks_per_row(layout, rows, policy), always))


def video_rows(layout: Sequence[Any], rows: Any, policy: MaskPolicy) -> Any:
    """Rows of blocks without text: those that choose."""
    return rows - sum(_text_rows(layout, policy.block))


def _text_rows(layout: Sequence[Any], block: int) -> tuple[Any, Any]:
    """``Layout.text_blocks`` in arithmetic that symbolic sizes follow too."""
    frames, per_frame, text, first, _ = layout
    if isinstance(text, int) and text == 0:
        return 0, 0
    if first:
        return (text + block - 1) // block, 0
    video = frames * per_frame
    return 0, (video + text + block - 1) // block - video // block


def _always(layout: Sequence[Any], policy: MaskPolicy) -> tuple[Any, Any]:
    """``Layout.always_keys``, likewise."""
    lead, tail = _text_rows(layout, policy.block)
    if policy.sinks:
        first = layout[2] if layout[3] else 0
        sinks = torch.sym_min(policy.sinks, layout[0])
        lead = (first + sinks * layout[1] + policy.block - 1) // policy.block
    return lead, tail
