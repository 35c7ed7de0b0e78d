"""What a search found: choices and their costs, predicted and measured."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, final

from vdqc.engine.named import NamedRecipe
from vdqc.search.budget import Budget
from vdqc.search.cost import Way


@final
@dataclass(frozen=True)
class Point:
    """One choice and what it is predicted to cost; ``ways`` are those of the groups, in order."""

    ways: tuple[Way, ...]
    error: float
    bytes: int
    us: float

    @property
    def sqnr_db(self) -> float:
        """The predicted error in dB; inf for the float model."""
        return math.inf if self.error <= 0 else -10 * math.log10(self.error)

    @property
    def mix(self) -> str:
        """``w4a8 12, w8a8 3``: how many groups have which scheme."""
        counts = Counter(way.scheme for way in self.ways)
        return ", ".join(f"{scheme} {n}" for scheme, n in counts.most_common())


@final
@dataclass(frozen=True)
class Applied:
    """What a recipe did when it was carried out.

    Attributes:
        error: mean relative squared error of the model's output.
        bytes: of the weights of the lowered program.
        attention_us: predicted time of its attention sites.
    """

    error: float
    bytes: int
    attention_us: float = 0.0

    @property
    def sqnr_db(self) -> float:
        """The error in dB."""
        return math.inf if self.error <= 0 else -10 * math.log10(self.error)


@final
@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        groups: names of the sites of each group, in the order of ``Point.ways``.
        gains: of the groups: error of the output over local error.
        front: choices of least error by size or time, the chosen one among them.
        applied: the chosen one carried out on ``probes`` samples, or None if that was not asked.
        misses: what the applied recipe does not reach, one sentence each.
        density: of attention over frames, 1 where no less keeps the floor; None if not asked.
        attention_us_dense: predicted time of attention without it.
    """

    name: str
    target: str
    budget: Budget
    bytes_float: int
    us_float: float
    groups: tuple[tuple[str, ...], ...]
    gains: tuple[float, ...]
    chosen: Point
    front: tuple[Point, ...]
    recipe: NamedRecipe
    probes: int
    applied: Applied | None = None
    misses: tuple[str, ...] = ()
    density: float | None = None
    attention_us_dense: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; infinities become null."""
        groups = [
            {"sites": list(sites), "gain": gain, "scheme": way.scheme}
            | {"rotated": way.rotated, "smoothed": way.smoothed}
            for sites, gain, way in zip(self.groups, self.gains, self.chosen.ways, strict=True)
        ]
        applied = None
        if self.applied is not None:
            applied = {"sqnr_db": _finite(self.applied.sqnr_db), "bytes": self.applied.bytes}
        return {
            "name": self.name,
            "target": self.target,
            "budget": self.budget.text,
            "bytes_float": self.bytes_float,
            "us_float": self.us_float,
            "predicted": _figures(self.chosen),
            "measured": applied,
            "samples": self.probes,
            "misses": list(self.misses),
            "density": self.density,
            "front": [_figures(point) for point in self.front],
            "groups": groups,
            "recipe": self.recipe.to_json(),
        }


def _figures(point: Point) -> dict[str, Any]:
    sqnr = _finite(point.sqnr_db)
    return {"sqnr_db": sqnr, "bytes": point.bytes, "us": point.us, "schemes": point.mix}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
