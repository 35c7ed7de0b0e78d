"""Pieces of a program that run and train by themselves: its blocks, cut at values of the model.

A compressed graph and its float teacher are cut at the same values. A value is a boundary if both
graphs have it under one key and it means the same in both: an output of a site, or a node that was
there before any pass rewrote the program. What passes put between (a rotation that five blocks
share, a quantiser in the first of them) is computed again in each piece that needs it. Pieces, in
order::

    before blocks.0   blocks.0   blocks.1   before refiner.0   refiner.0   ...   after refiner.1

A free parameter belongs to the piece that reads it. One that several pieces read (five blocks that
smooth one text embedding) belongs to none: trained for the first, it would be wrong for the others.

Error: none; a piece computes what the program computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from vdqc.engine.losses import tap
from vdqc.ir.graph import Graph
from vdqc.ir.learned import frozen
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import SiteKind, note

#: Passes that spell the program in another way; the values of their nodes are the model's own.
SPELLING = frozenset({"", "canonicalize", "annotate"})

#: Operands of a self-attention that loss terms may ask for.
TAPS = {"query": 0, "key": 1, "mask": 3}


@final
@dataclass(frozen=True)
class Piece:
    """One piece of both graphs.

    Attributes:
        name: of the block, or ``before`` / ``after`` one.
        teacher_reads, student_reads: keys of the values that enter it.
        makes: keys of the values that leave it.
        free: names of the parameters that are trained in it.
        is_block: False for what lies before, between and after blocks.
    """

    name: str
    teacher_reads: tuple[str, ...]
    student_reads: tuple[str, ...]
    makes: tuple[str, ...]
    free: tuple[str, ...] = ()
    is_block: bool = True

    @property
    def reads(self) -> set[str]:
        """Everything that either graph needs."""
        return {*self.teacher_reads, *self.student_reads}


@final
class Cuts:
    """Where one graph may be cut: key to node, and what is constant."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.constants = _constants(graph)
        self.nodes: dict[str, fx.Node] = {}
        self.keys: dict[fx.Node, str] = {}
        for node in self.order:
            if node not in self.constants and (key := boundary_key(node)):
                self.nodes[key], self.keys[node] = node, key

    def closure(
        self, outputs: Iterable[str], stop: Callable[[fx.Node], bool]
    ) -> tuple[list[fx.Node], tuple[str, ...]]:
        """(nodes that compute ``outputs``, in order, constants included; keys where it stopped).

        An output itself is computed, however ``stop`` sees it; a program input is never.
        """
        inside: set[fx.Node] = set()
        reads: dict[str, None] = {}
        wanted = [self.nodes[key] for key in outputs]
        waiting = list(wanted)
        targets = set(wanted)
        while waiting:
            node = waiting.pop()
            if node in inside:
                continue
            if node.op == "placeholder" or (node not in targets and stop(node)):
                reads[self.keys[node]] = None
                continue
            inside.add(node)
            waiting.extend(node.all_input_nodes)
        ordered = sorted(inside, key=self.order.__getitem__)
        return ordered, tuple(sorted(reads, key=lambda key: self.order[self.nodes[key]]))

    def free(self, nodes: Iterable[fx.Node]) -> list[str]:
        """Free parameters among ``nodes``."""
        return [
            str(node.target)
            for node in nodes
            if node.op == "get_attr" and node.target in self.graph.free
        ]


def boundary_key(node: fx.Node) -> str | None:
    """What a value is called in every version of its program, or None if a pass made it."""
    if node.op == "placeholder":
        return node.name
    if node.op != "call_function":
        return None
    entries = note(node)
    if "whole" in entries:  # the sum of a site and its branch, or its rows put together again
        return str(entries["whole"])
    if "site" in entries:
        return None if entries.get("partial") else str(entries["site"])
    origin = str(entries.get("origin", "")).partition("{")[0]
    return node.name if origin in SPELLING else None


def plan_blocks(student: Graph, teacher: Graph) -> list[Piece]:
    """The pieces up to the last one that has something to train; empty if there are no blocks.

    What is free after the last block gets a piece if the program's outputs are boundaries.
    """
    return _planned(student, teacher).finished()


