"""Codes and scales of activations, computed at run time or with a scale from calibration.

=================== =======================================================================
quantize_rows       ``x[..., K] -> codes i8[..., K], scale[..., 1]``, one scale per row or
                    per tensor (then ``scale[1, ..., 1]``)
quantize_rows_asym  the same with ``zero_point i32[..., 1]``
quantize_static     ``x[..., K], scale, zero_point -> codes i8[..., K]``
=================== =======================================================================

``clip``: what the ends of every range are multiplied by, one number; None covers them.

Unsigned codes 0 ... 2^b - 1 are kept as signed ones, code - 2^(b-1), with the zero point moved
along, so that one signed GEMM serves both. Scales are float32 (float64 for a float64 input).

A row that holds a NaN or an infinity has a scale that is one, codes 0 and zero point 0: what a
linear makes of it is NaN, as in float. ``quantize_static`` has no such channel: a NaN there becomes
the code of 0, an infinity the end of the range.

Error: none; the codes equal those of ``vdqc::fake_quantize``, on every target.
Source: dynamic per-token scales: Yao et al., ZeroQuant, arXiv 2206.01861, section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.base.numerics import MIN_SCALE
from vdqc.kernels.base import define


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _clipped(end: Tensor, clip: Tensor | None) -> Tensor:
    return end if clip is None else end * _wide(clip).reshape(())


def quantize_rows(
    x: Tensor, qmax: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric: scale = clip max|x| / qmax, codes = round-half-even(x / scale)."""
    wide = _wide(x)
    top = wide.abs().amax() if per_tensor else wide.abs().amax(-1, keepdim=True)
    top = _clipped(top, clip)
    scale = (top / qmax).clamp_min(MIN_SCALE)
    if per_tensor:
        scale = scale.reshape([1] * x.ndim)
    codes = (wide / scale).round().clamp(-qmax, qmax)
    return torch.where(scale.isfinite(), codes, 0.0).to(torch.int8), scale


def _symmetric_cuda(
    x: Tensor, qmax: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if x.dtype == torch.float64:
        return quantize_rows(x, qmax, per_tensor, clip)
    from vdqc.kernels.gpu.quantize import symmetric

    return symmetric(x, qmax, per_tensor, clip)


def _fake_rows(
    x: Tensor, qmax: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return _codes_like(x), _scale_like(x, per_tensor)


def quantize_rows_asym(
    x: Tensor, bits: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric over [min(x, 0), max(x, 0)] clip; codes and zero point are shifted by
    -2^(bits - 1).
    """
    wide, qmax, half = _wide(x), 2**bits - 1, 2 ** (bits - 1)
    if per_tensor:
        low, high = (end.reshape([1] * x.ndim) for end in (wide.amin(), wide.amax()))
    else:
        low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)
    low, high = _clipped(low, clip).clamp_max(0), _clipped(high, clip).clamp_min(0)
    scale = ((high - low) / qmax).clamp_min(MIN_SCALE)
    zero_point = (-low / scale).round().clamp(0, qmax)
    codes = ((wide / scale).round() + zero_point).clamp(0, qmax) - half
    finite = scale.isfinite()
    codes = torch.where(finite, codes, 0.0).to(torch.int8)
    return codes, scale, torch.where(finite, zero_point - half, 0.0).to(torch.int32)


def _asymmetric_cuda(
    x: Tensor, bits: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return quantize_rows_asym(x, bits, per_tensor, clip)
    from vdqc.kernels.gpu.quantize import asymmetric

    return asymmetric(x, bits, per_tensor, clip)


def _fake_rows_asym(
    x: Tensor, bits: int, per_tensor: bool, clip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    scale = _scale_like(x, per_tensor)
    return _codes_like(x), scale, torch.empty_like(scale, dtype=torch.int32)


def quantize_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """Codes for a known scale; ``zero_point`` (i32) and the code range are already shifted."""
    codes = (x.to(scale.dtype) / scale).round()
    codes = torch.where(codes.isnan(), 0.0, codes)
    if zero_point is not None:
        codes = codes + zero_point
    return codes.clamp(qmin, qmax).to(torch.int8).contiguous()


def _static_cuda(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    from vdqc.kernels.gpu.quantize import per_row, static

    if scale.dtype != torch.float32 or not per_row(x, scale):
        return quantize_static(x, scale, zero_point, qmin, qmax)
    return static(x, scale, zero_point, qmin, qmax)


def _fake_static(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    return _codes_like(x)


def _codes_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _scale_like(x: Tensor, per_tensor: bool) -> Tensor:
    shape = [1] * x.ndim if per_tensor else [*x.shape[:-1], 1]
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


QUANTIZE_ROWS = define(
    "quantize_rows",
    reference=quantize_rows,
    fake=_fake_rows,
    cuda=_symmetric_cuda,
    spelled={"cpu": quantize_rows},
)
QUANTIZE_ROWS_ASYM = define(
    "quantize_rows_asym",
    reference=quantize_rows_asym,
    fake=_fake_rows_asym,
    cuda=_asymmetric_cuda,
    spelled={"cpu": quantize_rows_asym},
)
QUANTIZE_STATIC = define(
    "quantize_static",
    reference=quantize_static,
    fake=_fake_static,
    cuda=_static_cuda,
    spelled={"cpu": quantize_static},
)
