"""Moves part of the spread of activation channels into the weights that read them.

::

    linear(x, @w, b)  ->  y = aten.mul(x, @smooth_inverse)
                          linear(y, aten.mul(@w, @smooth), b)

(x·diag(s)⁻¹)·(W·diag(s))ᵀ = x·Wᵀ, with s_j = max|x_j|^alpha / max|W_j|^(1 - alpha) per input
channel j, the maximum of the weights taken over all peers. Behind ``rotate`` these are the rotated
channels (dual smoothing); either order works. ``learn=true`` leaves log s free for ``distill``, and
the graph computes e^-s and its inverse.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4; Feng et al., QuantVGGT, arXiv
2509.21302, section 3.2 (scale behind a rotation, learned).
Invariant: the function of the graph is unchanged. Scales are positive and finite; a channel that is
zero on either side keeps scale 1. In half precision they are powers of two, so that multiplying and
dividing by them rounds nothing (within a factor sqrt(2) of equation 4), unless they are learned.
Online: one multiply per group, which ``fold`` removes where a norm, a modulation or a linear
above can carry it, and which kernels fuse into the quantiser where none can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import cast, parameter_dtype
from vdqc.ir.peers import feed, param_name, quantised_groups, wrap_weight
from vdqc.ir.site import Site, note, set_note

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class Smooth(Pass):
    """Scales the shared input of each group whose activations are quantised.

    Attributes:
        alpha: share of the spread that moves into the weights: 0 evens out the weights' columns
            alone, 1 the activations' channels alone.
        learn: leave the scales free for ``distill``; they then stay one multiply at run time.
        select: glob of sites.
    """

    alpha: float = 0.5
    learn: bool = False
    select: str = "*"

    name: ClassVar[str] = "smooth"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ConfigError(f"smooth.alpha: expected 0 ... 1, got {self.alpha:g}")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Smooth; facts: per group, how far its channels were apart before and after."""
        spread: dict[str, list[float]] = {}
        groups = [g for g in quantised_groups(graph, self.select) if matches(g, ctx)]
        # all statistics are of the graph as it enters: scaling one group leaves the others' inputs
        stats = ctx.stats(graph) if groups else None
        for group in ctx.progress(groups, "smooth"):
            assert stats is not None
            absmax = stats.absmax(group)
            scale = smoothing_scale(absmax, _weight_absmax(graph, group), self.alpha)
            if self.learn:
                rewrite_learned(graph, group, scale)
            else:
                scale = representable(scale, group[0].weight.meta["val"].dtype)
                rewrite(graph, group, scale)
            spread[group[0].name] = [_spread(absmax), _spread(absmax / scale.cpu())]
        return PassResult(len(spread), {"spread": spread})


def matches(group: Sequence[Site], ctx: Context) -> bool:
    """True if ``group`` reads one quantised activation that was not smoothed before."""
    name = group[0].name
    if any("smoothed" in note(site.node) for site in group):
        ctx.diagnostics.remark(name, "already-smoothed", "its input is smoothed already")
        return False
    if all(site.scheme is None or site.scheme.input is None for site in group):
        ctx.diagnostics.remark(name, "not-smoothed", "its activations stay in float")
        return False
    return True


def smoothing_scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s[K] = activation^alpha / weight^(1 - alpha) in float64, 1 where either maximum is 0.

    ``activation`` and ``weight``: float[K], greatest magnitude per channel.
    """
    a, w = activation.double(), weight.double().to(activation.device)
    scale = a.pow(alpha) / w.pow(1 - alpha)
    usable = (a > 0) & (w > 0) & scale.isfinite() & (scale > 0)
    # a channel that hardly ever fires would ask for a factor that overflows elsewhere
    return torch.where(usable, scale, 1.0).clamp(2.0**-14, 2.0**14)


def representable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` in ``dtype``; the nearest power of two where ``dtype`` has too few digits."""
    if dtype.itemsize < 4:
        scale = scale.log2().round().exp2()
    return scale.to(dtype)


def rewrite(graph: Graph, group: Sequence[Site], scale: Tensor) -> None:
    """Divide the input that ``group`` shares by ``scale`` and multiply each weight by it."""
    inverse = graph.set_param(param_name(group[0], "smooth_inverse"), 1 / scale)
    param = graph.set_param(param_name(group[0], "smooth"), scale)
    feed(graph, group, aten.mul.Tensor, inverse)
    for site in group:
        wrap_weight(graph, site, aten.mul.Tensor, param)
        set_note(site.node, smoothed=True)


def rewrite_learned(graph: Graph, group: Sequence[Site], scale: Tensor) -> None:
    """As ``rewrite``, by a free parameter that starts at log ``scale``.

    The weights get the inverse of the factor that the activations get, as it was rounded.
    """
    first, dtype = group[0].node, group[0].weight.meta["val"].dtype
    wide = parameter_dtype(dtype)
    name = param_name(group[0], "smooth")
    param = graph.set_param(name, scale.cpu().to(wide).log(), free=True)
    negative = graph.call(aten.neg.default, param, before=first)
    inverse = graph.call(aten.exp.default, negative, before=first)
    inverse = cast(graph, inverse, dtype, first)
    factor = cast(graph, inverse, wide, first)
    factor = graph.call(aten.reciprocal.default, factor, before=first)
    feed(graph, group, aten.mul.Tensor, inverse)
    for site in group:
        product = wrap_weight(graph, site, aten.mul.Tensor, factor)
        graph.set_operand(site.node, 1, cast(graph, product, dtype, site.node))
        set_note(site.node, smoothed=True)


def _weight_absmax(graph: Graph, group: Sequence[Site]) -> Tensor:
    """float32[K]: greatest magnitude per input channel over all weights of ``group``."""
    columns = [graph.evaluate(site.weight).abs().amax(0).float() for site in group]
    return torch.stack(columns).amax(0)


def _spread(absmax: Tensor) -> float:
    """Greatest over median channel."""
    median = float(absmax.median())
    return float(absmax.max()) / median if median > 0 else 0.0
