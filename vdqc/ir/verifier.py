"""What must hold at each stage; checked after every pass.

========== ==========================================================================
stage      rules, each including those above it
========== ==========================================================================
any        functional ops only, every value typed, weights exist, site names unique
annotated  no ``view`` (``reshape`` is the one spelling); every linear site has a scheme
compressed each operand that a scheme quantises sits behind one ``fake_quantize``
lowered    no ``vdqc::`` op is left
========== ==========================================================================
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from vdqc.base.diagnostics import VerifyError
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.printer import op_name, print_graph
from vdqc.ir.site import Site, SiteKind, note

_NAMESPACES = {
    Stage.CAPTURED: {"aten", "prim", "prims"},
    Stage.ANNOTATED: {"aten", "prim", "prims", "vdqc"},
    Stage.COMPRESSED: {"aten", "prim", "prims", "vdqc"},
    Stage.LOWERED: {"aten", "prim", "prims", "vdqc_kernels"},
}
_SIZE_FUNCTIONS = {operator.getitem}
_SIZE_MODULES = ("_operator", "math", "torch", "torch.fx", "torch.utils", "builtins")


def verify(graph: Graph) -> None:
    """Raise VerifyError, with the lines around the node, if a rule of the stage is broken."""
    graph.module.graph.lint()
    names: set[str] = set()
    for node in graph.nodes:
        if reason := _structure(graph, node) or _stage(graph, node):
            raise _error(graph, node, reason)
        name = note(node).get("site")
        if name in names:
            raise _error(graph, node, f"two nodes are site '{name}'")
        if name:
            names.add(name)
    if graph.stage in (Stage.ANNOTATED, Stage.COMPRESSED):
        for site in graph.sites(kind=SiteKind.LINEAR):
            if reason := _scheme(graph, site):
                raise _error(graph, site.node, reason)


def _structure(graph: Graph, node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    if node.op not in ("get_attr", "call_function"):
        return f"expected a function or a weight, got {node.op} {node.target}"
    if "val" not in node.meta:
        return "the node has no fake value"
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return f"{op_name(node.target)} writes to its operand"
    return ""


def _stage(graph: Graph, node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return "" if _is_size_arithmetic(node.target) else f"{op_name(node.target)} is not an op"
    if node.target.namespace not in _NAMESPACES[graph.stage]:
        return f"{op_name(node.target)} is not allowed at {graph.stage}"
    if graph.stage is Stage.ANNOTATED and op_name(node.target) == "vdqc.fake_quantize":
        return "fake_quantize is not allowed at annotated: it loses information"
    if graph.stage is Stage.ANNOTATED and node.target is torch.ops.aten.view.default:
        return "view depends on strides: expected reshape"
    return ""


def _is_size_arithmetic(target: Any) -> bool:
    module = getattr(target, "__module__", "") or ""
    return target in _SIZE_FUNCTIONS or module.startswith(_SIZE_MODULES)


def _scheme(graph: Graph, site: Site) -> str:
    if site.scheme is None:
        return "the site has no scheme: expected one, or 'none'"
    if graph.stage is Stage.ANNOTATED:
        return ""
    for operand, spec in ((site.input, site.scheme.input), (site.weight, site.scheme.weight)):
        quantised = op_name(operand.target) == "vdqc.fake_quantize"
        if spec is not None and not quantised:
            return (
                f"scheme {site.scheme} quantises %{operand.name}, which is not behind fake_quantize"
            )
    return ""


def _error(graph: Graph, node: fx.Node, reason: str) -> VerifyError:
    nodes = graph.nodes
    at = nodes.index(node)
    around = print_graph(graph, only=nodes[max(0, at - 5) : at + 6])
    return VerifyError(
        f"{reason} (%{node.name})", *around.splitlines(), site=str(note(node).get("site", ""))
    )
