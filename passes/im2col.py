"""Spell convolutions as linears over patches: what quantises linears then quantises them, too.

::

    conv2d(x, @w, @b, stride, padding)  ->  permute(linear(patches, @w as a matrix, @b))
    patches = reshape(permute(unfold(unfold(permute(pad(x))))))

x [B, C, *S], w [N, C, *k]; patches [B, *S', prod(k) C], one row for each output position, channels
innermost. A site keeps its name; its scheme, smoothing, rounding and branch are those of a linear
with prod(k) C input channels. Grouped and dilated convolutions stay, and what every recipe keeps in
float (embeddings, the output projection), where patches would only cost time.

Source: Chellapilla et al., High Performance Convolutional Neural Networks for Document Processing,
    2006, section 3.1; quantised so by Feng et al., MPQ-DM, arXiv 2412.11549 (rows are output
    channels, kernels flattened).
Invariant: exact but for the order of a sum.
Online: one copy of the input, read prod(k) / prod(stride) times; written as often in eager mode.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.ir.analysis.roles import KEPT_ROLES, find_roles
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.peers import param_name
from vdqc.ir.site import Site, SiteKind, set_note
from vdqc.ir.sizes import SizeBuilder

A = torch.ops.aten


@final
@dataclass(frozen=True)
class Im2col(Pass):
    """Spell convolutions as linears.

    Attributes:
        select: glob of sites; one that names a site exactly takes embeddings, too.
    """

    select: str = "*"

    name: ClassVar[str] = "im2col"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED})
    exact: ClassVar[bool] = True
    takes: ClassVar[SiteKind] = SiteKind.CONV

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Respell; the facts are counts of kernels."""
        # all sizes first: the convolution that they stand in front of may be respelled itself
        sizes = SizeBuilder(
            graph, next((n for n in graph.nodes if n.op == "call_function"), graph.output)
        )
        spaces: list[tuple[Site, list[Any]]] = []
        for site in find_sites(graph, self.select, ctx):
            wanted = site.node.meta["val"].shape
            try:
                space = [sizes.operand(size) for size in (wanted[0], *wanted[2:])]
            except KeyError:
                ctx.diagnostics.remark(
                    site.name, "conv-size", "the inputs do not tell its size: left a convolution"
                )
                continue
            spaces.append((site, space))
        kernels = Counter[str]()
        for site, space in spaces:
            geometry = Geometry.of(site.node)
            rewrite(graph, site, geometry, space)
            kernels["x".join(map(str, geometry.kernel))] += 1
        graph.module.graph.eliminate_dead_code()
        return PassResult(sum(kernels.values()), {"kernels": dict(kernels)})


