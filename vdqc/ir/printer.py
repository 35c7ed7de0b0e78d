"""The text of a graph: one node a line, values numbered in order, weights under their own names.

::

    graph (%x: f32[2, 8, 16]) @annotated {
      %0 = aten.linear(%x, @fc1.weight, @fc1.bias) : f32[2, 8, 48]  # site fc1 w8a8
      return %0
    }

Print only: the executable form is the exported program.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.ir.graph import Graph
from vdqc.ir.site import note

SHORT_DTYPE = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def print_graph(graph: Graph, only: Iterable[fx.Node] | None = None) -> str:
    """The printed IR; ``only`` keeps the lines of these nodes (numbers stay the same)."""
    printer = _Printer(graph)
    wanted = None if only is None else set(only)
    inputs = ", ".join(f"%{n.target}: {printer.type(n.meta.get('val'))}" for n in graph.inputs)
    lines = [
        f"  {printer.line(node)}"
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr") and (wanted is None or node in wanted)
    ]
    return "\n".join([f"graph ({inputs}) @{graph.stage} {{", *lines, "}"])


def print_type(value: Any) -> str:
    """``bf16[2, 8, 16]``; symbols under their own names."""
    return _Printer(None).type(value)


class _Printer:
    def __init__(self, graph: Graph | None) -> None:
        self.symbols: dict[str, str] = {}
        self.names: dict[fx.Node, str] = {}
        if graph is None:
            return
        index = 0
        for node in graph.nodes:
            if node.op == "placeholder":
                self.names[node] = f"%{node.target}"
            elif node.op == "get_attr":
                self.names[node] = f"@{node.target}"
            else:
                self.names[node] = f"%{index}"
                index += 1

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self.operand(node.args[0])}"
        operands = [self.operand(arg) for arg in node.args]
        operands += [f"{key}={self.operand(value)}" for key, value in node.kwargs.items()]
        text = f"{self.names[node]} = {op_name(node.target)}({', '.join(operands)})"
        text += f" : {self.type(node.meta.get('val'))}"
        entries = note(node)
        if "site" in entries:
            text += f"  # site {entries['site']}"
            text += f" {entries['scheme']}" if "scheme" in entries else ""
        return text

    def operand(self, value: Any) -> str:
        match value:
            case fx.Node():
                return self.names[value]
            case list() | tuple():
                return f"[{', '.join(self.operand(item) for item in value)}]"
            case torch.dtype():
                return SHORT_DTYPE.get(value, str(value).removeprefix("torch."))
            case torch.device():
                return str(value)
            case float():
                return f"{value:g}"
            case str():
                return repr(value)
        return str(value)

    def type(self, value: Any) -> str:
        match value:
            case Tensor():
                sizes = ", ".join(self.size(size) for size in value.shape)
                return f"{SHORT_DTYPE.get(value.dtype, str(value.dtype))}[{sizes}]"
            case list() | tuple():
                return f"({', '.join(self.type(item) for item in value)})"
            case torch.SymInt() | int():
                return self.size(value)
        return type(value).__name__

    def size(self, size: int | torch.SymInt) -> str:
        if isinstance(size, int):
            return str(size)
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.symbols.setdefault(str(symbol), f"s{len(self.symbols)}")
        renamed = expression.xreplace(
            {symbol: type(symbol)(self.symbols[str(symbol)]) for symbol in expression.free_symbols}
        )
        return str(renamed)


def op_name(target: Any) -> str:
    """``aten.add`` for an overload of a dispatcher op, the bare name for a python function."""
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    return getattr(target, "__name__", str(target))
