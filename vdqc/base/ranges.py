"""Ranges chosen by error: how far to clip so that the squared quantisation error is least.

Source: Banner et al., arXiv 1810.05723, section 3; search by grid as in Li et al., BRECQ, arXiv
2102.05426.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.diagnostics import InputError
from vdqc.base.scheme import GranularityKind, QuantSpec

#: Shares of the full range that a search tries, besides the full range itself.
CLIP_RATIOS = tuple(round(0.3 + 0.02 * i, 2) for i in range(35))


def clipped_range(
    x: Tensor, spec: QuantSpec, ratios: tuple[float, ...] = CLIP_RATIOS
) -> tuple[Tensor, Tensor]:
    """Least and greatest value per scale after the clipping that minimises the squared error.

    Searches ``ratio · range`` for each scale on its own; shapes as ``numerics.value_range``. Never
    worse than the full range, which is a candidate.
    """
    low, high = numerics.value_range(x, spec)
    best = _squared_error(x, low, high, spec)
    best_low, best_high = low, high
    for ratio in ratios:
        error = _squared_error(x, low * ratio, high * ratio, spec)
        better = error < best
        best = torch.where(better, error, best)
        best_low = torch.where(better, low * ratio, best_low)
        best_high = torch.where(better, high * ratio, best_high)
    return best_low, best_high


def percentile_range(values: Tensor, percentile: float) -> tuple[Tensor, Tensor]:
    """The range that holds the central ``percentile`` % of ``values``: scalars.

    Half of what is left out lies on each side, as far as there is a side: the range keeps 0.
    Raises InputError for a percentile outside (50, 100].
    """
    if not 50.0 < percentile <= 100.0:
        raise InputError(f"expected a percentile above 50 and up to 100, got {percentile:g}")
    ordered = values.flatten().sort().values
    skipped = int((1 - percentile / 100) / 2 * ordered.numel())
    return ordered[skipped], ordered[ordered.numel() - 1 - skipped]


def _squared_error(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> Tensor:
    """Sum of squared errors per scale, shaped like ``low``."""
    scale, zero_point = numerics.scale_from_range(low, high, spec)
    value = x.to(scale.dtype)
    error = numerics.fake_quantize(value, scale, zero_point, spec).sub_(value).square_()
    if spec.granularity.kind is GranularityKind.TENSOR:
        return error.sum()
    return numerics.group_view(error, spec).sum(-1).reshape(low.shape)
