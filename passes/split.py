"""Splits a small branch off a linear, that carries what its quantised weight loses.

::

    svd     linear(x, @w, b)         ->  linear(x, @w - up·down, b) + linear(linear(x, down), up)
    oolri   linear(q, Q(@w), b)      ->  linear(q, Q(@w), b) + linear(linear(x, down), up)
    tqe     linear(q, Q(@w), b)      ->  linear(q, Q(@w), b) + linear(linear(q, alpha)·M, beta)

``svd`` (SVDQuant) takes the leading singular vectors out of the weight before it is quantised: it
is exact, and runs in front of ``quant``; whether ``smooth`` comes before it is the recipe's choice.
The others know the quantised weight and run behind ``quant``. ``oolri`` starts at the leading
singular vectors of W - Q(W); ``placement=inner`` trains them inside the quantiser of the quantised
weight, Q(Q(W) + up·down), from which nothing is left at run time. ``tqe`` has rank 1, reads the
quantised input q, and multiplies the tokens of frame i by M_i; beta starts at 0, so that it changes
nothing before ``distill``, unless ``init=svd``. Text tokens have gain 1. A linear may have one
branch inside and one beside its quantised weight; rows of several widths (``allocate``) have their
own.

Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2; Feng et al., Q-VDiT, arXiv 2505.22167,
section 3.2 (token-aware estimator); Feng et al., MPQ-DMv2, arXiv 2507.04290, figure 2
(initialisation from the error; placement and scaling of the factors are ours).
Invariant: svd leaves the function as it is, and so does tqe with ``init=zero`` until it is trained;
biases stay.
Online: 2·R·(K + N) operations a token beside the 2·K·N of the linear.
"""

from __future__ import annotations

import enum
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.base import numerics
from vdqc.base.branches import alternating_factors, leading_factors
from vdqc.base.diagnostics import ConfigError, OrderError
from vdqc.base.options import check_belongs
from vdqc.base.rounding import output_error
from vdqc.engine.frame_gains import observed_gains
from vdqc.engine.moments import input_moments
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.branch import attach, branch, inside
from vdqc.ir.frame_gain import linear_frames, size_builder, times_gain
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.learned import cast, parameter_dtype
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.peers import param_name, quantised_groups, unquantised
from vdqc.ir.site import Site, note

aten = torch.ops.aten


class Branch(enum.StrEnum):
    """What the branch is and where it starts."""

    SVD = "svd"
    OOLRI = "oolri"
    TQE = "tqe"


class Placement(enum.StrEnum):
    """Beside the quantised linear, or inside the quantiser of its weight."""

    OUTER = "outer"
    INNER = "inner"


class Init(enum.StrEnum):
    """Where alpha and beta of tqe start."""

    ZERO = "zero"
    SVD = "svd"


class Gain(enum.StrEnum):
    """Where the gains of frames start: eta / omega of the samples, at 1, or there are none."""

    FRAMES = "frames"
    ONES = "ones"
    NONE = "none"


