"""The third search: the timestep at which a pass breaks the check, from the greatest down.

Programs compute as after the pass at the first ``k`` timesteps and as before it at the rest. The
built-in score needs no run for that: both graphs were scored call by call already. A command gets
a program that holds both and chooses by the timestep of the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vdqc.bisect import words
from vdqc.bisect.checks import ScoreCheck
from vdqc.bisect.results import Finding, Step
from vdqc.bisect.search import Outcome, Trials, first_failure, most_runs
from vdqc.bisect.switch import cuts, switched
from vdqc.engine.trajectory import timestep_of
from vdqc.ir.sample import Sample
from vdqc.lowering.residual import has_residuals


def search_timesteps(
    trials: Trials,
    before: Step,
    after: Step,
    good: Outcome,
    bad: Outcome,
    samples: Sequence[Sample],
) -> Finding:
    """The timestep that is to blame; ``good`` and ``bad`` are the outcomes of the two graphs."""
    check = trials.check
    of_call = [_timestep(sample) for sample in samples]
    timesteps = sorted({t for t in of_call if t is not None}, reverse=True)
    count = len(timesteps)
    if count < 2 or None in of_call:
        return Finding("timestep", "", 0, count, words.no_timesteps(count))
    scored = isinstance(check, ScoreCheck)
    if not scored and any(has_residuals(step.graph.module) for step in (before, after)):
        return Finding("timestep", "", 0, count, words.residuals())
    bounds, most = cuts(timesteps), most_runs(count)

    def outcome(label: str, start: int, stop: int, *, inside: bool = True) -> Outcome:
        """With the pass at the timesteps ``start:stop``, or everywhere else."""
        if isinstance(check, ScoreCheck):
            chosen = {t: (start <= i < stop) is inside for i, t in enumerate(timesteps)}
            pairs = zip(good.errors, bad.errors, of_call, strict=True)
            errors = [new if t is not None and chosen[t] else old for old, new, t in pairs]
            return trials.compute("timestep", label, check.outcome(errors))
        graphs = (before.graph, after.graph) if inside else (after.graph, before.graph)
        low, high = bounds[stop], bounds[start]
        return trials.run("timestep", label, lambda: switched(*graphs, low, high, samples))

    outcomes = {0: good, count: bad}
    with trials.counted(most, "bisect timesteps"):

        def passes(index: int) -> bool:
            outcomes[index] = outcome(f"first {index} of {count} timesteps", 0, index)
            return outcomes[index].passed

        index = first_failure(count, passes)
        name = f"{timesteps[index - 1]:g}"
        alone, without = outcomes[index], outcomes[index - 1]
        if index > 1:
            alone = outcome(f"timestep {name} alone", index - 1, index)
        if index < count:
            without = outcome(f"all but timestep {name}", index - 1, index, inside=False)
    each = _by_timestep(timesteps, of_call, bad.errors) if scored else {}
    text = words.culprit("timestep", name, index, count, alone, without, each)
    if isinstance(check, ScoreCheck) and not without.passed:
        low = sum(not check.outcome([error]).passed for error in each.values())
        text = words.spread(low, count, check.min_sqnr, each)
    ends = outcomes[index - 1], outcomes[index], alone, without
    return Finding("timestep", name, index, count, text, *ends, trials.runs("timestep"), most, each)


def _by_timestep(
    timesteps: Sequence[float], of_call: Sequence[float | None], errors: Sequence[float]
) -> dict[str, float]:
    """Root of the mean squared relative error over the calls of each timestep."""
    found = {}
    for timestep in timesteps:
        own = [error for error, t in zip(errors, of_call, strict=True) if t == timestep]
        found[f"{timestep:g}"] = math.sqrt(sum(error**2 for error in own) / len(own))
    return found


def _timestep(sample: Sample) -> float | None:
    return timestep_of(sample.inputs) if sample.timestep is None else sample.timestep
