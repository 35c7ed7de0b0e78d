"""explain(): what compile would do, found out without doing it.

The model is captured, its sites are annotated, and what passes insert is inserted and folded, with
scales of one and branches of zero: nothing is computed from weights or samples. Then every site is
asked which kernel its scheme would get on the target, and why; ``vdqc.forecast`` says what the
whole program takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.base.target import Target
from vdqc.compiler import capture_source
from vdqc.engine.pass_manager import Context, PassManager, check_passes
from vdqc.engine.recipe import Recipe
from vdqc.forecast import Forecast, forecast_of, total_cost
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.site import SiteKind
from vdqc.ir.source import Source
from vdqc.lowering.machine import measured, rates
from vdqc.lowering.rules import sized_like
from vdqc.lowering.select import choose
from vdqc.lowering.sparse import is_sparse, sparse_problem
from vdqc.passes.quant import keep_others_in_float
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
    by_samples: bool

    @property
    def stored_bytes(self) -> int:
        """Bytes of the table that says which mask each head gets, where the samples decide."""
        return 8 * self.heads if self.by_samples else 0


@final
@dataclass(frozen=True)
class Plan:
    """The expanded recipe and what each site would run.

    Attributes:
        undecided: passes, and what each decides of bytes and kernels only when it compiles.
    """

    name: str
    target: str
    passes: tuple[tuple[str, bool, str], ...]
    rules: tuple[str, ...]
    sites: tuple[SiteRow, ...]
    masks: tuple[PlannedMask, ...]
    forecast: Forecast
    machine: Target
    undecided: tuple[tuple[str, str], ...] = ()

    @property
    def predicted_us(self) -> float:
        """Predicted time of one call like the first sample."""
        return self.forecast.sites_us + self.forecast.between_us

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary."""
        return {
            "name": self.name,
            "target": self.target,
            "passes": [{"text": t, "exact": e, "leads_to": s} for t, e, s in self.passes],
            "rules": list(self.rules),
            "predicted_us": self.predicted_us,
            "forecast": asdict(self.forecast),
            "machine": rates(self.machine),
            "sites": [row.to_json() for row in self.sites],
            "masks": [asdict(mask) for mask in self.masks],
            "undecided": dict(self.undecided),
        }


def explain(
    source: Source,
    recipe: Recipe,
    target: Target,
    diagnostics: Diagnostics,
    progress: Callable[[Any, str], Any] = lambda items, description: items,
) -> Plan:
    """The plan for ``source`` under a complete recipe."""
    begin = time.perf_counter()
    graph, _ = capture_source(source, diagnostics)
    captured = time.perf_counter() - begin
    ctx = Context(source.samples, target, diagnostics, recipe.rules, 0, progress)
    reading = [item for item in recipe.passes if max(item.at) is Stage.CAPTURED]
    annotated, machine = graph.clone(), measured(target)
    # said once: what it says of sites comes with the second run
    PassManager(reading, probe=False).run(annotated, replace(ctx, diagnostics=Diagnostics()))
    check_passes(recipe.passes, annotated, ctx)
    first = source.samples[0].inputs
    with sized_like(annotated, first):
        plain_us = total_cost(choose(annotated, target), annotated).us(machine)
    planned = [stand_in for item in recipe.passes if (stand_in := item.planned()) is not None]
    records = PassManager([*reading, *planned], probe=False).run(graph, ctx)
    if not any(item.to is Stage.COMPRESSED for item in recipe.passes):
        keep_others_in_float(graph, "")  # schemes that no pass carries out
    for name in sorted(graph.free):  # what is learned is computed once, at lowering
        graph.set_param(name, graph.param(name))
    learning = learning_calls(recipe, len(source.samples)) * plain_us * 1e-6
    with sized_like(graph, first):
        choices = [c.priced(machine) for c in choose(graph, target, planned=True)]
        masks = tuple(planned_masks(graph, recipe))
        forecast = forecast_of(
            graph, choices, machine, captured + learning, sum(mask.stored_bytes for mask in masks)
        )
    rows = with_kernels(site_rows(graph, records), choices)
    stage, passes = Stage.CAPTURED, []
    for item in recipe.passes:
        stage = item.to if item.to is not None else stage
        passes.append((str(item), item.exact, str(stage)))
    rules = tuple(map(str, recipe.rules))
    undecided = tuple((str(p), words) for p in recipe.passes if (words := p.undecided()))
    return Plan(
        source.name,
        str(target),
        tuple(passes),
        rules,
        tuple(rows),
        masks,
        forecast,
        machine,
        undecided,
    )


def learning_calls(recipe: Recipe, samples: int) -> float:
    """Forward passes of the whole model that the recipe's passes take over the samples."""
    calls = 0.0
    for item in recipe.passes:
        calls += item.forwards() * samples
        samples = min(samples, getattr(item, "count", samples) or samples)  # select keeps so many
    return calls


def planned_masks(graph: Graph, recipe: Recipe) -> list[PlannedMask]:
    """The attentions of a planned graph that are sparse, with what is known before calibration."""
    options = next((vars(item) for item in recipe.passes if item.name == "sparsify"), {})
    found = []
    for site in graph.sites(kind=SiteKind.ATTENTION):
        if not is_sparse(site.node):
            continue
        problem, policy = sparse_problem(graph, site.node), MaskPolicy.parse(str(site.node.args[6]))
        how = _how(policy, str(options.get("heads")), str(options.get("budget")))
        found.append(PlannedMask(site.name, str(policy), problem.density, problem.heads, *how))
    return found


def _how(policy: MaskPolicy, heads: str, budget: str) -> tuple[str, bool]:
    """Who decides which mask a head gets, and whether that is the samples."""
    kinds = [kind.replace("_", " ") for kind in MASKS[policy.name]]
    if not kinds:
        return "every call, head and query block chooses", False
    mask = " or ".join(kinds)
    if budget == "calibrated":
        return f"{mask}, at a density of its own: the samples decide", True
    if len(kinds) == 1:
        return mask, False
    if heads == "online":
        return f"{mask}: every call decides", False
    return f"{mask}: the samples decide", True
