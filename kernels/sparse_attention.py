"""Block-sparse attention: softmax(q kᵀ scale) v over the key blocks that each query block keeps.

================= ============================ ===============================================
query             float[B, H, S, D]
key, value        float[B, H, T, D], [B, H, T, E]
starts, counts    i32[B|1, H|1, ceil(S/bq)]    compressed mask (``vdqc.base.block_mask``)
ids               i32[N]                       key blocks, ascending within a row
residual          float or i8[B, H, S, E]      added to the result; None for none
residual_scale    f32[B, H, S, 1]              of int8 residuals
key_length        i32[B], None                 keys from there on (padded text) do not exist
q_codes, k_codes  i8[B, H, S, D], [B, H, T, D] ``sparse_attention_int8``: with scales q_scale,
                                               k_scale f32[..., 1] per token; the mean of K over
                                               tokens may be subtracted first, softmax is
                                               invariant to it
result            float[B, H, S, E]            dtype of query (int8: of value)
================= ============================ ===============================================

A query block without keys gives zeros (plus its residual). The last block of either axis may be
ragged. Text queries are rows that keep everything; text keys are ids in every row.

On a CPU the kept key and value blocks of a few query blocks with equally many keys are gathered,
then matmul, softmax, matmul: the time is proportional to the density, and the buffers stay in
cache. Measured in bfloat16 on one Zen 4 core (AVX512-BF16, 0.21 TFLOP/s), random blocks of 128,
milliseconds:

================== ===== ===== ===== ===== ============== ====================
heads, tokens, D   100 % 50 %  25 %  10 %  ``attention``  torch's own (dense)
================== ===== ===== ===== ===== ============== ====================
12, 4096, 128      745   381   189   78    701            1210
12, 4096, 64       427   227   117   51    404            651
1, 16384, 128      1040  525   255   106   1054           1579
================== ===== ===== ===== ===== ============== ====================

FlexAttention with the same mask, compiled for the CPU, takes 3.0 to 3.7 times as long.

Error: bfloat16: scores and probabilities rounded once, as in ``attention``; int8: codes of 8 bits,
exact sums on a GPU, codes times scale rounded to the dtype of value on a CPU. float32: sums in
another order.
Source: Yang et al., QuantSparse, arXiv 2509.23681, Eq. 11 to 15 (the residual); Zhang et al.,
SageAttention, arXiv 2410.02367, section 4.2 (smoothed K). The route on a CPU: measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vdqc.base.block_mask import blocks, expand, kept_blocks
from vdqc.base.diagnostics import InputError
from vdqc.base.target import Target
from vdqc.kernels.base import FLOAT_FORMAT, Cost, define

#: Block pairs (of 128 x 128) whose scores and gathered keys and values are held at a time.
PAIRS = 32
#: Rate on a GPU, of what dense attention reaches there: the one aimed at, not yet measured.
GPU_RATE = 0.85


@final
@dataclass(frozen=True)
class SparseAttentionProblem:
    """One block-sparse attention; ``density`` is the share of block pairs that are computed.

    Attributes:
        int8: scores are computed from 8-bit codes.
        residual: bytes per element of the residual that is added; 0 for none.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    dtype: torch.dtype
    density: float
    block_q: int = 128
    block_k: int = 128
    int8: bool = False
    residual: int = 0

    @property
    def scores(self) -> float:
        """Scores that are computed, all heads together."""
        pairs = blocks(self.queries, self.block_q) * blocks(self.keys, self.block_k) * self.density
        return self.batch * self.heads * pairs * self.block_q * self.block_k


