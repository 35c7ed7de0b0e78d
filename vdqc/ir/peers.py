"""What several passes share: the quantised peers of a group and the edits in front of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from vdqc.base.scheme import QuantScheme
from vdqc.ir.graph import Graph
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import Site


def quantised_groups(graph: Graph, select: str = "*") -> list[list[Site]]:
    """Groups of peers, less the sites that stay in float; in program order, none empty."""
    groups = [
        [site for site in group if site.scheme is not None and not site.scheme.is_none]
        for group in graph.groups(select)
    ]
    return [group for group in groups if group]


def scheme_of(site: Site) -> QuantScheme:
    """The scheme of ``site``, which has one: all of ``quantised_groups`` do."""
    assert site.scheme is not None
    return site.scheme


def unquantised(node: fx.Node) -> fx.Node:
    """What a quantiser reads; the node itself if it is none."""
    if node.target is not FAKE_QUANTIZE:
        return node
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def param_name(site: Site, leaf: str) -> str:
    """Name for a parameter of ``site`` that no module of the model has: ``blocks.0.fc1.smooth``."""
    return f"{site.name.replace('#', '_')}.{leaf}"


def scale_params(
    graph: Graph, site: Site, role: str, scale: Tensor, zero_point: Tensor | None
) -> tuple[fx.Node, fx.Node | None]:
    """Scale and zero point of the ``weight`` or ``input`` of ``site``, as its parameters."""
    scale_node = graph.set_param(param_name(site, f"{role}_scale"), scale)
    if zero_point is None:
        return scale_node, None
    return scale_node, graph.set_param(param_name(site, f"{role}_zero_point"), zero_point)


def feed(graph: Graph, peers: Sequence[Site], op: Any, *args: Any) -> fx.Node:
    """Insert ``op(input, *args)`` once, before the first of ``peers``, for all of them to read."""
    value = graph.call(op, peers[0].input, *args, before=peers[0].node)
    for site in peers:
        graph.set_operand(site.node, 0, value)
    return value


def wrap_weight(graph: Graph, site: Site, op: Any, *args: Any) -> fx.Node:
    """Let ``site`` read ``op(weight, *args)``; other readers of the weight keep it as it is."""
    value = graph.call(op, site.weight, *args, before=site.node)
    graph.set_operand(site.node, 1, value)
    return value
