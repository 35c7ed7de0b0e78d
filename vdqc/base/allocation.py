"""Where bits go: which rows of a weight, or which layers, get more of them at a fixed mean.

A row's error is that of its output: of rounding it to nearest, under the second moment of its
inputs. Its saliency is its kurtosis, mean (w - mean)^4 / std^4: 3 for a Gaussian row, more the
heavier its tails. ``outlier_split`` gives k = N / 10 rows at a time from the top one more bit and
as many from the bottom one fewer, as long as the output error falls, so that the mean stays.
``spend`` buys bits one step at a time where a bit lowers the error most, up to a budget.

Source: Feng et al., MPQ-DM, arXiv 2412.11549 (kurtosis split); Shoham and Gersho, IEEE TASSP 36,
1988 (greedy allocation on the convex hull).
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.rounding import output_error
from vdqc.base.scheme import QuantSpec

#: Rows that a split moves at a time: one in so many.
SHARE = 10


def kurtosis(weight: Tensor) -> Tensor:
    """float64[N]: of each row of float[N, K]; 0 for a row without spread."""
    centred = weight.double() - weight.double().mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    fourth = centred.pow(4).mean(-1)
    return torch.where(variance > 0, fourth / variance.square().clamp_min(1e-300), 0.0)


def row_errors(weight: Tensor, spec: QuantSpec | None, moment: Tensor | None) -> Tensor:
    """float[N]: output error of each row, rounded to nearest over its whole range."""
    assert spec is not None
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return row_size(wide - numerics.nearest(wide, spec), moment)


def row_size(value: Tensor, moment: Tensor | None) -> Tensor:
    """float[N]: mean square of the output of each row."""
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    return wide.square().sum(-1) if moment is None else output_error(wide.to(moment.dtype), moment)


def outlier_split(saliency: Tensor, errors: Tensor, largest: int) -> tuple[Tensor, int]:
    """(choice int64[N] of 0, 1, 2; groups moved) that a split by saliency settles on.

    ``errors`` float[3, N]: output error of each row with a bit fewer, as it is, and with one more.
    All sizes up to ``largest`` tenths are tried.
    """
    rows = len(saliency)
    step = rows // SHARE
    order = saliency.argsort(stable=True)
    best, least, moved = torch.ones(rows, dtype=torch.int64), float(errors[1].sum()), 0
    for groups in range(1, min(largest, rows // step // 2 if step else 0) + 1):
        choice = torch.ones(rows, dtype=torch.int64)
        choice[order[: groups * step]] = 0
        choice[order[rows - groups * step :]] = 2
        error = float(errors.gather(0, choice[None]).sum())
        if error < least:
            best, least, moved = choice, error, groups
    return best, moved


def spend(errors: Tensor, costs: Tensor, budget: float) -> Tensor | None:
    """int64[N]: which of C ways each of N items gets, for the least sum of errors within a budget.

    ``errors``, ``costs``: float[C, N], costs rising along C. The items' cheapest ways are bought
    first, then steps along each item's convex hull in order of error saved per cost, skipping those
    that no longer fit. None if not even the cheapest ways fit.
    """
    ways, items = errors.shape
    choice = torch.zeros(items, dtype=torch.int64)
    spent = float(costs[0].sum())
    slack = 1e-9 * max(1.0, abs(budget))
    if spent > budget + slack:
        return None
    e, c = errors.double().tolist(), costs.double().tolist()
    waiting: list[tuple[float, int, int, int]] = []

    def offer(item: int, now: int) -> None:
        """The steepest step up from ``now``."""
        slopes = [
            ((e[now][item] - e[way][item]) / max(c[way][item] - c[now][item], 1e-300), way)
            for way in range(now + 1, ways)
            if e[way][item] < e[now][item]
        ]
        if slopes:
            slope, way = max(slopes, key=lambda pair: (pair[0], -pair[1]))
            heapq.heappush(waiting, (-slope, item, now, way))

    for item in range(items):
        offer(item, 0)
    while waiting:
        _, item, now, way = heapq.heappop(waiting)
        price = c[way][item] - c[now][item]
        if spent + price > budget + slack:
            continue
        spent += price
        choice[item] = way
        offer(item, way)
    return choice
