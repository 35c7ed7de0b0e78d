"""Codes of activations, with what comes before them in the same pass over memory.

================================ ================================================================
fused_quantize[_asym]            ``prologue(x)``
residual_quantize[_asym]         ``prologue(stream)``, ``stream = x + gate * y``, which is returned
================================ ================================================================

``prologue`` (``vdqc.kernels.prologue``): norm, modulation, activation, smoothing, rotation.

============ ====================== ==========================================================
x, y         float[..., K]
gate         None, float            broadcasts to x: ``[B, 1, K]``, or one row a token
down         None, float[K, R]      down-projection of a low-rank branch, R <= 32
bits         2 ... 8                packed: at most 4
clip         None, one float        ends of every row's range are multiplied by it
-> stream    dtype[..., K]          the sum in float32, rounded once to the dtype of x; the norm
                                    reads the rounded one, as does whatever comes later
-> codes     i8[..., K]             as ``quantize_rows``; packed: u8[..., ceil(K / 2)], the layout
                                    of ``vdqc.base.packing`` at four bits
-> scale     f32[..., 1]
-> zero      i32[..., 1]            _asym only; shifted like the codes
-> row_sum   i32[..., 1]            of the codes; for weights with zero points
-> low       dtype[..., R]          values before the codes times ``down``; R = 0 without it
============ ====================== ==========================================================

Codes, scale and zero are what ``int8_linear`` and ``packed_linear`` take. A row with a NaN or an
infinity has a scale that is one and codes 0.

Error: without norm, activation and rotation codes are equal on every target. These round as each
target does (float32, relative 1e-6): a value at the edge of two codes falls to either side, less
than 0.2 % of codes by one. A rotation on a GPU takes the values of a bfloat16 row as bfloat16, as a
rotation of its own would: measured 6 to 8 % of 8-bit codes by one, which is 1.5 % more noise
(``REDRAWN_NOISE`` allows 50 %). ``low`` on a GPU multiplies in the dtype of ``down``.
Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2 (one read of x for codes and branch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError
from vdqc.base.packing import pack, packed_bytes
from vdqc.base.target import Target
from vdqc.kernels.base import FLOAT_FORMAT, Cost, define
from vdqc.kernels.prologue import Prologue, gated_residual, prologue
from vdqc.kernels.quantize_rows import quantize_rows, quantize_rows_asym

#: Greatest rank of the low-rank branch.
RANK_LIMIT = 32


@final
@dataclass(frozen=True)
class QuantizeProblem:
    """Rows to quantise: ``rows`` of ``width`` values, with what comes before.

    Attributes:
        block: order of the Hadamard blocks, 0 for none.
        rank: of the low-rank branch, 0 for none.
        modulation_rows: rows of scale and shift that are read.
    """

    rows: int
    width: int
    dtype: torch.dtype
    bits: int = 8
    packed: bool = False
    residual: bool = False
    block: int = 0
    rank: int = 0
    modulation_rows: int = 0


def fused_quantize(
    x: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    activation: str,
    smooth: Tensor | None,
    signs: Tensor | None,
    block: int,
    down: Tensor | None,
    bits: int,
    packed: bool,
    post: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, row_sum, low): the truth; see the module's text."""
    steps = Prologue(
        norm, norm_weight, norm_bias, eps, mod_scale, mod_shift, activation, smooth, signs, block,
        post,
    )  # fmt: skip
    value = prologue(x, steps)
    codes, scale = quantize_rows(value, _qmax(bits, packed), False, clip)
    return _stored(codes, packed), scale, _row_sum(codes), _low(value, down, x.dtype)


