"""Attention masks made of blocks, compressed: which key blocks each query block attends to.

=========== ==================== ==============================================================
starts      i32[B|1, H|1, R]     where the row of ids of a query block begins in ``ids``
counts      i32[B|1, H|1, R]     how many key blocks it attends to; 0 = its output is zeros
ids         i32[N]               key blocks, ascending within a row
=========== ==================== ==============================================================

R = ceil(queries / block_q), C = ceil(keys / block_k); the last block of either may be ragged. Rows
may share ids: a mask for all heads is stored once, and text queries, which attend to everything,
share one row ``0 ... C-1``. Everything here is a function of tensors on their own device, without
synchronisation, except ``check`` and ``density``, which are for the host.

Source: block compressed sparse rows; kernels of Jenga, SpargeAttn and FlexAttention use its like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError


@final
@dataclass(frozen=True)
class BlockMask:
    """A compressed mask, as the module says, and the sizes that it is for."""

    starts: Tensor
    counts: Tensor
    ids: Tensor
    queries: int
    keys: int
    block_q: int = 128
    block_k: int = 128

    @property
    def rows(self) -> int:
        """Query blocks."""
        return blocks(self.queries, self.block_q)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return blocks(self.keys, self.block_k)

    def density(self) -> float:
        """Share of block pairs that are computed; waits for the device."""
        pairs = self.counts.numel() * self.columns
        return float(self.counts.sum()) / pairs if pairs else 0.0

    def kept(self) -> Tensor:
        """bool[B|1, H|1, R, C]: True where the block pair is computed."""
        return kept_blocks(self.starts, self.counts, self.ids, self.columns)

    def dense(self) -> Tensor:
        """bool[B|1, H|1, queries, keys]: True where a query attends to a key."""
        return expand(self.kept(), self.block_q, self.block_k, self.queries, self.keys)


def blocks(tokens: int, size: int) -> int:
    """Blocks of ``size`` that hold ``tokens``, the last one ragged."""
    return -(-tokens // size)


def block_means(x: Tensor, size: int) -> Tensor:
    """``x[..., T, D] -> f32[..., ceil(T / size), D]``: mean of each block, ragged last one too."""
    tokens = x.shape[-2]
    whole = tokens // size * size
    parts = [x[..., :whole, :].unflatten(-2, (-1, size)).mean(-2, dtype=torch.float32)]
    if whole < tokens:
        parts.append(x[..., whole:, :].mean(-2, keepdim=True, dtype=torch.float32))
    return torch.cat(parts, -2)


def valid_block_means(x: Tensor, size: int, valid: Tensor, first: int) -> Tensor:
    """``block_means`` of x[B, H, T, D] over ``valid`` bool[B, T], NaN for blocks without any.

    Tokens before ``first`` are valid whatever it says, so that only the rest is copied.
    """
    whole = first // size * size
    tail, exists = x[..., whole:, :], valid[:, None, whole:, None]
    # invalid tokens may hold anything, NaN included
    tail = tail.float().masked_fill(~exists, 0.0)
    missing = -tail.shape[-2] % size
    sums, counts = (
        torch.nn.functional.pad(part, (0, 0, 0, missing)).unflatten(-2, (-1, size)).sum(-2)
        for part in (tail, exists.float())
    )
    return torch.cat([block_means(x[..., :whole, :], size), sums / counts], -2)


def compress(kept: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``bool[..., R, C] -> starts, counts, ids``; every row gets room for ``width`` ids (or C).

    Unused room repeats valid ids, so that a kernel may read ahead. More than ``width`` kept blocks
    in a row are cut off.
    """
    width = kept.shape[-1] if width is None else width
    counts = kept.sum(-1, dtype=torch.int32).clamp_max(width)
    order = torch.sort(kept.logical_not().to(torch.uint8), dim=-1, stable=True).indices
    ids = order[..., :width].to(torch.int32).contiguous()
    starts = torch.arange(counts.numel(), dtype=torch.int32, device=kept.device) * width
    return starts.reshape(counts.shape), counts, ids.flatten()


