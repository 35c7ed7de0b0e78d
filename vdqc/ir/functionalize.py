"""An exported program to a plain ``fx.GraphModule``: positional inputs, no checks, no copies.

``run_decompositions({})`` has already made it functional, with autocast and no-grad regions turned
into casts and plain nodes; what is left of in-place writes are
``aten.copy`` nodes, which have no derivative and whose destination is dead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.graph import CodeGen

aten = torch.ops.aten

_CHECKS = ("_assert", "sym_constrain_range", "_guards_fn")


def plain_module(exported: ExportedProgram) -> fx.GraphModule:
    """The program as a module of its own that shares the weights; outputs are a flat tuple."""
    module = exported.module(check_guards=False)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" or any(word in str(node.target) for word in _CHECKS):
            graph.erase_node(node)
        elif node.target is aten.copy.default:
            _replace_copy(graph, node)
        elif node.target is aten.view.default:
            # the strides it was chosen for are the example's: attention that is trained has others
            node.target = aten.reshape.default
    graph.set_codegen(CodeGen())
    # assertions held size arithmetic alive; placeholders stay, they are the call's
    graph.eliminate_dead_code()
    # a fresh module: export's own carries hooks that insist on its calling convention
    return fx.GraphModule(module, graph, class_name="Program")


def _replace_copy(graph: fx.Graph, node: fx.Node) -> None:
    """``copy(dst, src)`` is ``src`` cast and expanded to ``dst``."""
    destination: Any = node.args[0]
    value: Any = node.args[1]
    target, source = destination.meta["val"], value.meta["val"]
    with graph.inserting_before(node):
        if source.dtype != target.dtype:
            value = graph.call_function(aten._to_copy.default, (value,), {"dtype": target.dtype})
            value.meta = {**node.meta, "val": source.to(target.dtype)}
        if source.shape != target.shape:
            sizes = [_size(graph, destination, axis) for axis in range(target.ndim)]
            value = graph.call_function(aten.expand.default, (value, sizes))
            value.meta = {**node.meta}
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> Any:
    size = node.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    symbolic = graph.call_function(aten.sym_size.int, (node, axis))
    symbolic.meta = {**node.meta, "val": size}
    return symbolic