@final
@dataclass(frozen=True)
class Split(Pass):
    """Adds a branch to each quantised linear.

    Attributes:
        branch: ``svd`` before quant; ``tqe`` or ``oolri`` behind it.
        rank: of svd and oolri; at most the least side of a weight.
        rounds: of svd: how often to take the factors anew from what quantisation leaves, while the
            output error falls (the paper: 1; its code: 100).
        placement: of oolri.
        init: of tqe: ``svd`` starts at the leading singular pair of W - Q(W).
        gain: of tqe.
        learn: leave the branch free for ``distill``; by default tqe and oolri.
        select: glob of sites.
    """

    branch: Branch = Branch.SVD
    rank: int = 32
    rounds: int = 1
    placement: Placement = Placement.OUTER
    init: Init = Init.ZERO
    gain: Gain = Gain.FRAMES
    learn: bool | None = None
    select: str = "*"

    name: ClassVar[str] = "split"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED, Stage.COMPRESSED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, value in (("rank", self.rank), ("rounds", self.rounds)):
            if value < 1:
                raise ConfigError(f"split.{option}: expected 1 or more, got {value}")
        svd, oolri, tqe = Branch
        check_belongs(
            self,
            (
                ("rank", "branch", (svd, oolri)),
                ("rounds", "branch", (svd,)),
                ("placement", "branch", (oolri,)),
                ("init", "branch", (tqe,)),
                ("gain", "branch", (tqe,)),
            ),
        )
        behind = self.branch is not Branch.SVD
        stage = Stage.COMPRESSED if behind else Stage.ANNOTATED
        # of the instance, so that a wrong order is refused before a model is loaded
        object.__setattr__(self, "at", frozenset({stage}))
        exact = not behind or (self.branch is Branch.TQE and self.init is Init.ZERO)
        object.__setattr__(self, "exact", exact)

    @property
    def learned(self) -> bool:
        """Whether the branch is free."""
        return self.branch is not Branch.SVD if self.learn is None else self.learn

    @property
    def inner(self) -> bool:
        """Whether the branch is inside the quantiser of the weight."""
        return self.branch is Branch.OOLRI and self.placement is Placement.INNER

    def planned(self) -> PlannedSplit | None:
        """The same branches, of zeros; what is inside a weight leaves nothing."""
        if self.inner:
            return None
        return PlannedSplit(self.branch, self.rank, self.gain, self.select)

    def leaves_free(self) -> Sequence[str]:
        """The branch, if it is learned; inside a weight's quantiser it always is."""
        if self.inner:
            return [f"placement={self.placement}"]
        if not self.learned:
            return []
        return [f"branch={self.branch}" if self.learn is None else "learn=true"]

    def forwards(self) -> float:
        """One for the second moments of inputs, where the branch is fitted again."""
        return 1.0 if self.rounds > 1 else 0.0

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Split; facts: per site the rank and bytes of its branch, and what is known of it."""
        sites = find_sites(graph, self.select, "inside" if self.inner else "branch", ctx)
        if self.branch is Branch.SVD:
            found = self.svd(graph, sites, ctx)
        elif self.branch is Branch.OOLRI:
            found = {site.name: self.oolri(graph, site, ctx) for site in sites}
        else:
            found = self.tqe(graph, sites, ctx)
        return PassResult(len(found), {"branches": found})

    # svd --------------------------------------------------------------------------------------

    def svd(self, graph: Graph, sites: list[Site], ctx: Context) -> dict[str, Any]:
        """Take the leading singular vectors of each weight out of it."""
        made: dict[str, tuple[Tensor, Tensor, int]] = {}
        for group, moment in self.moments(graph, sites, ctx):
            for site in group:
                rank = self.fitting(site, ctx)
                made[site.name] = svd_factors(graph, site, rank, self.rounds, moment)
        facts = {}
        for site in sites:
            up, down, rounds = made.pop(site.name)
            nodes = self.factors(graph, site, up, down)
            product = graph.call(aten.matmul.default, *nodes, before=site.node)
            rest = graph.call(aten.sub.Tensor, site.weight, product, before=site.node)
            graph.set_operand(site.node, 1, rest)
            attach(graph, site, branch(graph, site, site.input, *nodes))
            facts[site.name] = {**size_facts(up, down), "rounds": rounds}
        return facts

    def moments(
        self, graph: Graph, sites: list[Site], ctx: Context
    ) -> list[tuple[list[Site], Tensor | None]]:
        """Sites with the second moment of their inputs, where rounds are judged by it."""
        if self.rounds == 1 or not ctx.samples or not sites:
            return [([site], None) for site in sites]
        wanted = {site.name for site in sites}
        groups = [
            kept
            for group in graph.groups(self.select)
            if (kept := [site for site in group if site.name in wanted])
        ]
        walk = input_moments(graph, ctx.samples, groups, progress=ctx.progress)
        return [(list(group), found.second) for group, found in walk]

    # behind quant -----------------------------------------------------------------------------

    def oolri(self, graph: Graph, site: Site, ctx: Context) -> dict[str, Any]:
        """A branch that starts at the leading singular vectors of the weight's error."""
        weight, quantised = weights(graph, site)
        error = (weight - quantised).to(parameter_dtype(weight.dtype))
        up, down = leading_factors(error, self.fitting(site, ctx))
        left = float((error - up @ down).norm() / error.norm().clamp_min(1e-30))
        if self.inner:
            inside(graph, site, quantised, self.factors(graph, site, up, down, wide=True))
            return {"rank": up.shape[1], "bytes": 0, "error_left": round(left, 4)}
        dtype = weight.dtype
        nodes = self.factors(graph, site, up.to(dtype), down.to(dtype))
        attach(graph, site, branch(graph, site, unquantised(site.input), *nodes))
        facts = size_facts(up.to(dtype), down.to(dtype))
        return {**facts, "error_left": round(left, 4)}

    def tqe(self, graph: Graph, sites: list[Site], ctx: Context) -> dict[str, Any]:
        """Rank-1 branches on quantised inputs, with a gain for each frame."""
        layouts = {site.name: linear_frames(graph, site) for site in sites}
        if self.gain is Gain.NONE:
            layouts = dict.fromkeys(layouts)
        inputs = {site.input: layouts[site.name] for site in sites}
        gains = observed_gains(graph, inputs, ctx.samples, ones=self.gain is Gain.ONES)
        sizes, facts = size_builder(graph), {}
        for site in ctx.progress(sites, "split"):
            beta, alpha = self.estimator(graph, site, ctx.seed)
            nodes = self.factors(graph, site, beta, alpha)
            gain, layout = gains.get(site.input), layouts[site.name]
            facts[site.name] = size_facts(beta, alpha)
            if gain is None or layout is None:
                if self.gain is not Gain.NONE:
                    ctx.diagnostics.remark(
                        site.name, "no-frames", "its tokens are of no known frames: gain 1"
                    )
                attach(graph, site, branch(graph, site, site.input, *nodes))
                continue
            name = param_name(site, "branch_gain")
            # of its own: peers read one value, and each learns its gain
            node = graph.set_param(name, gain.clone(), free=self.learned)

            def times(
                narrow: fx.Node, node: fx.Node = node, layout: Any = layout, site: Site = site
            ) -> fx.Node:
                return times_gain(sizes, narrow, node, layout, site.node)

            attach(graph, site, branch(graph, site, site.input, *nodes, times))
            facts[site.name]["bytes"] += 4 * gain.numel()
            facts[site.name]["gain"] = [round(float(m), 3) for m in gain]
        return facts

    def estimator(self, graph: Graph, site: Site, seed: int) -> tuple[Tensor, Tensor]:
        """(beta [N, 1], alpha [1, K]) of tqe."""
        rows, width = site.weight.meta["val"].shape
        dtype = site.weight.meta["val"].dtype
        if self.init is Init.SVD:
            weight, quantised = weights(graph, site)
            up, down = leading_factors((weight - quantised).float(), 1)
            return up.to(dtype), down.to(dtype)
        bound = (6 / width) ** 0.5  # Kaiming: uniform, gain sqrt(2)
        # the name takes part: what a site starts from does not depend on which others are split
        generator = torch.Generator().manual_seed(seed ^ zlib.crc32(site.name.encode()))
        alpha = (2 * torch.rand(1, width, generator=generator) - 1) * bound
        return torch.zeros(rows, 1, dtype=dtype), alpha.to(dtype)

    def factors(
        self, graph: Graph, site: Site, up: Tensor, down: Tensor, *, wide: bool = False
    ) -> tuple[fx.Node, fx.Node]:
        """The factors as parameters of ``site``, and in its dtype unless they stay ``wide``."""
        dtype, nodes = site.weight.meta["val"].dtype, []
        kind = "branch_inside" if wide else "branch"
        for leaf, value in ((f"{kind}_up", up), (f"{kind}_down", down)):
            value = value.to(parameter_dtype(dtype) if self.learned or wide else dtype)
            node = graph.set_param(param_name(site, leaf), value, free=self.learned or wide)
            nodes.append(node if wide else cast(graph, node, dtype, site.node))
        return nodes[0], nodes[1]

    def fitting(self, site: Site, ctx: Context) -> int:
        """The rank that the weight of ``site`` has room for."""
        least = min(site.weight.meta["val"].shape)
        if self.rank > least:
            ctx.diagnostics.remark(
                site.name, "branch-rank", f"rank {self.rank} is cut to {least}, that of its weight"
            )
        return min(self.rank, least)