def sparse_attention(
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
    """The truth: dense attention in float32 with the mask written out."""
    queries, keys = query.shape[2], key.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    kept = kept_blocks(starts, counts, ids, blocks(keys, block_k))
    mask = expand(kept, block_q, block_k, queries, keys)
    if key_length is not None:
        exists = torch.arange(keys, device=key.device) < key_length[:, None]
        mask = mask & exists[:, None, None, :]
    scores = (query.to(wide) @ key.to(wide).mT) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    out = torch.ops.aten._safe_softmax(scores, -1) @ value.to(wide)
    return with_residual(out, residual, residual_scale).to(query.dtype)


def sparse_attention_int8(
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
    """The truth: codes times scales, then ``sparse_attention`` in float32."""
    query, key = q_codes.float() * q_scale, k_codes.float() * k_scale
    mask = (starts, counts, ids, scale, block_q, block_k)
    args = (query, key, value.float(), *mask, residual, residual_scale, key_length)
    return sparse_attention(*args).to(value.dtype)


def with_residual(out: Tensor, residual: Tensor | None, residual_scale: Tensor | None) -> Tensor:
    """``out`` plus the residual, in the dtype of ``out``."""
    if residual is None:
        return out
    if residual_scale is not None:
        return out + residual.to(out.dtype) * residual_scale.to(out.dtype)
    return out + residual.to(out.dtype)


def check_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    block_q: int,
    block_k: int,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    key_length: Tensor | None,
) -> None:
    """Refuse operands that do not belong together; looks at shapes and dtypes only."""
    batch, heads, queries, width = query.shape
    rows = blocks(queries, block_q)
    out = [batch, heads, queries, value.shape[-1]]
    want = [
        ("key", key, [batch, heads, key.shape[2], width], {query.dtype}),
        ("value", value, [batch, heads, key.shape[2], value.shape[3]], None),
        ("counts", counts, list(starts.shape), {torch.int32}),
        ("ids", ids, [ids.numel()], {torch.int32}),
    ]
    if residual is not None:
        want.append(("residual", residual, out, None))
        if (residual.dtype == torch.int8) != (residual_scale is not None):
            raise InputError("an int8 residual needs a residual_scale, a float one must have none")
    if residual_scale is not None:
        want.append(("residual_scale", residual_scale, [*out[:3], 1], {torch.float32}))
    if key_length is not None:
        want.append(("key_length", key_length, [batch], {torch.int32}))
    for name, tensor, shape, dtypes in want:
        if list(tensor.shape) != shape:
            raise InputError(f"{name}: expected {shape}, got {list(tensor.shape)}")
        if dtypes is not None and tensor.dtype not in dtypes:
            raise InputError(f"{name}: expected {next(iter(dtypes))}, got {tensor.dtype}")
    fits = (
        len(starts.shape) == 3 and starts.shape[0] in (1, batch) and starts.shape[1] in (1, heads)
    )
    if not fits or starts.shape[2] != rows or starts.dtype != torch.int32:
        raise InputError(
            f"starts: expected int32 [{batch} or 1, {heads} or 1, {rows}] for {queries} queries in "
            f"blocks of {block_q}, got {starts.dtype} {list(starts.shape)}"
        )


def _cpu(
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
    mask = (starts, counts, ids)
    extra = (residual, residual_scale, key_length)
    check_operands(query, key, value, *mask, block_q, block_k, *extra)
    if query.dtype == torch.float16:  # no unit multiplies it here
        wide = (query.float(), key.float(), value.float())
        return _cpu(*wide, *mask, scale, block_q, block_k, *extra).half()
    batch, heads, queries, width = query.shape
    keys, out_width = key.shape[2], value.shape[3]
    rows, columns = blocks(queries, block_q), blocks(keys, block_k)
    q = _padded(query * scale, rows * block_q).reshape(batch * heads, rows, block_q, width)
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
            _attend(q[head], k[head], v[head], out[head], group, block_k)
    result = out.reshape(batch, heads, rows * block_q, out_width)[:, :, :queries].contiguous()
    if residual_scale is not None and residual is not None:
        return result.addcmul_(residual.to(result.dtype), residual_scale.to(result.dtype))
    return result if residual is None else result.add_(residual)


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


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor, group: _Group, block_k: int) -> None:
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
    scores = torch.bmm(own, picked_k[:, : group.keys].mT)
    result = torch.bmm(torch.softmax(scores, -1), picked_v[:, : group.keys])
    result = result.reshape(rows, size, out_width)
    if near:
        out[part] = result
    else:
        out.index_copy_(0, group.rows, result)


def _padded(x: Tensor, tokens: int) -> Tensor:
    """``x[B, H, T, D]`` contiguous with zeros up to ``tokens``."""
    missing = tokens - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()


def _cpu_int8(
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
    _check_scales(q_codes, q_scale, k_codes, k_scale)
    query, key = (q_codes * q_scale).to(value.dtype), (k_codes * k_scale).to(value.dtype)
    mask = (starts, counts, ids, scale, block_q, block_k)
    return _cpu(query, key, value, *mask, residual, residual_scale, key_length)


def _cuda(
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
    from vdqc.kernels.gpu import attention

    mask, extra = (starts, counts, ids), (residual, residual_scale, key_length)
    check_operands(query, key, value, *mask, block_q, block_k, *extra)
    return attention.sparse_attention(query, key, value, *mask, scale, block_q, block_k, *extra)


def _cuda_int8(
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
    from vdqc.kernels.gpu import attention

    mask, extra = (starts, counts, ids), (residual, residual_scale, key_length)
    check_operands(q_codes, k_codes, value, *mask, block_q, block_k, *extra)
    _check_scales(q_codes, q_scale, k_codes, k_scale)
    return attention.sparse_attention(
        q_codes,
        k_codes,
        value,
        *mask,
        scale,
        block_q,
        block_k,
        *extra,
        q_scale=q_scale,
        k_scale=k_scale,
    )


def _check_scales(q_codes: Tensor, q_scale: Tensor, k_codes: Tensor, k_scale: Tensor) -> None:
    for name, codes, scale in (("q_scale", q_codes, q_scale), ("k_scale", k_codes, k_scale)):
        shape = [*codes.shape[:-1], 1]
        if list(scale.shape) != shape or scale.dtype != torch.float32:
            raise InputError(
                f"{name}: expected float32 {shape}, got {scale.dtype} {list(scale.shape)}"
            )


def _fake(
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
    return query.new_empty([*query.shape[:-1], value.shape[-1]])


def _fake_int8(
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
    return value.new_empty([*q_codes.shape[:-1], value.shape[-1]])


def _supports(problem: SparseAttentionProblem, target: Target) -> str | None:
    if target.device == "cpu":
        return None
    if problem.dtype not in (torch.bfloat16, torch.float16):
        return f"{str(problem.dtype).removeprefix('torch.')} has no tensor-core route"
    if problem.width not in (64, 128):
        return f"expected a head of 64 or 128 channels, got {problem.width}"
    if problem.block_q not in (64, 128) or problem.block_k not in (64, 128):
        return f"expected blocks of 64 or 128, got {problem.block_q} x {problem.block_k}"
    return None


def _cost(problem: SparseAttentionProblem) -> Cost:
    form, size, scores = FLOAT_FORMAT[problem.dtype], problem.dtype.itemsize, problem.scores
    ops = {form: scores * 4 * problem.width, "softmax": scores}
    if problem.int8:
        products = scores * 2 * problem.width
        ops = {form: products, "int8": products, "softmax": scores}
    tokens = problem.batch * problem.heads * problem.width
    moved = (2 * problem.queries + 2 * problem.keys) * size + problem.queries * problem.residual
    slower = {unit: count / GPU_RATE for unit, count in ops.items()}
    gpu = Cost(slower, float(tokens * moved))
    return Cost(ops, float(tokens * moved), 40.0 * problem.heads, gpu=gpu)


SPARSE_ATTENTION = define(
    "sparse_attention",
    reference=sparse_attention,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
)
SPARSE_ATTENTION_INT8 = define(
    "sparse_attention_int8",
    reference=sparse_attention_int8,
    fake=_fake_int8,
    cpu=_cpu_int8,
    cuda=_cuda_int8,
    supports=_supports,
    cost=_cost,
)
