"""explain(): what compile would do, found out without doing it.

The model is captured and its sites are annotated, which changes nothing; then every site is asked
which kernel its scheme would get on the target, why, and at what predicted time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.target import Target
from vdqc.compiler import capture_source
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import Recipe
from vdqc.ir.graph import Stage
from vdqc.ir.source import Source
from vdqc.lowering.select import choose
from vdqc.sites import SiteRow, site_rows, with_kernels


@final
@dataclass(frozen=True)
class Plan:
    """The expanded recipe and what each site would run."""

    name: str
    target: str
    passes: tuple[tuple[str, bool, str], ...]
    rules: tuple[str, ...]
    sites: tuple[SiteRow, ...]

    @property
    def predicted_us(self) -> float:
        """Predicted time of all sites for one call like the first sample."""
        return sum(row.predicted_us or 0.0 for row in self.sites)

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary."""
        return {
            "name": self.name,
            "target": self.target,
            "passes": [{"text": t, "exact": e, "leads_to": s} for t, e, s in self.passes],
            "rules": list(self.rules),
            "predicted_us": self.predicted_us,
            "sites": [row.to_json() for row in self.sites],
        }


def explain(
    source: Source,
    recipe: Recipe,
    target: Target,
    diagnostics: Diagnostics,
    progress: Callable[[Any, str], Any] = lambda items, description: items,
) -> Plan:
    """The plan for ``source`` under a complete recipe."""
    graph, _ = capture_source(source, diagnostics)
    ctx = Context(source.samples, target, diagnostics, recipe.rules, 0, progress)
    reading = [item for item in recipe.passes if item.name in ("canonicalize", "annotate")]
    # what changes which kernel a site gets, without what needs the samples
    reading += [item.planned() for item in recipe.passes if hasattr(item, "planned")]
    PassManager(reading, probe=False).run(graph, ctx)
    rows = with_kernels(site_rows(graph), choose(graph, target, planned=True))
    stage, passes = Stage.CAPTURED, []
    for item in recipe.passes:
        stage = item.to if item.to is not None else stage
        passes.append((str(item), item.exact, str(stage)))
    rules = tuple(map(str, recipe.rules))
    return Plan(source.name, str(target), tuple(passes), rules, tuple(rows))
