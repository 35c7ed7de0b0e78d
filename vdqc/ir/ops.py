"""The ``vdqc::`` dialect: what a compressed graph does, float to float, differentiable, pure torch.

Passes insert these ops and lowering maps them to kernels; until then they run and train anywhere.
Registered on import, which is the only import side effect in vdqc.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdqc.base import hadamard, numerics
from vdqc.base.scheme import QuantSpec


@torch.library.custom_op("vdqc::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: str) -> Tensor:
    """Quantise and dequantise ``x`` in one step: the float value that the integer stands for.

    x          float[..., K]
    scale      None if ``spec`` is dynamic, else shaped as ``Granularity`` documents
    zero_point None if ``spec`` is symmetric (or dynamic), else like ``scale``
    spec       text of a QuantSpec, e.g. ``int8/token/dynamic``
    returns    shape and dtype of ``x``

    Backward: straight through inside the range, zero outside; learned step size and offset.
    Source: Bengio et al., arXiv 1308.3432 (straight-through); Esser et al., LSQ, arXiv 1902.08153,
    eq. 3 (``scale``); Bhalgat et al., LSQ+, arXiv 2004.09576, eq. 6 (``zero_point``).
    """
    parsed = QuantSpec.parse(spec)
    if scale is not None:
        return numerics.fake_quantize(x, scale, zero_point, parsed)
    # widened once: the reductions of half types are slow on a CPU (measured: 4x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found = numerics.scale_from_range(*numerics.value_range(wide, parsed), parsed)
    return numerics.fake_quantize(wide, *found, parsed).to(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, spec = inputs
    ctx.save_for_backward(x, scale, zero_point)
    ctx.spec = spec


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors
    spec = QuantSpec.parse(ctx.spec)
    if scale is None:  # a dynamic range covers every value: nothing is clipped
        return grad, None, None, None
    per_group = spec.granularity.size > 0
    view, g = numerics.group_view(x, spec), numerics.group_view(grad, spec)
    s = scale.unsqueeze(-1) if per_group else scale
    z = 0 if zero_point is None else (zero_point.unsqueeze(-1) if per_group else zero_point)
    position = view.to(s.dtype) / s + z
    inside = (position >= spec.qmin) & (position <= spec.qmax)
    grad_scale = grad_zero = None
    if ctx.needs_input_grad[1]:
        clipped = position.clamp(spec.qmin, spec.qmax) - z
        code = position if spec.dtype.is_float else position.round()
        slope = torch.where(inside, code - position, clipped) * g
        grad_scale = slope.sum_to_size(s.shape).reshape(scale.shape).to(scale.dtype)
    if zero_point is not None and ctx.needs_input_grad[2]:
        slope = torch.where(inside, 0, -s * g)
        grad_zero = slope.sum_to_size(s.shape).reshape(zero_point.shape).to(zero_point.dtype)
    return (g * inside).reshape(x.shape), grad_scale, grad_zero, None


fake_quantize.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("vdqc::rotate", mutates_args=())
def rotate(x: Tensor, signs: Tensor, block: int, inverse: bool = False) -> Tensor:
    """Multiply the last axis of ``x`` by a random-sign Hadamard matrix: y = x · diag(signs) · H.

    x       float[..., K]
    signs   float[K], each +1 or -1
    block   H is block diagonal with K / block normalised Hadamard matrices of order ``block``
            (``block == K``: one Kronecker product over the whole axis)
    inverse y = x · Hᵀ · diag(signs)
    returns shape and dtype of ``x``; orthogonal, so norms are kept

    Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4; Sylvester and Paley constructions.
    """
    return hadamard.rotate(x, signs, block, inverse)


@rotate.register_fake
def _(x: Tensor, signs: Tensor, block: int, inverse: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, signs, block, inverse = inputs
    ctx.save_for_backward(signs)
    ctx.block, ctx.inverse = block, inverse


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (signs,) = ctx.saved_tensors  # orthogonal: the transpose is the inverse
    return rotate(grad, signs, ctx.block, not ctx.inverse), None, None, None


rotate.register_autograd(_rotate_backward, setup_context=_rotate_setup)

FAKE_QUANTIZE = torch.ops.vdqc.fake_quantize.default
ROTATE = torch.ops.vdqc.rotate.default
