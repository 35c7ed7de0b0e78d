"""What values mean: residual adds, norm + modulation, and the operands of attention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.analysis.channels import shape
from vdqc.ir.graph import Graph
from vdqc.ir.site import SITE_KINDS, Site, note

A = torch.ops.aten
NORMS = {A.layer_norm.default, A.rms_norm.default, A.group_norm.default}
#: Ops that only move elements, or change their type.
MOVES = {
    A._to_copy.default,
    A.clone.default,
    A.reshape.default,
    A.permute.default,
    A.transpose.int,
    A.unsqueeze.default,
    A.slice.Tensor,
    A.select.int,
    A.split.Tensor,
    A.split_with_sizes.default,
    A.unbind.int,
    A.cat.default,
    A.stack.default,
    A.expand.default,
    A.repeat_interleave.self_int,
    A.repeat.default,
    A.index_select.default,
    A.index.Tensor,
    A.gather.default,
    A.masked_fill.Scalar,
    A.squeeze.dim,
    operator.getitem,
}
_ROPE = {
    A.mul.Tensor,
    A.add.Tensor,
    A.sub.Tensor,
    A.neg.default,
    A.slice_scatter.default,
    A.sum.dim_IntList,
    A.view_as_complex.default,
    A.view_as_real.default,
}


@final
@dataclass(frozen=True)
class NormModulation:
    """``norm(x)`` or ``norm(x) * (1 + scale) + shift``: what linears of a block read.

    Attributes:
        norm: the layer_norm, rms_norm or group_norm node.
        scale: the factor as it enters the multiply (usually ``1 + s``), or None.
        shift: the value added, or None.
        result: the last node of the chain (``norm`` itself if it is bare).
    """

    norm: fx.Node
    scale: fx.Node | None
    shift: fx.Node | None
    result: fx.Node


@final
@dataclass(frozen=True)
class AttentionOperands:
    """What one attention site reads and who reads it.

    Attributes:
        query, key, value: names of the linear sites that produce each operand, several where
            streams are concatenated, in cat order.
        out: names of the linear sites that read the result through reshapes, slices and cats.
        qk_norm: the norm nodes between the linears and the attention.
        rope: True where query and key are multiplied by position tables on the way.
        cross: True if key and value come from other tokens than the query.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    out: tuple[str, ...]
    qk_norm: tuple[fx.Node, ...]
    rope: bool
    cross: bool


