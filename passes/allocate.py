"""Decides which weights get more bits: rows of a linear, or whole linears, at a fixed mean.

::

    linear(x, @w, b)  # site fc1 w3a6
    -->
    linear(x, @w[rows2], b[rows2])  # site fc1.w2 w2a6
    linear(x, @w[rows3], b[rows3])  # site fc1.w3 w3a6
    linear(x, @w[rows4], b[rows4])  # site fc1.w4 w4a6
    cat(...)[order]

``rows`` (MPQ-DM) gives the rows of highest kurtosis one bit more and as many of the lowest one
fewer; how many is what makes the output error least. ``planes`` (MPQ-DMv2) gives rows of N bits an
integer of N - 1 and 0, 1 or 2 binary planes instead, or the bits of ``rows``, whichever errs less,
for a layer or row by row. ``search=error`` buys bits for the rows that gain most, at any budget.
``layers`` chooses a width for each linear, so that the sum of relative output errors is least at a
mean number of bits.

Rows of one width are a linear of their own: each keeps one scheme, so that ``quant``, ``gptq``,
``calibrate``, verification, kernels and reports need to know nothing of mixed widths. (A vector of
bits beside one scheme would have to reach all of them, and its rows would be stored at the widest
or packed apart all the same.)

Source: Feng et al., MPQ-DM, arXiv 2412.11549 (kurtosis split; grid of tenths); Feng et al.,
MPQ-DMv2, arXiv 2507.04290, figure 2 (orders of residuals; order by kurtosis and choice by layer are
our completion). Trial outputs use float activations, as the released code of MPQ-DM does.
Invariant: the function is unchanged; rows are a permutation; the mean of bits is the scheme's, or
at most the budget.
Online: a join and a permutation of the output where rows have several widths.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.base.allocation import kurtosis, outlier_split, row_errors, row_size, spend
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.options import check_belongs
from vdqc.base.scheme import QuantScheme
from vdqc.engine.moments import input_moments
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.peers import param_name, quantised_groups
from vdqc.ir.row_plan import Plan, narrowed, spec_of, with_planes
from vdqc.ir.site import Site, note, set_note

aten = torch.ops.aten


class Method(enum.StrEnum):
    """What gets bits of its own, and in which form."""

    ROWS = "rows"
    PLANES = "planes"
    LAYERS = "layers"


class Search(enum.StrEnum):
    """Which rows get more bits: those of high kurtosis, or those whose error falls most."""

    KURTOSIS = "kurtosis"
    ERROR = "error"


class Choice(enum.StrEnum):
    """Whether integers or planes are chosen for a layer or for each row."""

    LAYER = "layer"
    ROW = "row"


_BY_ROWS = (Method.ROWS, Method.PLANES)
_BELONGS = (
    ("search", "method", _BY_ROWS),
    ("choice", "method", (Method.PLANES,)),
    ("largest", "method", _BY_ROWS),
    ("largest", "search", (Search.KURTOSIS,)),
    ("low", "method", (Method.LAYERS,)),
    ("high", "method", (Method.LAYERS,)),
)


@final
@dataclass(frozen=True)
class Allocate(Pass):
    """Gives rows or linears bits by their error.

    Attributes:
        method: ``rows``, ``planes`` or ``layers``.
        search: of rows and planes: by ``kurtosis``, or by ``error`` at a budget.
        choice: of planes: integers or planes by ``layer`` or by ``row``.
        largest: of kurtosis: most tenths of the rows that go up, and down (the released code: 1).
        budget: mean bits a weight, of each linear for rows and planes, of all for layers; by
            default those of the scheme. Scales, zero points and amplitudes come on top.
        low, high: least and greatest width that layers gives.
        select: glob of sites.
    """

    method: Method = Method.ROWS
    search: Search = Search.KURTOSIS
    choice: Choice = Choice.LAYER
    largest: int = 5
    budget: float | None = None
    low: int = 2
    high: int = 8
    select: str = "*"

    name: ClassVar[str] = "allocate"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.largest <= 5:
            raise ConfigError(f"allocate.largest: expected 0 ... 5 tenths, got {self.largest}")
        if not 1 <= self.low <= self.high <= 8:
            raise ConfigError(
                f"allocate: expected 1 <= low <= high <= 8, got {self.low}, {self.high}"
            )
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ConfigError(f"allocate.budget: expected bits above 0, got {self.budget:g}")
        check_belongs(self, _BELONGS)
        by_rows = self.method is not Method.LAYERS
        if by_rows and self.search is Search.KURTOSIS and self.budget is not None:
            raise ConfigError(
                "allocate.budget: a split by kurtosis keeps the mean of the scheme",
                "for a budget of rows say search=error",
            )

    def undecided(self) -> str:
        """The widths."""
        of = "linear" if self.method is Method.LAYERS else "row"
        return f"the bits of each {of}, by the error that they leave"

    def forwards(self) -> float:
        """One, for the second moments of inputs."""
        return 1.0

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Allocate; facts: per site what its rows got, mean and effective bits, error ratio."""
        groups = [
            kept
            for group in quantised_groups(graph, self.select)
            if (kept := [site for site in group if matches(site, ctx)])
        ]
        if self.method is Method.LAYERS:
            return self.layers(graph, groups, ctx)
        plans = {}
        for group, moment in moments(graph, groups, ctx):
            for site in group:
                plans[site.name] = self.plan(graph, site, moment)
        facts = {}
        for site in (site for group in groups for site in group):
            plan = plans[site.name]
            facts[site.name] = plan.facts(site)
            rewrite(graph, site, plan)
        return PassResult(sum(plan.is_mixed for plan in plans.values()), {"allocated": facts})

    # rows -------------------------------------------------------------------------------------

    def plan(self, graph: Graph, site: Site, moment: Tensor | None) -> Plan:
        """Which scheme each row of ``site`` gets."""
        bits = spec_of(site).bits
        uniform = [narrowed(site, width) for width in (bits - 1, bits, bits + 1)]
        forms = [uniform]
        if self.method is Method.PLANES:
            forms.append([uniform[0], *(with_planes(uniform[0], planes) for planes in (1, 2))])
        weight = graph.evaluate(site.weight)
        known: dict[str, Tensor] = {}
        for text in dict.fromkeys(text for form in forms for text in form):
            known[text] = row_errors(weight, QuantScheme.parse(text).weight, moment)
        tables = [torch.stack([known[text] for text in form]) for form in forms]
        plain = float(known[uniform[1]].sum())
        if self.choice is Choice.ROW:
            joined = torch.stack(tables)
            picked, table = joined.argmin(0), joined.amin(0)
            order, moved = self.orders(site, weight, table)
            form = picked.gather(0, order[None])[0]
            return Plan.of(forms, form, order, float(_total(table, order)), plain, moved)
        trials = [(*self.orders(site, weight, table), table) for table in tables]
        totals = [float(_total(table, order)) for order, _, table in trials]
        best = min(range(len(forms)), key=totals.__getitem__)
        order, moved, _ = trials[best]
        return Plan.of(forms, torch.full_like(order, best), order, totals[best], plain, moved)

    def orders(self, site: Site, weight: Tensor, table: Tensor) -> tuple[Tensor, int]:
        """(0, 1 or 2 for each row; tenths moved) for errors float[3, N]."""
        if self.search is Search.KURTOSIS:
            return outlier_split(kurtosis(weight), table, self.largest)
        bits, rows = spec_of(site).bits, len(weight)
        budget = float(bits) if self.budget is None else self.budget
        costs = torch.tensor([bits - 1.0, bits, bits + 1.0])[:, None].expand(3, rows)
        order = spend(table, costs, budget * rows)
        if order is None:
            raise InputError(
                f"expected a budget of at least {bits - 1} bits, got {budget:g}",
                f"rows of {site.scheme} get {bits - 1} to {bits + 1} bits",
                site=site.name,
                code="budget",
            )
        return order, 0

    # layers -----------------------------------------------------------------------------------

    def layers(self, graph: Graph, groups: Sequence[list[Site]], ctx: Context) -> PassResult:
        """A width for each site, least relative error in sum."""
        sites = [site for group in groups for site in group]
        columns: dict[str, Tensor] = {}
        for group, moment in moments(graph, groups, ctx):
            for site in group:
                columns[site.name] = self.width_errors(graph, site, moment)
        if not sites:
            return PassResult(0, {"allocated": {}})
        errors = torch.stack([columns[site.name] for site in sites], 1)
        counts = torch.tensor([float(site.weight.meta["val"].numel()) for site in sites])
        widths = torch.arange(self.low, self.high + 1).double()
        before = torch.tensor([float(spec_of(site).bits) for site in sites])
        given = float((before * counts).sum() / counts.sum())
        budget = given if self.budget is None else self.budget
        choice = spend(errors, widths[:, None] * counts, budget * float(counts.sum()))
        if choice is None:
            raise InputError(
                f"expected a budget of at least {self.low} bits, the least width, got {budget:g}",
                "raise the budget or lower 'low'",
                code="budget",
            )
        facts = {}
        for site, way, column in zip(sites, choice.tolist(), errors.T, strict=True):
            text = narrowed(site, self.low + way)
            facts[site.name] = {
                "scheme": text,
                "bits": self.low + way,
                "relative_error": float(f"{float(column[way]):.3g}"),
            }
            set_note(site.node, scheme=text)
        mean = float((widths[choice] * counts).sum() / counts.sum())
        return PassResult(len(sites), {"allocated": facts, "mean_bits": round(mean, 3)})

    def width_errors(self, graph: Graph, site: Site, moment: Tensor | None) -> Tensor:
        """float64[widths]: output error of each width to the output."""
        weight = graph.evaluate(site.weight)
        size = row_size(weight, moment).sum().clamp_min(1e-30)
        totals = []
        for width in range(self.low, self.high + 1):
            spec = QuantScheme.parse(narrowed(site, width)).weight
            totals.append(row_errors(weight, spec, moment).sum() / size)
        return torch.stack(totals).double().cpu()