def fused_quantize_asym(
    x: Tensor,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    activation: str,
    smooth: Tensor | None,
    signs: Tensor | None,
    block: int,
    down: Tensor | None,
    bits: int,
    packed: bool,
    post: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(codes, scale, zero, row_sum, low): the truth; see the module's text."""
    steps = Prologue(
        norm, norm_weight, norm_bias, eps, mod_scale, mod_shift, activation, smooth, signs, block,
        post,
    )  # fmt: skip
    _qmax(bits, packed)
    value = prologue(x, steps)
    codes, scale, zero = quantize_rows_asym(value, bits, False, clip)
    return _stored(codes, packed), scale, zero, _row_sum(codes), _low(value, down, x.dtype)


def residual_quantize(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    activation: str,
    smooth: Tensor | None,
    signs: Tensor | None,
    block: int,
    down: Tensor | None,
    bits: int,
    packed: bool,
    post: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(stream, codes, scale, row_sum, low): the truth; see the module's text."""
    stream = gated_residual(x, y, gate).contiguous()
    return stream, *fused_quantize(
        stream, norm, norm_weight, norm_bias, eps, mod_scale, mod_shift, activation, smooth,
        signs, block, down, bits, packed, post, clip,
    )  # fmt: skip


def residual_quantize_asym(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mod_scale: Tensor | None,
    mod_shift: Tensor | None,
    activation: str,
    smooth: Tensor | None,
    signs: Tensor | None,
    block: int,
    down: Tensor | None,
    bits: int,
    packed: bool,
    post: Tensor | None = None,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(stream, codes, scale, zero, row_sum, low): the truth; see the module's text."""
    stream = gated_residual(x, y, gate).contiguous()
    return stream, *fused_quantize_asym(
        stream, norm, norm_weight, norm_bias, eps, mod_scale, mod_shift, activation, smooth,
        signs, block, down, bits, packed, post, clip,
    )  # fmt: skip


def _qmax(bits: int, packed: bool) -> int:
    if not 2 <= bits <= (4 if packed else 8):
        limit = "4 if packed" if packed else "8"
        raise InputError(f"expected codes of 2 to {limit} bits, got {bits}")
    return 2 ** (bits - 1) - 1


def _stored(codes: Tensor, packed: bool) -> Tensor:
    width = codes.shape[-1]
    if not packed:
        return codes
    if width % 8:
        return pack(codes.reshape(-1, width), 4).reshape(*codes.shape[:-1], -1)
    low, high = codes.chunk(2, -1)  # what ``pack`` does, in ops that a compiler sees through
    return ((low & 15) | (high << 4)).view(torch.uint8)


def _row_sum(codes: Tensor) -> Tensor:
    return codes.sum(-1, keepdim=True, dtype=torch.int32)


def _low(value: Tensor, down: Tensor | None, dtype: torch.dtype) -> Tensor:
    if down is None:
        return value.new_empty((*value.shape[:-1], 0), dtype=dtype)
    return (value @ down.to(value.dtype)).to(dtype)


# The functions below take the arguments of the ops by position: [y, gate,] then the steps, down,
# bits, packed; post and clip are left out where they are None.
_STEPS = 10


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    down, _, packed = rest[_STEPS : _STEPS + 3]
    lead, width = x.shape[:-1], x.shape[-1]
    scale = torch.float64 if x.dtype == torch.float64 else torch.float32
    if packed:
        codes = x.new_empty([*lead, packed_bytes(4, width)], dtype=torch.uint8)
    else:
        codes = x.new_empty([*lead, width], dtype=torch.int8)
    return (
        codes,
        x.new_empty([*lead, 1], dtype=scale),
        x.new_empty([*lead, 1], dtype=torch.int32),
        x.new_empty([*lead, 0 if down is None else down.shape[1]]),
    )


def _fake_asym(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    codes, scale, row_sum, low = _fake(x, *rest)
    return codes, scale, torch.empty_like(row_sum), row_sum, low


def _fake_residual(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_fake(x, *rest[2:])


def _fake_residual_asym(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_fake_asym(x, *rest[2:])


def _cuda(reference: Callable[..., Any], residual: bool, asymmetric: bool) -> Callable[..., Any]:
    def route(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        if x.dtype == torch.float64:
            return reference(x, *rest)
        from vdqc.kernels.gpu.operands import Form
        from vdqc.kernels.gpu.quantize import quantise_rows

        y, gate, *rest = rest if residual else (None, None, *rest)  # type: ignore[assignment]
        steps, (down, bits, packed, *more) = rest[:_STEPS], rest[_STEPS:]
        post, clip = [*more, None, None][:2]
        if down is not None and not 0 < down.shape[1] <= RANK_LIMIT:
            raise InputError(f"down: expected a rank of 1 to {RANK_LIMIT}, got {down.shape[1]}")
        form = Form(_qmax(bits, packed), bits, asymmetric, packed, True, down, clip)
        found = quantise_rows(x, Prologue(*[*steps, post]), form, y, gate)
        low = x.new_empty((*x.shape[:-1], 0)) if found.low is None else found.low
        results = (found.stream, found.codes, found.scale, found.zero, found.sums, low)
        return tuple(result for result in results if result is not None)

    return route


def _supports(problem: QuantizeProblem, target: Target) -> str | None:
    if not 2 <= problem.bits <= 8:
        return f"{problem.bits} bits are outside 2 ... 8"
    if problem.packed and (problem.bits > 4 or problem.width % 8):
        return "two codes share a byte only at 4 bits and in rows of whole eights"
    if problem.rank > RANK_LIMIT:
        return f"rank {problem.rank} is above {RANK_LIMIT}"
    if problem.dtype == torch.float64 and target.device != "cpu":
        return "float64 has no kernel"
    if problem.block and (problem.width % problem.block or not hadamard.factors(problem.block)):
        return f"no Hadamard blocks of {problem.block} tile {problem.width} channels"
    return None


def _cost(problem: QuantizeProblem) -> Cost:
    size, values = problem.dtype.itemsize, float(problem.rows * problem.width)
    moved = size + (0.5 if problem.packed else 1.0) + (2 * size if problem.residual else 0)
    rows = problem.rows * (8 + problem.rank * size) + problem.modulation_rows * problem.width * 8
    pair = hadamard.factors(problem.block) if problem.block else None
    products = 2.0 * values * (problem.rank + (sum(pair) if pair else 0))
    return Cost({FLOAT_FORMAT[problem.dtype]: products}, values * moved + rows)


FUSED_QUANTIZE, FUSED_QUANTIZE_ASYM, RESIDUAL_QUANTIZE, RESIDUAL_QUANTIZE_ASYM = (
    define(
        reference.__name__,
        reference=reference,
        fake=fake,
        cuda=_cuda(reference, "residual" in reference.__name__, "asym" in reference.__name__),
        supports=_supports,
        cost=_cost,
        spelled={"cpu": reference},
    )
    for reference, fake in (
        (fused_quantize, _fake),
        (fused_quantize_asym, _fake_asym),
        (residual_quantize, _fake_residual),
        (residual_quantize_asym, _fake_residual_asym),
    )
)
