"""Moves part of the spread of activation channels into the weights that read them.

::

    linear(x, @w, b)  ->  y = aten.mul(x, @smooth_inverse)
                          linear(y, aten.mul(@w, @smooth), b)

(x·diag(s)⁻¹)·(W·diag(s))ᵀ = x·Wᵀ, with s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) per input
channel j, the maximum of the weights taken over all peers. Behind ``rotate`` these are the rotated
channels (dual smoothing); ``smooth,rotate,smooth`` scales both, the first so that a channel of
outliers does not fill the others of its rotation, the second what the rotation left uneven.
``learn=true`` leaves log s free for ``distill``, and the graph computes e^-s and its inverse.

``form=activation`` takes s_j = mean|x_j|^alpha, which protects the weights of salient channels and
serves weights alone too. ``search=20`` tries alpha = 0, 1/20, ... 19/20 for each group and keeps
what changes the group's outputs least, both operands quantised as the schemes say.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4; Feng et al., QuantVGGT, arXiv
2509.21302, section 3.2 (scale behind a rotation, learned); Lin et al., AWQ, arXiv 2306.00978,
equations 4 and 5 (mean magnitude, grid of 20).
Invariant: the function of the graph is unchanged. A group is scaled once on either side of its
rotation. Scales are positive and finite; by the balanced form a channel that is zero on either side
keeps scale 1. In half precision they are powers of two, so that multiplying and dividing by them
rounds nothing (within a factor sqrt(2) of equation 4), unless they are learned.
Online: one multiply per group, which ``fold`` removes where a norm, a modulation or a linear
above can carry it, and which kernels fuse into the quantiser where none can.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vdqc.base import numerics
from vdqc.base.diagnostics import ConfigError
from vdqc.base.scheme import QuantSpec
from vdqc.engine.calibrate import ActivationStats
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.engine.rows import input_rows
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import cast, parameter_dtype
from vdqc.ir.names import weight_source
from vdqc.ir.peers import feed, param_name, quantised_groups, wrap_weight
from vdqc.ir.site import Site, note, set_note

aten = torch.ops.aten

#: Rows of a group's input that a search weighs its scales on.
SEARCH_ROWS = 256


class Form(enum.StrEnum):
    """What a scale is made of."""

    BALANCED = "balanced"
    ACTIVATION = "activation"


class Weights(enum.StrEnum):
    """Which weights a balanced scale looks at."""

    ROTATED = "rotated"
    PLAIN = "plain"


@final
@dataclass(frozen=True)
class Smooth(Pass):
    """Scales the shared input of each group whose activations are quantised.

    Attributes:
        alpha: share of the spread that moves into the weights: 0 evens out the weights' columns
            alone, 1 the activations' channels alone.
        form: ``balanced`` by the greatest magnitudes of both sides, ``activation`` by the mean
            magnitude of the activations, also where these stay in float.
        search: values of alpha that are tried for each group; 0 takes ``alpha`` for all.
        learn: leave the scales free for ``distill``; they then stay one multiply at run time.
        weights: whose greatest magnitudes count: those that the site reads now, ``rotated`` where
            they are, or the ``plain`` ones of the model, as QuantVGGT's released code has it.
        select: glob of sites.
    """

    alpha: float = 0.5
    form: Form = Form.BALANCED
    search: int = 0
    learn: bool = False
    weights: Weights = Weights.ROTATED
    select: str = "*"

    name: ClassVar[str] = "smooth"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"smooth.alpha: expected 0 ... 1, got {self.alpha:g}")
        if self.search < 0:
            raise ConfigError(f"smooth.search: expected 0 or more, got {self.search}")

    def planned(self) -> PlannedSmooth:
        """The same multiplies, by one."""
        return PlannedSmooth(self.form, self.learn, self.select)

    def leaves_free(self) -> Sequence[str]:
        """The scales, if they are learned."""
        return ["learn=true"] if self.learn else []

    def forwards(self) -> float:
        """One, and one to keep rows where scales are weighed on them."""
        return 2.0 if self.search or self.form is Form.ACTIVATION else 1.0

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Smooth; facts: per group how far its channels were apart before and after, and alpha."""
        spread: dict[str, list[float]] = {}
        alphas: dict[str, float] = {}
        groups = [
            g for g in quantised_groups(graph, self.select) if matches(g, ctx, form=self.form)
        ]
        # all statistics are of the graph as it enters: scaling one group leaves the others' inputs
        stats = ctx.stats(graph) if groups else None
        rows: dict[str, Tensor] = {}
        if groups and (self.search or self.form is Form.ACTIVATION):
            rows = input_rows(
                graph, ctx.samples, groups, SEARCH_ROWS, seed=ctx.seed, progress=ctx.progress
            )
        for group in ctx.progress(groups, "smooth"):
            assert stats is not None
            name, absmax = group[0].name, stats.absmax(group)
            scale, alphas[name] = self.scale(graph, group, stats, rows)
            if self.learn:
                rewrite_learned(graph, group, scale)
            else:
                scale = representable(scale, group[0].weight.meta["val"].dtype)
                rewrite(graph, group, scale)
            spread[name] = [_spread(absmax), _spread(absmax / scale.cpu())]
        return PassResult(len(spread), {"spread": spread, "alpha": alphas})

    def scale(
        self, graph: Graph, group: Sequence[Site], stats: ActivationStats, rows: dict[str, Tensor]
    ) -> tuple[Tensor, float]:
        """s[K] of ``group`` and the alpha that it was made with."""
        name = group[0].name
        if self.form is Form.ACTIVATION:
            activation = rows[name].abs().mean(0)
            weight = torch.ones_like(activation)
        else:
            activation = stats.absmax(group)
            weight = _weight_absmax(graph, group, self.weights)

        def at(alpha: float) -> Tensor:
            scale = smoothing_scale(activation, weight, alpha)
            return centred(scale) if self.form is Form.ACTIVATION else scale

        if not self.search:
            return at(self.alpha), self.alpha
        alphas = [step / self.search for step in range(self.search)]
        operands = [
            (graph.evaluate(site.weight).detach().to(rows[name]), *specs(site)) for site in group
        ]
        dtype = group[0].weight.meta["val"].dtype
        errors = [
            sum(
                smoothed_error(rows[name], weight, representable(at(alpha), dtype), *both)
                for weight, *both in operands
            )
            for alpha in alphas
        ]
        best = min(range(len(alphas)), key=errors.__getitem__)
        return at(alphas[best]), alphas[best]


