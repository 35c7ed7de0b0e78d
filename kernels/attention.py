"""Dense exact attention: softmax(q kᵀ scale + mask) v.

================== =============================== ==========================================
query              float[B, H, S, D]
key, value         float[B, H, T, D], [B, H, T, E]
mask               None, bool or float             broadcasts to [B, H, S, T]; True = attend
scale              float                           usually D^-0.5
result             float[B, H, S, E]               dtype of query
================== =============================== ==========================================

On a CPU torch's own attention multiplies at 75 to 90 GFLOP/s a core in every dtype, bfloat16
matmuls at 400. So scores are computed for a chunk of queries of one head at a time, into a buffer
that stays in cache: matmul, 2^x in place, matmul, division by the sums (``exp2_attention``), or
torch's softmax where powers do not fit. Measured on Zen 5, 12 heads of 4096 tokens, milliseconds:
D = 128: 311, with torch's softmax 371, torch's own 1247; D = 64: 198, 239, 685. Nothing is dropped
and no value is approximated except by rounding scores and weights to bfloat16.

On a GPU it is torch's own: cuDNN's from sm90 on, which is the fastest there, else FlashAttention.

Error: bfloat16: scores, weights, their sums, products and quotients are rounded once each: relative
RMS 0.005 against float32 (torch's own: 0.002). float32: equal up to the order of sums.
Source: measured on the CPU, reported on GPUs; Rabe and Staats, arXiv 2112.05682 (query chunks).
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from vdqc.base.target import Target
from vdqc.kernels.base import FLOAT_FORMAT, AttentionProblem, Cost, define
from vdqc.kernels.exp2_attention import LOG2_E, attend_exp2

#: Bytes of one chunk of scores: small enough for a last-level cache, large enough for full matmuls.
CHUNK_BYTES = 4 << 20
#: Fewer scores than this per head are not worth the calls of a chunk.
MIN_SCORES = 128 * 128


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """The truth: torch's scaled_dot_product_attention."""
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale
    ).contiguous()


def _cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if query.dtype != torch.bfloat16 or queries * keys < MIN_SCORES or key.shape[1] != heads:
        return attention(query, key, value, mask, scale)
    rows = max(64, CHUNK_BYTES // (keys * query.element_size()) // 64 * 64)
    rows = min(rows, queries)
    if mask is not None:
        mask = _additive(mask, query.dtype).expand(batch, heads, -1, -1)
    # a query that may attend to nothing gets zeros, as from torch's own attention
    softmax = torch.softmax if mask is None else torch.ops.aten._safe_softmax.default
    out = query.new_empty(batch, heads, queries, value.shape[-1])
    scores = query.new_empty(rows, keys)
    for b, h in product(range(batch), range(heads)):
        k, v = key[b, h].contiguous(), value[b, h].contiguous()
        fits = True
        for start in range(0, queries, rows):
            chunk = slice(start, min(start + rows, queries))
            part, result = scores[: chunk.stop - start], out[b, h, chunk]
            own = None if mask is None else mask[b, h, chunk if mask.shape[2] > 1 else slice(1)]
            if fits:
                _score(query[b, h, chunk], k, own, scale, LOG2_E, part)
                fits = attend_exp2(part, v, result) is not None
            if not fits:  # nor will, probably, the rest of this head
                _score(query[b, h, chunk], k, own, scale, 1.0, part)
                torch.mm(softmax(part, -1), v, out=result)
    return out


def _score(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, unit: float, out: Tensor
) -> None:
    """Write ``(q kᵀ scale + mask) unit``."""
    torch.mm(q * (scale * unit), k.T, out=out)
    if mask is not None:
        out.add_(mask, alpha=unit)


def _cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    best = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    if torch.cuda.get_device_capability(query.device)[0] < 9:
        best.reverse()
    with sdpa_kernel([*best, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        return attention(query, key, value, mask, scale)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask of four axes; False becomes minus infinity."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
    return mask.reshape([1] * (4 - mask.ndim) + list(mask.shape))


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return query.new_empty([*query.shape[:-1], value.shape[-1]])


def _supports(problem: AttentionProblem, target: Target) -> str | None:
    if target.device != "cpu":
        return None
    if problem.dtype != torch.bfloat16:
        return f"{str(problem.dtype).removeprefix('torch.')} matmuls are no faster than torch's own"
    return None


def _cost(problem: AttentionProblem) -> Cost:
    scores = float(problem.batch * problem.heads * problem.queries * problem.keys)
    if problem.queries * problem.keys < MIN_SCORES:
        return torch_attention_cost(problem)  # the route that a call of this size takes
    form = FLOAT_FORMAT[problem.dtype]
    ops = {form: scores * 4 * problem.width, "softmax": scores}
    return Cost(ops, 0.0, 40.0 * problem.heads, gpu=_gpu_cost(problem))


def torch_attention_cost(problem: AttentionProblem) -> Cost:
    """What torch's own attention costs; on a CPU every dtype runs at one rate."""
    scores = float(problem.batch * problem.heads * problem.queries * problem.keys)
    return Cost({"sdpa": scores * 4 * problem.width}, 0.0, gpu=_gpu_cost(problem))


def _gpu_cost(problem: AttentionProblem) -> Cost:
    """Both products and, hardly overlapped with them, one exponential a score.

    On sm90 that is 650 TFLOP/s for heads of 128 channels and 484 for 64; FlashAttention-3 is
    reported at 648 and 497 (arXiv 2407.08608, 16k tokens). Not measured here.
    """
    heads = problem.batch * problem.heads
    scores = float(heads * problem.queries * problem.keys)
    values = 2 * heads * (problem.queries + problem.keys) * problem.width
    ops = {FLOAT_FORMAT[problem.dtype]: scores * 4 * problem.width, "softmax": scores}
    return Cost(ops, float(values * problem.dtype.itemsize))


ATTENTION = define(
    "attention",
    reference=attention,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
)
