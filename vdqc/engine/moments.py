"""Second moments of what linears read, block by block, over all samples.

H float[K, K] = mean of x·xᵀ over the tokens of every sample, one for each group of peers. At most
the moments of one block are held at a time, and per sample the values that are alive between two
blocks: the program is walked in segments that end where the last input of a block is known.

A pass that rewrites weights as it goes asks for ``rewritten``: a segment then is run again, with
the new weights, before the next one is looked at, so that later moments know of earlier rounding.
Each node runs once a sample, twice if ``rewritten``.

Error: NaN or infinity at an input is one InputError that names the site.
Source: Frantar et al., GPTQ, arXiv 2210.17323, section 4 (block by block, quantised inputs).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.engine.calibrate import Progress
from vdqc.ir.blocks import block_name
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site

#: Values of one sample that are alive at a cut.
Values = dict[fx.Node, Any]


@torch.no_grad()
def input_moments(
    graph: Graph,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Site]],
    *,
    rewritten: bool = False,
    progress: Progress = lambda items, description: items,
) -> Iterator[tuple[Sequence[Site], Tensor]]:
    """(group, moment) for every group of peers, in program order.

    Between two steps the caller may, if ``rewritten``, replace weights of the groups it was given;
    the nodes that they read must stay. Raises InputError without samples.
    """
    if not samples:
        raise InputError("expected at least one sample to see inputs on, got none")
    states = [
        dict(zip(graph.inputs, graph.signature.bind((), sample.inputs), strict=True))
        for sample in samples
    ]
    done: set[fx.Node] = set(graph.inputs)
    segments = [list(part) for _, part in groupby(groups, lambda g: block_name(g[0].node))]
    pending: list[fx.Node] = []
    for segment in progress(segments, "input moments"):
        done = _advance(graph, states, done, pending)  # the segment before, as it is by now
        inputs = {group[0].input: group for group in segment}
        moments, ran = _moments(graph, states, done, inputs, stay=rewritten)
        done, pending = (done, list(inputs)) if rewritten else (done | ran, [])
        yield from ((group, moments.pop(node)) for node, group in inputs.items())


def _moments(
    graph: Graph,
    states: Sequence[Values],
    done: set[fx.Node],
    inputs: dict[fx.Node, Sequence[Site]],
    *,
    stay: bool,
) -> tuple[dict[fx.Node, Tensor], set[fx.Node]]:
    """Moments of ``inputs`` and the nodes that ran to know them; ``states`` move on or stay."""
    sums: dict[fx.Node, Tensor] = {}
    counts = dict.fromkeys(inputs, 0)

    def look(node: fx.Node, value: Any) -> None:
        if node not in inputs:
            return
        rows = value.reshape(-1, value.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        total = sums.setdefault(node, rows.new_zeros(rows.shape[1], rows.shape[1]))
        total.addmm_(rows.T, rows)
        counts[node] += rows.shape[0]
        if not bool(total.diagonal().isfinite().all()):
            site = inputs[node][0].name
            raise InputError("the input holds NaN or infinity", code="not-finite", site=site)

    segment = _Segment(graph, done, inputs)
    for state in states:
        for node in done.intersection(inputs):
            look(node, state[node])
        segment.run(dict(state) if stay else state, look)
    moments = {node: total / max(1, counts[node]) for node, total in sums.items()}
    return moments, set(segment.nodes)


def _advance(
    graph: Graph, states: Sequence[Values], done: set[fx.Node], wanted: Collection[fx.Node]
) -> set[fx.Node]:
    """Move every sample's values to where all of ``wanted`` are known; what is done by then."""
    segment = _Segment(graph, done, wanted)
    for state in states:
        segment.run(state, None)
    return done | set(segment.nodes)


class _Segment:
    """The nodes to run until all of ``wanted`` are known; weights are evaluated once for all."""

    def __init__(self, graph: Graph, done: set[fx.Node], wanted: Collection[fx.Node]) -> None:
        self._graph = graph
        self._done = done
        self._values: dict[fx.Node, Any] = {}
        self._weights = _constants(graph)
        nodes = graph.nodes
        end = max((i for i, node in enumerate(nodes) if node in wanted), default=-1)
        self.nodes = [n for n in nodes[: end + 1] if n not in done and n not in self._weights]

    def run(self, state: Values, look: Callable[[fx.Node, Any], None] | None) -> None:
        """Run one sample from ``state`` on, which then holds what later nodes read."""
        unread = {node: set(node.users) - self._done for node in (*state, *self.nodes)}
        for node in self.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(state, n))
            state[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            if look is not None:
                look(node, state[node])
            for operand in (*node.all_input_nodes, node):
                readers = unread.get(operand)
                if readers is not None:
                    readers.discard(node)
                    if not readers:
                        state.pop(operand, None)

    def _value(self, state: Values, node: fx.Node) -> Any:
        if node not in self._weights:
            return state[node]
        if node not in self._values:
            self._values[node] = self._graph.evaluate(node)
        return self._values[node]


def _constants(graph: Graph) -> set[fx.Node]:
    """Weights and what is computed from weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        computed = node.op == "call_function" and operands and all(n in found for n in operands)
        if node.op == "get_attr" or computed:
            found.add(node)
    return found
