"""What a bisection found, as data: one finding per search, and every program that was tried."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from vdqc.bisect.search import Outcome, Trial
from vdqc.ir.graph import Graph
from vdqc.ir.manifest import plain


@final
@dataclass(frozen=True)
class Step:
    """The graph after one pass; ``exact`` if that promised to leave the function as it was."""

    text: str
    exact: bool
    graph: Graph


@final
@dataclass(frozen=True)
class Finding:
    """What one search came to.

    Attributes:
        stage: "pass", "site" or "timestep".
        culprit: its name; "" if there is no single one.
        index, count: its place among all that were searched, from 1.
        text: what was found, as a clause.
        good, bad: the last state that passed and the first that failed.
        alone, without: with the culprit alone, and with everything but it; None if not tried.
        runs, most: evaluations of the check, and the bound on them.
        each: relative error of each site or timestep by itself, as far as it is known.
    """

    stage: str
    culprit: str
    index: int
    count: int
    text: str
    good: Outcome | None = None
    bad: Outcome | None = None
    alone: Outcome | None = None
    without: Outcome | None = None
    runs: int = 0
    most: int = 0
    each: Mapping[str, float] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class BisectResult:
    """Everything that was tried, and what came of it; ``found`` is false if nothing is broken."""

    check: str
    found: bool
    conclusion: str
    findings: tuple[Finding, ...]
    trials: tuple[Trial, ...]

    @property
    def runs(self) -> int:
        """Evaluations of the check in all."""
        return sum(not trial.computed for trial in self.trials)

    def finding(self, stage: str) -> Finding | None:
        """What the search of a stage came to; None if it was not reached."""
        return next((found for found in self.findings if found.stage == stage), None)

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; a number that is not finite is a text, ``"inf"``."""
        data: dict[str, Any] = plain(self)
        return {**data, "runs": self.runs}
