"""Which option every group takes: a multiple-choice knapsack, solved as an integer program.

::

    least  Σ_g Σ_c a[g,c]·x[g,c]     x[g,c] in {0, 1},  Σ_c x[g,c] = 1 for every group g
    where  Σ_g Σ_c b[g,c]·x[g,c] <= limit of b          for error, bytes and time

Axes are brought down one after the other: the least error, then the least bytes at that error, then
the least time at both. An option that another of its group beats on every axis is left out first.

Error: proved within ``GAP`` of the least, relative; limits are kept exactly.
Source: Sinha and Zoltners, "The multiple-choice knapsack problem", Operations Research 27, 1979;
Huangfu and Hall, HiGHS, Math. Prog. Comp. 10, 2018, through ``scipy.optimize.milp``.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, final

from vdqc.base.diagnostics import InputError

Axis = Literal["error", "bytes", "us"]

#: Relative distance to the least value that counts as least: 0.0004 dB.
GAP = 1e-4
#: Share by which sums may differ because they were added up in another order.
_ROUNDING = 1e-12
#: How often a limit is tightened where the solver's tolerance let a choice slip over it.
_ROUNDS = 8


@final
@dataclass(frozen=True)
class Option:
    """What one way of doing a group costs; of a choice or its limits: the sums over groups."""

    error: float
    bytes: float
    us: float


UNLIMITED = Option(math.inf, math.inf, math.inf)


def solve(
    groups: Sequence[Sequence[Option]],
    limits: Option = UNLIMITED,
    order: Sequence[Axis] = ("error", "bytes", "us"),
) -> list[int] | None:
    """Index of the option of each group that is least on the first axis, ties by the next.

    None if nothing keeps to ``limits``.
    """
    kept = [undominated(group) for group in groups]
    options = [[asdict(group[i]) for i in at] for group, at in zip(groups, kept, strict=True)]
    bounds: dict[str, float] = asdict(limits)
    for axis in bounds:  # what even the least option of a group takes is no choice
        least = [min(option[axis] for option in group) for group in options]
        rounding = _ROUNDING * (abs(bounds[axis]) + sum(map(abs, least)))
        bounds[axis] += rounding - sum(least)
        for group, smallest in zip(options, least, strict=True):
            for option in group:
                option[axis] -= smallest
    chosen: list[int] | None = None
    for axis in order:
        found = _least(options, axis, bounds)
        if found is None:
            break  # only the first axis can be out of reach: later ones have a choice already
        chosen = found
        spent = sum(group[i][axis] for group, i in zip(options, chosen, strict=True))
        bounds[axis] = min(bounds[axis], spent * (1 + GAP))
    if chosen is None:
        return None
    return [at[i] for at, i in zip(kept, chosen, strict=True)]


def total(groups: Sequence[Sequence[Option]], choice: Sequence[int]) -> Option:
    """The sums over the options that are chosen."""
    taken = [group[i] for group, i in zip(groups, choice, strict=True)]
    return Option(
        sum(o.error for o in taken), sum(o.bytes for o in taken), sum(o.us for o in taken)
    )


def undominated(group: Sequence[Option]) -> list[int]:
    """Indices of the options that no other is as good as on every axis; of equals the first."""
    order = sorted(range(len(group)), key=lambda i: (_key(group[i]), i))
    kept: list[int] = []
    for i in order:  # whatever beats an option comes before it
        mine = _key(group[i])
        if not any(all(a <= b for a, b in zip(_key(group[j]), mine, strict=True)) for j in kept):
            kept.append(i)
    return sorted(kept)


def _key(option: Option) -> tuple[float, float, float]:
    return option.error, option.bytes, option.us


def _least(
    options: Sequence[Sequence[dict[str, float]]], axis: str, bounds: dict[str, float]
) -> list[int] | None:
    """The choice with the least sum along ``axis`` that keeps to ``bounds``, exactly."""
    asked = dict(bounds)
    for _ in range(_ROUNDS):
        choice = _program(options, axis, asked)
        if choice is None:
            return None
        over = {}
        for name, bound in bounds.items():
            spent = sum(group[i][name] for group, i in zip(options, choice, strict=True))
            if spent > bound:
                over[name] = spent - bound
        if not over:
            return choice
        for name, excess in over.items():
            asked[name] -= 2 * excess
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints debugging lines to stdout for some models, where results alone belong."""
    flush = getattr(ctypes.CDLL(None), "fflush", None) if os.name == "posix" else None
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        if flush is not None:
            flush(None)  # what C still holds in its buffer
        os.dup2(kept, 1)
        os.close(kept)


def _program(
    options: Sequence[Sequence[dict[str, float]]], axis: str, bounds: dict[str, float]
) -> list[int] | None:
    """One run of HiGHS, with rows and objective scaled to what its tolerances are made for."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    flat = [option for group in options for option in group]
    owner = [g for g, group in enumerate(options) for _ in group]
    count = len(flat)
    which = csr_array((np.ones(count), (owner, range(count))), shape=(len(options), count))
    rows, low, high = [which], [np.ones(len(options))], [np.ones(len(options))]
    allowed = np.ones(count)
    for name, bound in bounds.items():
        if math.isinf(bound):
            continue
        values = np.array([option[name] for option in flat])
        allowed[values > bound] = 0  # nothing is negative: it alone is too much
        values = np.where(values > bound, 0.0, values)
        scale = max(float(values.max()), bound) or 1.0
        rows.append(csr_array(values[None] / scale))
        low.append(np.array([-np.inf]))
        high.append(np.array([bound / scale]))
    if any(not allowed[[g == i for g in owner]].any() for i in range(len(options))):
        return None
    constraint = LinearConstraint(vstack(rows), np.concatenate(low), np.concatenate(high))
    cost = allowed * np.array([option[axis] for option in flat])

    def run(factor: float, whole: int, gap: float) -> tuple[float, Any] | None:
        with _silent():
            result = milp(
                cost * factor,
                integrality=np.full(count, whole),
                bounds=Bounds(0, allowed),
                constraints=constraint,
                options={"mip_rel_gap": gap},
            )
        if result.status == 2:
            return None
        if result.x is None:
            raise InputError(f"the solver stopped without an answer: {result.message}")
        return float(result.fun) / factor, result.x

    relaxed = run(1 / (float(cost.max(initial=0.0)) or 1.0), 0, 0.0)
    if relaxed is None:
        return None
    # the solver stops at an absolute gap of 1e-6 too: let the least sum be far above that
    smallest = float(cost[cost > 0].min(initial=1.0))
    found = run(10 / max(relaxed[0], smallest), 1, GAP / 2)
    if found is None:
        return None
    starts = np.cumsum([0, *(len(group) for group in options)])
    return [int(found[1][start:stop].argmax()) for start, stop in itertools.pairwise(starts)]
