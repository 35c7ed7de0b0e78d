"""Linear with packed weights and float activations (A16): a smaller model, not a faster one.

================== =======================  ==============================================
x                  float[..., K]
packed             u8[N, ceil(bits K / 8)]
weight_scale       f32[N, groups]           groups = 1: one scale per output channel
weight_zero_point  f32[N, groups], None
bias               float[N], None
result             float[..., N]            dtype of x
================== =======================  ==============================================

The weight is dequantised once per call and dropped. Opaque to the compiler on purpose: Inductor
compiles the unpack several times slower than eager torch runs it. On a GPU a product with at most
64 rows reads the packed weight and dequantises it in registers.

Error: one rounding of each weight to the dtype of x, as in the float graph.
Source: Lin et al., AWQ, arXiv 2306.00978, section 5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vdqc.base.packing import packed_bytes
from vdqc.base.target import Target
from vdqc.kernels.base import FLOAT_FORMAT, Cost, LinearProblem, define
from vdqc.kernels.integer import dequantize_weight


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """The truth: see the module's text."""
    weight = dequantize_weight(packed, bits, x.shape[-1], weight_scale, weight_zero_point)
    return functional.linear(x, weight.to(x.dtype), bias)


def _cuda(
    x: Tensor,
    packed: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    from vdqc.kernels.gpu import weight_only

    args = (x, packed, bits, weight_scale, weight_zero_point, bias)
    if weight_only.serves(x, bits) and weight_scale.dtype == torch.float32:
        return weight_only.weight_only_linear(*args)
    return weight_only_linear(*args)


def _fake(
    x: Tensor,
    packed: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], packed.shape[0]])


def _supports(problem: LinearProblem, target: Target) -> str | None:
    if problem.weight is None:
        return "the weight is in float"
    if problem.input is not None:
        return "the activation is quantised too"
    if problem.weight.dtype.is_float:
        return f"{problem.weight.dtype} is not an integer format"
    return None if problem.k > 0 else "K = 0"


def _cost(problem: LinearProblem) -> Cost:
    assert problem.weight is not None
    m, n, k = problem.m, problem.n, problem.k
    size = problem.dtype.itemsize
    weight = n * packed_bytes(problem.weight.dtype.bits, k) + n * k * (12 + 2 * size)
    return Cost({FLOAT_FORMAT[problem.dtype]: 2.0 * m * n * k}, weight + (m * k + m * n) * size)


WEIGHT_ONLY_LINEAR = define(
    "weight_only_linear",
    reference=weight_only_linear,
    fake=_fake,
    supports=_supports,
    cost=_cost,
    cuda=_cuda,
)
