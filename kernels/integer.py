"""The exact integer matmul that every quantised linear rests on, and the arithmetic around it.

``int8_matmul``: ``codes i8[M, K], weight i8[N, K] -> i32[M, N]``; ``packed_matmul`` unpacks 2 to
7-bit weights first, once per call. On a CPU both are ``torch._int_mm``. They are opaque to the
compiler on purpose: Inductor, when it sees ``_int_mm`` under a scale, rewrites it into an oneDNN
call that runs a reference loop on machines without AMX (measured 500 times slower), and it compiles
the shifts of an unpack badly (measured 3 to 5 times slower than eager). On a GPU both are Triton
kernels, which the linears do not call: there the arithmetic that follows is in the same kernel.

Error: none while K <= 131072 (127 * 127 * K < 2^31).
Source: oneDNN through torch; measured at the peak of AVX512-VNNI for M >= 1024.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vdqc.base.diagnostics import InputError
from vdqc.base.packing import unpack
from vdqc.kernels.base import define

#: Greatest K for which every intermediate of a corrected sum fits an int32.
MAX_K = 32768


def int8_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """The sums of products, in 64-bit arithmetic on the way."""
    return (codes.double() @ weight.double().T).to(torch.int32)


def _int8_matmul_cpu(codes: Tensor, weight: Tensor) -> Tensor:
    if codes.numel() == 0 or weight.numel() == 0:
        return codes.new_zeros(codes.shape[0], weight.shape[0], dtype=torch.int32)
    if codes.shape[1] == 1:  # measured: _int_mm returns uninitialised memory here (torch 2.13)
        return codes.to(torch.int32) * weight.T.to(torch.int32)
    return torch._int_mm(codes, weight.T)


def _fake_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=torch.int32)


def _int8_matmul_cuda(codes: Tensor, weight: Tensor) -> Tensor:
    from vdqc.kernels.gpu import gemm

    return gemm.int8_matmul(codes, weight)


def unpack_weight(
    packed: Tensor, bits: int, width: int, multiplier: Tensor | None, binary: bool = False
) -> Tensor:
    """int8[N, width] from packed codes; column groups times ``multiplier`` i8[N, groups].

    ``binary``: a 5-bit code 2 q + b stands for ``16 q + multiplier (2b - 1)``, a 4-bit weight with
    a plane of residual signs.
    """
    weight = unpack(packed, bits, width)
    if multiplier is None:
        return weight
    weight, factor = weight.unflatten(-1, (multiplier.shape[-1], -1)), multiplier.unsqueeze(-1)
    if binary:
        return ((weight >> 1) * 16 + (2 * (weight & 1) - 1) * factor).flatten(-2)
    return (weight * factor).flatten(-2)


def packed_matmul(
    codes: Tensor, packed: Tensor, bits: int, multiplier: Tensor | None, binary: bool = False
) -> Tensor:
    """``codes i8[M, K], packed u8[N, bits K / 8] -> i32[M, N]``; see ``unpack_weight``.

    Every weight, that is code times multiplier, fits an int8.
    """
    return int8_matmul(codes, unpack_weight(packed, bits, codes.shape[1], multiplier, binary))


def _packed_matmul_cpu(
    codes: Tensor, packed: Tensor, bits: int, multiplier: Tensor | None, binary: bool = False
) -> Tensor:
    weight = unpack_weight(packed, bits, codes.shape[1], multiplier, binary)
    return _int8_matmul_cpu(codes, weight)


def _packed_matmul_cuda(
    codes: Tensor, packed: Tensor, bits: int, multiplier: Tensor | None, binary: bool = False
) -> Tensor:
    from vdqc.kernels.gpu import packed_gemm

    return packed_gemm.packed_matmul(codes, packed, bits, multiplier, binary)


def _fake_packed(
    codes: Tensor, packed: Tensor, bits: int, multiplier: Tensor | None, binary: bool = False
) -> Tensor:
    return _fake_matmul(codes, packed)


INT8_MATMUL = define(
    "int8_matmul",
    reference=int8_matmul,
    fake=_fake_matmul,
    cpu=_int8_matmul_cpu,
    cuda=_int8_matmul_cuda,
)
PACKED_MATMUL = define(
    "packed_matmul",
    reference=packed_matmul,
    fake=_fake_packed,
    cpu=_packed_matmul_cpu,
    cuda=_packed_matmul_cuda,
)


def dequantize_weight(
    packed: Tensor, bits: int, width: int, weight_scale: Tensor, weight_zero_point: Tensor | None
) -> Tensor:
    """scale.dtype[N, width] = (code - zero point) * scale; scale and zero point ``[N, groups]``."""
    codes = unpack(packed, bits, width).to(weight_scale.dtype)
    codes = codes.unflatten(-1, (weight_scale.shape[-1], -1))
    if weight_zero_point is not None:
        codes = codes - weight_zero_point.unsqueeze(-1)
    return (codes * weight_scale.unsqueeze(-1)).flatten(-2)


def corrected(
    total: Tensor,
    codes: Tensor,
    zero_point: Tensor | None,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    row_sum: Tensor | None = None,
) -> Tensor:
    """Sum over k of (a - za)(w - zw) from ``total`` = sum of a w, all in int32.

    codes i8[M, K], zero_point i32[M | 1, 1], weight_zero_point i32[N], weight_sum i32[N] (sum of w
    over k), row_sum i32[M, 1] (sum of a over k, computed if not given). A sum that wraps on the way
    is right in the end, because the result fits (K <= MAX_K).
    """
    if zero_point is not None:
        assert weight_sum is not None
        shifted = weight_sum
        if weight_zero_point is not None:
            shifted = weight_sum - codes.shape[-1] * weight_zero_point
        total = total - zero_point * shifted
    if weight_zero_point is not None:
        if row_sum is None:
            row_sum = codes.sum(-1, keepdim=True, dtype=torch.int32)
        total = total - row_sum * weight_zero_point
    return total


def finished(
    value: Tensor,
    dtype: torch.dtype,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """``residual + gate * act(value + down · upᵀ)`` in the dtype of ``value``, then ``dtype``.

    ``activation`` is ``none`` or ``gelu_tanh``. ``gate[..., N]`` is broadcast over rows;
    ``residual`` is shaped as the result; ``down[..., R]`` (the input through the first factor of a
    low-rank branch) and ``up[N, R]`` have R = 1, 16 or 32 on a GPU.
    """
    if down is not None and up is not None:
        value = value + down.to(value.dtype) @ up.to(value.dtype).T
    if activation == "gelu_tanh":
        value = functional.gelu(value, approximate="tanh")
    elif activation != "none":
        raise InputError(f"activation: expected none or gelu_tanh, got {activation}")
    if gate is not None:
        value = value * gate
    if residual is not None:
        value = value + residual
    return value.to(dtype)


def flat_rows(x: Tensor) -> Tensor:
    """``[..., K]`` as ``[M, K]``."""
    return x.reshape(-1, x.shape[-1])
