"""The nodes of a low-rank branch, beside a linear or inside the quantiser of its weight.

::

    beside   y = linear(x, Q(@w), b)  ->  y + linear(linear(v, down), up)
    inside   Q(@w)                    ->  Q(Q(@w) + up·down), on the scales of Q(@w)

``v`` is the input of the linear, quantised or not; a gain may multiply the narrow product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from vdqc.ir import transforms
from vdqc.ir.graph import Graph
from vdqc.ir.learned import cast
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.peers import param_name
from vdqc.ir.site import Site, note, set_note

aten = torch.ops.aten


def branch(
    graph: Graph,
    site: Site,
    value: fx.Node,
    up: fx.Node,
    down: fx.Node,
    gain: Callable[[fx.Node], fx.Node] = lambda narrow: narrow,
) -> fx.Node:
    """The nodes of a branch that reads ``value``, in front of ``site``."""
    narrow = gain(graph.call(aten.linear.default, value, down, before=site.node))
    return graph.call(aten.linear.default, narrow, up, before=site.node)


def attach(graph: Graph, site: Site, value: fx.Node) -> None:
    """Give the readers of ``site`` its sum with ``value``."""
    total = graph.call_after(aten.add.Tensor, site.node, value, after=site.node)
    graph.replace(site.node, total)
    if not note(site.node).get("rows"):  # those of a part are put together elsewhere
        set_note(total, whole=site.name)
    set_note(site.node, partial=True, branch=True)


def inside(graph: Graph, site: Site, quantised: Tensor, factors: tuple[fx.Node, fx.Node]) -> None:
    """Q(w) -> Q(Q(w) + up·down), on the scales of Q(w)."""
    quantiser, before = site.weight, site.node
    name = param_name(site, "weight_base")
    transforms.bound(graph, name, quantiser.all_input_nodes[0])
    base = graph.set_param(name, quantised.detach())
    product = graph.call(aten.matmul.default, *factors, before=before)
    product = cast(graph, product, quantised.dtype, before)
    total = graph.call(aten.add.Tensor, base, product, before=before)
    scales = []
    for node, leaf in zip(quantiser.args[1:3], ("base_scale", "base_zero_point"), strict=True):
        if isinstance(node, fx.Node) and (node.op != "get_attr" or node.target in graph.free):
            node = graph.set_param(param_name(site, leaf), graph.evaluate(node).detach())
        scales.append(node)
    wrapped = graph.call(FAKE_QUANTIZE, total, *scales, quantiser.args[3], before=before)
    graph.set_operand(site.node, 1, wrapped)
    set_note(site.node, inside=True)
