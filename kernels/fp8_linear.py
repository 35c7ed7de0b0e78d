"""Linear with fp8 (e4m3) weights and activations, one scale per row of each.

================== =======================  ==============================================
codes              f8e4m3[..., K]           activations
scale              f32[..., 1] or [1]       of the codes
weight             f8e4m3[N, K]
weight_scale       f32[N]
bias               float[N], None
activation ... up  as ``int8_linear``
result             dtype[..., N]
================== =======================  ==============================================

``y = residual + gate * act((sum_k a w) * s_a * s_w + b + down · upᵀ)``. Only GPUs from Ada on
multiply fp8; elsewhere the reference serves, in float32.

Error: against the sum in float32, up to 1e-3 on Hopper, whose fp8 adder keeps 13 bits of fraction.
Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdqc.base.target import Target
from vdqc.kernels.base import Cost, LinearProblem, define
from vdqc.kernels.integer import finished


def fp8_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """The truth: see the module's text."""
    value = (codes.to(scale.dtype) @ weight.to(scale.dtype).T) * scale * weight_scale
    value = value if bias is None else value + bias
    return finished(value, dtype, activation, gate, residual, down, up)


def _cuda(codes: Tensor, scale: Tensor, *rest: Any, **named: Any) -> Tensor:
    if scale.dtype != torch.float32 or torch.cuda.get_device_capability(codes.device) < (8, 9):
        return fp8_linear(codes, scale, *rest, **named)
    from vdqc.kernels.gpu import gemm

    return gemm.fp8_linear(codes, scale, *rest, **named)


def _fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *fused: Any,
    **named: Any,
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], weight.shape[0]], dtype=dtype)


def _supports(problem: LinearProblem, target: Target) -> str | None:
    if problem.weight is None or problem.input is None:
        return "an operand is in float"
    if not (problem.weight.dtype.is_float and problem.input.dtype.is_float):
        return "an operand is an integer format"
    if problem.weight.granularity.size:
        return "weights scaled per group"
    if "fp8" not in target.peak:
        return f"{target} has no fp8 multiply"
    return None if problem.k > 0 else "K = 0"


def _cost(problem: LinearProblem) -> Cost:
    m, n, k = problem.m, problem.n, problem.k
    size = problem.dtype.itemsize
    return Cost({"fp8": 2.0 * m * n * k}, n * k + m * k * (size + 2) + m * n * size)


FP8_LINEAR = define(
    "fp8_linear",
    reference=fp8_linear,
    fake=_fake,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
)
