"""Binary search over programs of which the first passes a check and the last fails it.

States ``0 ... count`` stand in a row: the first ``k`` of ``count`` changes are made. Between a
state that passes and one that fails lies at least one transition; the search ends at one, seen on
both sides, in ``ceil(log2(count))`` runs. It is the only one where the check never passes again
behind its first failure; otherwise it is one of several, and still true.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, final

from vdqc.ir.graph import Graph

Progress = Callable[[Any, str], Any]

#: Runs that a stage may add to those of its binary search: the ends, and the proofs of a culprit.
EXTRA_RUNS = 5


@final
@dataclass(frozen=True)
class Outcome:
    """What a check said of one program.

    Attributes:
        passed: whether it is good enough.
        sqnr_db: step-locked SQNR over all calls; None if the check measures no such thing.
        errors: relative error of each call, in the order of the calls; infinite where not finite.
        said: last line that a command printed.
    """

    passed: bool
    sqnr_db: float | None = None
    errors: tuple[float, ...] = ()
    said: str = ""


@final
@dataclass(frozen=True)
class Trial:
    """One program that was tried; ``computed`` if its outcome followed from runs made before."""

    stage: str
    program: str
    outcome: Outcome
    seconds: float = 0.0
    computed: bool = False


class Check(Protocol):
    """Tells good programs from bad ones."""

    @property
    def text(self) -> str:
        """What it asks for, as a clause."""

    def judge(self, graph: Graph, label: str) -> Outcome:
        """Evaluate one program; ``label`` names it to people."""


@final
@dataclass
class Trials:
    """Runs a check and keeps what it said; ``progress`` counts the runs of a stage."""

    check: Check
    progress: Progress = lambda items, description: items
    made: list[Trial] = field(default_factory=list)
    _ticks: Iterator[Any] = field(default_factory=lambda: iter(()))

    def run(self, stage: str, program: str, build: Callable[[], Graph]) -> Outcome:
        """Build a program, evaluate it, keep the outcome."""
        start = time.perf_counter()
        outcome = self.check.judge(build(), program)
        next(self._ticks, None)
        self.made.append(Trial(stage, program, outcome, time.perf_counter() - start))
        return outcome

    def compute(self, stage: str, program: str, outcome: Outcome) -> Outcome:
        """Keep an outcome that follows from runs made before."""
        self.made.append(Trial(stage, program, outcome, computed=True))
        return outcome

    def runs(self, stage: str) -> int:
        """How often the check was evaluated in ``stage``."""
        return sum(trial.stage == stage and not trial.computed for trial in self.made)

    @contextmanager
    def counted(self, most: int, description: str) -> Iterator[None]:
        """A progress bar over the at most ``most`` runs made inside."""
        bar = self.progress(range(most), description)
        self._ticks = iter(bar)
        try:
            yield
        finally:
            self._ticks = iter(())
            if hasattr(bar, "close"):
                bar.close()


def most_runs(count: int) -> int:
    """The bound on the runs of one stage over ``count`` changes: ceil(log2(count)) + 5."""
    return math.ceil(math.log2(max(count, 1))) + EXTRA_RUNS


def first_failure(count: int, passes: Callable[[int], bool]) -> int:
    """``k`` in 1 ... count such that state ``k - 1`` passes and state ``k`` fails.

    State 0 must pass and state ``count`` fail; neither is evaluated here, every other at most once,
    ``ceil(log2(count))`` in all.
    """
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return high
