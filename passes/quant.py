"""Puts the inputs and weights of linears behind ``fake_quantize``, as their schemes say.

::

    linear(x, w, b)  ->  q = vdqc.fake_quantize(x, scale, zero_point, spec)
                         linear(q, vdqc.fake_quantize(w, @scale, @zero_point, spec), b)

Weight ranges are read off the weights (absmax, or the clipping of least squared error per scale);
static activation ranges start from what the samples show and are refined by ``calibrate``; dynamic
ones are found at run time and have no parameters.

Source: Jacob et al., arXiv 1712.05877, equation 1 (uniform quantisation); Banner et al., arXiv
1810.05723, section 3 (clipping that minimises the squared error).
Invariant: peers whose activations have one spec share one quantiser; every code fits its dtype, and
no weight moves by more than half a step where its range is not clipped.
Online: one quantisation of each group's input a call (fused with the GEMM's prologue at lowering).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.diagnostics import InputError
from vdqc.base.packing import packed_bytes
from vdqc.base.ranges import clipped_range
from vdqc.base.scheme import GranularityKind, QuantScheme, QuantSpec
from vdqc.engine.calibrate import ActivationStats
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage, source_line
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.peers import feed, param_name, quantised_groups, wrap_weight
from vdqc.ir.site import Site, SiteKind, set_note


class WeightRange(enum.StrEnum):
    """How the range of a weight is chosen."""

    ABSMAX = "absmax"
    MSE = "mse"


@final
@dataclass(frozen=True)
class Quant(Pass):
    """Inserts the quantisers that the schemes ask for.

    Attributes:
        weight_range: ``absmax`` covers every weight; ``mse`` clips where that lowers the squared
            error of a row (or group).
        select: glob of sites; those it leaves out get the scheme ``none``.
    """

    weight_range: WeightRange = WeightRange.ABSMAX
    select: str = "*"

    name: ClassVar[str] = "quant"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    to: ClassVar[Stage | None] = Stage.COMPRESSED
    exact: ClassVar[bool] = False

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Quantise; facts: per site scheme, weight SQNR in dB, bits a weight, bytes; and totals."""
        keep_others_in_float(graph, self.select)
        groups = quantised_groups(graph)
        stats = input_stats(graph, groups, ctx)
        sites: dict[str, dict[str, Any]] = {}
        for group in ctx.progress(groups, "quantise"):
            if stats is not None:
                warn_outliers(group, stats, ctx)
            for site in group:
                if (spec := _scheme(site).weight) is not None:
                    sites[site.name] = quantise_weight(graph, site, spec, self.weight_range)
            quantise_inputs(graph, group, stats, ctx)
        return PassResult(sum(map(len, groups)), {"sites": sites, **totals(sites)})


def keep_others_in_float(graph: Graph, select: str) -> None:
    """Give every linear site that ``select`` does not match the scheme ``none``."""
    selected = {site.name for site in graph.sites(select, SiteKind.LINEAR)}
    for site in graph.sites(kind=SiteKind.LINEAR):
        if site.name not in selected:
            set_note(site.node, scheme="none")


def input_stats(
    graph: Graph, groups: Sequence[Sequence[Site]], ctx: Context
) -> ActivationStats | None:
    """Statistics of what ``groups`` read; None if there are no samples to see it on.

    A graph whose weights are on disk is run only for static ranges, which cannot do without.
    """
    specs = [_scheme(site).input for group in groups for site in group]
    static = any(spec is not None and not spec.dynamic for spec in specs)
    wanted = static or (any(spec is not None for spec in specs) and not graph.stored)
    return ctx.stats(graph) if ctx.samples and wanted else None


def quantise_weight(
    graph: Graph, site: Site, spec: QuantSpec, weight_range: WeightRange
) -> dict[str, Any]:
    """Wrap the weight of ``site``; returns the facts about it. Holds one weight at a time."""
    weight = graph.evaluate(site.weight)
    if weight.shape[-1] % max(1, spec.granularity.size):
        raise InputError(
            f"groups of {spec.granularity.size} do not divide {weight.shape[-1]} input channels",
            f"give it another scheme: {site.name}=<scheme>",
            site=site.name,
        )
    scale, zero_point = weight_scale(weight, spec, weight_range)
    if _scheme(site).input is not None:  # both operands are codes: keep the sum over groups whole
        scale = numerics.whole_multiples(scale, spec)
    quantised = numerics.fake_quantize(weight, scale, zero_point, spec)
    stored = stored_bytes(weight, scale, zero_point, spec)
    facts = {
        "scheme": str(_scheme(site)),
        "sqnr_db": round(numerics.sqnr_db(quantised, weight), 2),
        "weights": weight.numel(),
        "bytes": stored,
        "bits_per_weight": round(8 * stored / weight.numel(), 3),
    }
    params = _params(graph, site, "weight", scale, zero_point)
    wrap_weight(graph, site, FAKE_QUANTIZE, *params, str(spec))
    return facts