@final
@dataclass(frozen=True)
class PlannedSmooth(Pass):
    """``Smooth`` with scales of one, before any activation was seen."""

    form: Form
    learn: bool
    select: str

    name: ClassVar[str] = "smooth"
    at: ClassVar[frozenset[Stage]] = Smooth.at
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Insert the multiplies."""
        groups = [
            g for g in quantised_groups(graph, self.select) if matches(g, ctx, form=self.form)
        ]
        for group in groups:
            value = group[0].weight.meta["val"]
            ones = torch.ones(int(value.shape[-1]), dtype=value.dtype)
            (rewrite_learned if self.learn else rewrite)(graph, group, ones)
        return PassResult(len(groups))


def matches(group: Sequence[Site], ctx: Context, *, form: Form = Form.BALANCED) -> bool:
    """True if ``group`` reads what ``form`` needs quantised, and no scale of these channels yet."""
    name = group[0].name
    if any(frame(site) in note(site.node).get("smoothed", ()) for site in group):
        ctx.diagnostics.remark(name, "already-smoothed", "its input is smoothed already")
        return False
    if form is Form.BALANCED and all(specs(site)[1] is None for site in group):
        ctx.diagnostics.remark(name, "not-smoothed", "its activations stay in float")
        return False
    return True


def frame(site: Site) -> str:
    """Which channels ``site`` reads now: ``plain``, or ``rotated`` behind a rotation."""
    return "rotated" if "rotated" in note(site.node) else "plain"


def smoothing_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s[K] = activation^alpha / weight^(1 - alpha) in float64, 1 where either maximum is 0.

    ``activation`` and ``weight``: float[K], greatest magnitude per channel.
    """
    a, w = activation.double(), weight.double().to(activation.device)
    scale = a.pow(alpha) / w.pow(1 - alpha)
    usable = (a > 0) & (w > 0) & scale.isfinite() & (scale > 0)
    # a channel that hardly ever fires would ask for a factor that overflows elsewhere
    return torch.where(usable, scale, 1.0).clamp(2.0**-14, 2.0**14)