# match ------------------------------------------------------------------------------------------


def matches(site: Site, ctx: Context) -> bool:
    """True for a weight of integers whose rows are together."""
    if site.scheme is None or site.scheme.weight is None:
        return False
    if site.scheme.weight.dtype.is_float or site.scheme.weight.planes:
        ctx.diagnostics.remark(site.name, "not-allocated", f"{site.scheme} has no width to vary")
        return False
    if note(site.node).get("rows"):
        ctx.diagnostics.remark(site.name, "already-allocated", "its rows were split before")
        return False
    return True


# math -------------------------------------------------------------------------------------------


def moments(
    graph: Graph, groups: Sequence[list[Site]], ctx: Context
) -> Iterable[tuple[Sequence[Site], Tensor | None]]:
    """Each group with the second moment of its inputs; None, with a remark, without samples."""
    if not groups:
        return []
    if not ctx.samples:
        ctx.diagnostics.remark(
            "", "no-samples", "bits are allocated by the errors of weights: there are no samples"
        )
        return [(group, None) for group in groups]
    walk = input_moments(graph, ctx.samples, groups, progress=ctx.progress)
    return ((group, found.second) for group, found in walk)


def _total(table: Tensor, order: Tensor) -> Tensor:
    return table.gather(0, order[None].to(table.device)).sum()


