"""Linear with int8 weights and int8 activations, one scale per row of each.

================== =================== =============================================
codes              i8[..., K]           activations, A4 to A8 (a narrower range)
scale              f32[..., 1] or [1]   of the codes
zero_point         i32 like scale, None asymmetric activations
weight             i8[N, K]             W8, or any narrower code kept wide
weight_scale       f32[N]
weight_zero_point  i32[N], None         asymmetric weights
weight_sum         i32[N], None         sum of ``weight`` over K; needed with zero_point
bias               float[N], None
row_sum            i32[..., 1], None   sum of ``codes`` over K; computed if it is needed
activation         none, gelu_tanh
gate               float[..., N], None broadcast over rows
residual           float[..., N], None
down, up           float[..., R], float[N, R], None: branch of low rank R
result             dtype[..., N]
================== =================== =============================================

``y = residual + gate * act((sum_k (a - za)(w - zw)) * s_a * s_w + b + down · upᵀ)``: zero points
are corrections of rank one, in integers. A gain per frame on a branch of rank one goes into
``down``.

Error: integer part exact; one rounding to float32 (sums beyond 2^24), two products, one rounding to
``dtype``. The float graph rounds both operands to ``dtype`` first, so this is the more exact one.
Source: Jacob et al., arXiv 1712.05877, section 2.3 (zero points as rank-one corrections).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdqc.base.target import Target
from vdqc.kernels.base import Cost, LinearProblem, define
from vdqc.kernels.integer import INT8_MATMUL, MAX_K, corrected, finished, flat_rows, int8_matmul


def _around(matmul: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The linear around the integer sums of ``matmul``."""

    def int8_linear(
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        weight_sum: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        row_sum: Tensor | None = None,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
    ) -> Tensor:
        total = matmul(flat_rows(codes), weight).reshape(*codes.shape[:-1], weight.shape[0])
        total = corrected(total, codes, zero_point, weight_zero_point, weight_sum, row_sum)
        value = total.to(scale.dtype) * scale * weight_scale
        value = value if bias is None else value + bias
        return finished(value, dtype, activation, gate, residual, down, up)

    return int8_linear


int8_linear = _around(int8_matmul)  #: the truth: see the module's text
_spelled = _around(INT8_MATMUL.op)


def _fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *fused: Any,
    **named: Any,
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], weight.shape[0]], dtype=dtype)


def _cuda(codes: Tensor, scale: Tensor, *rest: Any, **named: Any) -> Tensor:
    if scale.dtype != torch.float32:  # models in float64: the integer part is a kernel all the same
        return _spelled(codes, scale, *rest, **named)
    from vdqc.kernels.gpu import gemm

    return gemm.int8_linear(codes, scale, *rest, **named)


def _supports(problem: LinearProblem, target: Target) -> str | None:
    if problem.weight is None or problem.input is None:
        return "an operand is in float"
    if problem.weight.dtype.is_float or problem.input.dtype.is_float:
        return f"{problem.weight.dtype} is not an integer format"
    if problem.weight.dtype.bits < 8:
        return "narrower weights stay packed"
    if problem.weight.granularity.size:
        return "weights scaled per group"
    if "int8" not in target.peak:
        return f"{target} has no int8 multiply"
    return None if 0 < problem.k <= MAX_K else f"K = {problem.k} is outside 1 ... {MAX_K}"


def _cost(problem: LinearProblem) -> Cost:
    m, n, k = problem.m, problem.n, problem.k
    size = problem.dtype.itemsize
    ops, read = {"int8": 2.0 * m * n * k}, n * k + m * k * (size + 2)
    gpu = Cost(ops, read + m * n * size, calls=2.0)  # sums stay in registers up to the epilogue
    # the quantiser, the product
    return Cost(ops, read + m * n * (8 + size), calls=2.0, gpu=gpu)


INT8_LINEAR = define(
    "int8_linear",
    reference=int8_linear,
    fake=_fake,
    cpu=_spelled,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
    spelled={"cpu": _spelled},
)
