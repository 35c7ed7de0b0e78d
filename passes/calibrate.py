"""Sets the ranges of static quantisers from data.

::

    vdqc.fake_quantize(x, @scale, @zero_point, spec)  ->  the same, its parameters rebound

``absmax`` covers every value seen, ``percentile`` leaves out a share at the ends, ``mse`` clips
where that lowers the mean squared quantisation error of the values seen. The samples run through
the graph with the quantisers to be set open, so that no range depends on another's first guess.

Source: Wu et al., arXiv 2004.09602, section 5 (max, percentile); Banner et al., arXiv 1810.05723,
section 3 (squared error).
Invariant: the graph's nodes stay as they are, only parameters change; on the values seen, ``mse``
is never worse than ``absmax``.
Online: nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError
from vdqc.base.options import check_belongs
from vdqc.base.ranges import clipped_range, percentile_range
from vdqc.base.scheme import QuantSpec
from vdqc.engine.calibrate import SiteStats, observe
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import weight_source
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import Site, SiteKind

#: Values kept of each quantiser's input: enough that the 99.99th percentile rests on several.
RESERVOIR = 2**16


class Method(enum.StrEnum):
    """How a range is chosen."""

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    MSE = "mse"


@final
@dataclass(frozen=True)
class Calibrate(Pass):
    """Ranges of static activation quantisers, and of weights if asked.

    Attributes:
        method: ``absmax``, ``percentile`` or ``mse``.
        percentile: share of values, in %, that ``percentile`` keeps.
        weights: choose the ranges of weights by squared error, too.
        select: glob of sites.
    """

    method: Method = Method.MSE
    percentile: float = 99.99
    weights: bool = False
    select: str = "*"

    name: ClassVar[str] = "calibrate"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.COMPRESSED})
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 50.0 < self.percentile <= 100.0:
            raise ConfigError(
                f"calibrate.percentile: expected above 50 and up to 100, got {self.percentile:g}"
            )
        check_belongs(self, (("percentile", "method", (Method.PERCENTILE,)),))

    def forwards(self) -> float:
        """One."""
        return 1.0

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Calibrate; facts: per site the range chosen, the range seen, the SQNR on the values."""
        sites = graph.sites(self.select, SiteKind.LINEAR)
        inputs = static_inputs(sites, ctx)
        chosen: dict[str, dict[str, float]] = {}
        if inputs:
            stats = observe_open(graph, inputs, ctx)
            for quantiser, name in ctx.progress(list(inputs.items()), "ranges"):
                chosen[name] = self.set_range(graph, quantiser, stats[name])
        weights = [site for site in sites if self.weights and has_fixed_scale(site, ctx)]
        for site in ctx.progress(weights, "weight ranges"):
            set_weight_range(graph, site)
        facts: dict[str, Any] = {"method": str(self.method), "inputs": chosen}
        return PassResult(len(inputs) + len(weights), {**facts, "weights": len(weights)})

    def set_range(self, graph: Graph, quantiser: fx.Node, seen: SiteStats) -> dict[str, float]:
        """Rebind one activation quantiser's scale; returns the facts about it."""
        spec = QuantSpec.parse(str(quantiser.args[3]))
        low, high = self.choose(seen, spec)
        scale, zero_point = numerics.scale_from_range(low, high, spec)
        _rebind(graph, quantiser, scale, zero_point)
        quantised = numerics.fake_quantize(seen.values, scale, zero_point, spec)
        return {
            "low": float(low),
            "high": float(high),
            "seen_low": float(seen.low.amin()),
            "seen_high": float(seen.high.amax()),
            "sqnr_db": round(numerics.sqnr_db(quantised, seen.values), 2),
        }

    def choose(self, seen: SiteStats, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """The range, as two scalars."""
        low, high = seen.low.amin(), seen.high.amax()
        if self.method is Method.ABSMAX:
            return low, high
        if self.method is Method.PERCENTILE:
            return percentile_range(seen.values.to(low.dtype), self.percentile)
        # the ends are what clipping is weighed against: the values drawn may have missed them
        return clipped_range(torch.cat((seen.values.to(low.dtype), low[None], high[None])), spec)


def static_inputs(sites: Sequence[Site], ctx: Context) -> dict[fx.Node, str]:
    """Activation quantisers that have a scale, each under the name of its first site."""
    quantisers: dict[fx.Node, str] = {}
    dynamic = 0
    for site in sites:
        if not _is_quantiser(site.input):
            continue
        if QuantSpec.parse(str(site.input.args[3])).dynamic:
            dynamic += 1
        else:
            quantisers.setdefault(site.input, site.name)
    if dynamic:
        ctx.diagnostics.remark(
            "", "dynamic-range", f"{dynamic} inputs find their range at run time: left as they are"
        )
    return quantisers


def observe_open(
    graph: Graph, quantisers: dict[fx.Node, str], ctx: Context
) -> dict[str, SiteStats]:
    """What enters each quantiser when none of them rounds or clips, by its name."""
    twin = graph.clone()
    pairs = dict(zip(graph.nodes, twin.nodes, strict=True))
    watched: dict[fx.Node, list[str]] = {}
    for quantiser, name in quantisers.items():
        watched.setdefault(pairs[quantiser].args[0], []).append(name)  # type: ignore[arg-type]
        pairs[quantiser].replace_all_uses_with(pairs[quantiser].args[0])  # type: ignore[arg-type]
    twin.clean()
    return dict(
        observe(twin, ctx.samples, watched, reservoir=RESERVOIR, progress=ctx.progress).sites
    )


def has_fixed_scale(site: Site, ctx: Context) -> bool:
    """True if the weight of ``site`` has a scale to set: one that is not being learned."""
    if not _is_quantiser(site.weight):
        return False
    scale = site.weight.args[1]
    if isinstance(scale, fx.Node) and scale.op == "get_attr":
        return True
    ctx.diagnostics.remark(site.name, "learned-range", "its weight range is learned: left as it is")
    return False


def set_weight_range(graph: Graph, site: Site) -> None:
    """Rebind the scale of the weight of ``site`` to the clipping of least squared error."""
    quantiser = site.weight
    spec = QuantSpec.parse(str(quantiser.args[3]))
    source = quantiser.args[0]
    assert isinstance(source, fx.Node)
    weight = graph.evaluate(source)
    scale, zero_point = numerics.scale_from_range(*clipped_range(weight, spec), spec)
    if site.scheme is not None and site.scheme.input is not None:
        scale = numerics.whole_multiples(scale, spec)  # as quant does: an integer GEMM needs it
    _rebind(graph, quantiser, scale, zero_point)


def _is_quantiser(node: fx.Node) -> bool:
    return node.target is FAKE_QUANTIZE


def _rebind(graph: Graph, quantiser: fx.Node, scale: Tensor, zero_point: Tensor | None) -> None:
    for operand, value in ((quantiser.args[1], scale), (quantiser.args[2], zero_point)):
        if isinstance(operand, fx.Node) and value is not None:
            source = weight_source(operand)  # behind a learned factor the scale itself is set
            assert source is not None
            name = str(source.target)
            graph.set_param(name, value, free=name in graph.free)
