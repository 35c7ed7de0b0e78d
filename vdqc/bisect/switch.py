"""One program out of two: the graph after a pass at some timesteps, the graph before it elsewhere.

::

    y = where(low <= t < high, after(x, t), before(x, t))

Both are computed at every call, so it is twice the work of one; what neither reads from a changed
node is computed once. The timestep is that of the call's first sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.bisect.mix import bind, changed_nodes, operand_nodes
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.size_nodes import timestep_input

_aten = torch.ops.aten


def switched(
    before: Graph, after: Graph, low: float, high: float, samples: Sequence[Sample]
) -> Graph:
    """``after`` where low <= timestep < high, ``before`` elsewhere.

    Raises InputError if no input holds the timestep.
    """
    graph = after.clone()
    timestep = timestep_input(graph, samples)
    if timestep is None:
        raise InputError(
            "expected an input that holds the timestep, found none",
            "give Sample(..., timestep=t), equal to one of the inputs",
            code="no-timestep",
        )
    twins = _copied(graph, before, changed_nodes(before, after))
    end = graph.output
    inside = _inside(graph, timestep, low, high)

    def choose(old: fx.Node, new: fx.Node) -> fx.Node:
        if old is new or not isinstance(new.meta["val"], Tensor):
            return new
        return graph.call(_aten.where.self, inside, new, old, before=end)

    wanted = iter(operand_nodes(before.output.args))
    end.args = fx.map_arg(end.args, lambda node: choose(twins[next(wanted)], node))
    graph.version += 1
    graph.clean()
    return graph


def cuts(timesteps: Sequence[float]) -> list[float]:
    """Bounds between neighbours of falling timesteps: inf, midpoints, -inf.

    Step ``k`` has ``cuts[k + 1] <= t < cuts[k]``: also what lies near a known timestep belongs to
    it, as a sampler's own schedule may differ from the samples.
    """
    middles = [(a + b) / 2 for a, b in itertools.pairwise(timesteps)]
    return [math.inf, *middles, -math.inf]


def _copied(graph: Graph, before: Graph, changed: set[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Every node of ``before`` as a node of ``graph``: its counterpart, or a copy at the end."""
    there = {node.name: node for node in graph.nodes}
    twins: dict[fx.Node, fx.Node] = {}
    for node in before.nodes:
        same = node not in changed and all(
            twins[o] is there.get(o.name) for o in node.all_input_nodes
        )
        if node.op == "output":
            break
        if same:
            twins[node] = there[node.name]
        elif node.op == "get_attr":
            twins[node] = bind(graph, before, str(node.target))
        else:
            with graph.module.graph.inserting_before(graph.output):
                twins[node] = graph.module.graph.node_copy(node, twins.__getitem__)
    return twins


def _inside(graph: Graph, timestep: fx.Node, low: float, high: float) -> fx.Node:
    """bool[]: low <= timestep < high."""
    end = graph.output

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=end)

    first = call(_aten.select.int, call(_aten.reshape.default, timestep, [-1]), 0, 0)
    above, below = call(_aten.ge.Scalar, first, low), call(_aten.lt.Scalar, first, high)
    return call(_aten.logical_and.default, above, below)
