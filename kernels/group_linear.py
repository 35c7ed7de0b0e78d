"""Linear with packed weights and float scales per group, int8 activations.

================== =======================  ==============================================
codes              i8[..., K]               activations
scale              f32[..., 1] or [1]
zero_point         i32 like scale, None
packed             u8[N, ceil(bits K / 8)]
weight_scale       f32[N, groups]
weight_zero_point  f32[N, groups], None
bias               float[N], None
result             dtype[..., N]
================== =======================  ==============================================

Scales that share no base leave no integer sum over all of K. The codes (exact in bfloat16) meet
dequantised weights in a GEMM of ``dtype``, half the speed of an integer one. So too on a GPU, by
cuBLAS: integer sums of each group, added in float32, need twice the registers (compiled for sm90:
255 and 207 spills), and group scales that are whole multiples (``packed_linear``) need none.

Error: one rounding of each weight to ``dtype``, as in the float graph.
Source: Lin et al., AWQ, arXiv 2306.00978, section 5 (group-wise weights).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vdqc.base.packing import packed_bytes
from vdqc.base.target import Target
from vdqc.kernels.base import FLOAT_FORMAT, Cost, LinearProblem, define
from vdqc.kernels.integer import dequantize_weight


def group_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The truth: see the module's text."""
    weight = dequantize_weight(packed, bits, codes.shape[-1], weight_scale, weight_zero_point)
    values = codes if zero_point is None else codes - zero_point
    # unscaled sums may pass the range of float16
    compute = torch.float32 if dtype == torch.float16 else dtype
    result = functional.linear(values.to(compute), weight.to(compute)).to(scale.dtype) * scale
    return (result if bias is None else result + bias).to(dtype)


def _fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], packed.shape[0]], dtype=dtype)


def _supports(problem: LinearProblem, target: Target) -> str | None:
    if problem.weight is None or problem.input is None:
        return "an operand is in float"
    if problem.weight.dtype.is_float or problem.input.dtype.is_float:
        return f"{problem.weight.dtype} is not an integer format"
    return None if problem.k > 0 else "K = 0"


def _cost(problem: LinearProblem) -> Cost:
    assert problem.weight is not None
    m, n, k = problem.m, problem.n, problem.k
    size = problem.dtype.itemsize
    weight = n * packed_bytes(problem.weight.dtype.bits, k) + n * k * (12 + 2 * size)
    activation = m * k * (2 * size + 3) + m * n * 3 * size
    return Cost({FLOAT_FORMAT[problem.dtype]: 2.0 * m * n * k}, weight + activation, calls=2.0)


GROUP_LINEAR = define(
    "group_linear", reference=group_linear, fake=_fake, supports=_supports, cost=_cost
)
