"""Channel-basis classes: values that must be scaled, or rotated, together.

Source: connected components over ops that commute with the change of basis; for the rotation of a
residual stream see Ashkboos et al., QuaRot, arXiv 2404.00456, section 4.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, final

import networkx as nx
import torch
from torch import Tensor, fx

from vdqc.ir.analysis.channels import aligned, shape
from vdqc.ir.analysis.dataflow import MOVES
from vdqc.ir.graph import Graph
from vdqc.ir.site import note

A = torch.ops.aten


class Basis(enum.StrEnum):
    """What is applied to the channels."""

    DIAG = "diag"  # a factor per channel: passes through elementwise products too
    ORTH = "orth"  # an orthogonal matrix: passes through sums alone


@final
@dataclass(frozen=True)
class ChannelClass:
    """Values with one channel basis.

    Attributes:
        width: number of channels.
        values: all of them.
        writers: names of sites whose output is one of them.
        readers: names of sites whose input is one of them.
        norms: normalisations that read one of them.
    """

    width: int
    values: frozenset[fx.Node]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[fx.Node, ...]


def channel_classes(graph: Graph, basis: Basis) -> list[ChannelClass]:
    """Classes of at least two values, largest first; that is usually the residual stream."""
    links = nx.Graph()
    for node in graph.nodes:
        if _width(node) is None or node.op != "call_function":
            continue
        links.add_node(node)
        for operand in _carriers(node, basis):
            links.add_edge(operand, node)
    groups = [group for group in nx.connected_components(links) if len(group) > 1]
    position = {node: at for at, node in enumerate(graph.nodes)}
    classes = [_class(sorted(group, key=position.__getitem__)) for group in groups]
    return sorted(classes, key=lambda c: -len(c.values))


def _class(nodes: list[fx.Node]) -> ChannelClass:
    users = dict.fromkeys(user for node in nodes for user in node.users)
    inside = frozenset(nodes)
    return ChannelClass(
        _width(nodes[0]) or 0,
        inside,
        tuple(note(node)["site"] for node in nodes if "site" in note(node)),
        tuple(
            note(user)["site"]
            for user in users
            if "site" in note(user) and user.args[0] in inside and user.target is A.linear.default
        ),
        tuple(user for user in users if user.target in (A.layer_norm.default, A.rms_norm.default)),
    )


def _width(node: fx.Node) -> int | None:
    """Channels on the last axis of a value, None for sizes, lists and scalars."""
    value: Any = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.ndim or not value.is_floating_point():
        return None
    return value.shape[-1] if isinstance(value.shape[-1], int) else None


def _carriers(node: fx.Node, basis: Basis) -> list[fx.Node]:
    """Operands whose channel basis is also ``node``'s."""
    width = _width(node)
    operands = [n for n in node.all_input_nodes if _width(n) == width and n.op != "get_attr"]
    target = node.target
    if target in (A.add.Tensor, A.sub.Tensor):
        return operands
    if target in (A.mul.Tensor, A.div.Tensor):
        full = [n for n in operands if shape(n) == shape(node)]
        return full if basis is Basis.DIAG and len(full) == 1 else []
    if target not in MOVES or not operands:
        return []
    last = len(shape(node)) - 1
    if target is A.reshape.default:
        kept = ([last], [len(shape(operands[0])) - 1])
        return operands if kept in aligned(shape(node), shape(operands[0])) else []
    return operands if _keeps_last_axis(node, last) else []


def _keeps_last_axis(node: fx.Node, last: int) -> bool:
    target, args = node.target, node.args
    if target is A.permute.default:
        return bool(args[1][-1] % (last + 1) == last)  # type: ignore[index, operator]
    if target is A.transpose.int:
        return last not in (int(args[1]) % (last + 1), int(args[2]) % (last + 1))  # type: ignore[arg-type]
    if target in (A._to_copy.default, A.clone.default, A.expand.default):
        return True
    if target in (A.cat.default, A.slice.Tensor, A.unsqueeze.default):
        axis = args[1] if len(args) > 1 else 0
        return int(axis) % (last + 1) != last  # type: ignore[arg-type]
    if target is A.select.int:
        return int(args[1]) % (last + 2) <= last  # type: ignore[arg-type]
    return False