@final
@dataclass(frozen=True)
class PlannedSplit(Pass):
    """``Split`` with factors of zero, before anything was quantised. Weights stay as they are."""

    branch: Branch
    rank: int
    gain: Gain
    select: str

    name: ClassVar[str] = "split"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Insert the branches; facts: rank and bytes of each, as those of ``Split``."""
        gains = self.branch is Branch.TQE and self.gain is not Gain.NONE
        gain = Gain.ONES if gains else self.gain
        split = Split(self.branch, self.rank, gain=gain, learn=False, select=self.select)
        sites = find_sites(graph, self.select, "branch", ctx)
        if self.branch is Branch.TQE:  # it starts without a look at weights
            return PassResult(len(sites), {"branches": split.tqe(graph, sites, ctx)})
        found = {}
        for site in sites:
            weight, rank = site.weight.meta["val"], split.fitting(site, ctx)
            up = torch.zeros(weight.shape[0], rank, dtype=weight.dtype)
            down = torch.zeros(rank, weight.shape[1], dtype=weight.dtype)
            nodes = split.factors(graph, site, up, down)
            attach(graph, site, branch(graph, site, site.input, *nodes))
            found[site.name] = size_facts(up, down)
        return PassResult(len(sites), {"branches": found})


# match ------------------------------------------------------------------------------------------


def find_sites(graph: Graph, select: str, mark: str, ctx: Context) -> list[Site]:
    """Sites that ``select`` names and that have no branch of the kind ``mark`` yet."""
    groups = quantised_groups(graph, select)
    return [site for group in groups for site in group if matches(site, mark, ctx)]


def matches(site: Site, mark: str, ctx: Context) -> bool:
    """True if the weight of ``site`` is quantised and has no branch of this kind yet."""
    if site.scheme is None or site.scheme.weight is None:
        return False
    if note(site.node).get(mark):
        ctx.diagnostics.remark(site.name, "already-split", "it has a branch already")
        return False
    return True


def weights(graph: Graph, site: Site) -> tuple[Tensor, Tensor]:
    """The weight of ``site`` in front of its quantiser and behind it."""
    if site.weight.target is not FAKE_QUANTIZE:
        raise OrderError(f"{site.name}: expected a quantised weight", "put split behind quant")
    return graph.evaluate(unquantised(site.weight)), graph.evaluate(site.weight)


# math -------------------------------------------------------------------------------------------


def svd_factors(
    graph: Graph, site: Site, rank: int, rounds: int, moment: Tensor | None
) -> tuple[Tensor, Tensor, int]:
    """(up, down, rounds of use) for the weight of ``site`` under its scheme."""
    weight = graph.evaluate(site.weight)
    assert site.scheme is not None
    spec = site.scheme.weight
    assert spec is not None
    wide = weight.to(parameter_dtype(weight.dtype))

    def error(difference: Tensor) -> float:
        if moment is None:
            return float(difference.square().sum())
        return float(output_error(difference.to(moment.dtype), moment).sum())

    up, down, used = alternating_factors(
        wide, rank, lambda w: numerics.nearest(w, spec), error, rounds
    )
    return up.to(weight.dtype), down.to(weight.dtype), used


def size_facts(up: Tensor, down: Tensor) -> dict[str, Any]:
    """Rank and bytes of two factors."""
    stored = up.numel() * up.itemsize + down.numel() * down.itemsize
    return {"rank": up.shape[1], "bytes": stored}
