"""Fused activation quantiser that holds a whole row in registers: read once, written once.

A row of K columns is a block of A x B values, column = block * B + place, so that a rotation of
order B is one small matrix product and a Kronecker rotation is two. Without a rotation the block is
a vector. Packed codes hold columns j and j + K/2 in one byte: the second half of the row is then
the lower half of the block.

Error: codes equal those of the reference wherever the values before them do; see ``steps``.
Source: QuaRot (arXiv 2404.00456, section 4) for what is fused; the form is ours.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.base import hadamard
from vdqc.kernels.gpu.device import (
    asymmetric_codes,
    asymmetric_scale,
    exact_dot,
    exact_dot_left,
    magnitude,
    ordered,
    symmetric_codes,
    symmetric_scale,
)
from vdqc.kernels.gpu.memory import shared_memory
from vdqc.kernels.gpu.operands import Form, Quantised, allocate, arguments, hadamard_matrix
from vdqc.kernels.gpu.runtime import on_device
from vdqc.kernels.gpu.steps import activate, affine, deviation, nibbles, residual
from vdqc.kernels.prologue import Prologue

#: Longest row that is held in registers.
ROW_LIMIT = 16384
#: Greatest order of one Hadamard factor: 32 KiB as bfloat16.
ORDER_LIMIT = 128


@triton.jit
def _row(  # noqa: C901 - decided at compilation
    x, y, gate, streamed, weight, bias, scale, shift, smooth, signs, post, clip, left, right,
    out, codes, scales, zeros, sums,
    rows, width, part, sign_rows,
    gate_every, gate_stride, scale_every, scale_stride, shift_every, shift_stride,
    eps, root,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, SIGNS_LAST: tl.constexpr,
    QMAX: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr, TERMS: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    SPLIT: tl.constexpr = 2 if PACKED else 1
    HALF: tl.constexpr = A // SPLIT
    block = tl.arange(0, A)
    place = tl.arange(0, B)
    inner = (block % HALF)[:, None] * ORDER + place[None, :]
    known = inner < part
    if ORDER != B:
        known = known & (place < ORDER)[None, :]
    column = inner + (block // HALF)[:, None] * part
    if right is not None:
        fits = (place < ORDER)[:, None] & (place < ORDER)[None, :]
        right_matrix = tl.load(
            right + place[:, None] * ORDER + place[None, :], mask=fits, other=0.0
        )
    if left is not None:
        count = width // ORDER
        factor = (block % HALF) + (block // HALF) * (part // ORDER)
        alive = (block % HALF) * ORDER < part
        # rows of this matrix are its columns in memory: it is transposed as it is loaded
        left_at = factor[None, :] * count + factor[:, None]
        left_matrix = tl.load(left + left_at, mask=alive[None, :] & alive[:, None], other=0.0)

    # a program takes every so many rows if it has matrices to load first, else one
    first = tl.program_id(0)
    last, stride = (first + 1, 1) if right is None else (rows, tl.num_programs(0))
    for index in range(first, last, stride):
        row = tl.cast(index, tl.int64)
        base = row * width
        # divided in 32 bits: 64 cost as much as the codes of four values
        gate_base = tl.cast(index // gate_every, tl.int64) * gate_stride
        value = residual(x, y, gate, base, gate_base, column, known, ".cg")
        if streamed is not None:
            tl.store(streamed + base + column, value.to(streamed.dtype.element_ty), mask=known)
        if NORM == "layer":
            value = tl.where(known, value - tl.div_rn(tl.sum(value), width * 1.0), 0.0)
        if NORM != "none":
            value = value * deviation(tl.sum(value * value), width, eps)
        scale_base = tl.cast(index // scale_every, tl.int64) * scale_stride
        shift_base = tl.cast(index // shift_every, tl.int64) * shift_stride
        sign_base = (index % sign_rows) * width
        first_signs = None if SIGNS_LAST else signs
        value = affine(
            value, weight, bias, scale, shift, column, scale_base, shift_base, known, known, False
        )
        value = activate(value, smooth, first_signs, column, sign_base, known, known, ACTIVATION)
        if right is not None:
            value = exact_dot(value, right_matrix, TERMS)
        if left is not None:
            value = exact_dot_left(left_matrix, value, TERMS)
        if right is not None:
            value = value * root
        if post is not None:
            value = value * tl.load(post + column, mask=known, other=0.0).to(tl.float32)
        if out is not None:
            if SIGNS_LAST:
                value = value * tl.load(signs + sign_base + column, mask=known, other=0.0).to(
                    tl.float32
                )
            tl.store(out + base + column, value.to(out.dtype.element_ty), mask=known)
        else:
            if zeros is not None:
                low, high = tl.min(ordered(value)), tl.max(ordered(value))
                step, inverse, finite, zero = asymmetric_scale(low, high, clip, BITS)
                code = asymmetric_codes(value, step, inverse, finite, zero, clip, BITS)
                tl.store(zeros + row, tl.where(finite, zero - 2 ** (BITS - 1), 0))
            else:
                step, inverse, finite = symmetric_scale(tl.max(magnitude(value)), clip, QMAX)
                code = symmetric_codes(value, step, inverse, finite, clip, QMAX)
            tl.store(scales + row, step)
            if sums is not None:
                tl.store(sums + row, tl.sum(tl.where(known, code, 0)))
            if PACKED:
                half_inner = tl.arange(0, HALF)[:, None] * ORDER + place[None, :]
                half_known = half_inner < part
                if ORDER != B:
                    half_known = half_known & (place < ORDER)[None, :]
                tl.store(codes + row * part + half_inner, nibbles(code, HALF, B), mask=half_known)
            else:
                tl.store(codes + base + column, code.to(tl.int8), mask=known)


def takes_row(width: int, steps: Prologue, packed: bool = False, x: Tensor | None = None) -> bool:
    """True if a row fits in registers and its rotation is one or two small products.

    With ``x``, which rows are of, also if its operands fit the GPU's shared memory.
    """
    if not steps.block:
        return width <= ROW_LIMIT
    pair = hadamard.factors(steps.block) if width % steps.block == 0 else None
    if pair is None or max(pair) > ORDER_LIMIT or (pair[0] > 1 and steps.block != width):
        return False
    tile = row_tile(width, steps.block, packed)
    if tile["A"] * tile["B"] > ROW_LIMIT:
        return False
    return x is None or row_memory(tile, pair, summands(x)) <= shared_memory(x.device)


def row_memory(tile: dict[str, int], pair: tuple[int, int], terms: int) -> int:
    """Bytes of shared memory at most: both matrices and the summands of a row, bfloat16.

    Compiled (Triton 3.6 and 3.9): exact where A = B = 128, which is 96 KiB for a bfloat16 row and
    128 KiB for a float32 one; less where they are smaller.
    """
    a, b = tile["A"], tile["B"]
    return 2 * (b * b + (a * a if pair[0] > 1 else 0) + terms * a * b)


def row_tile(width: int, block: int, packed: bool) -> dict[str, int]:
    """Blocks A in a row, places B in a block, columns ORDER of it, warps and stages.

    A and B are powers of two that a product can take. A rotation needs registers for two blocks;
    its loop must not be pipelined, or every operand of a row is staged in shared memory as well.
    """
    split = 2 if packed else 1
    if block:
        pair = hadamard.factors(block)
        assert pair is not None
        order, b = pair[1], max(16, triton.next_power_of_2(pair[1]))
        a = max(16, split * triton.next_power_of_2(width // split // order))
    else:
        a, order = split, triton.next_power_of_2(width // split)
        b = order
    values = a * b
    warps = (4 if values <= 4096 else 8) if block else min(16, max(1, values // 512))
    return {"A": a, "B": b, "ORDER": order, "num_warps": warps, "num_stages": 1}


def launch_row(
    x: Tensor,
    steps: Prologue,
    form: Form,
    y: Tensor | None,
    gate: Tensor | None,
    out: Tensor | None = None,
    inverse: bool = False,
) -> Quantised:
    """The codes; with ``out`` the values in its dtype instead, and empty codes."""
    width = x.shape[-1]
    left = right = None
    if steps.block:
        pair = hadamard.factors(steps.block)
        assert pair is not None
        right = hadamard_matrix(pair[1], x.device, inverse)
        left = hadamard_matrix(pair[0], x.device, inverse) if pair[0] > 1 else None
    given = arguments(x, steps, form, y, gate)
    signs = given["signs"]
    result = allocate(x if out is None else x[:0], form, False)
    stream = None if y is None else torch.empty_like(x)
    if given["rows"]:
        with on_device(x):
            _row[(_programs(x, given["rows"], right is not None),)](
                **given,
                streamed=stream,
                left=left,
                right=right,
                out=out,
                codes=result.codes,
                scales=result.scale,
                zeros=result.zero,
                sums=result.sums,
                part=width // 2 if form.packed else width,
                sign_rows=1 if signs is None else signs.numel() // width,
                root=float(steps.block or 1) ** -0.5,
                SIGNS_LAST=inverse,
                QMAX=form.qmax,
                BITS=form.bits,
                PACKED=form.packed,
                TERMS=summands(x),
                **row_tile(width, steps.block, form.packed),
                enable_fp_fusion=False,
            )
    return replace(result, stream=stream)


def summands(x: Tensor) -> int:
    """bfloat16 summands that a rotation takes a value as: its own precision, or 2^-17 of it."""
    return 1 if x.dtype == torch.bfloat16 else 2


def _programs(x: Tensor, rows: int, matrices: bool) -> int:
    """A program a row; where each first loads matrices, only as many as run at once."""
    if not matrices:
        return rows
    if not x.is_cuda:
        return min(rows, 3)
    return min(rows, 4 * torch.cuda.get_device_properties(x.device).multi_processor_count)
