"""Size expressions as nodes: every symbolic size computed from the sizes of the inputs."""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any, final

import sympy
import torch
from torch import Tensor, fx
from torch.utils._sympy import functions as size_functions

from vdqc.ir.graph import Graph

A = torch.ops.aten


def size_expression(size: int | torch.SymInt) -> Any:
    """The sympy expression behind a size."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


@final
class SizeBuilder:
    """Builds size expressions from the inputs' sizes, each once, in front of ``anchor``."""

    def __init__(self, graph: Graph, anchor: fx.Node) -> None:
        self.graph, self.anchor = graph, anchor
        self.made: dict[Any, fx.Node] = {}
        self.sources: dict[Any, tuple[fx.Node, int] | fx.Node] = {}
        for node in graph.inputs:
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt):
                self.sources.setdefault(size_expression(value), node)
            elif isinstance(value, Tensor):
                for axis, size in enumerate(value.shape):
                    if isinstance(size, torch.SymInt):
                        self.sources.setdefault(size_expression(size), (node, axis))

    def operand(self, size: int | torch.SymInt) -> Any:
        """An int, or the node that computes ``size``; raises KeyError if the inputs do not tell."""
        return size if isinstance(size, int) else self.build(size_expression(size))

    def build(self, expression: Any) -> Any:
        """An int, or the node of a sympy expression; raises KeyError as ``operand`` does."""
        if expression.is_Integer:
            return int(expression)
        if expression in self.made:
            return self.made[expression]
        if expression in self.sources:
            source = self.sources[expression]
            if isinstance(source, fx.Node):
                return source
            node = self._insert(A.sym_size.int, *source)
        else:
            node = self._combine(expression)
        self.made[expression] = node
        return node

    def _combine(self, expression: Any) -> fx.Node:
        negated = expression.is_Mul and expression.args[0] == -1
        if negated:
            return self._insert(operator.neg, self.build(-expression))
        if type(expression) not in _SIZE_OPS or (
            expression.is_Pow and not (expression.exp.is_Integer and expression.exp > 0)
        ):
            raise KeyError(expression)
        operands = [self.build(part) for part in expression.args]
        function = _SIZE_OPS[type(expression)]
        node: fx.Node = reduce(lambda left, right: self._insert(function, left, right), operands)
        return node

    def _insert(self, function: Any, *args: Any) -> fx.Node:
        with self.graph.module.graph.inserting_before(self.anchor):
            node = self.graph.module.graph.call_function(function, args)
        values = fx.map_arg(args, lambda operand: operand.meta["val"])
        with self.graph.fake_mode:
            node.meta["val"] = function(*values)
        return node


_SIZE_OPS: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    size_functions.FloorDiv: operator.floordiv,
    size_functions.PythonMod: operator.mod,
    size_functions.Mod: operator.mod,
    size_functions.Max: torch.sym_max,
    size_functions.Min: torch.sym_min,
}