def plan_model(student: Graph, teacher: Graph) -> list[Piece]:
    """The whole program as one piece."""
    cuts, reference = Cuts(student), Cuts(teacher)
    nodes = _tensor_outputs(student)
    keys = [cuts.keys.get(node) for node in nodes]
    makes = tuple(key for key in keys if key is not None and key in reference.nodes)
    if not makes:
        return []
    inside, reads = cuts.closure(makes, lambda node: False)
    _, teacher_reads = reference.closure(makes, lambda node: False)
    return [Piece("model", teacher_reads, reads, makes, tuple(cuts.free(inside)))]


def quantised_pieces(graph: Graph, whole_model: bool) -> list[Piece]:
    """The pieces of an annotated graph in which a pass may leave something to train: those with a
    site whose scheme quantises its weight.
    """
    pieces = ([] if whole_model else _planned(graph, graph).pieces) or plan_model(graph, graph)
    sites = {s.node for s in graph.sites() if s.scheme is not None and s.scheme.weight is not None}
    cuts = Cuts(graph)
    return [piece for piece in pieces if sites.intersection(_inside(cuts, piece))]


def _planned(student: Graph, teacher: Graph) -> _Plan:
    plan = _Plan(Cuts(student), Cuts(teacher))
    for block in teacher.blocks():
        plan.block(block.name, set(block.nodes), [node for node in block.outputs])
    if plan.pieces:
        plan.rest(f"after {plan.pieces[-1].name}", _tensor_outputs(student))
    return plan


def _inside(cuts: Cuts, piece: Piece) -> list[fx.Node]:
    stops = {cuts.nodes[key] for key in piece.teacher_reads}
    return cuts.closure(piece.makes, stops.__contains__)[0]