def weight_scale(
    weight: Tensor, spec: QuantSpec, weight_range: WeightRange
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of float[N, K], shaped as ``Granularity`` documents."""
    if weight_range is WeightRange.MSE:
        return numerics.scale_from_range(*clipped_range(weight, spec), spec)
    return numerics.scale_from_range(*numerics.value_range(weight, spec), spec)


def stored_bytes(weight: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> int:
    """Bytes of the packed codes, float32 scales and one byte a zero point."""
    rows, width = weight.shape
    zero_points = zero_point.numel() if zero_point is not None else 0
    return rows * packed_bytes(spec.dtype.bits, width) + 4 * scale.numel() + zero_points


def quantise_inputs(
    graph: Graph, group: Sequence[Site], stats: ActivationStats | None, ctx: Context
) -> None:
    """Wrap what ``group`` reads, once per spec."""
    by_spec: dict[QuantSpec, list[Site]] = {}
    for site in group:
        if (spec := _scheme(site).input) is not None:
            by_spec.setdefault(spec, []).append(site)
    for spec, peers in by_spec.items():
        params: Sequence[fx.Node | None] = (None, None)
        if not spec.dynamic:
            params = _params(graph, peers[0], "input", *static_scale(peers, spec, stats, ctx))
        feed(graph, peers, FAKE_QUANTIZE, *params, str(spec))


def static_scale(
    peers: Sequence[Site], spec: QuantSpec, stats: ActivationStats | None, ctx: Context
) -> tuple[Tensor, Tensor | None]:
    """The scale that covers what the samples showed, or 1 ... with a warning if there are none."""
    if stats is None:
        ctx.diagnostics.warning(
            peers[0].name,
            "no-samples",
            f"a static {spec.dtype} range needs samples and there are none: it covers -1 ... 1",
            "give samples, or a scheme whose activations are dynamic",
        )
        return numerics.scale_from_range(torch.tensor(-1.0), torch.tensor(1.0), spec)
    seen = stats.sites[peers[0].name]
    return numerics.scale_from_range(seen.low.amin(), seen.high.amax(), spec)


def warn_outliers(group: Sequence[Site], stats: ActivationStats, ctx: Context) -> None:
    """Warn where one channel is so large that the median channel falls below one step."""
    spec = next((s.input for s in map(_scheme, group) if s.input is not None), None)
    if spec is None or spec.dtype.is_float or spec.granularity.kind is GranularityKind.GROUP:
        return
    absmax = stats.absmax(group)
    largest, median = float(absmax.max()), float(absmax.median())
    if median <= 0 or largest <= spec.dtype.qmax * median:
        return
    line = source_line(group[0].node)
    ctx.diagnostics.warning(
        group[0].name,
        "input-outlier",
        f"input maximum {largest:.4g} is {largest / median:.0f} times the median channel, which "
        f"falls below one step of {spec.dtype}",
        *([line] if line else []),
        "rotate or smooth it, or give it more bits",
    )


def totals(sites: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Bytes and mean bits a weight over all quantised sites."""
    weights = sum(facts["weights"] for facts in sites.values())
    stored = sum(facts["bytes"] for facts in sites.values())
    return {"bytes": stored, "bits_per_weight": round(8 * stored / weights, 3) if weights else 0.0}


def _params(
    graph: Graph, site: Site, role: str, scale: Tensor, zero_point: Tensor | None
) -> tuple[fx.Node, fx.Node | None]:
    scale_node = graph.set_param(param_name(site, f"{role}_scale"), scale)
    if zero_point is None:
        return scale_node, None
    return scale_node, graph.set_param(param_name(site, f"{role}_zero_point"), zero_point)


def _scheme(site: Site) -> QuantScheme:
    assert site.scheme is not None
    return site.scheme