# rewrite ----------------------------------------------------------------------------------------


def rewrite(graph: Graph, site: Site, plan: Plan) -> None:
    """One linear for the rows of each scheme, joined in their old order."""
    if not plan.is_mixed:
        set_note(site.node, scheme=plan.parts[0][0])
        return
    notes, before = dict(note(site.node)), site.node
    made = []
    for text, rows in plan.parts:
        label = text.partition("a")[0].replace("+", "p")
        index = graph.set_param(param_name(site, f"{label}.rows"), rows)
        weight = graph.call(aten.index_select.default, site.weight, 0, index, before=before)
        operands: list[fx.Node] = [site.input, weight]
        if site.bias is not None:
            operands.append(
                graph.call(aten.index_select.default, site.bias, 0, index, before=before)
            )
        linear = graph.call(aten.linear.default, *operands, before=before)
        entries = {**notes, "site": f"{site.name}.{label}", "scheme": text}
        entries |= {"partial": True, "rows": True, "origin": graph.provenance}
        set_note(linear, **entries)
        made.append(linear)
    axis = made[0].meta["val"].ndim - 1
    value = graph.call(aten.cat.default, made, axis, before=before)
    order = torch.cat([rows for _, rows in plan.parts]).argsort()
    if not torch.equal(order, torch.arange(len(order))):
        index = graph.set_param(param_name(site, "row_order"), order)
        value = graph.call(aten.index_select.default, value, axis, index, before=before)
    before.meta["custom"] = {**before.meta.get("custom", {}), "vdqc": {}}  # its parts are sites now
    graph.replace(before, value)
    set_note(value, whole=site.name)
