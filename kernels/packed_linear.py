"""Linear with 2 to 7-bit weights kept packed, int8 activations.

Operands as ``int8_linear``, except

================== ======================= ===================================================
packed             u8[N, ceil(bits K / 8)]  ``vdqc.base.packing``: parts split along K
multiplier         i8[N, groups], None      whole-number scale of each group of K / groups columns
code_bits          8 or 4                   4: codes are packed too, u8[..., K / 2], 8 divides K
binary             bool                     bits = 5: q4 with a plane of residual signs, see below
================== ======================= ===================================================

Group scales that are whole multiples of one scale per output channel (|code * multiplier| <= 127)
stay in integers: the GEMM runs once over all of K. Other group scales go to ``group_linear``.

A weight of four bits with a binary residual, s1 q4 + s2 (2b - 1), needs no second product either:
with s2 / s1 rounded to c / 16, c a whole number in 1 ... 15, it is (s1 / 16) (16 q4 + c (2b - 1)),
a whole number of eight bits. ``binary``: the packed 5-bit code is 2 q4 + b, ``multiplier`` is c.

A layer whose rows have several widths is one call for each width: sort its rows by width (offline,
with the columns of what follows), and give each run of rows to its own ``packed_linear``; the
results lie side by side.

Codes of A4 may come packed (``code_bits`` 4; ``vdqc.base.packing`` with 4 bits).
Hopper has no int4 multiply: there A4 halves what is read and written, not the time.

Error: as ``int8_linear``; the integer part is exact.
Source: Lin et al., QServe, arXiv 2405.04532, section 4.1 (progressive group scales); the fold of a
binary residual is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.base.packing import packed_bytes, unpack
from vdqc.base.target import Target
from vdqc.kernels.base import Cost, LinearProblem, define
from vdqc.kernels.integer import (
    MAX_K,
    PACKED_MATMUL,
    corrected,
    finished,
    flat_rows,
    packed_matmul,
)


def _around(matmul: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The linear around the integer sums of ``matmul``."""

    def packed_linear(
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        packed: Tensor,
        bits: int,
        multiplier: Tensor | None,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        weight_sum: Tensor | None,
        bias: Tensor | None,
        dtype: torch.dtype,
        row_sum: Tensor | None = None,
        activation: str = "none",
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        down: Tensor | None = None,
        up: Tensor | None = None,
        code_bits: int = 8,
        binary: bool = False,
    ) -> Tensor:
        if code_bits == 4:
            wide = unpack(flat_rows(codes), 4, 2 * codes.shape[-1])
            codes = wide.reshape(*codes.shape[:-1], wide.shape[-1])
        elif code_bits != 8:
            raise InputError(f"code_bits: expected 4 or 8, got {code_bits}")
        total = matmul(flat_rows(codes), packed, bits, multiplier, binary)
        total = total.reshape(*codes.shape[:-1], packed.shape[0])
        total = corrected(total, codes, zero_point, weight_zero_point, weight_sum, row_sum)
        value = total.to(scale.dtype) * scale * weight_scale
        value = value if bias is None else value + bias
        return finished(value, dtype, activation, gate, residual, down, up)

    return packed_linear


packed_linear = _around(packed_matmul)  #: the truth: see the module's text
_spelled = _around(PACKED_MATMUL.op)


def _fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    bits: int,
    multiplier: Tensor | None,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *fused: Any,
    **named: Any,
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], packed.shape[0]], dtype=dtype)


def _cuda(codes: Tensor, scale: Tensor, *rest: Any, **named: Any) -> Tensor:
    if scale.dtype != torch.float32:  # models in float64: the integer part is a kernel all the same
        return _spelled(codes, scale, *rest, **named)
    from vdqc.kernels.gpu import packed_gemm

    return packed_gemm.packed_linear(codes, scale, *rest, **named)


def _supports(problem: LinearProblem, target: Target) -> str | None:
    if problem.weight is None or problem.input is None:
        return "an operand is in float"
    if problem.weight.dtype.is_float or problem.input.dtype.is_float:
        return f"{problem.weight.dtype} is not an integer format"
    if problem.weight.dtype.bits == 8:
        return "8-bit weights have nothing to unpack"
    if problem.weight.granularity.size and not problem.integer_groups:
        return "group scales are not whole multiples of a scale per channel"
    if "int8" not in target.peak:
        return f"{target} has no int8 multiply"
    return None if 0 < problem.k <= MAX_K else f"K = {problem.k} is outside 1 ... {MAX_K}"


def _cost(problem: LinearProblem) -> Cost:
    assert problem.weight is not None
    m, n, k = problem.m, problem.n, problem.k
    size = problem.dtype.itemsize
    # unpacking writes and reads int8[N, K], twice with group multipliers
    passes = 4 if problem.weight.granularity.size else 2
    ops = {"int8": 2.0 * m * n * k}
    read = n * packed_bytes(problem.weight.dtype.bits, k) + m * k * (size + 2)
    gpu = Cost(ops, read + m * n * size, calls=2.0)  # unpacked and summed in registers
    # the quantiser, the product
    return Cost(ops, read + passes * n * k + m * n * (8 + size), calls=2.0, gpu=gpu)


PACKED_LINEAR = define(
    "packed_linear",
    reference=packed_linear,
    fake=_fake,
    cpu=_spelled,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
    spelled={"cpu": _spelled},
)
