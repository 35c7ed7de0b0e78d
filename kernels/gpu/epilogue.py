"""From int32 sums to the result of a linear, in registers: what every integer GEMM ends with.

::

    sum -= za (sum_w - K zw) + sum_a zw                      zero points, in integers
    y    = sum * s_a * s_w + bias + down · upᵀ               low-rank branch of rank 1, 16 or 32
    y    = residual + gate * act(y)                          then rounded to the result's dtype

``Epilogue`` carries the pointers as one argument; None switches a step off at compile time.

Error: the float part is float32 with fused multiply-add, so its last bit may differ from torch.
A scale of zero or NaN follows IEEE: 0 gives ``bias``, NaN spreads over its row or column.
Source: Jacob et al., arXiv 1712.05877, section 2.3; low-rank branch: Li et al., SVDQuant, arXiv
2411.05007, section 4.2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.kernels.gpu.device import gelu_tanh
from vdqc.kernels.gpu.runtime import operand

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("none", "gelu_tanh")
RANKS = (1, 16, 32)
#: Compile-time arguments of an empty ``Epilogue``: the sums themselves are written.
NO_END = {"ACTIVATION": "none", "RANK": 1}


class Epilogue(NamedTuple):
    """Pointers that ``finish`` reads; None where there is nothing to do.

    ``row_step`` is 0 for one scale of all rows, else 1; ``gate_rows`` rows share a row of ``gate``.
    """

    scale: Any = None
    row_step: Any = None
    zero_point: Any = None
    weight_scale: Any = None
    weight_zero_point: Any = None
    weight_sum: Any = None
    row_sum: Any = None
    bias: Any = None
    gate: Any = None
    gate_rows: Any = None
    residual: Any = None
    down: Any = None
    up: Any = None


@triton.jit
def finish(
    total, rows, cols, n_rows, n_cols, depth, e, ACTIVATION: tl.constexpr, RANK: tl.constexpr
):
    """float32 block of results from the int32 block ``total``."""
    row_ok = rows < n_rows
    col_ok = cols < n_cols
    if e.weight_zero_point is not None:
        wide = tl.load(e.weight_zero_point + cols, mask=col_ok, other=0)
        sums = tl.load(e.row_sum + rows, mask=row_ok, other=0)
        total -= sums[:, None] * wide[None, :]
    if e.zero_point is not None:
        shifted = tl.load(e.weight_sum + cols, mask=col_ok, other=0)
        if e.weight_zero_point is not None:
            shifted -= depth * tl.load(e.weight_zero_point + cols, mask=col_ok, other=0)
        moved = tl.load(e.zero_point + rows * e.row_step, mask=row_ok, other=0)
        total -= moved[:, None] * shifted[None, :]
    y = total.to(tl.float32) * tl.load(e.scale + rows * e.row_step, mask=row_ok, other=0.0)[:, None]
    y *= tl.load(e.weight_scale + cols, mask=col_ok, other=0.0)[None, :]
    if e.bias is not None:
        y += tl.load(e.bias + cols, mask=col_ok, other=0.0).to(tl.float32)[None, :]
    if e.down is not None:
        y += _low_rank(rows, cols, row_ok, col_ok, e, RANK)
    if ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if e.gate is not None:
        at = (rows // e.gate_rows)[:, None] * n_cols + cols[None, :]
        y *= tl.load(e.gate + at, mask=row_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
    if e.residual is not None:
        at = rows[:, None].to(tl.int64) * n_cols + cols[None, :]
        wanted = row_ok[:, None] & col_ok[None, :]
        y += tl.load(e.residual + at, mask=wanted, other=0.0).to(tl.float32)
    return y


@triton.jit
def _low_rank(rows, cols, row_ok, col_ok, e, RANK: tl.constexpr):
    if RANK == 1:
        left = tl.load(e.down + rows, mask=row_ok, other=0.0).to(tl.float32)
        right = tl.load(e.up + cols, mask=col_ok, other=0.0).to(tl.float32)
        branch = left[:, None] * right[None, :]
    else:
        inner = tl.arange(0, RANK)
        at = rows[:, None] * RANK + inner[None, :]
        left = tl.load(e.down + at, mask=row_ok[:, None], other=0.0)
        at = cols[None, :] * RANK + inner[:, None]
        right = tl.load(e.up + at, mask=col_ok[None, :], other=0.0)
        branch = tl.dot(left, right, input_precision="tf32x3", out_dtype=tl.float32)
    return branch


@triton.jit
def tile_of(
    index, n_rows, n_cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """Row and column of tile number ``index``: ``GROUP`` rows of tiles at a time, so that the tiles
    that run together share their operands in L2.
    """
    down = tl.cdiv(n_rows, BLOCK_M)
    across = tl.cdiv(n_cols, BLOCK_N)
    first = index // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = index % (GROUP * across)
    return first + inside % height, inside // height


@triton.jit
def write_tile(
    total,
    out,
    row,
    col,
    n_rows,
    n_cols,
    depth,
    e,
    SWAPPED: tl.constexpr,
    SLICES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
):
    """Finish and write the int32 block ``total`` whose first element is at ``row``, ``col``.

    SWAPPED: its rows are output channels. SLICES: runs of its columns (1, 2, 4) are written after
    each other, because a wide tile with gate and residual does not fit in registers at once.
    """
    if SLICES == 1:
        _write(total, out, row, col, n_rows, n_cols, depth, e, SWAPPED, ACTIVATION, RANK)
    else:
        HALF: tl.constexpr = total.shape[1] // 2
        left, right = _halves(total)
        _write_half(
            left, out, row, col, n_rows, n_cols, depth, e, SWAPPED, SLICES, ACTIVATION, RANK
        )
        if SWAPPED:
            row += HALF
        else:
            col += HALF
        _write_half(
            right, out, row, col, n_rows, n_cols, depth, e, SWAPPED, SLICES, ACTIVATION, RANK
        )


@triton.jit
def _halves(block):
    """The first and the second half of the columns."""
    apart = tl.reshape(block, (block.shape[0], 2, block.shape[1] // 2))
    return tl.split(tl.permute(apart, (0, 2, 1)))


@triton.jit
def _write_half(
    total,
    out,
    row,
    col,
    n_rows,
    n_cols,
    depth,
    e,
    SWAPPED: tl.constexpr,
    SLICES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
):
    if SLICES == 2:
        _write(total, out, row, col, n_rows, n_cols, depth, e, SWAPPED, ACTIVATION, RANK)
    else:
        HALF: tl.constexpr = total.shape[1] // 2
        left, right = _halves(total)
        _write(left, out, row, col, n_rows, n_cols, depth, e, SWAPPED, ACTIVATION, RANK)
        if SWAPPED:
            row += HALF
        else:
            col += HALF
        _write(right, out, row, col, n_rows, n_cols, depth, e, SWAPPED, ACTIVATION, RANK)


@triton.jit
def _write(
    total,
    out,
    row,
    col,
    n_rows,
    n_cols,
    depth,
    e,
    SWAPPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
):
    if SWAPPED:
        total = tl.trans(total)
    rows = row + tl.arange(0, total.shape[0])
    cols = col + tl.arange(0, total.shape[1])
    if e.scale is not None:
        total = finish(total, rows, cols, n_rows, n_cols, depth, e, ACTIVATION, RANK)
    at = rows[:, None].to(tl.int64) * n_cols + cols[None, :]
    wanted = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=wanted)


def epilogue(
    codes: Tensor,
    n: int,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    row_sum: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> tuple[Epilogue, dict[str, Any]]:
    """Checked operands of ``finish`` and its compile-time arguments.

    ``row_sum`` is computed from ``codes[..., K]`` where it is needed and not given. Raises
    InputError for operands that do not fit ``codes`` and ``n`` output channels.
    """
    lead, device = codes.shape[:-1], codes.device
    rows = lead.numel()
    _check(rows, scale, zero_point, weight_sum, activation)
    if weight_zero_point is None:
        row_sum = None
    elif row_sum is None:
        row_sum = codes.sum(-1, dtype=torch.int32)
    elif row_sum.numel() != rows:
        raise InputError(f"row_sum: expected {rows} values, got {row_sum.numel()}")
    rank = _rank(down, up)
    gate_rows = None
    if gate is not None:
        gate, gate_rows = _rows_of_gate(gate, lead, n)
    pointers = Epilogue(
        scale=operand("scale", scale, torch.float32, None, device),
        row_step=int(scale.numel() != 1 or rows == 1),
        zero_point=_maybe("zero_point", zero_point, torch.int32, None, device),
        weight_scale=operand("weight_scale", weight_scale, torch.float32, (n,), device),
        weight_zero_point=_maybe("weight_zero_point", weight_zero_point, torch.int32, (n,), device),
        weight_sum=_maybe(
            "weight_sum", None if zero_point is None else weight_sum, torch.int32, (n,), device
        ),
        row_sum=_maybe("row_sum", row_sum, torch.int32, None, device),
        bias=_maybe("bias", bias, FLOATS, (n,), device),
        gate=_maybe("gate", gate, FLOATS, None, device),
        gate_rows=gate_rows,
        residual=_maybe("residual", residual, FLOATS, (*lead, n), device),
        down=_maybe("down", down, FLOATS, (*lead, rank), device),
        up=_maybe("up", up, FLOATS, (n, rank), device),
    )
    return pointers, {"ACTIVATION": activation, "RANK": rank}


def _check(
    rows: int,
    scale: Tensor,
    zero_point: Tensor | None,
    weight_sum: Tensor | None,
    activation: str,
) -> None:
    if activation not in ACTIVATIONS:
        raise InputError(f"activation: expected {' or '.join(ACTIVATIONS)}, got {activation}")
    if scale.numel() not in (1, rows):
        raise InputError(f"scale: expected 1 or {rows} values, got {scale.numel()}")
    if zero_point is None:
        return
    if zero_point.numel() != scale.numel():
        raise InputError(
            f"zero_point: expected {scale.numel()} values like scale, got {zero_point.numel()}"
        )
    if weight_sum is None:
        raise InputError("weight_sum: expected i32[N] beside zero_point, got None")


def _rank(down: Tensor | None, up: Tensor | None) -> int:
    if down is None and up is None:
        return 1
    if down is None or up is None:
        raise InputError("down and up: expected both or neither, got one")
    rank = down.shape[-1]
    if rank not in RANKS or down.dtype != up.dtype:
        raise InputError(
            f"down and up: expected one dtype and rank 1, 16 or 32, got {down.dtype}, {up.dtype} "
            f"and rank {rank}"
        )
    return rank


def types(dtype: str = "*bf16", **given: Any) -> Epilogue:
    """The argument's type for offline compilation: per-row scales, and whatever is ``given``."""
    base: dict[str, Any] = {"scale": "*fp32", "row_step": 1, "weight_scale": "*fp32"}
    words = {"zero_point": "*i32", "weight_zero_point": "*i32", "weight_sum": "*i32"}
    words |= {"row_sum": "*i32", "gate_rows": "i32"}
    return Epilogue(
        **base, **{n: words.get(n, dtype) if v is True else v for n, v in given.items()}
    )


