"""The steps of ``vdqc.kernels.prologue`` on a block of a row, and how codes leave a kernel.

Arguments that are None skip their step. ``base`` is where a row starts (64 bits, one a row);
columns and masks are blocks that broadcast to the block of values. What lies outside a row is 0
from the first load to the last code.

Error: as ``vdqc.kernels.prologue``; a rotation takes a bfloat16 row as bfloat16, any other as two
bfloat16 summands (2^-17).
Source: see ``vdqc.kernels.prologue``.
"""

import triton
import triton.language as tl

from vdqc.kernels.gpu.device import gelu_tanh, silu


@triton.jit
def residual(x, y, gate, base, gate_base, column, real, CACHE: tl.constexpr):
    """``x + gate * y`` as float32, rounded to the dtype of x where there is a sum.

    ``CACHE``: where x and y are kept; ``.cg`` leaves L1 to what all rows share.
    """
    value = tl.load(x + base + column, mask=real, other=0.0, cache_modifier=CACHE)
    value = value.to(tl.float32)
    if y is not None:
        update = tl.load(y + base + column, mask=real, other=0.0, cache_modifier=CACHE)
        update = update.to(tl.float32)
        if gate is not None:
            factor = tl.load(gate + gate_base + column, mask=real, other=0.0)
            update = factor.to(tl.float32) * update
        value = (value + update).to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def deviation(square_sum, width, eps):
    """``1 / sqrt(square_sum / width + eps)``."""
    return tl.rsqrt(square_sum / (width * 1.0) + eps)


@triton.jit
def affine(
    value, weight, bias, scale, shift, column, scale_base, shift_base, known, real,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Norm weight and bias, then adaLN; ``known`` masks columns, ``real`` elements.

    ``FUSED``: adaLN rounds once, not as torch does.
    """
    if weight is not None:
        value = value * tl.load(weight + column, mask=known, other=0.0).to(tl.float32)
    if bias is not None:
        value = value + tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    factor = None
    if scale is not None:
        factor = 1.0 + tl.load(scale + scale_base + column, mask=real, other=0.0).to(tl.float32)
    if shift is not None:
        summand = tl.load(shift + shift_base + column, mask=real, other=0.0).to(tl.float32)
        if factor is None:
            value = value + summand
        elif FUSED:
            value = tl.fma(value, factor, summand)
        else:
            value = value * factor + summand
    elif factor is not None:
        value = value * factor
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
