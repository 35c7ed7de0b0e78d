"""How the elements of a loss become one number, in one piece or chunk by chunk."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Reduction(enum.StrEnum):
    """``mean`` over all elements, ``row`` summed over the last axis and averaged over the others,
    ``sum`` over all.

    Rows are tokens of an output, distributions of a relation, queries of an attention map.
    """

    MEAN = "mean"
    ROW = "row"
    SUM = "sum"


def divisor(shape: Sequence[int], reduction: Reduction) -> int:
    """What the sum over all elements of a tensor of ``shape`` is divided by."""
    if reduction is Reduction.SUM:
        return 1
    return max(1, math.prod(shape if reduction is Reduction.MEAN else shape[:-1]))


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """``values`` as one number."""
    return values.sum() / divisor(values.shape, reduction)


def widened(value: Tensor) -> Tensor:
    """``value`` in float32, or float64 if it is: half precision cannot hold a sum of squares."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