def _maybe(name: str, tensor: Tensor | None, *rest: Any) -> Tensor | None:
    return None if tensor is None else operand(name, tensor, *rest)


def _rows_of_gate(gate: Tensor, lead: torch.Size, n: int) -> tuple[Tensor, int]:
    """``gate`` as ``[G, N]`` and the number of rows that share one of them."""
    try:
        whole = torch.broadcast_shapes(gate.shape, (*lead, n))
    except RuntimeError:
        whole = ()
    if tuple(whole) != (*lead, n):
        raise InputError(f"gate: expected a shape that fits {[*lead, n]}, got {list(gate.shape)}")
    gate = gate.reshape(*[1] * (len(lead) + 1 - gate.ndim), *gate.shape)
    kept = len(lead)
    while kept and gate.shape[kept - 1] == 1:
        kept -= 1
    # kept: the axes that vary come first; a broadcast axis in front of one that varies is expanded
    gate = gate.expand(*lead[:kept], *[1] * (len(lead) - kept), n)
    if gate.numel() >= 2**31:  # its offsets are 32 bits wide
        raise InputError(f"gate: expected fewer than 2^31 values, got {gate.numel()}")
    return gate.reshape(-1, n), max(int(torch.Size(lead[kept:]).numel()), 1)


#: What a model's linears use: all that can follow the sums.
ENDS: Mapping[str, dict[str, Any]] = {
    "plain": {"end": types(bias=True)},
    "gelu": {"end": types(bias=True), "activation": "gelu_tanh"},
    "zero": {
        "end": types(
            bias=True, zero_point=True, weight_sum=True, weight_zero_point=True, row_sum=True
        )
    },
    "gated": {"end": types(bias=True, gate=True, gate_rows=True, residual=True)},
    "rank1": {"end": types(bias=True, down=True, up=True), "rank": 1},
    "rank32": {"end": types(bias=True, down=True, up=True), "rank": 32},
}
