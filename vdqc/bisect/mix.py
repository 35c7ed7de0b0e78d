"""Programs between the graph before a pass and the graph after it: some sites changed, some not.

::

    before   y = linear(x, @w)
    after    y = linear(fake_quantize(x), fake_quantize(rotate(@w)))
    mixed    any set of sites as before, the rest as after, x being that of the mixed program

Both graphs are snapshots of one that was edited in place, so nodes that a pass left alone have
their names in both. A node is *dirty* if it is new, computes with other operands, reads another
weight, or reads a dirty value; at the output of a site that ends, because a site computes the same
quantity in both. What a site of the graph before reads through dirty nodes, back to clean ones, is
its region: restoring the site copies that into the graph after. So a transform of its input and
weight, a quantiser that it shares, and a norm that absorbed a scale come along.

Passes that promise to be exact may give a site's output another meaning (rows permuted or scaled)
and undo that in its reader. Such pairs are found by numbers: both sites differ from what they were,
each for itself, and the reader taken together with the other does not. They are kept together.

Limit: a *lossy* pass that does such a thing is not seen through.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.ir.graph import Graph
from vdqc.ir.site import note
from vdqc.ir.weights import StoredTensor

#: The name of what lies behind the last site.
END = "(output)"
#: How many sites are tried one by one for belonging to their readers; each is a forward pass.
_SINGLES = 16


@final
class Mixer:
    """Mixes ``before`` and ``after``, two snapshots of one graph; neither is edited.

    Attributes:
        sites: names of the sites whose computation differs, in program order; last ``END`` if what
            the program returns differs behind all of them.
    """

    def __init__(self, before: Graph, after: Graph) -> None:
        self.before, self.after = before, after
        there = site_outputs(after)
        self.places = {n: name for name, n in site_outputs(before).items() if name in there}
        self._changed = changed_nodes(before, after)
        self._through: frozenset[str] = frozenset()
        self._dirty, self.sites = self._scan()

    def mix(self, restored: Collection[str]) -> Graph:
        """The graph after, with the sites ``restored`` as they were before."""
        graph = self.after.clone()
        graft = _Graft(self, graph)
        for name in self.sites:
            if name in restored:
                graft.restore(name)
        sort(graph)
        graph.clean()
        return graph

    @torch.no_grad()
    def local_errors(self, inputs: Sequence[Any]) -> dict[str, float]:
        """Relative error of each site by itself: its computation after against before.

        One run of the graph after; every site gets what reaches it there.
        """
        graph = self.after.clone()
        graft = _Graft(self, graph)
        measured = {graft.compare(name): name for name in self.sites}
        sort(graph)
        errors: dict[str, float] = {}

        def look(node: fx.Node, value: Any) -> None:
            if node in measured:
                errors[measured[node]] = value

        graph.run_inputs(inputs, look)
        return errors

    def join_coupled(self, inputs: Sequence[Any], tolerance: float) -> dict[str, float]:
        """Keep sites together whose outputs changed in meaning; ``local_errors`` afterwards.

        For passes that promise to be exact, where a site by itself moves by more than
        ``tolerance`` only if it is at fault or if its reader makes up for it. A joined site is no
        longer one of ``sites``: it comes along with its reader.
        """
        errors = self.local_errors(inputs)
        moved = {name for name, error in errors.items() if error > tolerance}
        through: set[str] = set()
        if len(moved) > 1:
            through |= self._healed(inputs, moved, moved, tolerance)
        left = [name for name in self.sites if name in moved - through]
        for name in left[:_SINGLES] if through != moved else ():  # a fault among them hides others
            through |= self._healed(inputs, {*through, name}, set(left), tolerance)
        self._through = frozenset(through)
        self.sites = [name for name in self.sites if name not in through]
        self._dirty, _ = self._scan(self.sites)
        return self.local_errors(inputs)

    def _healed(
        self, inputs: Sequence[Any], released: set[str], moved: set[str], tolerance: float
    ) -> set[str]:
        """Those of ``released`` that, taken together with a reader in ``moved``, set it right."""
        self._dirty, _ = self._scan(set(self.sites) - released)
        together = self.local_errors(inputs)
        healed = [name for name in moved if together[name] <= tolerance]
        return {inner for name in healed for inner in self._inside(name)} & released

    def joined(self, name: str) -> list[str]:
        """Sites that come along with ``name``, in program order."""
        inside = self._inside(name)
        return [place for place in self.places.values() if place in inside & self._through]

    def is_copied(self, node: fx.Node) -> bool:
        """True if ``node`` of the graph before is computed anew where something restored reads it.

        All others have a counterpart in the graph after: of the same name, or as a site's output.
        """
        return node in self._dirty

    def root(self, name: str) -> fx.Node:
        """The node of the graph before that computes a site."""
        return next(node for node, place in self.places.items() if place == name)

    def _scan(self, ends: Collection[str] | None = None) -> tuple[set[fx.Node], list[str]]:
        """Dirty nodes of the graph before, and sites that read any; dirt ends at ``ends`` (all)."""
        dirty: set[fx.Node] = set()
        sites = []
        for node in self.before.nodes:
            name = END if node.op == "output" else self.places.get(node)
            if node in self._changed or any(o in dirty for o in node.all_input_nodes):
                if name is not None:
                    sites.append(name)
                if name is None or (ends is not None and name not in ends):
                    dirty.add(node)
        return dirty, sites

    def _inside(self, name: str) -> set[str]:
        """Other sites that are computed anew where ``name`` is restored."""
        found: set[str] = set()
        waiting = [self.before.output if name == END else self.root(name)]
        while waiting:
            for operand in waiting.pop().all_input_nodes:
                if operand in self._dirty:
                    waiting.append(operand)
                    found |= {self.places[operand]} if operand in self.places else set()
        return found - {name}


class _Graft:
    """Copies from the graph before into one clone of the graph after."""

    def __init__(self, mixer: Mixer, graph: Graph) -> None:
        self._mixer, self._graph = mixer, graph
        self._nodes = {node.name: node for node in graph.nodes}
        self._outputs = site_outputs(graph)
        self._copies: dict[fx.Node, fx.Node] = {}

    def restore(self, name: str) -> None:
        """Let the readers of a site read it as it was before."""
        if name == END:
            self._graph.output.args = self._ends()
            return
        old = self._outputs[name]
        new = self._copy(self._mixer.root(name), old)
        old.replace_all_uses_with(new)
        self._outputs[name] = new

    def compare(self, name: str) -> fx.Node:
        """A node whose value is the relative error of a site by itself, a number."""
        end = self._graph.output
        if name == END:
            pairs = list(zip(operand_nodes(end.args), operand_nodes(self._ends()), strict=True))
        else:
            pairs = [(self._outputs[name], self._copy(self._mixer.root(name), end))]
        with self._graph.module.graph.inserting_before(end):
            return self._graph.module.graph.call_function(_relative_error, (pairs,))

    def _ends(self) -> Any:
        end = self._graph.output
        return fx.map_arg(self._mixer.before.output.args, lambda node: self._value(node, end))

    def _value(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """What stands for ``node`` of the graph before, as something restored reads it."""
        if self._mixer.is_copied(node):
            return self._copy(node, before)
        name = self._mixer.places.get(node)
        return self._nodes[node.name] if name is None else self._outputs[name]

    def _copy(self, node: fx.Node, before: fx.Node) -> fx.Node:
        if node not in self._copies:
            if node.op == "get_attr":
                made = bind(self._graph, self._mixer.before, str(node.target))
            else:
                operands = {o: self._value(o, before) for o in node.all_input_nodes}
                with self._graph.module.graph.inserting_before(before):
                    made = self._graph.module.graph.node_copy(node, operands.__getitem__)
            self._copies[node] = made
        return self._copies[node]


def site_outputs(graph: Graph) -> dict[str, fx.Node]:
    """Site to the node that holds its whole value: the sum with its branch, where it has one."""
    found = {site.name: site.node for site in graph.sites()}
    whole = {str(note(node)["whole"]): node for node in graph.nodes if "whole" in note(node)}
    return {name: whole.get(name, node) for name, node in found.items()}


def changed_nodes(before: Graph, after: Graph) -> set[fx.Node]:
    """Nodes of ``before`` that ``after`` lacks, or that compute from something else there.

    Operands are compared by name, and outputs of sites by the name of the site.
    """
    there = {node.name: node for node in after.nodes}
    here, far = site_outputs(before), site_outputs(after)
    ours = {node: name for name, node in here.items() if name in far}
    theirs = {node: name for name, node in far.items() if name in here}
    changed = set()
    for node in before.nodes:
        twin = there.get(node.name)
        if (
            twin is None
            or (node.op, node.target) != (twin.op, twin.target)
            or _operands(node, ours) != _operands(twin, theirs)
            or (node in ours and far[ours[node]] is not twin)  # a branch joined it
            or (node.op == "get_attr" and not _same_weight(before, after, str(node.target)))
        ):
            changed.add(node)
    return changed


def bind(graph: Graph, source: Graph, name: str) -> fx.Node:
    """The weight ``name`` of ``source`` as a weight of ``graph`` with a name of its own."""
    value: Tensor | StoredTensor = source.stored.get(name) or source.param(name)
    return graph.set_param(f"restored.{name}", value)


def sort(graph: Graph) -> None:
    """Move each node behind its operands; all others keep their order."""
    placed: set[fx.Node] = set()
    for node in graph.nodes:
        waiting = [node]
        while waiting:
            top = waiting[-1]
            missing = [o for o in top.all_input_nodes if o not in placed]
            if missing and top not in placed:
                waiting.extend(missing)
                continue
            waiting.pop()
            if top not in placed and top is not node:
                node.prepend(top)
            placed.add(top)
    graph.version += 1


def operand_nodes(args: Any) -> list[fx.Node]:
    """Every node in nested operands, in order, with repeats."""
    found: list[fx.Node] = []

    def look(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.map_arg(args, look)
    return found


def _operands(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    def spelled(operand: fx.Node) -> Any:
        return _Name(f"site {names[operand]}" if operand in names else operand.name)

    return repr(_as_tuples(fx.map_arg((node.args, node.kwargs), spelled)))


def _as_tuples(value: Any) -> Any:
    """``value`` with its sequences alike: a program that was read from a file has lists alone."""
    if isinstance(value, (list, tuple)):
        return tuple(_as_tuples(item) for item in value)
    return value


class _Name(str):
    """A node's name, which a text operand never equals."""

    def __repr__(self) -> str:
        return f"%{self}"


def _same_weight(a: Graph, b: Graph, name: str) -> bool:
    if name in a.stored or name in b.stored:
        return a.stored.get(name) == b.stored.get(name)
    x, y = a.param(name), b.param(name)
    if (x.shape, x.dtype) != (y.shape, y.dtype):
        return False
    return (x.data_ptr(), x.stride()) == (y.data_ptr(), y.stride()) or torch.equal(x, y)


def _relative_error(pairs: Iterable[tuple[Any, Any]]) -> float:
    """Relative RMS error of the first of each pair against the second; infinite if not finite."""
    tensors = [pair for pair in pairs if isinstance(pair[0], Tensor)]
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in tensors)
    power = sum(float(b.double().square().sum()) for _, b in tensors)
    if error == 0:
        return 0.0
    return math.sqrt(error / power) if power > 0 and math.isfinite(error) else math.inf
