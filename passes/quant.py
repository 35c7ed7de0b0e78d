"""Puts the inputs and weights of linears behind ``fake_quantize``, as their schemes say.

::

    linear(x, w, b)  ->  q = vdqc.fake_quantize(x, scale, zero_point, spec)
                         linear(q, vdqc.fake_quantize(w, @scale, @zero_point, spec), b)

Weight ranges are read off the weights (absmax, or the clipping of least squared error per scale);
static activation ranges start from what the samples show and are refined by ``calibrate``; dynamic
ones are found at run time. ``clip=learned`` multiplies each end of a range by a ratio in (0, 1) and
``step=learned`` each step by a positive factor; both are free for ``distill``, and weight scales
then are expressions of the weights, so that they follow learned transforms::

    scale of w = max|w| · sigmoid(@w_clip) / qmax      one clip per scale
    scale of x = sigmoid(@x_clip) of the range         one clip per quantiser

``rounding=learned`` lets ``distill`` choose for every weight which of its two neighbours it takes::

    fake_quantize(s·(floor(w / s) + h(@w_rounding)))   h = clip(1.2·sigmoid - 0.1, 0, 1)

The quantiser behind it decides at once and lets gradients straight through, so that no penalty has
to drive h to 0 or 1 in the end. It starts as rounding to nearest.

Source: Jacob et al., arXiv 1712.05877, equation 1 (uniform quantisation); Banner et al., arXiv
1810.05723, section 3 (clipping that minimises the squared error); Shao et al., OmniQuant, arXiv
2308.13137, equation 2 (learnable clipping); Esser et al., LSQ, arXiv 1902.08153 (learned step);
Nagel et al., AdaRound, arXiv 2004.10568, equation 23 (h).
Invariant: peers whose activations have one spec share one quantiser; every code fits its dtype, and
no weight moves by more than half a step where its range is not clipped.
Online: one quantisation of each group's input a call (fused with the GEMM's prologue at lowering).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.scheme import GranularityKind, QuantSpec
from vdqc.engine.calibrate import ActivationStats
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import CLIP_START, learned_ratio, parameter_dtype
from vdqc.ir.names import source_line
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.peers import feed, param_name, quantised_groups, scale_params, scheme_of, wrap_weight
from vdqc.ir.resume import WeightWork, share
from vdqc.ir.site import Site, SiteKind, set_note
from vdqc.ir.weight_quantiser import (
    WeightRange,
    fixed_weight_scale,
    learn_rounding,
    learned_weight_scale,
    measuring,
    weight_facts,
)

aten = torch.ops.aten


class Clip(enum.StrEnum):
    """Which ranges have a clip ratio to learn."""

    NONE = "none"
    LEARNED = "learned"
    WEIGHT = "weight"
    INPUT = "input"

    @property
    def of_weight(self) -> bool:
        """True if weights have one."""
        return self in (Clip.LEARNED, Clip.WEIGHT)

    @property
    def of_input(self) -> bool:
        """True if activations have one."""
        return self in (Clip.LEARNED, Clip.INPUT)


class Step(enum.StrEnum):
    """Which steps have a factor to learn."""

    FIXED = "fixed"
    LEARNED = "learned"
    INPUT = "input"


class Rounding(enum.StrEnum):
    """How a weight finds its code."""

    NEAREST = "nearest"
    LEARNED = "learned"


@final
@dataclass(frozen=True)
class Quant(Pass):
    """Inserts the quantisers that the schemes ask for.

    Attributes:
        weight_range: ``absmax`` covers every weight; ``mse`` clips where that lowers the squared
            error of a row (or group).
        clip: ``learned`` leaves a clip ratio of each range free, ``weight`` or ``input`` those of
            one side; they start at sigmoid(4) = 0.982, or with ``mse`` where it would clip.
        step: ``learned`` leaves a factor of each step of weights and static activations free,
            ``input`` of static activations alone.
        rounding: ``learned`` leaves it free which of two codes a weight gets; scales are fixed.
        select: glob of sites; those it leaves out get the scheme ``none``.
    """

    weight_range: WeightRange = WeightRange.ABSMAX
    clip: Clip = Clip.NONE
    step: Step = Step.FIXED
    rounding: Rounding = Rounding.NEAREST
    select: str = "*"

    name: ClassVar[str] = "quant"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    to: ClassVar[Stage | None] = Stage.COMPRESSED
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        moving = self.clip.of_weight or self.step is Step.LEARNED
        if self.rounding is Rounding.LEARNED and moving:
            raise ConfigError(
                "quant.rounding=learned chooses codes on a fixed grid, and clip or step moves it",
                "leave one of them out; clip=input and step=input go with it",
            )

    def leaves_free(self) -> Sequence[str]:
        """Clips, steps and rounding, whichever are learned."""
        fixed = {"clip": Clip.NONE, "step": Step.FIXED, "rounding": Rounding.NEAREST}
        values = {option: getattr(self, option) for option in fixed}
        return [f"{name}={value}" for name, value in values.items() if value is not fixed[name]]

    def planned(self) -> PlannedQuant:
        """Which sites stay in float."""
        return PlannedQuant(self.select)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Quantise; facts: per site scheme, weight SQNR in dB, bits a weight, bytes; and totals."""
        keep_others_in_float(graph, self.select)
        groups = quantised_groups(graph)
        stats = input_stats(graph, groups, ctx)
        if not self.learns_weights:
            share(graph, self.work(graph, groups), "measure", ctx.progress)
        sites: dict[str, dict[str, Any]] = {}
        for group in ctx.progress(groups, "quantise"):
            if stats is not None:
                warn_outliers(group, stats, ctx)
            for site in group:
                if (spec := scheme_of(site).weight) is not None:
                    sites[site.name] = self.quantise_weight(graph, site, spec)
            self.quantise_inputs(graph, group, stats, ctx)
        return PassResult(sum(map(len, groups)), {"sites": sites, **totals(sites)})

    def quantise_weight(self, graph: Graph, site: Site, spec: QuantSpec) -> dict[str, Any]:
        """Wrap the weight of ``site``; returns the facts about it. Holds one weight at a time."""
        width = site.weight.meta["val"].shape[-1]
        if width % max(1, spec.granularity.size):
            raise InputError(
                f"groups of {spec.granularity.size} do not divide {width} input channels",
                f"give it another scheme: {site.name}=<scheme>",
                site=site.name,
            )
        if self.learns_weights:
            clip, step = self.clip.of_weight, self.step is Step.LEARNED
            params = learned_weight_scale(graph, site, spec, self.weight_range, clip, step)
            facts = weight_facts(graph, site, spec, *params)
        else:
            params, facts = fixed_weight_scale(graph, site, spec, self.weight_range)
        if self.rounding is Rounding.LEARNED:
            learn_rounding(graph, site, spec, params[0])
        wrap_weight(graph, site, FAKE_QUANTIZE, *params, str(spec))
        return facts

    @property
    def learns_weights(self) -> bool:
        """True if ranges or steps of weights are free."""
        return self.clip.of_weight or self.step is Step.LEARNED

    def work(self, graph: Graph, groups: Sequence[Sequence[Site]]) -> Iterator[WeightWork]:
        """What measuring the weights of ``groups`` will ask for."""
        for site in (site for group in groups for site in group):
            if (spec := scheme_of(site).weight) is not None:
                yield measuring(graph, site, spec, self.weight_range)

    def quantise_inputs(
        self, graph: Graph, group: Sequence[Site], stats: ActivationStats | None, ctx: Context
    ) -> None:
        """Wrap what ``group`` reads, once per spec."""
        by_spec: dict[QuantSpec, list[Site]] = {}
        for site in group:
            if (spec := scheme_of(site).input) is not None:
                by_spec.setdefault(spec, []).append(site)
        for spec, peers in by_spec.items():
            scale = zero_point = None
            if not spec.dynamic:
                found = static_scale(peers, spec, stats, ctx)
                scale, zero_point = scale_params(graph, peers[0], "input", *found)
                scale = self.learned_static(graph, peers[0], scale)
            elif self.clip.of_input:
                scale = dynamic_clip(graph, peers[0], peers[0].input.meta["val"].dtype)
            feed(graph, peers, FAKE_QUANTIZE, scale, zero_point, str(spec))

    def learned_static(self, graph: Graph, site: Site, scale: fx.Node) -> fx.Node:
        """A static scale times what is learned of it."""
        before, dtype = site.node, scale.meta["val"].dtype
        if self.clip.of_input:
            scale = graph.call(
                aten.mul.Tensor, scale, dynamic_clip(graph, site, dtype), before=before
            )
        if self.step is not Step.FIXED:
            zero = torch.zeros((), dtype=dtype)
            param = graph.set_param(param_name(site, "input_step"), zero, free=True)
            factor = graph.call(aten.exp.default, param, before=before)
            scale = graph.call(aten.mul.Tensor, scale, factor, before=before)
        return scale


@final
@dataclass(frozen=True)
class PlannedQuant(Pass):
    """``Quant`` that inserts no quantisers: the schemes of sites tell what it would."""

    select: str

    name: ClassVar[str] = "quant"
    at: ClassVar[frozenset[Stage]] = Quant.at
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Leave schemes to the sites that would be quantised."""
        keep_others_in_float(graph, self.select)
        return PassResult(sum(map(len, quantised_groups(graph))))


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
    specs = [scheme_of(site).input for group in groups for site in group]
    static = any(spec is not None and not spec.dynamic for spec in specs)
    wanted = static or (any(spec is not None for spec in specs) and not graph.stored)
    return ctx.stats(graph) if ctx.samples and wanted else None


def dynamic_clip(graph: Graph, site: Site, dtype: torch.dtype) -> fx.Node:
    """The clip ratio of a dynamic quantiser in front of ``site``, from one free number."""
    start = torch.tensor(CLIP_START, dtype=parameter_dtype(dtype))
    return learned_ratio(graph, param_name(site, "input_clip"), start, site.node)


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
    spec = next((s.input for s in map(scheme_of, group) if s.input is not None), None)
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
