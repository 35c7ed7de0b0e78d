"""Activation quantisers and rotations on a GPU: which kernel takes what.

=============== =================================================================================
quantize_line   rows up to 16384 in registers, without a rotation
quantize_row    the same with one: Hadamard blocks up to 128, or one Kronecker product
quantize_steps  longer rows; low-rank branches; Hadamard blocks up to 128
both            other combinations: the values go through memory once, in float32
torch           rotations that neither takes, or that need more shared memory than there is
=============== =================================================================================

Error: codes equal those of the reference wherever the values before them do; see ``steps``.
Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2 (one read of x for codes and branch).
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import MIN_SCALE
from vdqc.base.packing import pack
from vdqc.kernels.gpu.device import whole
from vdqc.kernels.gpu.operands import FLOATS, Form, Quantised
from vdqc.kernels.gpu.quantize_line import launch_line, takes_line
from vdqc.kernels.gpu.quantize_row import launch_row, takes_row
from vdqc.kernels.gpu.quantize_steps import launch_steps, takes_steps
from vdqc.kernels.gpu.runtime import on_device, operand
from vdqc.kernels.prologue import Prologue, gated_residual, prologue


@triton.jit
def _static(x, codes, scale, zero, width, chunks, qmin, qmax, per_row, BLOCK: tl.constexpr):
    row = tl.program_id(0) // chunks
    column = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * width + column
    value = tl.load(x + at, mask=column < width, other=0.0).to(tl.float32)
    value = tl.div_rn(value, tl.load(scale + row * per_row))
    value = tl.where(value == value, value, 0.0)
    moved = tl.load(zero + row * per_row) if zero is not None else 0
    # clamped before it is rounded: the bounds are whole
    low, high = (qmin - moved) * 1.0, (qmax - moved) * 1.0
    value = tl.minimum(tl.maximum(value, low), high)
    tl.store(codes + at, (whole(value) + moved).to(tl.int8), mask=column < width)


def symmetric(
    x: Tensor, qmax: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` on a GPU."""
    if not per_tensor:
        found = quantise_rows(x, Prologue(), Form(qmax, sums=False, clip=clip))
        return found.codes, found.scale
    ends = torch.stack(torch.aminmax(x)).float()
    top = ends.abs().amax().reshape([1] * x.ndim)
    if clip is not None:
        top = top * clip.float().reshape(())
    scale = _over(top, qmax).clamp_min(MIN_SCALE)
    return static(x, scale, None, -qmax, qmax), scale


def asymmetric(
    x: Tensor, bits: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize_rows_asym`` on a GPU."""
    if not per_tensor:
        form = Form(0, bits, asymmetric=True, sums=False, clip=clip)
        found = quantise_rows(x, Prologue(), form)
        assert found.zero is not None
        return found.codes, found.scale, found.zero
    ends = [end.float().reshape([1] * x.ndim) for end in torch.aminmax(x)]
    if clip is not None:
        ends = [end * clip.float().reshape(()) for end in ends]
    low, high = ends[0].clamp_max(0), ends[1].clamp_min(0)
    half, qmax = 2 ** (bits - 1), 2**bits - 1
    scale = _over(high - low, qmax).clamp_min(MIN_SCALE)
    zero = (-low / scale).round().clamp(0, qmax) - half
    zero = torch.where(scale.isfinite(), zero, 0.0).to(torch.int32)
    return static(x, scale, zero, -half, half - 1), scale, zero


def _over(value: Tensor, divisor: int) -> Tensor:
    # on a GPU torch multiplies by the reciprocal of a number, which may round otherwise
    return value / torch.full_like(value, divisor)


def per_row(x: Tensor, scale: Tensor) -> bool:
    """True if ``static`` takes this scale: one for all of x, or one a row."""
    return scale.numel() == 1 or scale.shape == (*x.shape[:-1], 1)


def static(x: Tensor, scale: Tensor, zero: Tensor | None, qmin: int, qmax: int) -> Tensor:
    """``quantize_static`` on a GPU, for the scales of ``per_row``."""
    x = operand("x", x, FLOATS)
    scale = operand("scale", scale, torch.float32, device=x.device)
    if zero is not None:
        zero = operand("zero_point", zero.expand(scale.shape), torch.int32, device=x.device)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel() == 0:
        return codes
    rowwise = scale.numel() > 1
    width = x.shape[-1] if rowwise else x.numel()
    block = min(triton.next_power_of_2(width), 4096)
    chunks = triton.cdiv(width, block)
    with on_device(x):
        _static[(x.numel() // width * chunks,)](
            x, codes, scale, zero, width, chunks, qmin, qmax, int(rowwise),
            BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes


def quantise_rows(
    x: Tensor, steps: Prologue, form: Form, y: Tensor | None = None, gate: Tensor | None = None
) -> Quantised:
    """Codes of ``prologue(x)``, or of ``prologue(x + gate * y)`` together with that stream.

    Shapes without a kernel of their own take two: one writes the values in float32, one reads them.
    """
    x = operand("x", x, FLOATS)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(f"x: expected rows [..., K] with K > 0, got {list(x.shape)}")
    width = x.shape[-1]
    if form.packed and not _packs(width, steps):
        found = quantise_rows(x, steps, replace(form, packed=False), y, gate)
        flat = pack(found.codes.reshape(-1, width), 4)
        return replace(found, codes=flat.reshape(*x.shape[:-1], -1))
    if form.down is None and takes_line(width, steps):
        return launch_line(x, steps, form, y, gate)
    if form.down is None and takes_row(width, steps, form.packed, x):
        return launch_row(x, steps, form, y, gate)
    if takes_steps(width, steps):
        return launch_steps(x, steps, form, y, gate)
    if takes_row(width, steps, x=x):
        value = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        stream = launch_row(x, steps, Form(0, sums=False), y, gate, value).stream
    else:
        stream = None if y is None else gated_residual(x, y, gate)
        value = prologue(x if stream is None else stream, steps)
    found = quantise_rows(value, Prologue(), form)
    low = None if found.low is None else found.low.to(x.dtype)
    return replace(found, stream=stream, low=low)


def rotate(x: Tensor, signs: Tensor, block: int, inverse: bool) -> Tensor | None:
    """``rotation`` on a GPU; None where no kernel takes these orders or this dtype."""
    width = x.shape[-1]
    pair = hadamard.factors(block) if block > 0 and width % block == 0 else None
    if pair is None or x.dtype not in FLOATS:
        return None
    # blocks that are Kronecker products themselves are taken as rows
    size = block if pair[0] > 1 else width
    steps = Prologue(signs=signs, block=block)
    if not takes_row(size, steps, x=x):
        return None
    rows = operand("x", x.reshape(-1, size), FLOATS)
    out = torch.empty_like(rows)
    launch_row(rows, steps, Form(0, sums=False), None, None, out, inverse)
    return out.reshape(x.shape)


def _packs(width: int, steps: Prologue) -> bool:
    """True if both halves of a row can be walked together, a whole number of blocks each."""
    pair = hadamard.factors(steps.block) if steps.block else (1, 1)
    return width % 8 == 0 and pair is not None and (width // 2) % pair[1] == 0
