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
ragged. Text queries are rows that keep everything; text keys are ids in every row. The route on a
CPU is ``sparse_attention_cpu``, the one on a GPU ``vdqc.kernels.gpu.attention``.

Error: bfloat16: scores and probabilities rounded once, as in ``attention``; int8: codes of 8 bits,
exact sums on a GPU, codes times scale rounded to the dtype of value on a CPU. float32: sums in
another order.
Source: Yang et al., QuantSparse, arXiv 2509.23681, Eq. 11 to 15 (the residual); Zhang et al.,
SageAttention, arXiv 2410.02367, section 4.2 (smoothed K).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vdqc.base.block_mask import blocks, expand, kept_blocks
from vdqc.base.target import Target
from vdqc.kernels.base import FLOAT_FORMAT, Cost, define
from vdqc.kernels.sparse_attention_cpu import sparse_attention_cpu, sparse_attention_int8_cpu
from vdqc.kernels.sparse_operands import check_operands, check_scales

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
    check_scales(q_codes, q_scale, k_codes, k_scale)
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
    cpu=sparse_attention_cpu,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
)
SPARSE_ATTENTION_INT8 = define(
    "sparse_attention_int8",
    reference=sparse_attention_int8,
    fake=_fake_int8,
    cpu=sparse_attention_int8_cpu,
    cuda=_cuda_int8,
    supports=_supports,
    cost=_cost,
)
