"""What a choice costs before it is carried out: the bytes of the artifact's weights, and time.

Bytes are exact (``vdqc.footprint``): the transforms of a choice are put into a copy of the graph
and folded, as ``compile`` will.

Time is what ``explain`` predicts, at the rates of this machine if the target is its CPU, and the
transforms that stay online: reading and writing the input once, for a rotation also its products.
A convolution that ``im2col`` made a linear runs as a convolution where it stays in float.
Shapes: N outputs, K inputs of a linear.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor, fx

from vdqc.base.scheme import QuantScheme
from vdqc.base.target import Target
from vdqc.engine.pass_manager import Context
from vdqc.footprint import kernel_bytes, value_bytes, weight_bytes
from vdqc.ir.graph import Graph
from vdqc.ir.peers import param_name
from vdqc.ir.site import Site, SiteKind
from vdqc.kernels.base import FLOAT_FORMAT, Cost
from vdqc.lowering.between import between_sites
from vdqc.lowering.machine import measured
from vdqc.lowering.rules import hint, linear_site
from vdqc.lowering.select import KernelChoice, choose_site
from vdqc.passes import fold, rotate, smooth


@final
@dataclass(frozen=True)
class Way:
    """One way of compressing a group: a scheme, and whether it is rotated, smoothed or both."""

    scheme: str
    rotated: bool = False
    smoothed: bool = False

    def __str__(self) -> str:
        words = [word for word, on in (("rotate", self.rotated), ("smooth", self.smoothed)) if on]
        return " ".join([self.scheme, *words])


FLOAT = Way("none")


@final
@dataclass(frozen=True)
class Transforms:
    """What the passes would insert, by group: order of its rotation, scales [K] of its smoothing.

    ``rotated_scales`` are the scales behind the rotation. A group that a pass leaves alone is
    missing.
    """

    blocks: Mapping[str, int]
    scales: Mapping[str, Tensor]
    rotated_scales: Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class Bill:
    """What one choice costs: bytes of all weights, predicted microseconds of one call."""

    bytes: int
    us: float


@final
class Account:
    """Prices ways of the groups of one annotated graph on a target.

    ``convolutions``: what ``convolution_us`` says of those that were made linears in it.
    """

    def __init__(
        self,
        graph: Graph,
        target: Target,
        transforms: Transforms,
        convolutions: Mapping[str, float],
    ) -> None:
        self._graph, self._target, self._transforms = graph, target, transforms
        self._machine = measured(target)
        self._between_us = between_sites(graph).us(self._machine)
        self._float_us = {
            site.name: self._us(choose_site(graph, _with(site, "none"), target, planned=True))
            for site in graph.sites()
        } | dict(convolutions)
        self._known: dict[tuple[str, str], tuple[KernelChoice, int]] = {}
        self._stays: dict[Way, set[str]] = {}

    @property
    def float_us(self) -> float:
        """Predicted time of the float model."""
        return sum(self._float_us.values()) + self._between_us

    def _us(self, choice: KernelChoice) -> float:
        return choice.priced(self._machine).predicted_us

    def quantised(self, site: Site, scheme: str) -> tuple[KernelChoice, int]:
        """The kernel that ``site`` gets, and the bytes that its weight then takes."""
        key = site.name, scheme
        if key not in self._known:
            choice = choose_site(self._graph, _with(site, scheme), self._target, planned=True)
            rows, width = site.weight.meta["val"].shape
            stored = kernel_bytes(choice.kernel, int(rows), int(width), QuantScheme.parse(scheme))
            self._known[key] = choice, stored
        return self._known[key]

    def alone(self, groups: Sequence[Sequence[Site]], group: Sequence[Site], way: Way) -> Bill:
        """What ``group`` adds to the float model, if others are transformed alike; may be less than
        nothing.
        """
        if way == FLOAT:
            return Bill(0, 0.0)
        alike = replace(way, scheme="")
        if alike not in self._stays:
            self._stays[alike] = self._online_of(groups, alike)
        signs, scale = (name in self._stays[alike] for name in _params(group[0]))
        us = self._online_us(group, signs, scale)
        extra = value_bytes(group[0].input, last=True) * (signs + scale)
        for site in group:
            choice, stored = self.quantised(site, way.scheme)
            extra += stored - value_bytes(site.weight)
            us += self._us(choice) - self._float_us[site.name]
        return Bill(extra, us)

    def whole(self, ways: Sequence[tuple[Sequence[Site], Way]]) -> Bill:
        """The exact bill of the whole model, with what ``fold`` takes away."""
        chosen = [(group, way) for group, way in ways if way != FLOAT]
        graph = self._graph.clone()
        self._transform(graph, chosen)
        kept = {site.name: self.quantised(site, w.scheme) for group, w in chosen for site in group}
        stored = weight_bytes(graph, set(kept)) + sum(size for _, size in kept.values())
        times = (self._us(kept[n][0]) if n in kept else t for n, t in self._float_us.items())
        us = self._between_us + sum(times)
        online = _online(graph)
        for group, _ in chosen:
            us += self._online_us(group, *(name in online for name in _params(group[0])))
        return Bill(stored, us)

    def _online_of(self, groups: Sequence[Sequence[Site]], way: Way) -> set[str]:
        """Names of the transforms left online if every group that can has those of ``way``."""
        made = self._transforms
        scales = made.rotated_scales if way.rotated else made.scales
        able = [
            (group, way)
            for group in groups
            if (not way.rotated or group[0].name in made.blocks)
            and (not way.smoothed or group[0].name in scales)
        ]
        graph = self._graph.clone()
        self._transform(graph, able)
        return _online(graph)

    def _transform(self, graph: Graph, chosen: Sequence[tuple[Sequence[Site], Way]]) -> None:
        """What ``rotate``, ``smooth`` and ``fold`` will do, but for computing any weight."""
        with graph.edited_by("search"):  # fold knows what passes inserted by its origin
            self._insert(graph, chosen)
            ctx = Context()
            fold.fold_rotations(graph, ctx)
            fold.merge_scales(graph)
            fold.fold_scales(graph, ctx)
        graph.module.graph.eliminate_dead_code()

    def _insert(self, graph: Graph, chosen: Sequence[tuple[Sequence[Site], Way]]) -> None:
        made = self._transforms
        sites = {site.name: site for site in graph.sites()}
        for group, way in chosen:
            if way.rotated:
                own = [sites[site.name] for site in group]
                rotate.rewrite(graph, own, made.blocks[group[0].name], 0)
        for group, way in chosen:
            if way.smoothed:
                scales = made.rotated_scales if way.rotated else made.scales
                smooth.rewrite(graph, [sites[site.name] for site in group], scales[group[0].name])

    def _online_us(self, group: Sequence[Site], rotated: bool, smoothed: bool) -> float:
        if not (rotated or smoothed):
            return 0.0
        problem = linear_site(self._graph, group[0]).problem
        values, form = problem.m * problem.k, FLOAT_FORMAT[problem.dtype]
        moved = 2.0 * values * problem.dtype.itemsize
        block = self._transforms.blocks.get(group[0].name, 0)
        us = Cost({form: 2.0 * values * block}, moved).us(self._machine) if rotated else 0.0
        return us + (Cost({}, moved, calls=0.0).us(self._machine) if smoothed else 0.0)


def convolution_us(before: Graph, after: Graph, target: Target) -> dict[str, float]:
    """Predicted microseconds in float of the sites that ``im2col`` made linears of, by name: as
    convolutions, less their parts of the copies that ``after`` makes between its sites.
    """
    machine = measured(target)
    copied = between_sites(after).us(machine) - between_sites(before).us(machine)
    kept = {site.name for site in after.sites(kind=SiteKind.CONV)}
    made = [site for site in before.sites(kind=SiteKind.CONV) if site.name not in kept]
    patches = {site.name: _patch_values(site) for site in made}
    share = copied / max(sum(patches.values()), 1)
    return {
        site.name: choose_site(before, site, target).priced(machine).predicted_us
        - share * patches[site.name]
        for site in made
    }


def _patch_values(site: Site) -> int:
    """Values of the patches that the convolution reads; none where it reads its input in order."""
    out, weight = site.node.meta["val"], site.weight.meta["val"]
    positions = math.prod(map(hint, (out.shape[0], *out.shape[2:])))
    return positions * int(weight[0].numel()) if math.prod(weight.shape[2:]) > 1 else 0


def _params(site: Site) -> tuple[str, str]:
    """Names of the signs and of the scale of the group that ``site`` is first in."""
    return param_name(site, "rotation_signs"), param_name(site, "smooth_inverse")


def _online(graph: Graph) -> set[str]:
    """Names of the parameters of transforms that are left after folding."""
    nodes = [*fold.online_rotations(graph), *fold.online_scales(graph)]
    params = [node.args[1] for node in nodes]
    return {str(param.target) for param in params if isinstance(param, fx.Node)}


def _with(site: Site, scheme: str) -> Site:
    return replace(site, scheme=QuantScheme.parse(scheme))
