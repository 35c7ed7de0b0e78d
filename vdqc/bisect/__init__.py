"""bisect(): which pass breaks a check, at which site, at which timestep.

::

    passes      float model ... after pass k ... lowered          the first k passes made
    sites       before the pass ... after it                      at the first j sites it changed
    timesteps   before the pass ... after it                      at the i greatest timesteps

Each is a binary search between a program that passes and one that fails, in at most
``ceil(log2(n)) + 5`` runs of the check. The pipeline runs once; the graph after every pass is kept
(weights are shared), and programs between two neighbours are mixed from both. So a fault that a
pass planted in one site is found as well as a site that its scheme does not suit. A culprit is
tried alone, and everything is tried without it: where errors only add up, that is what is said.

Error: InputError if the check fails for the float model already, before any pass has run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

from vdqc.base.diagnostics import Diagnostics, InputError
from vdqc.base.target import Target
from vdqc.bisect import words
from vdqc.bisect.checks import ScoreCheck
from vdqc.bisect.results import BisectResult, Finding, Step
from vdqc.bisect.search import Check, Outcome, Trials, first_failure, most_runs
from vdqc.bisect.sites import search_sites
from vdqc.bisect.timesteps import search_timesteps
from vdqc.compiler import capture_source
from vdqc.engine.pass_manager import Context, PassManager, PassRecord
from vdqc.engine.recipe import Recipe
from vdqc.ir.graph import Graph
from vdqc.ir.learned import frozen
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source
from vdqc.ir.weights import return_freed_memory
from vdqc.lowering.lower import lower
from vdqc.lowering.residual import has_residuals

Progress = Callable[[Any, str], Any]


def bisect(
    source: Source,
    recipe: Recipe,
    target: Target,
    check: Check,
    *,
    calls: Sequence[Sample] = (),
    seed: int = 0,
    diagnostics: Diagnostics | None = None,
    artifact: Graph | None = None,
    progress: Progress = lambda items, description: items,
) -> BisectResult:
    """Find what in ``recipe``, a complete one, makes ``check`` fail for the model of ``source``.

    ``calls`` are what passes learn from and what is scored, by default the samples. ``artifact`` is
    a program made from the same recipe: it is tried first, and blamed if the recipe is fine now;
    sites and timesteps are then searched between the two programs.
    """
    diagnostics = diagnostics or Diagnostics()
    trials = Trials(check, progress)
    with tempfile.TemporaryDirectory(prefix="vdqc-bisect-") as folder:
        graph, _ = capture_source(source, diagnostics)
        if graph.stored:
            graph.spill = Path(folder)
            return_freed_memory()
        ctx = Context(source.samples, target, diagnostics, recipe.rules, seed, progress)
        if calls:
            ctx.use(calls)
        samples = calls or source.samples
        steps = _Steps(graph, recipe, ctx)
        findings = _search_passes(trials, steps, artifact)
        pair = steps.around(findings[0], artifact) if findings else None
        # a command gets programs as artifacts: one mixed from two captures cannot be written
        if pair is not None and (pair[1].graph is not artifact or isinstance(check, ScoreCheck)):
            good, bad = findings[0].good, findings[0].bad
            assert good is not None
            assert bad is not None
            findings.append(search_sites(trials, *pair, good, bad, samples[0]))
            findings.append(search_timesteps(trials, *pair, good, bad, samples))
    text = words.conclusion(findings, trials.made)
    return BisectResult(check.text, bool(findings), text, tuple(findings), tuple(trials.made))


#: What is named where the recipe is fine and the artifact is not.
ARTIFACT = "the artifact"


@final
class _Steps:
    """The captured graph, and the graph after each pass once ``run`` has made them."""

    def __init__(self, graph: Graph, recipe: Recipe, ctx: Context) -> None:
        self._graph, self._recipe, self._ctx = graph, recipe, ctx
        self.made = [Step("float model", True, frozen(graph))]
        self.count = len(recipe.passes) + 1

    def run(self) -> None:
        """The pipeline, without the probe that would stop it where it goes wrong."""
        graph, ctx = self._graph, self._ctx
        PassManager(self._recipe.passes, probe=False, instruments=[self]).run(graph, ctx)
        lower(graph, ctx.target, ctx.diagnostics, progress=ctx.progress)
        self.made.append(Step("lower", True, graph))

    def before_pass(self, text: str, graph: Graph) -> None:
        """Nothing: the pass before this one was kept."""

    def after_pass(self, record: PassRecord, graph: Graph) -> None:
        """Keep the graph; weights are shared, trained ones copied."""
        self.made.append(Step(record.text, record.exact, frozen(graph)))

    def around(self, found: Finding, artifact: Graph | None) -> tuple[Step, Step]:
        """The graphs that passed and failed: around a pass, or of the recipe and the artifact."""
        if found.culprit == ARTIFACT:
            assert artifact is not None
            return self.made[-1], Step(ARTIFACT, False, artifact)
        return self.made[found.index - 1], self.made[found.index]


def _search_passes(trials: Trials, steps: _Steps, artifact: Graph | None) -> list[Finding]:
    """The first pass that breaks the check; empty if none does."""
    count = steps.count
    most = most_runs(count)
    outcomes: dict[int, Outcome] = {}

    def passes(index: int) -> bool:
        step = steps.made[index]
        label = f"after {step.text}" if index else step.text
        outcomes[index] = trials.run("pass", label, lambda: step.graph)
        return outcomes[index].passed

    with trials.counted(most, "bisect passes"):
        if not passes(0):
            raise InputError(
                f"the check fails for the float model already: {words.measured(outcomes[0])}",
                f"expected it to pass: {trials.check.text}",
                "lower the threshold, or mend the check",
                code="float-fails",
            )
        given = trials.run("pass", ARTIFACT, lambda: artifact) if artifact is not None else None
        if given is not None and given.passed:
            return []
        steps.run()
        if passes(count):
            if given is None:
                return []
            text = words.artifact_differs(given, outcomes[count])
            ends = outcomes[count], given, None, None
            return [Finding("pass", ARTIFACT, 0, count, text, *ends, trials.runs("pass"), most)]
        index = first_failure(count, passes)
    ends = outcomes[index - 1], outcomes[index], None, None
    text = words.first_pass(steps.made[index].text, index, count, *ends[:2])
    before, after = (step.graph.module for step in steps.made[index - 1 : index + 1])
    if has_residuals(after) and not has_residuals(before):
        text += words.residuals_begin()
    runs = trials.runs("pass")
    return [Finding("pass", steps.made[index].text, index, count, text, *ends, runs, most)]


__all__ = ["ARTIFACT", "BisectResult", "Finding", "bisect"]
