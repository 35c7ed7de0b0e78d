"""The steps of ``vdqc.kernels.prologue`` on a block of a row, and how codes leave a kernel.

Arguments that are None skip their step. ``base`` is where a row starts (64 bits, one a row);
columns and masks are blocks that broadcast to the block of values. What lies outside a row is 0
from the first load to the last code.

Error: as ``vdqc.kernels.prologue``; a rotation takes float32 as two bfloat16 summands (2^-17).
Source: see ``vdqc.kernels.prologue``.
"""

import triton
import triton.language as tl

from vdqc.kernels.gpu.device import gelu_tanh, silu


@triton.jit
def residual(x, y, gate, base, gate_base, column, real):
    """``x + gate * y`` as float32, rounded to the dtype of x where there is a sum."""
    value = tl.load(x + base + column, mask=real, other=0.0).to(tl.float32)
    if y is not None:
        update = tl.load(y + base + column, mask=real, other=0.0).to(tl.float32)
        if gate is not None:
            factor = tl.load(gate + gate_base + column, mask=real, other=0.0)
            update = factor.to(tl.float32) * update
        value = (value + update).to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def deviation(square_sum, width, eps):
    """``1 / sqrt(square_sum / width + eps)``, correctly rounded at each step."""
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(square_sum, width * 1.0) + eps))


@triton.jit
def affine(value, weight, bias, scale, shift, column, scale_base, shift_base, known, real):
    """Norm weight and bias, then adaLN; ``known`` masks columns, ``real`` elements."""
    if weight is not None:
        value = value * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    if bias is not None:
        value = value + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    if scale is not None:
        factor = tl.load(scale + scale_base + column, mask=real, other=0.0)
        value = value * (1.0 + factor.to(tl.float32))
    if shift is not None:
        summand = tl.load(shift + shift_base + column, mask=real, other=0.0)
        value = value + summand.to(tl.float32)
    return value


@triton.jit
def activate(value, smooth, signs, column, sign_base, known, real, ACTIVATION: tl.constexpr):
    """Activation, smoothing, signs; 0 outside of the row."""
    if ACTIVATION == "gelu_tanh":
        value = gelu_tanh(value)
    elif ACTIVATION == "silu":
        value = silu(value)
    if smooth is not None:
        value = value * tl.load(smooth + column, mask=known, other=0.0).to(tl.float32)
    if signs is not None:
        value = value * tl.load(signs + sign_base + column, mask=known, other=0.0).to(tl.float32)
    return tl.where(real, value, 0.0)


@triton.jit
def nibbles(codes, HALF: tl.constexpr, B: tl.constexpr):
    """uint8[HALF, B] from codes [2 * HALF, B]: the first half of the rows in the low bits."""
    pairs = tl.permute(tl.reshape(codes.to(tl.int8), (2, HALF, B)), (1, 2, 0))
    low, high = tl.split(pairs)
    return ((low & 15) | (high << 4)).to(tl.uint8)
