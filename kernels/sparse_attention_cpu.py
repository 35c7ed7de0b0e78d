"""Block-sparse attention on a CPU: softmax(q kᵀ scale) v over gathered key blocks.

Operands are those of ``sparse_attention``.

On a CPU the kept key and value blocks of a few query blocks with equally many keys are gathered,
then weighed as in ``attention``: the time is proportional to the density, and the buffers stay in
cache. Measured in bfloat16 on one Zen 5 core (AVX512-BF16, 0.4 TFLOP/s), random blocks of 128,
milliseconds:

================== ===== ===== ===== ===== ============== ====================
heads, tokens, D   100 % 50 %  25 %  10 %  ``attention``  torch's own (dense)
================== ===== ===== ===== ===== ============== ====================
12, 4096, 128      358   204   107   47    340            1279
12, 4096, 64       217   117   62    28    193            659
1, 16384, 128      464   235   119   51    464            1468
================== ===== ===== ===== ===== ============== ====================

FlexAttention with the same mask, compiled for the CPU, took 3.0 to 3.7 times as long on Zen 4.

Error: bfloat16: that of ``attention``; int8: codes times scale rounded to the dtype of value.
float32: sums in another order.
Source: ours, measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vdqc.base.block_mask import blocks
from vdqc.kernels.exp2_attention import LOG2_E, attend_exp2
from vdqc.kernels.sparse_operands import check_operands, check_scales

#: Block pairs (of 128 x 128) whose scores and gathered keys and values are held at a time.
PAIRS = 32


def sparse_attention_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """``sparse_attention``: group after group of query blocks with equally many keys."""
    mask = (starts, counts, ids)
    extra = (residual, residual_scale, key_length)
    check_operands(query, key, value, *mask, block_q, block_k, *extra)
    if query.dtype == torch.float16:  # no unit multiplies it here
        wide = (query.float(), key.float(), value.float())
        return sparse_attention_cpu(*wide, *mask, scale, block_q, block_k, *extra).half()
    batch, heads, queries, width = query.shape
    keys, out_width = key.shape[2], value.shape[3]
    rows, columns = blocks(queries, block_q), blocks(keys, block_k)
    q = _padded(query, rows * block_q).reshape(batch * heads, rows, block_q, width)
    k = _padded(key, columns * block_k).reshape(batch * heads, columns, block_k * width)
    v = _padded(value, columns * block_k).reshape(batch * heads, columns, block_k * out_width)
    out = query.new_empty(batch * heads, rows, block_q, out_width)
    lengths = [keys] * batch if key_length is None else key_length.clamp(0, keys).tolist()
    plans: dict[tuple[int, ...], list[_Group]] = {}
    for head in range(batch * heads):
        b, h = head // heads, head % heads
        at = (b % starts.shape[0], h % starts.shape[1], lengths[b])
        if at not in plans:  # most masks are shared by many heads
            plan = _groups(starts[at[:2]], counts[at[:2]], ids, lengths[b], block_q, block_k)
            plans[at] = list(plan)
        for group in plans[at]:
            _attend(q[head], k[head], v[head], out[head], group, block_k, scale)
    result = out.reshape(batch, heads, rows * block_q, out_width)[:, :, :queries].contiguous()
    if residual_scale is not None and residual is not None:
        return result.addcmul_(residual.to(result.dtype), residual_scale.to(result.dtype))
    return result if residual is None else result.add_(residual)


def sparse_attention_int8_cpu(
    q_codes: Tensor,
    q_scale: Tensor,
    k_codes: Tensor,
    k_scale: Tensor,
    value: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """``sparse_attention_int8``: codes times scales, then attention in the dtype of value."""
    check_scales(q_codes, q_scale, k_codes, k_scale)
    query, key = (q_codes * q_scale).to(value.dtype), (k_codes * k_scale).to(value.dtype)
    mask = (starts, counts, ids, scale, block_q, block_k)
    return sparse_attention_cpu(query, key, value, *mask, residual, residual_scale, key_length)


@final
@dataclass(frozen=True)
class _Group:
    """Query blocks ``rows`` that keep ``keys`` keys each, those of blocks ``ids[len(rows), n]``.

    ``first`` is the first row if the rows are neighbours, else -1; ``all`` if every key is kept.
    """

    rows: Tensor
    ids: Tensor
    keys: int
    first: int
    all: bool


def _groups(
    starts: Tensor, counts: Tensor, ids: Tensor, length: int, block_q: int, block_k: int
) -> Iterator[_Group]:
    """The query blocks of one head by number of keys, as many together as fit the buffers."""
    columns = blocks(length, block_k)
    by_size: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for row, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        own = ids[start : start + count]
        if count and int(own[-1]) >= columns - 1:  # the ragged block, or blocks that do not exist
            own = own[own < columns]
        size = own.numel() * block_k
        if size and int(own[-1]) == columns - 1:
            size -= columns * block_k - length
        by_size.setdefault((own.numel(), size), []).append((row, own))
    budget = PAIRS * 128 * 128 // (block_q * block_k)
    for (count, size), members in by_size.items():
        most = max(1, budget // max(count, 1))
        for part in range(0, len(members), most):
            chosen = members[part : part + most]
            rows = [row for row, _ in chosen]
            first = rows[0] if rows[-1] - rows[0] == len(rows) - 1 else -1
            yield _Group(
                torch.tensor(rows),
                torch.stack([own for _, own in chosen]).long(),
                size,
                first,
                size == length,
            )


def _attend(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, group: _Group, block_k: int, scale: float
) -> None:
    """Write the outputs of one group of query blocks of one head."""
    rows, (_, size, width), out_width = len(group.rows), q.shape, v.shape[-1] // block_k
    near = group.first >= 0
    part = slice(group.first, group.first + rows)
    if group.keys == 0:
        out[group.rows] = 0
        return
    own = q[part] if near else q.index_select(0, group.rows)
    if group.all:  # no gathering: one matmul for all rows
        own = own.reshape(1, rows * size, width)
        picked_k, picked_v = k.reshape(1, -1, width), v.reshape(1, -1, out_width)
    else:
        picked_k = k.index_select(0, group.ids.flatten()).reshape(rows, -1, width)
        picked_v = v.index_select(0, group.ids.flatten()).reshape(rows, -1, out_width)
    picked_k, picked_v = picked_k[:, : group.keys], picked_v[:, : group.keys]
    result = attend_exp2(torch.bmm(own * (scale * LOG2_E), picked_k.mT), picked_v)
    if result is None:
        scores = torch.bmm(own * scale, picked_k.mT)
        result = torch.bmm(torch.softmax(scores, -1), picked_v)
    result = result.reshape(rows, size, out_width)
    if near:
        out[part] = result
    else:
        out.index_copy_(0, group.rows, result)


def _padded(x: Tensor, tokens: int) -> Tensor:
    """``x[B, H, T, D]`` contiguous with zeros up to ``tokens``."""
    missing = tokens - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
