"""Integers of a graph from its inputs: expressions over the signature's symbols, made into nodes.

``(s1//2)*(s2//2)`` becomes ``floordiv`` and ``mul`` of ``aten.sym_size`` of the inputs that show
s1 and s2, in front of everything else, so that every call computes it for its own sizes.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import fx

from vdqc.base.diagnostics import InputError
from vdqc.ir.graph import Graph
from vdqc.ir.signature import IntInput

_OPERATORS: Mapping[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@final
class SizeNodes:
    """Makes nodes for sizes of ``graph``, each expression once."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made: dict[str, fx.Node] = {}
        nodes = graph.nodes
        self._first = next(n for n in nodes if n.op not in ("placeholder", "get_attr"))

    def of(self, text: str) -> fx.Node | int:
        """The node, or the number, that ``text`` stands for; 0 for an empty text.

        Raises InputError for what is no integer expression over sizes of the inputs.
        """
        return self._value(ast.parse(text, mode="eval").body) if text else 0

    def _value(self, tree: ast.expr) -> fx.Node | int:
        if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
            return tree.value
        text = ast.unparse(tree)
        if text not in self._made:
            self._made[text] = self._node(tree, text)
        return self._made[text]

    def _node(self, tree: ast.expr, text: str) -> fx.Node:
        match tree:
            case ast.Name(id=name):
                return self._symbol(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                values = self._value(left), self._value(right)
                return self._call(_OPERATORS[type(op)], *values)
        raise InputError(f"'{text}' is not an integer expression over sizes of inputs")

    def _symbol(self, name: str) -> fx.Node:
        entries = self._graph.signature.inputs
        for node, entry in zip(self._graph.inputs, entries, strict=True):
            if isinstance(entry, IntInput):
                if entry.size == name:
                    return node
            elif name in entry.sizes:
                return self._call(torch.ops.aten.sym_size.int, node, entry.sizes.index(name))
        raise InputError(f"no input shows the size {name}")

    def _call(self, op: Any, *args: Any) -> fx.Node:
        node = self._graph.call(op, *args, before=self._first)
        for key in ("nn_module_stack", "stack_trace"):
            node.meta.pop(key, None)
        return node


def timestep_input(graph: Graph, samples: Any = ()) -> fx.Node | None:
    """The input that holds the timestep: what every sample's own timestep equals, else by name."""
    timed = [sample for sample in samples if sample.timestep is not None]
    for index, (node, entry) in enumerate(zip(graph.inputs, graph.signature.inputs, strict=True)):
        if isinstance(entry, IntInput):
            continue
        if entry.path in ("timestep", "timesteps", "sigma", "t"):
            return node
        if timed and all(
            _is_all(graph.signature.bind((), sample.inputs)[index], sample.timestep)
            for sample in timed
        ):
            return node
    return None


def _is_all(value: Any, wanted: float) -> bool:
    if not isinstance(value, torch.Tensor) or not value.numel():
        return False
    return bool((value.double() - wanted).abs().max() <= 1e-3 * max(1.0, abs(wanted)))
