"""Bytes of the weights that a compiled model will hold, known before it is made.

Every weight that the program reads is counted as it is, and that of a quantised linear as its
kernel keeps it:

========================= ============================================================
kernel                    parameters of ``[N, K]`` with G groups
========================= ============================================================
int8_linear               codes i8[N, K], scale f32[N]
packed_linear             codes u8[N, ⌈bits·K/8⌉], scale f32[N], multiplier i8[N, G]
group, weight only        codes u8[N, ⌈bits·K/8⌉], scale f32[N, G]
with zero points          + i32[N] (the two above), f32[N, G] (the last)
asymmetric activations    + i32[N] (the two above): sums of codes
========================= ============================================================

Shapes: N outputs, K inputs of a linear.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from vdqc.base.packing import packed_bytes
from vdqc.base.scheme import GranularityKind, QuantScheme
from vdqc.ir.graph import Graph
from vdqc.ir.site import SiteKind
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.passes import fold


def kernel_bytes(kernel: str, rows: int, width: int, scheme: QuantScheme) -> int:
    """Bytes of the parameters that ``kernel`` keeps of a weight [rows, width]; see the module."""
    spec, sums = scheme.weight, scheme.input is not None and not scheme.input.symmetric
    assert spec is not None
    groups = width // spec.granularity.size if spec.granularity.size else 1
    if kernel == INT8_LINEAR.name:
        return rows * (width + 4 + 4 * (not spec.symmetric) + 4 * sums)
    codes = rows * packed_bytes(spec.dtype.bits, width)
    if kernel == PACKED_LINEAR.name:
        grouped = spec.granularity.kind is GranularityKind.GROUP
        return codes + rows * (4 + groups * grouped + 4 * (not spec.symmetric) + 4 * sums)
    return codes + rows * groups * (4 + 4 * (not spec.symmetric))


def range_bytes(graph: Graph) -> int:
    """Bytes of scales and zero points of static activations: one pair for peers of one spec."""
    schemes = [(s.input, s.scheme.input) for s in graph.sites(kind=SiteKind.LINEAR) if s.scheme]
    static = {(value, spec) for value, spec in schemes if spec is not None and not spec.dynamic}
    return sum(4 + 4 * (not spec.symmetric) for _, spec in static)


def weight_bytes(graph: Graph, quantised: set[str]) -> int:
    """Bytes of all weights that ``graph`` will read once constants are folded, each once.

    Weights of the sites ``quantised`` are left out.
    """
    roots = set(fold.constant_roots(graph))
    skipped = {site.node: site.weight for site in graph.sites() if site.name in quantised}
    waiting, seen, read = [graph.output], set(), set()
    total = 0
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "get_attr" or node in roots:
            key = _memory(graph, node)
            total += 0 if key in read else value_bytes(node)
            read.add(key)
            continue
        waiting.extend(o for o in node.all_input_nodes if o is not skipped.get(node))
    return total


def stored_bytes(graph: Graph) -> int:
    """Bytes of all weights that ``graph`` reads as it is, each once."""
    reads = (node for node in graph.nodes if node.op == "get_attr")
    return sum({_memory(graph, node): value_bytes(node) for node in reads}.values())


def _memory(graph: Graph, node: fx.Node) -> Any:
    """What tells one weight from another: tied ones are stored once."""
    if node.op != "get_attr" or node.target in graph.stored:
        return node
    value = graph.param(str(node.target))
    if not value.numel():
        return node
    return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def value_bytes(node: fx.Node, *, last: bool = False) -> int:
    """Bytes of a value, or of one vector along its last axis."""
    value = node.meta["val"]
    return int(value.shape[-1] if last else value.numel()) * value.dtype.itemsize