def kept_blocks(starts: Tensor, counts: Tensor, ids: Tensor, columns: int) -> Tensor:
    """The inverse of ``compress``: bool[..., R, columns]."""
    kept = torch.zeros(*counts.shape, columns + 1, dtype=torch.bool, device=counts.device)
    if ids.numel() == 0:
        return kept[..., :columns]
    step = torch.arange(columns, device=counts.device)
    at = (starts[..., None].long() + step).clamp_max(ids.numel() - 1)
    spare = torch.full_like(at, columns)
    kept.scatter_(-1, torch.where(step < counts[..., None], ids[at].long(), spare), True)
    return kept[..., :columns]


def expand(kept: Tensor, block_q: int, block_k: int, queries: int, keys: int) -> Tensor:
    """Block pairs to pairs of tokens: ``bool[..., R, C] -> bool[..., queries, keys]``."""
    wide = kept.repeat_interleave(block_q, -2)[..., :queries, :]
    return wide.repeat_interleave(block_k, -1)[..., :keys]


def full_mask(
    queries: int,
    keys: int,
    *,
    block_q: int = 128,
    block_k: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Everything attends to everything; all rows share the same ids."""
    rows, columns = blocks(queries, block_q), blocks(keys, block_k)
    shape = (1, 1, rows)
    return BlockMask(
        torch.zeros(shape, dtype=torch.int32, device=device),
        torch.full(shape, columns, dtype=torch.int32, device=device),
        torch.arange(columns, dtype=torch.int32, device=device),
        queries,
        keys,
        block_q,
        block_k,
    )


def choose(masks: Sequence[BlockMask], choice: Tensor) -> BlockMask:
    """One mask for all heads from masks of shape [1, 1, R]: head h of sample b gets
    ``masks[choice[b, h]]``; ``choice`` is int[B, H] on the device.
    """
    first = masks[0]
    for mask in masks[1:]:
        if (mask.queries, mask.keys, mask.block_q, mask.block_k) != (
            (first.queries, first.keys, first.block_q, first.block_k)
        ):
            raise InputError(f"expected masks of the same sizes, got {first} and {mask}")
    offsets, starts = 0, []
    for mask in masks:
        starts.append(mask.starts.reshape(-1) + offsets)
        offsets += mask.ids.numel()
    pick = choice.long()
    return BlockMask(
        torch.stack(starts)[pick],
        torch.stack([mask.counts.reshape(-1) for mask in masks])[pick],
        torch.cat([mask.ids for mask in masks]),
        first.queries,
        first.keys,
        first.block_q,
        first.block_k,
    )


def check(mask: BlockMask) -> int:
    """Refuse a mask that a kernel could read out of bounds; the number of empty rows.

    For masks from files and hands: waits for the device. Each row must lie within ``ids`` and be
    ascending without repeats.
    """
    if mask.counts.shape != mask.starts.shape or mask.counts.shape[-1] != mask.rows:
        raise InputError(
            f"expected starts and counts of [B, H, {mask.rows}] for {mask.queries} queries in "
            f"blocks of {mask.block_q}, got {list(mask.starts.shape)} and {list(mask.counts.shape)}"
        )
    starts, counts = mask.starts.flatten().cpu().long(), mask.counts.flatten().cpu().long()
    ids = mask.ids.cpu().long()
    if counts.numel() == 0:
        return 0
    if int(counts.min()) < 0 or int(counts.max()) > mask.columns:
        raise InputError(f"expected 0 ... {mask.columns} key blocks a row, got {int(counts.max())}")
    if int(starts.min()) < 0 or int((starts + counts).max()) > ids.numel():
        raise InputError(f"a row of the mask ends beyond its {ids.numel()} ids")
    used = torch.repeat_interleave(starts - counts.cumsum(0) + counts, counts)
    row_ids = ids[used + torch.arange(used.numel())]
    if used.numel() and not 0 <= int(row_ids.min()) <= int(row_ids.max()) < mask.columns:
        raise InputError(f"expected key blocks 0 ... {mask.columns - 1}, got {int(row_ids.max())}")
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    steps = (row_ids.diff() > 0) | (row.diff() > 0)
    if not bool(steps.all()):
        raise InputError("the key blocks of a row must ascend without repeats")
    return int((counts == 0).sum())
