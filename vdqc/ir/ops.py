"""The ``vdqc::`` dialect: what a compressed graph does, float to float, differentiable, pure torch.

Passes insert these ops and lowering maps them to kernels; until then they run and train anywhere.
Registered on import, which is the only import side effect in vdqc.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vdqc.base import hadamard, numerics
from vdqc.base.kronecker import cayley as _cayley
from vdqc.base.kronecker import kronecker as _kronecker
from vdqc.base.scheme import GranularityKind, PerToken, QuantSpec


@torch.library.custom_op("vdqc::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: str) -> Tensor:
    """Quantise and dequantise ``x`` in one step: the float value that the integer stands for.

    x          float[..., K]
    scale      shaped as ``Granularity`` documents; if ``spec`` is dynamic, None or a clip ratio
               float[] in (0, 1]: the range is that much of the one that x shows
    zero_point None if ``spec`` is symmetric (or dynamic), else like ``scale``
    spec       text of a QuantSpec, e.g. ``int8/token/dynamic``
    returns    shape and dtype of ``x``

    Backward: straight through inside the range, zero outside; learned step size and offset. A
    dynamic range is a function of ``x``, whose ends get the gradient of the step.
    Source: Bengio et al., arXiv 1308.3432 (straight-through); Esser et al., LSQ, arXiv 1902.08153,
    eq. 3 (``scale``); Bhalgat et al., LSQ+, arXiv 2004.09576, eq. 6 (``zero_point``); Sun et al.,
    FlatQuant, arXiv 2410.09426, section 3.2 (clip ratio).
    """
    parsed = QuantSpec.parse(spec)
    if scale is not None and not parsed.dynamic:
        return numerics.fake_quantize(x, scale, zero_point, parsed)
    # widened once: the reductions of half types are slow on a CPU (measured: 4x)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low, high = numerics.value_range(wide, parsed)
    if scale is not None:
        low, high = low * scale, high * scale
    found = numerics.scale_from_range(low, high, parsed)
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
    if spec.dynamic:
        return (*_dynamic_backward(x, scale, grad, spec), None, None)
    view, g = numerics.group_view(x, spec), numerics.group_view(grad, spec)
    grad_x, grad_scale, grad_zero = _straight_through(view, g, scale, zero_point, spec)
    return grad_x.reshape(x.shape), grad_scale, grad_zero, None


def _straight_through(
    view: Tensor, g: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x (as ``view``), scale and zero point for a gradient ``g`` of the output.

    In place where it can be: of a weight these are the largest temporaries of a training step.
    """
    per_group = spec.granularity.size > 0
    s = scale.unsqueeze(-1) if per_group else scale
    z = None if zero_point is None else (zero_point.unsqueeze(-1) if per_group else zero_point)
    position = view.to(s.dtype) / s
    if z is not None:
        position.add_(z)
    outside = (position < spec.qmin) | (position > spec.qmax)
    slope = position.clone() if spec.dtype.is_float else position.round()
    slope.clamp_(spec.qmin, spec.qmax)
    # code - position inside the range, code - zero point outside
    position = position.masked_fill_(outside, 0) if z is None else torch.where(outside, z, position)
    slope.sub_(position).mul_(g)
    grad_scale = slope.sum_to_size(s.shape).reshape(scale.shape).to(scale.dtype)
    grad_zero = None
    if zero_point is not None:
        slope = torch.where(outside, -s * g, 0)
        grad_zero = slope.sum_to_size(s.shape).reshape(scale.shape).to(scale.dtype)
    return g.masked_fill(outside, 0), grad_scale, grad_zero


def _dynamic_backward(
    x: Tensor, clip: Tensor | None, grad: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the clip ratio where the range is that of x itself."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    view, g = numerics.group_view(wide, spec), numerics.group_view(grad, spec)
    if spec.granularity.kind is GranularityKind.TENSOR:
        view, g = view.reshape(1, -1), g.reshape(1, -1)
    low, at_low = view.min(-1, keepdim=True)
    high, at_high = view.max(-1, keepdim=True)
    with torch.enable_grad():
        leaves = [low.detach().requires_grad_(), high.detach().requires_grad_()]
        if clip is not None:
            leaves.append(clip.detach().requires_grad_())
        ratio = leaves[2] if clip is not None else 1.0
        scale, zero_point = numerics.scale_from_range(leaves[0] * ratio, leaves[1] * ratio, spec)
    whole = replace(spec, granularity=PerToken)  # one scale per row of the view, whatever it was
    frozen = None if zero_point is None else zero_point.detach()
    grad_view, grad_scale, _ = _straight_through(view, g, scale.detach(), frozen, whole)
    ends = torch.autograd.grad(scale, leaves, grad_scale.to(scale.dtype))
    grad_view = grad_view.to(view.dtype)
    grad_view = grad_view.scatter_add(-1, at_low, ends[0]).scatter_add(-1, at_high, ends[1])
    return grad_view.reshape(x.shape).to(x.dtype), ends[2] if clip is not None else None


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


@torch.library.custom_op("vdqc::kronecker", mutates_args=())
def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Multiply the last axis of ``x`` by a Kronecker product: y = x · (left ⊗ right).

    x       float[..., a·b]
    left    float[a, a]
    right   float[b, b]
    returns shape and dtype of ``x``

    Source: Sun et al., FlatQuant, arXiv 2410.09426, section 3.1.
    """
    return _kronecker(x, left, right)


@kronecker.register_fake
def _(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _kronecker_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _kronecker_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, left, right = ctx.saved_tensors
    grad_left = grad_right = None
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        shape = (-1, left.shape[0], right.shape[0])
        value, g = x.to(left.dtype).reshape(shape), grad.to(left.dtype).reshape(shape)
        # y = Lᵀ X R per token; einsum would copy both operands and take 2 to 3 times as long
        grad_left = torch.bmm(value @ right, g.mT).sum(0)
        grad_right = value.flatten(0, 1).T @ (left @ g).flatten(0, 1)
    return kronecker(grad.contiguous(), left.T, right.T), grad_left, grad_right


kronecker.register_autograd(_kronecker_backward, setup_context=_kronecker_setup)


@torch.library.custom_op("vdqc::cayley", mutates_args=())
def cayley(raw: Tensor) -> Tensor:
    """The rotation (I - A)(I + A)⁻¹ of A = raw - rawᵀ: float[n, n] of any values to orthogonal.

    Source: the Cayley transform; Sun et al., FlatQuant, arXiv 2410.09426 (released code).
    """
    return _cayley(raw)


@cayley.register_fake
def _(raw: Tensor) -> Tensor:
    return torch.empty_like(raw, memory_format=torch.contiguous_format)


def _cayley_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _cayley_backward(ctx: Any, grad: Tensor) -> Tensor:
    raw, q = ctx.saved_tensors  # dQ = -(I + Q) dA (I + A)⁻¹
    identity = torch.eye(raw.shape[0], dtype=raw.dtype, device=raw.device)
    right = torch.linalg.solve(identity + raw - raw.T, grad.T).T  # grad · (I + A)⁻ᵀ, transposed
    skew = -(identity + q).T @ right
    return skew - skew.T


cayley.register_autograd(_cayley_backward, setup_context=_cayley_setup)

FAKE_QUANTIZE = torch.ops.vdqc.fake_quantize.default
ROTATE = torch.ops.vdqc.rotate.default
KRONECKER = torch.ops.vdqc.kronecker.default
CAYLEY = torch.ops.vdqc.cayley.default
