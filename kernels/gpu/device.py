"""Functions that kernels share, on blocks of float32 values.

Codes must be equal to those of torch bit for bit, so a quotient is rounded as IEEE 754 says. PTX's
own division costs about ten instructions an element, more than the memory time of a quantiser
leaves; a product with the rounded reciprocal and one correction by its exact remainder costs three
and rounds alike (``quotient``). Launch with ``enable_fp_fusion=False``, so that products and sums
round as torch's do: what is fused is spelled ``tl.fma``.

Greatest values are taken of the bits as integers: one instruction each for |x| and maximum,
reduced over a warp in hardware, and a NaN, whose bits are above infinity's, is not lost on the way.

Error: gelu_tanh and silu: relative 1e-6 (2^t and 1 / t to 2^-22); all else is IEEE float32.
Source: Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor",
IBM J. Res. Dev. 34 (1990), for the division; the rest is ours.
"""

from typing import Any

import triton
import triton.language as tl

from vdqc.base.numerics import MIN_SCALE
from vdqc.kernels.gpu.assembly import MEANING

_MIN_SCALE = tl.constexpr(MIN_SCALE)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
#: 1.5 * 2^23: a float32 added to it is rounded, half to even, to a whole number in its low bits.
_SHIFT = tl.constexpr(12582912.0)
_SHIFT_BITS = tl.constexpr(0x4B400000)
_LOGISTIC = tl.constexpr(
    "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;"
)


def _logistic_of_words(words: Any) -> Any:
    import numpy as np

    with np.errstate(over="ignore"):
        value = 1 / (1 + np.exp2(words.view(np.float32)))
    return value.astype(np.float32).view(np.uint32)


MEANING[_LOGISTIC.value] = _logistic_of_words


@triton.jit
def round_half_even(x):
    """The nearest whole number, |x| < 2^22."""
    return (x + _SHIFT) - _SHIFT


@triton.jit
def whole(x):
    """The nearest whole number as int32, |x| < 2^22."""
    return (x + _SHIFT).to(tl.int32, bitcast=True) - _SHIFT_BITS


@triton.jit
def nearest(x, factor):
    """The whole number nearest to ``x * factor``, unrounded, as int32; below 2^22."""
    return tl.fma(x, factor, _SHIFT).to(tl.int32, bitcast=True) - _SHIFT_BITS


@triton.jit
def quotient(x, divisor, reciprocal):
    """``x / divisor`` rounded to nearest, from ``reciprocal = round(1 / divisor)``."""
    first = x * reciprocal
    return tl.fma(tl.fma(-first, divisor, x), reciprocal, first)


@triton.jit
def magnitude(x):
    """Bits of \\|x|, which order as the values do; a NaN is above all."""
    return x.to(tl.int32, bitcast=True) & _MAGNITUDE


@triton.jit
def ordered(x):
    """Bits of x, changed so that they order as the values do; NaNs are at the ends."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def unordered(bits):
    """The value that ``ordered`` took ``bits`` from."""
    return (bits ^ ((bits >> 31) & _MAGNITUDE)).to(tl.float32, bitcast=True)


@triton.jit
def row_scale(span, steps):
    """``max(span / steps, MIN_SCALE)``; a NaN stays one."""
    scale = tl.div_rn(span, steps)
    return tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)


@triton.jit
def clipped(end, clip):
    """``end`` of a range times the number at ``clip``, if there is one."""
    if clip is not None:
        end = end * tl.load(clip).to(tl.float32)
    return end


@triton.jit
def symmetric_scale(top, clip, QMAX: tl.constexpr):
    """(scale, reciprocal, finite) from ``top`` = greatest ``magnitude``.

    Where the scale is not finite the codes are to be 0, whatever ``quotient`` gives.
    """
    scale = row_scale(clipped(top.to(tl.float32, bitcast=True), clip), QMAX * 1.0)
    return scale, tl.div_rn(1.0, scale), scale < float("inf")


@triton.jit
def asymmetric_scale(low, high, clip, BITS: tl.constexpr):
    """(scale, reciprocal, finite, zero point) from the least and greatest ``ordered``.

    The zero point is that of unsigned codes, 0 where the scale is not finite.
    """
    bottom, top = clipped(unordered(low), clip), clipped(unordered(high), clip)
    bottom = tl.where(bottom > 0.0, 0.0, bottom)
    top = tl.where(top < 0.0, 0.0, top)
    scale = row_scale(top - bottom, (2**BITS - 1) * 1.0)
    finite = scale < float("inf")
    zero = tl.where(finite, tl.div_rn(-bottom, scale), 0.0)
    zero = tl.minimum(whole(zero), 2**BITS - 1)
    return scale, tl.div_rn(1.0, scale), finite, zero


@triton.jit
def within(x, clip, LIMIT: tl.constexpr):
    """``x`` held between the whole numbers -LIMIT and LIMIT, where a range is clipped at all."""
    if clip is not None:
        x = tl.minimum(tl.maximum(x, -LIMIT * 1.0), LIMIT * 1.0)
    return x


@triton.jit
def symmetric_codes(x, scale, reciprocal, finite, clip, QMAX: tl.constexpr):
    """int32 codes; none leaves the range, because the scale covers the row or holds them in it."""
    return tl.where(finite, whole(within(quotient(x, scale, reciprocal), clip, QMAX)), 0)


@triton.jit
def asymmetric_codes(x, scale, reciprocal, finite, zero, clip, BITS: tl.constexpr):
    """int32 codes, shifted by half the range to be signed."""
    codes = whole(within(quotient(x, scale, reciprocal), clip, 2**BITS)) + zero
    codes = tl.minimum(tl.maximum(codes, 0), 2**BITS - 1) - 2 ** (BITS - 1)
    return tl.where(finite, codes, 0)


@triton.jit
def _logistic(t):
    """``1 / (1 + 2^t)``: five instructions where exp and a division are twenty."""
    return tl.inline_asm_elementwise(_LOGISTIC, "=f,f", [t], tl.float32, is_pure=True, pack=1)


@triton.jit
def gelu_tanh(x):
    """``x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u))``, u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * _logistic(x * tl.fma(x * x, -0.10294324, -2.3022082))


@triton.jit
def silu(x):
    """``x / (1 + exp(-x))``."""
    return x * _logistic(x * -1.44269504)


@triton.jit
def exact_dot(x, matrix, TERMS: tl.constexpr):
    """``x @ matrix`` with a matrix of bfloat16 whole numbers, x in ``TERMS`` bfloat16 summands.

    One summand is exact for a bfloat16 x, three for any float32; two leave 2^-17 of x.
    """
    part = x.to(tl.bfloat16)
    total = tl.dot(part, matrix, out_dtype=tl.float32)
    for _ in tl.static_range(1, TERMS):
        x = x - part.to(tl.float32)
        part = x.to(tl.bfloat16)
        total = tl.dot(part, matrix, total, out_dtype=tl.float32)
    return total


@triton.jit
def exact_dot_left(matrix, x, TERMS: tl.constexpr):
    """``matrix @ x``, as ``exact_dot``."""
    part = x.to(tl.bfloat16)
    total = tl.dot(matrix, part, out_dtype=tl.float32)
    for _ in tl.static_range(1, TERMS):
        x = x - part.to(tl.float32)
        part = x.to(tl.bfloat16)
        total = tl.dot(matrix, part, total, out_dtype=tl.float32)
    return total
