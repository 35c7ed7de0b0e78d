"""Fused activation quantiser without a rotation: a row as a few vectors in registers.

Memory leaves about twenty instructions a value (H200, three bytes a value), so what is done per
value counts. A row is cut into equal pieces, as few slots beyond its end as powers of two allow
(3072 = 3 x 1024); sums and greatest values are taken over pieces first, value by value, and over
threads once. Packed codes pair a piece of the first half of the row with one of the second.

After a norm or an activation, whose last bits are no target's, a code is one fused multiply-add
with the reciprocal of the scale; without, it is that of a division, bit for bit.

Error: without norm and activation none; else values at the edge of two codes (2^-24) may fall to
either side, as they do with any other order of summation.
Source: ours.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from vdqc.kernels.gpu.device import (
    asymmetric_scale,
    magnitude,
    nearest,
    ordered,
    quotient,
    symmetric_scale,
    whole,
    within,
)
from vdqc.kernels.gpu.operands import Form, Quantised, allocate, arguments
from vdqc.kernels.gpu.runtime import on_device
from vdqc.kernels.gpu.steps import activate, affine, deviation, residual
from vdqc.kernels.prologue import Prologue

#: Longest row that is held in registers, and pieces it may be cut into.
LINE_LIMIT = 16384
PIECES_LIMIT = 8


@triton.jit
def _columns(piece: tl.constexpr, part, PIECES: tl.constexpr, B: tl.constexpr, WHOLE: tl.constexpr):
    """(columns, mask) of a piece; pieces of the second half follow those of the first."""
    inner = (piece % PIECES) * B + tl.arange(0, B)
    known = tl.full((B,), True, tl.int1)
    if not WHOLE and piece % PIECES == PIECES - 1:
        known = inner < part
    return inner + (piece // PIECES) * part, known


@triton.jit
def _line(  # noqa: C901 - decided at compilation
    x, y, gate, streamed, weight, bias, scale, shift, smooth, signs, post, clip,
    codes, scales, zeros, sums,
    rows, width, part,
    gate_every, gate_stride, scale_every, scale_stride, shift_every, shift_stride, eps,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, QMAX: tl.constexpr, BITS: tl.constexpr,
    PACKED: tl.constexpr, PIECES: tl.constexpr, B: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = 2 * PIECES if PACKED else PIECES
    EXACT: tl.constexpr = NORM == "none" and ACTIVATION == "none"
    LIMIT: tl.constexpr = 2**BITS if zeros is not None else QMAX
    index = tl.program_id(0)
    row = index.to(tl.int64)
    base = row * width
    # divided in 32 bits: 64 cost as much as the codes of four values
    gate_base = (index // gate_every).to(tl.int64) * gate_stride
    scale_base = (index // scale_every).to(tl.int64) * scale_stride
    shift_base = (index // shift_every).to(tl.int64) * shift_stride

    values = ()
    total = tl.zeros((B,), tl.float32)
    for piece in tl.static_range(COUNT):
        column, known = _columns(piece, part, PIECES, B, WHOLE)
        value = residual(x, y, gate, base, gate_base, column, known, ".cg")
        if streamed is not None:
            tl.store(streamed + base + column, value.to(streamed.dtype.element_ty), mask=known)
        total += value
        values += (value,)  # type: ignore[assignment]
    if NORM != "none":
        mean = tl.sum(total) / (width * 1.0)
        moved = ()
        squares = tl.zeros((B,), tl.float32)
        for piece in tl.static_range(COUNT):
            value = values[piece]
            if NORM == "layer":
                column, known = _columns(piece, part, PIECES, B, WHOLE)
                value = tl.where(known, value - mean, 0.0)
            squares = tl.fma(value, value, squares)
            moved += (value,)  # type: ignore[assignment]
        rstd = deviation(tl.sum(squares), width, eps)
        values = moved

    done = ()
    least = tl.zeros((B,), tl.int32)
    most = tl.zeros((B,), tl.int32)
    for piece in tl.static_range(COUNT):
        column, known = _columns(piece, part, PIECES, B, WHOLE)
        value = values[piece]
        if NORM != "none":
            value = value * rstd
        value = affine(
            value, weight, bias, scale, shift, column, scale_base, shift_base, known, known,
            not EXACT,
        )  # fmt: skip
        value = activate(value, smooth, signs, column, 0, known, known, ACTIVATION)
        if zeros is not None:
            bits = ordered(value)
            least, most = tl.minimum(least, bits), tl.maximum(most, bits)
        else:
            most = tl.maximum(most, magnitude(value))
        done += (value,)  # type: ignore[assignment]

    zero = 0
    if zeros is not None:
        step, inverse, finite, zero = asymmetric_scale(tl.min(least), tl.max(most), clip, BITS)
        tl.store(zeros + row, tl.where(finite, zero - 2 ** (BITS - 1), 0))
    else:
        step, inverse, finite = symmetric_scale(tl.max(most), clip, QMAX)
    tl.store(scales + row, step)
    count = tl.zeros((B,), tl.int32)
    for piece in tl.static_range(PIECES):
        column, known = _columns(piece, part, PIECES, B, WHOLE)
        packed = tl.zeros((B,), tl.int32)
        for half in tl.static_range(COUNT // PIECES):
            value = done[piece + half * PIECES]
            if EXACT:
                code = whole(within(quotient(value, step, inverse), clip, LIMIT))
            elif clip is not None:
                code = whole(within(value * inverse, clip, LIMIT))
            else:
                code = nearest(value, inverse)
            if zeros is not None:
                code = tl.minimum(tl.maximum(code + zero, 0), 2**BITS - 1) - 2 ** (BITS - 1)
                code = tl.where(known, code, 0)
            if sums is not None:
                count += code
            packed |= ((code & 15) << (4 * half)) if PACKED else code
        kept = codes + row * part + column
        tl.store(kept, packed.to(codes.dtype.element_ty), mask=known)
        if tl.where(finite, 0, 1) != 0:
            tl.store(kept, tl.zeros((B,), codes.dtype.element_ty), mask=known)
    if sums is not None:
        tl.store(sums + row, tl.where(finite, tl.sum(count), 0))


def takes_line(width: int, steps: Prologue) -> bool:
    """True if nothing is rotated and a row fits in registers."""
    return not steps.block and width <= LINE_LIMIT


def line_tile(width: int, packed: bool) -> dict[str, Any]:
    """How a row, or half a packed one, is cut: least slots, then fewest pieces; eight bfloat16
    values a thread and piece.
    """
    part = width // 2 if packed else width
    limit = PIECES_LIMIT // 2 if packed else PIECES_LIMIT
    sizes = [2**k for k in range(5, 13) if triton.cdiv(part, 2**k) <= limit] or [4096]
    size = min(sizes, key=lambda size: (triton.cdiv(part, size) * size, -size))
    return {
        "PIECES": triton.cdiv(part, size),
        "B": size,
        "WHOLE": part % size == 0,
        "num_warps": min(16, max(1, size // 256)),
        "num_stages": 1,
    }


def launch_line(
    x: Tensor, steps: Prologue, form: Form, y: Tensor | None, gate: Tensor | None
) -> Quantised:
    """The codes of rows that ``takes_line`` takes."""
    width = x.shape[-1]
    given = arguments(x, steps, form, y, gate)
    result = allocate(x, form, y is not None)
    if given["rows"]:
        with on_device(x):
            _line[(given["rows"],)](
                **given,
                streamed=result.stream,
                codes=result.codes,
                scales=result.scale,
                zeros=result.zero,
                sums=result.sums,
                part=width // 2 if form.packed else width,
                QMAX=form.qmax,
                BITS=form.bits,
                PACKED=form.packed,
                **line_tile(width, form.packed),
                enable_fp_fusion=False,
            )
    return result