def centred(scale: Tensor) -> Tensor:
    """``scale`` over the geometric mean of its ends, so that weights keep their magnitude."""
    return scale / (scale.amax() * scale.amin()).sqrt()


def smoothed_error(
    rows: Tensor,
    weight: Tensor,
    scale: Tensor,
    weight_spec: QuantSpec | None,
    input_spec: QuantSpec | None,
) -> float:
    """Squared error of x·Wᵀ relative to it, both sides scaled and then quantised.

    ``rows`` float[R, K], ``weight`` float[N, K], ``scale`` float[K]; a static input is quantised
    with the range of the rows.
    """
    scale = scale.to(rows)
    inputs, scaled = rows / scale, weight * scale
    if input_spec is not None:
        inputs = numerics.nearest(inputs, input_spec)
    if weight_spec is not None:
        scaled = numerics.nearest(scaled, weight_spec, whole=input_spec is not None)
    expected = rows @ weight.T
    size = float(expected.square().sum())
    return float((inputs @ scaled.T - expected).square().sum()) / size if size > 0 else 0.0


def representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` in ``dtype``; the nearest power of two where ``dtype`` has too few digits."""
    if dtype.itemsize < 4:
        scale = scale.log2().round().exp2()
    return scale.to(dtype)


def rewrite(graph: Graph, group: Sequence[Site], scale: Tensor) -> None:
    """Divide the input that ``group`` shares by ``scale`` and multiply each weight by it."""
    name = scale_name(group)
    inverse = graph.set_param(f"{name}_inverse", 1 / scale)
    param = graph.set_param(name, scale)
    feed(graph, group, aten.mul.Tensor, inverse)
    for site in group:
        wrap_weight(graph, site, aten.mul.Tensor, param)
        _mark(site)


def rewrite_learned(graph: Graph, group: Sequence[Site], scale: Tensor) -> None:
    """As ``rewrite``, by a free parameter that starts at log ``scale``.

    The weights get the inverse of the factor that the activations get, as it was rounded.
    """
    first, dtype = group[0].node, group[0].weight.meta["val"].dtype
    wide = parameter_dtype(dtype)
    param = graph.set_param(scale_name(group), scale.cpu().to(wide).log(), free=True)
    negative = graph.call(aten.neg.default, param, before=first)
    inverse = graph.call(aten.exp.default, negative, before=first)
    inverse = cast(graph, inverse, dtype, first)
    factor = cast(graph, inverse, wide, first)
    factor = graph.call(aten.reciprocal.default, factor, before=first)
    feed(graph, group, aten.mul.Tensor, inverse)
    for site in group:
        product = wrap_weight(graph, site, aten.mul.Tensor, factor)
        graph.set_operand(site.node, 1, cast(graph, product, dtype, site.node))
        _mark(site)


def scale_name(group: Sequence[Site]) -> str:
    """The parameter that holds the scale: ``smooth``, or ``smooth_behind`` if one stands before."""
    earlier = any("smoothed" in note(site.node) for site in group)
    return param_name(group[0], "smooth_behind" if earlier else "smooth")


def _mark(site: Site) -> None:
    set_note(site.node, smoothed=[*note(site.node).get("smoothed", ()), frame(site)])


def specs(site: Site) -> tuple[QuantSpec | None, QuantSpec | None]:
    """How weight and input of ``site`` will be quantised."""
    return (None, None) if site.scheme is None else (site.scheme.weight, site.scheme.input)


def _weight_absmax(graph: Graph, group: Sequence[Site], weights: Weights) -> Tensor:
    """float32[K]: greatest magnitude per input channel over all weights of ``group``."""
    columns = []
    for site in group:
        source = weight_source(site.weight) if weights is Weights.PLAIN else None
        same = source is not None and source.meta["val"].shape == site.weight.meta["val"].shape
        value = graph.evaluate(source if source is not None and same else site.weight)
        columns.append(value.abs().amax(0).float())
    return torch.stack(columns).amax(0)


def _spread(absmax: Tensor) -> float:
    """Greatest over median channel."""
    median = float(absmax.median())
    return float(absmax.max()) / median if median > 0 else 0.0