# match ------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Geometry:
    """One number per axis of space; ``same`` pads half a position where a kernel is even."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[float, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def is_pointwise(self) -> bool:
        """True if each output position reads one of the input, in order."""
        return all(size == 1 for size in (*self.kernel, *self.stride))

    @staticmethod
    def of(node: fx.Node) -> Geometry:
        """Read off ``conv(x, w, b, stride, padding, dilation, groups)``."""
        weight: Any = node.args[1]
        kernel = tuple(int(size) for size in weight.meta["val"].shape[2:])
        schema = node.target._schema.arguments[3:]  # type: ignore[union-attr]
        given = dict(zip((item.name for item in schema), node.args[3:], strict=False))
        given = {**given, **node.kwargs}

        def axes(name: str, otherwise: int) -> tuple[int, ...]:
            value: Any = given.get(name, otherwise)
            sizes = list(value) if isinstance(value, (list, tuple)) else [value]
            return tuple(sizes * len(kernel) if len(sizes) == 1 else sizes)

        stride, dilation = axes("stride", 1), axes("dilation", 1)
        groups: Any = given.get("groups", 1)
        if given.get("padding") == "same":
            padding = tuple((k - 1) * d / 2 for k, d in zip(kernel, dilation, strict=True))
        elif given.get("padding") == "valid":
            padding = (0,) * len(kernel)
        else:
            padding = axes("padding", 0)
        return Geometry(kernel, stride, padding, dilation, groups)


def find_sites(graph: Graph, select: str, ctx: Context) -> list[Site]:
    """Convolutions that a linear can compute, and that something would quantise."""
    roles = find_roles(graph)
    found = []
    for site in graph.sites(select, SiteKind.CONV):
        reason = _reason(graph, site)
        if reason is None and roles[site.name] in KEPT_ROLES and select != site.name:
            reason = f"its role is {roles[site.name]} (name it to respell it)"
        if reason is not None:
            ctx.diagnostics.remark(site.name, "conv-kept", f"{reason}: left a convolution")
            continue
        found.append(site)
    return found


def _reason(graph: Graph, site: Site) -> str | None:
    if not graph.is_constant(site.weight):
        return "the weight depends on an input"
    geometry = Geometry.of(site.node)
    if geometry.groups != 1:
        return f"its channels are in {geometry.groups} groups"
    if any(step != 1 for step in geometry.dilation):
        return "it is dilated"
    if any(size % 1 for size in geometry.padding):
        return "it is padded unevenly"
    if site.input.meta["val"].ndim != len(geometry.kernel) + 2:
        return "its input has no batch axis"
    return None


# rewrite ----------------------------------------------------------------------------------------


def rewrite(graph: Graph, site: Site, geometry: Geometry, space: Sequence[Any]) -> None:
    """Replace the convolution; ``space`` are the sizes of batch and output positions."""
    node, axes = site.node, len(geometry.kernel)
    channels = int(node.meta["val"].shape[1])
    weight = graph.call(A.reshape.default, site.weight, [channels, -1], before=node)
    if not geometry.is_pointwise:
        order = channels_last(int(site.input.meta["val"].shape[1]), math.prod(geometry.kernel))
        index = graph.set_param(param_name(site, "kernel_order"), order)
        weight = graph.call(A.index_select.default, weight, 1, index, before=node)
    rows = _patches(graph, site, geometry, space)
    product = graph.call(A.linear.default, rows, weight, site.bias, before=node)
    back = [0, axes + 1, *range(1, axes + 1)]
    value = graph.call(A.permute.default, product, back, before=node)
    set_note(product, site=site.name, kind=str(SiteKind.LINEAR), partial=True)
    set_note(value, whole=site.name)
    node.meta["custom"] = {**node.meta.get("custom", {}), "vdqc": {}}  # the linear is the site now
    graph.replace(node, value)


def _patches(graph: Graph, site: Site, geometry: Geometry, space: Sequence[Any]) -> fx.Node:
    """[B, *S', prod(k) C]: what each output position reads, channel by channel for each offset."""
    node, axes = site.node, len(geometry.kernel)

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call(op, *args, before=node, **kwargs)

    value = site.input
    if any(geometry.padding):
        ends = [int(size) for size in reversed(geometry.padding) for _ in range(2)]
        value = call(A.constant_pad_nd.default, value, ends)
    value = call(A.permute.default, value, [0, *range(2, axes + 2), 1])
    if geometry.is_pointwise:
        return value
    # without the copy, quantisers gather single numbers: 41 ms instead of 7 (320 channels, 48 x 48)
    value = call(A.clone.default, value, memory_format=torch.contiguous_format)
    for axis, size, step in zip(range(axes), geometry.kernel, geometry.stride, strict=True):
        value = call(A.unfold.default, value, axis + 1, size, step)
    offsets = range(axes + 2, 2 * axes + 2)
    value = call(A.permute.default, value, [*range(axes + 1), *offsets, axes + 1])
    return call(A.reshape.default, value, [*space, -1])


# math -------------------------------------------------------------------------------------------


def channels_last(channels: int, offsets: int) -> Tensor:
    """int64[offsets * channels]: for each column of patches, its place in a flat kernel."""
    return torch.arange(channels * offsets).reshape(channels, offsets).T.flatten()