def residual_adds(graph: Graph) -> list[fx.Node]:
    """Adds of a value and a branch computed from it by at least one site, both of full extent."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    above: dict[fx.Node, int] = {}  # bit n: node n is the value or an ancestor of it
    sites = 0
    found = []
    for node, at in order.items():
        above[node] = 1 << at
        for operand in node.all_input_nodes:
            above[node] |= above[operand]
        sites |= (1 << at) if node.target in SITE_KINDS else 0
        if node.target is not A.add.Tensor:
            continue
        x, y = node.args[:2]
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            continue
        if not shape(x) == shape(y) == shape(node):
            continue
        x_first = above[y] >> order[x] & 1
        y_first = above[x] >> order[y] & 1
        stream, branch = (x, y) if x_first else (y, x)
        if (x_first or y_first) and above[branch] & ~above[stream] & sites:
            found.append(node)
    return found


def norm_modulations(graph: Graph) -> list[NormModulation]:
    """Every normalisation with what modulates it, in program order."""
    return [
        modulation
        for node in graph.nodes
        if node.target in NORMS
        for modulation in _modulations(graph, node)
    ]


def _modulations(graph: Graph, norm: fx.Node) -> list[NormModulation]:
    found = []
    for value in [norm, *(user for user in norm.users if user.target is A._to_copy.default)]:
        for scaled in value.users:
            if scaled.target is not A.mul.Tensor or (scale := _other(scaled, value)) is None:
                continue
            if graph.is_constant(scale) or not (_is_one_plus(scale) or _is_broadcast(scale, norm)):
                continue
            found.append(_with_shift(norm, scale, scaled))
    return found or [NormModulation(norm, None, None, norm)]


def _with_shift(norm: fx.Node, scale: fx.Node, scaled: fx.Node) -> NormModulation:
    for user in scaled.users:
        if user.target is A.add.Tensor and (shift := _other(user, scaled)) is not None:
            return NormModulation(norm, scale, shift, user)
    return NormModulation(norm, scale, None, scaled)


def _other(node: fx.Node, known: fx.Node) -> fx.Node | None:
    x, y = node.args[:2]
    other = y if x is known else x
    return other if isinstance(other, fx.Node) and other is not known else None


def _is_one_plus(node: fx.Node) -> bool:
    while node.target in MOVES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.target is A.add.Tensor and 1 in [
        a for a in node.args if isinstance(a, (int, float))
    ]


def _is_broadcast(node: fx.Node, value: fx.Node) -> bool:
    small, full = shape(node), shape(value)
    small = [1] * (len(full) - len(small)) + small
    return any(a == 1 and b != 1 for a, b in zip(small, full, strict=True))


def attention_operands(graph: Graph, site: Site) -> AttentionOperands:
    """Producers and readers of an attention site, found by walking the values."""
    walks = [_Walk(graph, operand) for operand in site.node.args[:3]]
    query, key, value = (tuple(walk.sites) for walk in walks)
    inputs = [{graph.site(name).input for name in names} for names in (query, key)]
    return AttentionOperands(
        query,
        key,
        value,
        readers(site.node),
        tuple(dict.fromkeys(norm for walk in walks[:2] for norm in walk.norms)),
        walks[0].rope and walks[1].rope,
        bool(inputs[0]) and bool(inputs[1]) and not inputs[0] & inputs[1],
    )


class _Walk:
    """From an attention operand up to the linears that produce it."""

    def __init__(self, graph: Graph, start: Any) -> None:
        self.sites: dict[str, None] = {}
        self.norms: list[fx.Node] = []
        self.rope = False
        self._graph = graph
        self._seen: set[fx.Node] = set()
        self._visit(start)

    def _visit(self, node: Any) -> None:
        pending = [node]
        while pending:
            node = pending.pop()
            if not isinstance(node, fx.Node) or node in self._seen or node.op != "call_function":
                continue
            self._seen.add(node)
            if node.target is A.linear.default:
                if "site" in note(node):
                    self.sites[note(node)["site"]] = None
            elif node.target in NORMS:
                self.norms.append(node)
                pending.append(node.args[0])
            elif node.target in MOVES or node.target in _ROPE:
                self.rope = self.rope or self._multiplies_by_table(node)
                pending += reversed(node.all_input_nodes)

    def _multiplies_by_table(self, node: fx.Node) -> bool:
        if node.target is not A.mul.Tensor:
            return False
        return any(
            isinstance(operand, fx.Node)
            and len(shape(operand)) >= 2
            and shape(operand)[-1] != 1
            and not depends_on_site(operand)
            for operand in node.args[:2]
        )


def depends_on_site(node: fx.Node) -> bool:
    """True if a site is among the producers of ``node``, within a table's few dozen nodes."""
    pending, seen = [node], {node}
    while pending and len(seen) < 200:
        current = pending.pop()
        if current.target in SITE_KINDS:
            return True
        for operand in current.all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return bool(pending)


def readers(node: fx.Node) -> tuple[str, ...]:
    """Linear sites that read ``node`` through moves and gates, or adds if need be."""
    direct = _readers(node, lambda user: user.target in MOVES or user.target is A.mul.Tensor)
    summed = {A.mul.Tensor, A.add.Tensor, *NORMS, *MOVES}
    return tuple(direct or _readers(node, lambda user: user.target in summed))


def _readers(node: fx.Node, passes: Callable[[fx.Node], bool]) -> Iterable[str]:
    found: dict[str, None] = {}
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            if user.target is A.linear.default:
                if user.args[0] is current and "site" in note(user):
                    found[note(user)["site"]] = None
            elif passes(user):
                pending.append(user)
    return found
