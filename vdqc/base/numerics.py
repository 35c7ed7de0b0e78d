"""The mathematics that passes, kernels and tests share: scales, codes, ranges, error measures.

Pure functions on tensors; no graph, no state. Codes are exact integers held in an integer tensor
or, inside ``fake_quantize``, in the float type of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.base.planes import binary_planes
from vdqc.base.scheme import GranularityKind, QuantSpec

#: Largest relative RMS error that "equal" allows, by compute dtype. The only tolerance in vdqc.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 2e-2,
}

#: Values that are worked on at a time: they stay in a core's cache (measured, sqnr_db of a bfloat16
#: weight: 2,150 MB/s, and 81 MB/s with pieces of 2**22).
_CHUNK = 2**17

#: What two programs that differ in float rounding in front of a quantiser may differ by, in units
#: of the quantisation noise: from each other, and in distance to the float model. A value at the
#: edge of two codes falls to either side, and every flip is another draw of the noise.
REDRAWN_NOISE = 1.5
REDRAWN_DISTANCE = 1.15

#: Smallest scale kept: an all-zero row quantises to zeros instead of dividing by zero.
MIN_SCALE = 1e-12


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of ``expected``, in float64; 0 where both are all zero."""
    a, e = actual.detach().flatten(), expected.detach().flatten()
    norm = difference = 0.0
    for part in range(0, e.numel(), _CHUNK):  # a whole weight in float64 would be four copies of it
        left, right = a[part : part + _CHUNK].double(), e[part : part + _CHUNK].double()
        norm += float(torch.dot(right, right))
        left = left - right
        difference += float(torch.dot(left, left))
    return math.sqrt(difference / norm) if norm > 0 else math.sqrt(difference)


def sqnr_db(actual: Tensor, expected: Tensor) -> float:
    """Signal to quantisation noise, in dB: 10 log10(|expected|² / |actual - expected|²)."""
    error = relative_error(actual, expected)
    return float("inf") if error == 0 else -20 * math.log10(error)


def group_view(x: Tensor, spec: QuantSpec) -> Tensor:
    """``x`` with its last axis split so that one scale serves the last axis of the result.

    ``[N, K] -> [N, K / size, size]`` for groups, ``x`` itself otherwise.
    """
    if spec.granularity.kind is not GranularityKind.GROUP:
        return x
    size = spec.granularity.size
    if x.shape[-1] % size:
        raise InputError(
            f"groups of {size} do not divide {x.shape[-1]} input channels",
            "choose a group size that divides every width, or none",
        )
    return x.unflatten(-1, (-1, size))


