"""Fused activation quantisers that walk along rows in steps: any length, with a low-rank branch.

A program takes some rows and walks along them two or three times: for the norm, for the range of
the values (and their product with the down-projection, on the same block), for the codes. Only the
first walk reads main memory, as long as the rows that are being worked on fit the L2 cache.

Means and squares of a layer norm are merged step by step; no difference of large sums is taken.

Error: codes equal those of the reference wherever the values before them do; see ``steps``. The
down-projection multiplies in the dtype of ``down``.
Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2 (the branch shares the load); Chan et
al., "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.base import hadamard
from vdqc.kernels.gpu.device import (
    asymmetric_codes,
    asymmetric_scale,
    exact_dot,
    magnitude,
    ordered,
    symmetric_codes,
    symmetric_scale,
)
from vdqc.kernels.gpu.operands import (
    FLOATS,
    Form,
    Quantised,
    allocate,
    arguments,
    hadamard_matrix,
)
from vdqc.kernels.gpu.runtime import on_device, operand
from vdqc.kernels.gpu.steps import activate, affine, deviation, residual
from vdqc.kernels.prologue import Prologue

#: Greatest order of a Hadamard block, and of a step with a product in it.
ORDER_LIMIT = 128
#: Greatest rank of the low-rank branch.
RANK_LIMIT = 32


@triton.jit
def _values(
    x, y, gate, weight, bias, scale, shift, smooth, signs, post, matrix,
    mean, rstd, start, limit, index, live, width, order, root,
    gate_every, gate_stride, scale_every, scale_stride, shift_every, shift_stride,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, TERMS: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """(values before the quantiser, columns, mask) of columns ``start`` ... of some rows."""
    place, row = tl.arange(0, B)[None, :], index.to(tl.int64)
    column = start + place
    known = (place < order) & (column < limit)
    real = live & known
    gate_base = (index // gate_every).to(tl.int64) * gate_stride
    value = residual(x, y, gate, row * width, gate_base, column, real, "")
    if NORM == "layer":
        value = value - mean
    if NORM != "none":
        value = value * rstd
    scale_base = (index // scale_every).to(tl.int64) * scale_stride
    shift_base = (index // shift_every).to(tl.int64) * shift_stride
    value = affine(
        value, weight, bias, scale, shift, column, scale_base, shift_base, known, real, False
    )
    value = activate(value, smooth, signs, column, 0, known, real, ACTIVATION)
    if matrix is not None:
        value = exact_dot(value, matrix, TERMS) * root
        if post is not None:
            value = value * tl.load(post + column, mask=known, other=0.0).to(tl.float32)
    return value, column, real


@triton.jit
def _steps(  # noqa: C901 - decided at compilation
    x, y, gate, streamed, weight, bias, scale, shift, smooth, signs, post, clip, right, down,
    codes, scales, zeros, sums, low,
    rows, width, part, rank,
    gate_every, gate_stride, scale_every, scale_stride, shift_every, shift_stride,
    eps, root,
    NORM: tl.constexpr, ACTIVATION: tl.constexpr, QMAX: tl.constexpr, BITS: tl.constexpr,
    PACKED: tl.constexpr, TERMS: tl.constexpr, ROWS: tl.constexpr, B: tl.constexpr,
    ORDER: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    row, live = index.to(tl.int64), index < rows
    place = tl.arange(0, B)
    matrix = None
    if right is not None:
        square = (place < ORDER)[:, None] & (place < ORDER)[None, :]
        matrix = tl.load(right + place[:, None] * ORDER + place[None, :], mask=square, other=0.0)

    # first walk: the norm, and the stream
    mean = tl.zeros((ROWS, 1), tl.float32)
    squares = tl.zeros((ROWS, 1), tl.float32)
    if NORM != "none" or streamed is not None:
        for start in range(0, width, ORDER):
            column = start + place[None, :]
            known = (place[None, :] < ORDER) & (column < width)
            real = live & known
            gate_base = (index // gate_every).to(tl.int64) * gate_stride
            value = residual(x, y, gate, row * width, gate_base, column, real, "")
            if streamed is not None:
                tl.store(
                    streamed + row * width + column, value.to(streamed.dtype.element_ty), mask=real
                )
            if NORM == "layer":
                count = tl.minimum(width - start, ORDER) * 1.0
                step_mean = tl.div_rn(tl.sum(value, 1, keep_dims=True), count)
                value = tl.where(known, value - step_mean, 0.0)
                moved = step_mean - mean
                share = tl.div_rn(count, start + count)
                mean += moved * share
                squares += moved * moved * (start * share)
            squares += tl.sum(value * value, 1, keep_dims=True)
    rstd = deviation(squares, width, eps)

    # second walk: the range of the values, and the branch
    least = tl.zeros((ROWS, 1), tl.int32)
    most = tl.zeros((ROWS, 1), tl.int32)
    if low is not None:
        column_of_rank = tl.arange(0, R)
        branch = tl.zeros((ROWS, R), tl.float32)
    for start in range(0, width, ORDER):
        value, column, real = _values(
            x, y, gate, weight, bias, scale, shift, smooth, signs, post, matrix,
            mean, rstd, start, width, index, live, width, ORDER, root,
            gate_every, gate_stride, scale_every, scale_stride, shift_every, shift_stride,
            NORM, ACTIVATION, TERMS, B,
        )  # fmt: skip
        if zeros is not None:
            bits = ordered(value)
            least = tl.minimum(least, tl.min(bits, 1, keep_dims=True))
            most = tl.maximum(most, tl.max(bits, 1, keep_dims=True))
        else:
            most = tl.maximum(most, tl.max(magnitude(value), 1, keep_dims=True))
        if low is not None:
            inner = start + place[:, None]
            fits = (place[:, None] < ORDER) & (inner < width) & (column_of_rank[None, :] < rank)
            factor = tl.load(down + inner * rank + column_of_rank[None, :], mask=fits, other=0.0)
            branch = tl.dot(
                value.to(factor.dtype), factor, branch, input_precision="ieee",
                out_dtype=tl.float32,
            )  # fmt: skip
    if low is not None:
        low_at = row * rank + column_of_rank[None, :]
        kept = live & (column_of_rank[None, :] < rank)
        tl.store(low + low_at, branch.to(low.dtype.element_ty), mask=kept)

    # third walk: the codes
    zero = least
    if zeros is not None:
        step, inverse, finite, zero = asymmetric_scale(least, most, clip, BITS)
        tl.store(zeros + row, tl.where(finite, zero - 2 ** (BITS - 1), 0), mask=live)
    else:
        step, inverse, finite = symmetric_scale(most, clip, QMAX)
    tl.store(scales + row, step, mask=live)
    total = tl.zeros((ROWS, 1), tl.int32)
    SPLIT: tl.constexpr = 2 if PACKED else 1
    for start in range(0, part, ORDER):
        packed = tl.zeros((ROWS, B), tl.int32)
        for half in tl.static_range(SPLIT):
            value, column, real = _values(
                x, y, gate, weight, bias, scale, shift, smooth, signs, post, matrix,
                mean, rstd, start + half * part, (half + 1) * part, index, live, width, ORDER, root,
                gate_every, gate_stride, scale_every, scale_stride, shift_every, shift_stride,
                NORM, ACTIVATION, TERMS, B,
            )  # fmt: skip
            if zeros is not None:
                code = asymmetric_codes(value, step, inverse, finite, zero, clip, BITS)
            else:
                code = symmetric_codes(value, step, inverse, finite, clip, QMAX)
            if sums is not None:
                total += tl.sum(tl.where(real, code, 0), 1, keep_dims=True)
            if PACKED:
                packed |= (code & 15) << (4 * half)
            else:
                tl.store(codes + row * width + column, code.to(tl.int8), mask=real)
        if PACKED:
            column = start + place[None, :]
            real = live & (place[None, :] < ORDER) & (column < part)
            tl.store(codes + row * part + column, packed.to(tl.uint8), mask=real)
    if sums is not None:
        tl.store(sums + row, total, mask=live)


def takes_steps(width: int, steps: Prologue) -> bool:
    """True if the rotation, if there is one, is of blocks that one step holds."""
    if not steps.block:
        return True
    pair = hadamard.factors(steps.block) if width % steps.block == 0 else None
    return pair is not None and pair[0] == 1 and pair[1] <= ORDER_LIMIT


def launch_steps(
    x: Tensor, steps: Prologue, form: Form, y: Tensor | None, gate: Tensor | None
) -> Quantised:
    """The codes of rows of any length; packed ones of rows whose halves are whole steps."""
    width = x.shape[-1]
    result = allocate(x, form, y is not None)
    down, rank = form.down, 0
    if down is not None:
        down = operand("down", down, FLOATS, (width, None), x.device)
        rank = down.shape[1]
    given = arguments(x, steps, form, y, gate)
    if not given["rows"]:
        return result
    tile = step_tile(width, steps.block, rank, form.packed)
    right = hadamard_matrix(steps.block, x.device) if steps.block else None
    with on_device(x):
        _steps[(triton.cdiv(given["rows"], tile["ROWS"]),)](
            **given,
            streamed=result.stream,
            right=right,
            down=down if rank else None,
            codes=result.codes,
            scales=result.scale,
            zeros=result.zero,
            sums=result.sums,
            low=result.low if rank else None,
            part=width // 2 if form.packed else width,
            rank=rank,
            root=float(steps.block or 1) ** -0.5,
            QMAX=form.qmax,
            BITS=form.bits,
            PACKED=form.packed,
            TERMS=1 if x.dtype == torch.bfloat16 else 2,
            R=max(16, triton.next_power_of_2(rank)),
            **tile,
            enable_fp_fusion=False,
        )
    return result


def step_tile(width: int, block: int, rank: int, packed: bool) -> dict[str, int]:
    """Rows of a program, places B and columns ORDER of a step, and how it is compiled.

    Without a limit ptxas aims at 128 registers where there is a rotation, and spills.
    """
    if block:
        place = max(16, triton.next_power_of_2(block))
        tile = {
            "ROWS": 16,
            "B": place,
            "ORDER": block,
            "num_warps": 4,
            "maxnreg": 232 if packed else 168,
        }
    elif rank:
        order = max(16, min(128, triton.next_power_of_2(width)))
        tile = {"ROWS": 16, "B": order, "ORDER": order, "num_warps": 8}
    else:
        order = min(4096, triton.next_power_of_2(width // 2 if packed else width))
        tile = {"ROWS": 1, "B": order, "ORDER": order, "num_warps": 8}
    return tile | {"num_stages": 2}
