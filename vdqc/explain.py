"""explain(): what compile would do, found out without doing it.

The model is captured and its sites are annotated, which changes nothing; then every site is asked
which kernel its scheme would get on the target, why, and at what predicted time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, final

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.base.target import Target
from vdqc.compiler import capture_source
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import Recipe
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.site import SiteKind
from vdqc.ir.source import Source
from vdqc.lowering.select import choose
from vdqc.lowering.sparse import is_sparse, sparse_problem
from vdqc.sites import SiteRow, site_rows, with_kernels


@final
@dataclass(frozen=True)
class PlannedMask:
    """One attention that would be sparse: ``density`` is of the first sample, ``how`` says who
    decides which of the policy's masks each of the ``heads`` gets."""

    site: str
    policy: str
    density: float
    heads: int
    how: str


@final
@dataclass(frozen=True)
class Plan:
    """The expanded recipe and what each site would run."""

    name: str
    target: str
    passes: tuple[tuple[str, bool, str], ...]
    rules: tuple[str, ...]
    sites: tuple[SiteRow, ...]
    masks: tuple[PlannedMask, ...] = ()

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
            "masks": [asdict(mask) for mask in self.masks],
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
    masks = tuple(planned_masks(graph, recipe))
    return Plan(source.name, str(target), tuple(passes), rules, tuple(rows), masks)


def planned_masks(graph: Graph, recipe: Recipe) -> list[PlannedMask]:
    """The attentions of a planned graph that are sparse, with what is known before calibration."""
    options = next((vars(item) for item in recipe.passes if item.name == "sparsify"), {})
    found = []
    for site in graph.sites(kind=SiteKind.ATTENTION):
        if not is_sparse(site.node):
            continue
        problem, policy = sparse_problem(graph, site.node), MaskPolicy.parse(str(site.node.args[6]))
        how = _how(policy, str(options.get("heads")), str(options.get("budget")))
        found.append(PlannedMask(site.name, str(policy), problem.density, problem.heads, how))
    return found


def _how(policy: MaskPolicy, heads: str, budget: str) -> str:
    kinds = [kind.replace("_", " ") for kind in MASKS[policy.name]]
    if not kinds:
        return "every call, head and query block chooses"
    mask = " or ".join(kinds)
    if budget == "calibrated":
        return f"{mask}, at a density of its own: the samples decide"
    if len(kinds) == 1:
        return mask
    return f"{mask}: {'every call decides' if heads == 'online' else 'the samples decide'}"
