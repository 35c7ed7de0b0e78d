"""Second moments of what linears read, block by block, over all samples.

H float[K, K] = mean of x·xᵀ over the tokens of every sample, one for each group of peers. At most
the moments of one block are held at a time, and per sample the values that are alive between two
blocks: the program is walked in segments that end where the last input of a block is known.

A pass that rewrites weights as it goes asks for ``rewritten``: a segment then is run again, with
the new weights, before the next one is looked at, so that later moments know of earlier rounding.
Each node runs once a sample, twice if ``rewritten``. For the ``drift`` of inputs the program walks
in float beside itself (once a sample more), and every group is a segment of its own: what a group
is told of is then the error of all weights before it, as they are by now.

Error: NaN or infinity at an input is one InputError that names the site.
Source: Frantar et al., GPTQ, arXiv 2210.17323, section 4 (block by block, quantised inputs); Arai
and Ichikawa, QEP, arXiv 2504.09629 (the drift).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import InputError
from vdqc.engine.calibrate import Progress
from vdqc.ir.blocks import block_name
from vdqc.ir.graph import Graph
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.peers import unquantised
from vdqc.ir.sample import Sample
from vdqc.ir.site import Site

#: Values of one sample that are alive at a cut.
Values = dict[fx.Node, Any]


@final
@dataclass(frozen=True)
class InputMoments:
    """Of what a group of peers reads, x float[K], over all tokens of all samples.

    Attributes:
        second: float[K, K], mean of x·xᵀ.
        drift: float[K, K], mean of (y - x)·xᵀ where y is what the program in float has in place
            of x; None if it was not asked for.
        tokens: how many rows both are means of.
    """

    second: Tensor
    drift: Tensor | None = None
    tokens: int = 0


@torch.no_grad()
def input_moments(
    graph: Graph,
    samples: Sequence[Sample],
    groups: Sequence[Sequence[Site]],
    *,
    rewritten: bool = False,
    drift: bool = False,
    progress: Progress = lambda items, description: items,
) -> Iterator[tuple[Sequence[Site], InputMoments]]:
    """(group, moments) for every group of peers, in program order.

    Between two steps the caller may, if ``rewritten``, replace weights of the groups it was given;
    the nodes that they read must stay. Raises InputError without samples.
    """
    if not samples:
        raise InputError("expected at least one sample to see inputs on, got none")
    states = [
        dict(zip(graph.inputs, graph.signature.bind((), sample.inputs), strict=True))
        for sample in samples
    ]
    walk = _Walk(graph, states)
    exact = _Exact(graph, [dict(state) for state in states]) if drift else None
    if drift:
        segments = [[group] for group in groups]
    else:
        segments = [list(part) for _, part in groupby(groups, lambda g: block_name(g[0].node))]
    pending: list[fx.Node] = []
    for segment in progress(segments, "input moments"):
        walk.advance(pending)  # the segment before, as it is by now
        inputs = {group[0].input: group for group in segment}
        if exact is not None:
            exact.keep(segment)
        moments = _moments(walk, exact, inputs, stay=rewritten)
        pending = list(inputs) if rewritten else []
        yield from ((group, moments.pop(node)) for node, group in inputs.items())


def _moments(
    walk: _Walk, exact: _Walk | None, inputs: dict[fx.Node, Sequence[Site]], *, stay: bool
) -> dict[fx.Node, InputMoments]:
    """Moments of ``inputs``; ``walk`` moves on or stays, ``exact`` moves on."""
    seconds: dict[fx.Node, Tensor] = {}
    drifts: dict[fx.Node, Tensor] = {}
    counts = dict.fromkeys(inputs, 0)
    floats = ({} for _ in walk.states) if exact is None else exact.look(inputs)
    for seen, meant in zip(walk.look(inputs, stay=stay), floats, strict=True):
        for node, rows in seen.items():
            width = rows.shape[1]
            second = seconds.setdefault(node, rows.new_zeros(width, width))
            second.addmm_(rows.T, rows)
            counts[node] += rows.shape[0]
            if not bool(second.diagonal().isfinite().all()):
                site = inputs[node][0].name
                raise InputError("the input holds NaN or infinity", code="not-finite", site=site)
            if node in meant:
                drift = drifts.setdefault(node, rows.new_zeros(width, width))
                drift.addmm_((meant[node] - rows).T, rows)
    return {
        node: InputMoments(
            seconds[node] / max(1, counts[node]),
            drifts[node] / max(1, counts[node]) if node in drifts else None,
            counts[node],
        )
        for node in inputs
    }


class _Walk:
    """All samples on their way through the program, from one cut to the next.

    Attributes:
        states: by sample, values that nodes behind the cut read.
        done: nodes before the cut.
    """

    def __init__(self, graph: Graph, states: list[Values]) -> None:
        self.graph = graph
        self.states = states
        self.done: set[fx.Node] = set(graph.inputs)

    def advance(self, wanted: Collection[fx.Node]) -> None:
        """Move every sample to where all of ``wanted`` are known."""
        segment = self._segment(wanted)
        for state in self.states:
            segment.run(state, None)
        self.done |= set(segment.nodes)

    def look(
        self, wanted: Collection[fx.Node], *, stay: bool = False
    ) -> Iterator[dict[fx.Node, Tensor]]:
        """float[tokens, K] of each of ``wanted``, sample by sample; moves there, or stays."""
        segment = self._segment(wanted)
        for state in self.states:
            seen = {node: _rows(state[node]) for node in self.done.intersection(wanted)}

            def keep(node: fx.Node, value: Any, seen: dict[fx.Node, Tensor] = seen) -> None:
                if node in wanted:
                    seen[node] = _rows(value)

            segment.run(dict(state) if stay else state, keep)
            yield seen
        if not stay:
            self.done |= set(segment.nodes)

    def _segment(self, wanted: Collection[fx.Node]) -> _Segment:
        return _Segment(self.graph, self.done, wanted)


class _Exact(_Walk):
    """The same in float: no quantiser rounds, and weights are those from before a rewrite."""

    def __init__(self, graph: Graph, states: list[Values]) -> None:
        super().__init__(graph, states)
        self._weights: dict[fx.Node, Any] = {}

    def keep(self, groups: Sequence[Sequence[Site]]) -> None:
        """Hold the weights of ``groups``, which may be rewritten before this walk reads them."""
        self._weights = {n: w for n, w in self._weights.items() if n not in self.done}
        for site in (site for group in groups for site in group):
            self._weights[site.node] = self.graph.evaluate(unquantised(site.weight))

    def _segment(self, wanted: Collection[fx.Node]) -> _Segment:
        return _Segment(self.graph, self.done, wanted, self._weights)


class _Segment:
    """The nodes to run until all of ``wanted`` are known; weights are evaluated once for all.

    With ``weights``, by linear, no quantiser rounds.
    """

    def __init__(
        self,
        graph: Graph,
        done: set[fx.Node],
        wanted: Collection[fx.Node],
        weights: dict[fx.Node, Any] | None = None,
    ) -> None:
        self._graph = graph
        self._done = done
        self._float = weights
        self._values: dict[fx.Node, Any] = {}
        self._weights = _constants(graph)
        nodes = graph.nodes
        end = max((i for i, node in enumerate(nodes) if node in wanted), default=-1)
        self.nodes = [n for n in nodes[: end + 1] if n not in done and n not in self._weights]

    def run(self, state: Values, look: Callable[[fx.Node, Any], None] | None) -> None:
        """Run one sample from ``state`` on, which then holds what later nodes read."""
        unread = {node: set(node.users) - self._done for node in (*state, *self.nodes)}
        for node in self.nodes:
            state[node] = self._call(state, node)
            if look is not None:
                look(node, state[node])
            for operand in (*node.all_input_nodes, node):
                readers = unread.get(operand)
                if readers is not None:
                    readers.discard(node)
                    if not readers:
                        state.pop(operand, None)

    def _call(self, state: Values, node: fx.Node) -> Any:
        if self._float is not None and node.target is FAKE_QUANTIZE:
            return self._value(state, node.all_input_nodes[0])
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(state, n))
        if self._float is not None and node in self._float:
            args = args[0], self._float[node], *args[2:]
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, state: Values, node: fx.Node) -> Any:
        if node not in self._weights:
            return state[node]
        if self._float is not None:
            node = unquantised(node)
        if node not in self._values:
            self._values[node] = self._graph.evaluate(node)
        return self._values[node]


def _rows(value: Tensor) -> Tensor:
    rows = value.reshape(-1, value.shape[-1])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _constants(graph: Graph) -> set[fx.Node]:
    """Weights and what is computed from weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        computed = node.op == "call_function" and operands and all(n in found for n in operands)
        if node.op == "get_attr" or computed:
            found.add(node)
    return found
