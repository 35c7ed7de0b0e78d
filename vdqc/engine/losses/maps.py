"""Attention maps in chunks of rows: what each token receives, and the error of a map.

``query`` [B, H, L, D], ``key`` [B, H or fewer, M, D] as they enter the attention op, ``mask``
[B or 1, H or 1, L or 1, M] boolean (True attends) or added to the logits. ``rows`` rows of the map
exist at a time, in the forward and, being computed again, in the backward pass.

Error: chunked equals dense up to the order of summation (1e-12 in float64); half precision is
computed in float32.
Source: Feng et al., QuantSparse, arXiv 2509.23681, section 3.2.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vdqc.engine.losses.reduction import Reduction, divisor, widened

#: What a mask adds to logits that no query attends; models write -10000, half precision's minimum
#: or infinity, and the softmax of anything below this is zero.
NEVER = -1e3


class SalientAxis(enum.StrEnum):
    """``received``: attention that a token gets, its column's sum. ``emitted``: how sharply a token
    attends, its row's squared sum (the plain sum is the same for all rows).
    """

    RECEIVED = "received"
    EMITTED = "emitted"


def probabilities(query: Tensor, key: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """softmax(query keyᵀ scale + mask), [B, H, L, M]; a row that may attend nowhere is uniform."""
    q, k = widened(query), widened(key)
    if k.shape[1] != q.shape[1]:  # grouped queries share a key
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = (q * (query.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    if mask is not None:
        never = torch.finfo(logits.dtype).min
        if mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, never)
        else:
            logits = (logits + mask).clamp_min(never)
    return logits.softmax(-1)


@torch.no_grad()
def saliency(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    *,
    rows: int = 16,
    axis: SalientAxis = SalientAxis.RECEIVED,
) -> Tensor:
    """What each token receives (over keys, [B, M]) or emits (over queries, [B, L]).

    Received: s_j = sum over heads h and queries i of A[h, i, j]; sum_j s_j = H·L. Summed in
    float64: the sums of a long sequence differ less than float32 resolves.
    """
    received = torch.zeros(query.shape[0], key.shape[2], dtype=torch.float64, device=query.device)
    emitted = []
    for part, part_mask in _row_chunks(query, mask, rows):
        chunk = probabilities(part, key, scale, part_mask)
        if axis is SalientAxis.EMITTED:
            emitted.append(chunk.square_().sum((1, 3), dtype=torch.float64))
        else:
            received += chunk.sum((1, 2), dtype=torch.float64)
    return torch.cat(emitted, 1) if emitted else received


def map_error(
    fp: tuple[Tensor, Tensor],
    q: tuple[Tensor, Tensor],
    scale: float | None = None,
    mask: Tensor | None = None,
    *,
    rows: int = 16,
    reduction: Reduction = Reduction.MEAN,
) -> Tensor:
    """Squared error between the maps of two (query, key) pairs, differentiable in the second."""
    loss: Tensor | None = None
    students = _row_chunks(q[0], mask, rows)
    for (teacher, part_mask), (student, _) in zip(
        _row_chunks(fp[0], mask, rows), students, strict=True
    ):
        error = checkpoint(
            _chunk_error,
            *(teacher, fp[1], student, q[1], scale, part_mask),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        loss = error if loss is None else loss + error
    assert loss is not None, "a map has at least one row"
    shape = (*q[0].shape[:3], q[1].shape[2])
    return loss / divisor(shape, reduction)


def _chunk_error(
    fp_query: Tensor,
    fp_key: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float | None,
    mask: Tensor | None,
) -> Tensor:
    with torch.no_grad():
        wanted = probabilities(fp_query, fp_key, scale, mask)
    return (probabilities(query, key, scale, mask) - wanted).square().sum()


def take_rows(value: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [B, k] of [B, H, L, D]; a mask may have 1 as B: [B, H, k, D]."""
    batch, heads, _, width = value.shape
    value = value.expand(index.shape[0], heads, -1, -1) if batch == 1 else value
    return value.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))


#: A run of tokens, and whether it is pooled.
Segment = tuple[int, int, bool]


def pool(
    value: Tensor,
    stride: int,
    segments: Sequence[Segment] | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Averages over ``stride`` neighbouring tokens, the last over what is left: [B, H, L~, D].

    L~ = ceil(L / stride), segment by segment; segments that are not pooled stay as they are.
    ``keep`` bool[B, L] leaves tokens out of the averages. Second result: bool[B, L~], groups with
    any token left.
    """
    batch, _, length, _ = value.shape
    keep = (
        torch.ones(batch, length, dtype=torch.bool, device=value.device) if keep is None else keep
    )
    pooled, kept = [], []
    for start, stop, is_pooled in segments or [(0, length, True)]:
        part, weight = widened(value[:, :, start:stop]), keep[:, start:stop]
        if is_pooled and stride > 1:
            part, weight = _averages(part, weight, stride)
        pooled.append(part)
        kept.append(weight)
    return torch.cat(pooled, 2), torch.cat(kept, 1)


def _averages(value: Tensor, keep: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    length = value.shape[2]
    group = torch.arange(length, device=value.device) // stride
    count = (length + stride - 1) // stride
    weight = keep.to(value.dtype)
    totals = torch.zeros(keep.shape[0], count, dtype=value.dtype, device=value.device)
    totals = totals.index_add(1, group, weight)
    sums = value.new_zeros(*value.shape[:2], count, value.shape[3])
    if not bool(keep.all()):
        value = value * weight[:, None, :, None]
    sums = sums.index_add(2, group, value)
    return sums / totals.clamp_min(1)[:, None, :, None], totals > 0


def kept_keys(mask: Tensor | None, batch: int) -> Tensor | None:
    """bool[B, M] of a mask that is the same for every query (padding), None for any other."""
    if mask is None or mask.shape[1] != 1:
        return None
    if mask.shape[2] > 1 and not bool((mask == mask[:, :, :1]).all()):
        return None
    row = mask[:, 0, 0]
    keep = row if row.dtype == torch.bool else row > NEVER
    return keep.expand(batch, -1)


def _row_chunks(
    query: Tensor, mask: Tensor | None, rows: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, query.shape[2], rows):
        part = slice(start, start + rows)
        varies = mask is not None and mask.shape[2] > 1
        yield query[:, :, part], mask[:, :, part] if mask is not None and varies else mask