def value_range(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Least and greatest value per scale, shaped as ``Granularity`` documents."""
    view = group_view(x, spec)
    if spec.granularity.kind is GranularityKind.TENSOR:
        return view.amin(), view.amax()
    low, high = view.amin(-1, keepdim=True), view.amax(-1, keepdim=True)
    if spec.granularity.kind is GranularityKind.GROUP:
        return low.squeeze(-1), high.squeeze(-1)
    return low, high


def scale_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover ``[low, high]``; float32 (float64 if the range is).

    Symmetric: scale = max(|low|, |high|) / qmax and no zero point. Asymmetric: the range is first
    widened to hold 0, scale = (high - low) / (qmax - qmin), zero point = round(-low / scale).
    """
    if low.dtype != torch.float64:
        low, high = low.float(), high.float()
    if spec.symmetric:
        return (torch.maximum(low.abs(), high.abs()) / spec.qmax).clamp_min(MIN_SCALE), None
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp_min(MIN_SCALE)
    return scale, (-low / scale).round().clamp(spec.qmin, spec.qmax)


def nearest(x: Tensor, spec: QuantSpec, *, whole: bool = False) -> Tensor:
    """``x`` rounded to nearest over its own range; ``whole`` as for weights that meet codes."""
    scale, zero_point = scale_from_range(*value_range(x, spec), spec)
    if whole:
        scale = whole_multiples(scale, spec)
    return fake_quantize(x, scale, zero_point, spec)


def whole_multiples(scale: Tensor, spec: QuantSpec) -> Tensor:
    """Group scales[N, groups], rounded up to whole multiples of one scale per row.

    A code times its multiple then still fits an int8, so that an integer GEMM sums over all groups.
    With codes up to ``qmax`` there are 127 // qmax multiples: 18 for int4. Below eight (6 bits and
    more), and with zero points, the scales stay as they are. Rounding up clips nothing.

    Source: Lin et al., QServe, arXiv 2405.04532, section 4.1 (progressive group quantisation).
    """
    if not has_whole_multiples(spec):
        return scale
    limit = 127 // spec.qmax
    base = scale.amax(-1, keepdim=True) / limit
    return base * (scale / base - 1e-5).ceil().clamp(1, limit)


def has_whole_multiples(spec: QuantSpec) -> bool:
    """True where ``whole_multiples`` makes group scales such."""
    grouped = spec.granularity.kind is GranularityKind.GROUP
    return grouped and spec.symmetric and not spec.dtype.is_float and 127 // spec.qmax >= 8


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes of ``x``: round-half-even(x / scale) + zero point, clamped.

    Shape of ``x``; int8, or uint8 if asymmetric; fp8 gives ``torch.float8_e4m3fn``.
    """
    view = group_view(x, spec)
    per_group = spec.granularity.kind is GranularityKind.GROUP
    s = scale.unsqueeze(-1) if per_group else scale
    scaled = view.to(s.dtype) / s
    if spec.dtype.is_float:
        codes = scaled.clamp(spec.qmin, spec.qmax).to(torch.float8_e4m3fn)
        return codes.reshape(x.shape)
    codes = scaled.round()
    if zero_point is not None:
        codes = codes + (zero_point.unsqueeze(-1) if per_group else zero_point)
    codes = codes.clamp(spec.qmin, spec.qmax)
    return codes.to(torch.int8 if spec.symmetric else torch.uint8).reshape(x.shape)


def by_rows(
    function: Callable[[Tensor, Tensor, Tensor | None, QuantSpec], Tensor],
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
) -> Tensor:
    """``quantize`` or ``fake_quantize`` of float[N, K], some rows at a time: the same bits.

    Measured on a bfloat16 weight of 5120 x 5120, two cores: 2,760 MB/s instead of 177.
    """
    rows = max(1, _CHUNK * torch.get_num_threads() // x.shape[-1])
    if x.ndim != 2 or len(x) <= rows or spec.planes or x.requires_grad:
        return function(x, scale, zero_point, spec)

    def part(value: Tensor, start: int) -> Tensor:
        return value[start : start + rows] if value.ndim > 0 and len(value) == len(x) else value

    return torch.cat(
        [
            function(
                x[start : start + rows],
                part(scale, start),
                None if zero_point is None else part(zero_point, start),
                spec,
            )
            for start in range(0, len(x), rows)
        ]
    )


def plane_parts(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(integers times scale, amplitudes, signs) of a weight with binary planes.

    As ``group_view`` shapes it, amplitudes with a last axis of one; in the dtype of ``scale``.
    """
    plain = replace(spec, planes=0)
    wide = x.to(scale.dtype)
    view = group_view(wide, spec)
    base = group_view(fake_quantize(wide, scale, zero_point, plain), spec)
    return base, *binary_planes(view - base, spec.planes)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """(codes - zero point) · scale, in the dtype of ``scale``; shape of ``codes``."""
    per_group = spec.granularity.kind is GranularityKind.GROUP
    values = group_view(codes, spec).to(scale.dtype)
    if zero_point is not None:
        values = values - (zero_point.unsqueeze(-1) if per_group else zero_point)
    return (values * (scale.unsqueeze(-1) if per_group else scale)).reshape(codes.shape)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """``dequantize(quantize(x))`` bit for bit, rounded to the dtype of x; contiguous.

    Works on one temporary in place: the codes never leave the float type that holds them exactly.
    Binary planes of ``spec`` are added.
    """
    if spec.planes:
        base, amplitudes, signs = plane_parts(x, scale, zero_point, spec)
        for amplitude, sign in zip(amplitudes, signs, strict=True):
            base = base + amplitude * sign
        return base.reshape(x.shape).to(x.dtype).contiguous()
    if spec.dtype.is_float:
        codes = quantize(x, scale, zero_point, spec)
        return dequantize(codes, scale, zero_point, spec).to(x.dtype).contiguous()
    per_group = spec.granularity.kind is GranularityKind.GROUP
    s = scale.unsqueeze(-1) if per_group else scale
    values = (group_view(x, spec).to(s.dtype) / s).round_()
    if zero_point is None:
        values = values.clamp_(spec.qmin, spec.qmax)
    else:
        z = zero_point.unsqueeze(-1) if per_group else zero_point
        values = values.add_(z).clamp_(spec.qmin, spec.qmax).sub_(z)
    return values.mul_(s).reshape(x.shape).to(x.dtype).contiguous()