@final
class _Plan:
    def __init__(self, student: Cuts, teacher: Cuts) -> None:
        self.student, self.teacher = student, teacher
        self.shared = student.nodes.keys() & teacher.nodes.keys()
        self.available = {node.name for node in teacher.graph.inputs}
        self.readers: Counter[str] = Counter()
        self.pieces: list[Piece] = []

    def block(self, name: str, nodes: set[fx.Node], outputs: Sequence[fx.Node]) -> None:
        """A block, and what must be computed before it."""
        members = {self.teacher.keys[node] for node in nodes if node in self.teacher.keys}
        makes = self._new(self.teacher.keys.get(node) for node in outputs)

        def outside(cuts: Cuts) -> Callable[[fx.Node], bool]:
            return lambda node: (key := cuts.keys.get(node)) in self.shared and key not in members

        if not makes:
            return
        _, reads = self.teacher.closure(makes, outside(self.teacher))
        inside, own_reads = self.student.closure(makes, outside(self.student))
        needed = self._new(dict.fromkeys([*reads, *own_reads]))
        if needed:
            self._glue(f"before {name}", needed)
        self._add(Piece(name, reads, own_reads, makes, self._free(inside)))

    def rest(self, name: str, outputs: Sequence[fx.Node]) -> None:
        """What is left between the last block and the program's outputs."""
        makes = self._new(self.student.keys.get(node) for node in outputs)
        if makes:
            self._glue(name, makes)

    def _glue(self, name: str, makes: tuple[str, ...]) -> None:
        def known(cuts: Cuts) -> Callable[[fx.Node], bool]:
            return lambda node: cuts.keys.get(node) in self.available

        _, reads = self.teacher.closure(makes, known(self.teacher))
        inside, own_reads = self.student.closure(makes, known(self.student))
        self._add(Piece(name, reads, own_reads, makes, self._free(inside), is_block=False))

    def _add(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.available |= set(piece.makes)

    def _new(self, keys: Iterable[str | None]) -> tuple[str, ...]:
        return tuple(k for k in keys if k in self.shared and k not in self.available)

    def _free(self, nodes: Iterable[fx.Node]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(self.student.free(nodes)))
        self.readers.update(names)
        return names

    def finished(self) -> list[Piece]:
        """The pieces, with what is theirs alone to train, up to the last that has any."""
        found = [
            replace(piece, free=tuple(n for n in piece.free if self.readers[n] == 1))
            for piece in self.pieces
        ]
        while found and not found[-1].free:
            found.pop()
        return found


@final
class BlockModule(nn.Module):
    """One piece of one graph, runnable: values by key in, values by key and taps out.

    Constant expressions are evaluated once, except those of ``trainable`` parameters, which are the
    graph's own: training them trains the graph. ``taps`` are kinds of operands of self-attention;
    ``only_taps`` computes nothing that they do not need, and makes nothing.
    """

    def __init__(
        self,
        cuts: Cuts,
        reads: Sequence[str],
        makes: Sequence[str],
        trainable: Collection[str] = (),
        taps: Collection[str] = (),
        *,
        only_taps: bool = False,
    ) -> None:
        super().__init__()
        self.reads, self.makes = tuple(reads), () if only_taps else tuple(makes)
        stops = {cuts.nodes[key] for key in reads}
        nodes, _ = cuts.closure(makes, stops.__contains__)
        tapped = {
            tap(str(note(node)["site"]), kind): node.args[TAPS[kind]]
            for node in nodes
            if _is_attention(node) and not note(node).get("cross")
            for kind in taps
            if len(node.args) > TAPS[kind] and isinstance(node.args[TAPS[kind]], fx.Node)
        }
        self.taps = tuple(tapped)
        inputs = [cuts.nodes[key] for key in reads]
        outputs = [*(cuts.nodes[key] for key in self.makes), *tapped.values()]
        self.program = _extract(cuts, nodes, inputs, outputs, set(trainable))

    def forward(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(values made, taps)."""
        results = self.program(*(values[key] for key in self.reads))
        made = dict(zip(self.makes, results, strict=False))
        return made, dict(zip(self.taps, results[len(self.makes) :], strict=True))

    def release(self) -> None:
        """Let go of the weights now: a graph module refers to itself and would wait for gc."""
        for module in self.modules():
            module._buffers.clear()
            module._parameters.clear()


def attention_nodes(cuts: Cuts, reads: Sequence[str], makes: Sequence[str]) -> list[fx.Node]:
    """Attention sites of a piece, in order."""
    stops = {cuts.nodes[key] for key in reads}
    nodes, _ = cuts.closure(makes, stops.__contains__)
    return [node for node in nodes if _is_attention(node)]


def opened(graph: Graph) -> Graph:
    """A frozen copy of ``graph`` without its quantisers: a teacher where none was kept."""
    twin = frozen(graph)
    for node in twin.nodes:
        if node.target is FAKE_QUANTIZE:
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    twin.clean()
    return twin


def _extract(
    cuts: Cuts,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[Any],
    trainable: set[str],
) -> fx.GraphModule:
    holder, program = nn.Module(), fx.Graph()
    values = {node: program.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    varying = _varying(cuts, nodes, trainable)

    def value(node: fx.Node) -> fx.Node:
        """The node of the piece that stands for ``node``; a constant is evaluated here."""
        if node not in values:
            name = f"value_{len(values)}"
            if node in varying:
                parameter = cuts.graph.param(str(node.target))
                assert isinstance(parameter, nn.Parameter)
                holder.register_parameter(name, parameter)
            else:
                holder.register_buffer(name, cuts.graph.evaluate(node).detach())
            values[node] = program.get_attr(name)
        return values[node]

    for node in nodes:
        computed = node not in cuts.constants or node in varying
        if node not in values and computed and node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            values[node] = program.create_node(node.op, node.target, args, kwargs)
    program.output(tuple(value(node) for node in outputs))
    # attention counts as random for its dropout, and would stay
    program.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(holder, program, class_name="Piece")


def _varying(cuts: Cuts, nodes: Sequence[fx.Node], trainable: set[str]) -> set[fx.Node]:
    """Constant expressions among ``nodes`` that read a trainable parameter."""
    found: set[fx.Node] = set()
    for node in nodes:
        trains = node.op == "get_attr" and node.target in trainable
        reads = node in cuts.constants and any(o in found for o in node.all_input_nodes)
        if trains or reads:
            found.add(node)
    return found


def _constants(graph: Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        operands = node.all_input_nodes
        if node.op == "get_attr" or (
            node.op == "call_function" and operands and all(o in found for o in operands)
        ):
            found.add(node)
    return found


def _is_attention(node: fx.Node) -> bool:
    return note(node).get("kind") == SiteKind.ATTENTION and "site" in note(node)


def _tensor_outputs(graph: Graph) -> list[fx.Node]:
    return [
        node
        for node in graph.output.all_input_nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    ]
