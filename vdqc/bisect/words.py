"""What a bisection says: the clauses of its conclusion, and the table of what was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from vdqc.bisect.results import BisectResult, Finding
from vdqc.bisect.search import Outcome, Trial
from vdqc.text import columns, count, duration

#: How many of the sites or timesteps with the greatest errors are listed.
_WORST = 5


def shown(result: BisectResult) -> str:
    """The whole answer of ``vdqc bisect``: the table, the worst by themselves, the conclusion."""
    parts = [f"check: {result.check}", "", table(result.trials), ""]
    for found in result.findings:
        if len(found.each) > 1:
            parts += [f"{found.stage}s by themselves, worst first: {_ranking(found.each)}"]
    return "\n".join([*parts, result.conclusion])


def table(trials: Sequence[Trial]) -> str:
    """One line per program."""
    rows = [
        [
            trial.stage,
            trial.program,
            "passes" if trial.outcome.passed else "FAILS",
            measured(trial.outcome),
            "no run needed" if trial.computed else duration(trial.seconds),
        ]
        for trial in trials
    ]
    return columns(rows, ["search", "program", "check", "", "time"])


def measured(outcome: Outcome) -> str:
    """``31.2 dB``, ``exact``, ``not finite``, or what the command said."""
    if outcome.sqnr_db is None:
        return outcome.said
    return _decibel(outcome.sqnr_db)


def conclusion(findings: Sequence[Finding], trials: Sequence[Trial]) -> str:
    """One sentence."""
    runs = count(sum(not trial.computed for trial in trials), "run")
    if not findings:
        last = trials[-1]
        return f"nothing to find: {last.program} passes ({measured(last.outcome)}, {runs})"
    return f"{'; '.join(found.text for found in findings)} ({runs})"


def first_pass(name: str, index: int, total: int, good: Outcome, bad: Outcome) -> str:
    """The clause for a pass."""
    where = f"pass {index} of {total}"
    numbers = f"{measured(good)} before it, {measured(bad)} after"
    return f"'{name}' ({where}) is the first that breaks the check: {numbers}"


def residuals_begin() -> str:
    """What is said with a pass behind which the program keeps residuals between steps."""
    return (
        " ('reparameterize' computes dense attention until its two programs are made: what is lost "
        "between refreshes shows here)"
    )


def artifact_differs(artifact: Outcome, fresh: Outcome) -> str:
    """The clause for an artifact whose recipe is fine now."""
    return (
        f"the artifact fails ({measured(artifact)}) and its recipe passes now "
        f"({measured(fresh)}): it was made from another model, another version or other samples"
    )


def culprit(
    kind: str,
    name: str,
    index: int,
    total: int,
    alone: Outcome,
    without: Outcome,
    each: Mapping[str, float],
) -> str:
    """The clause for a site or a timestep, which says whether it is to blame by itself."""
    what = f"{kind} {name} ({index} of {total})"
    by_itself, others = measured(alone), measured(without)
    if total == 1:
        return f"{kind} {name} is the only one that it touches"
    if without.passed and not alone.passed:
        return f"{what} is at fault: {by_itself} with it alone, {others} with all but it"
    if without.passed:
        return (
            f"{what} tips it: all but it pass ({others}), and so does it alone ({by_itself}); "
            f"worst by themselves: {_ranking(each)}"
        )
    if not alone.passed:
        return f"{what} is the first of several: {by_itself} with it alone, {others} without it"
    ranking = f"; worst by themselves: {_ranking(each)}" if each else ""
    return f"no single {kind}: errors add up until {name} ({index} of {total}) is too much{ranking}"


def spread(low: int, total: int, least: float, each: Mapping[str, float]) -> str:
    """The clause where several timesteps are below the threshold by themselves."""
    return (
        f"no single timestep: {low} of {total} are below {least:g} dB by themselves, worst first: "
        f"{_ranking(each)}"
    )


def not_a_site(name: str, outcome: Outcome) -> str:
    """The clause for a pass whose fault lies between the sites."""
    return (
        f"no single site: with every site as it was, the rest of what '{name}' changed fails "
        f"({measured(outcome)})"
    )


def no_difference(name: str) -> str:
    """The clause for two graphs that are the same."""
    return f"no site: '{name}' changed nothing, so the check itself varies from run to run"


def no_timesteps(total: int) -> str:
    """The clause where timesteps cannot be told apart."""
    known = "name none" if total == 0 else "do not all name one, or name the same"
    return f"no timestep was searched: the samples {known}"


def residuals() -> str:
    """The clause where a command cannot be given a program for some timesteps."""
    return (
        "no timestep was searched: the program keeps residuals between steps, so none can be left "
        "out (use --min-sqnr)"
    )


def _ranking(each: Mapping[str, float]) -> str:
    worst = sorted(each.items(), key=lambda item: -item[1])[:_WORST]
    return ", ".join(f"{name} {_decibel(_sqnr(error))}" for name, error in worst)


def _sqnr(error: float) -> float:
    if error == 0:
        return math.inf
    return -20 * math.log10(error) if error < math.inf else -math.inf


def _decibel(value: float) -> str:
    if math.isfinite(value):
        return f"{value:.1f} dB"
    return "exact" if value > 0 else "not finite"
