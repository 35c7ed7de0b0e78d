"""What runs between the sites and what it costs: norms, modulations, positions, residual adds.

A compiler fuses these into loops. A value is taken to be stored where something that is no such
loop reads it (a site, a matmul, the output), where two readers stand on different sides of one, or
where a norm is taken of it; every other value lives inside its reader's loop. A loop costs the
bytes of what it stores and reads, and per value the operations of all that it fuses:

============================================= ==========================
light: add, mul, where, casts, copies          1
exp, silu, gelu, sin, division, roots          10
norms                                          8
============================================= ==========================

Units are operations of ``Target.peak["pointwise"]``, 0.045 ns each on one Zen 5 core (measured:
LayerNorm, modulation and quantiser of 4096 x 1536 5.0 ms, GELU and epilogue of 4096 x 6144 17 ms).
Sizes that vary are those of the call that ``sized_like`` names, else of the captured example.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base import hadamard
from vdqc.ir.graph import Graph
from vdqc.ir.ops import FAKE_QUANTIZE, KRONECKER, ROTATE
from vdqc.ir.spelling import VIEWS
from vdqc.kernels.base import FLOAT_FORMAT, NOTHING, Cost
from vdqc.lowering.rules import hint

#: Fixed time of one fused loop, in microseconds: its call, and the tensor that it fills (fitted to
#: the small models of ``benchmarks/predict.py``).
LOOP_US = 25.0

_HEAVY = {
    "cos", "div", "erf", "exp", "gelu", "log", "pow", "reciprocal", "rsqrt", "sigmoid", "silu",
    "sin", "sqrt", "tanh", "true_divide",
}  # fmt: skip
_NORMS = {"group_norm", "layer_norm", "native_group_norm", "native_layer_norm", "rms_norm"}
_MATMULS = {"addmm", "baddbmm", "bmm", "einsum", "matmul", "mm"}


def between_sites(graph: Graph) -> Cost:
    """Cost of every node of ``graph`` that is no site and depends on an input."""
    flow = _Flow(graph)
    total = NOTHING
    for node in flow.nodes:
        if node in flow.sites or node.op != "call_function" or not _tensors(node):
            continue
        total += _computing(node)
        if node in flow.stored:
            moved = _bytes(node) + sum(map(_bytes, flow.leaves(node)))
            total += Cost({}, float(moved), LOOP_US, 0.0)
    return total


def live_bytes(graph: Graph) -> int:
    """Most bytes of stored values at one time while ``graph`` runs, inputs included."""
    flow = _Flow(graph)
    dies: dict[fx.Node, int] = {}
    for index, node in enumerate(flow.nodes):
        for value in (node, *node.all_input_nodes):
            for owner in flow.owners(value):
                dies[owner] = index
    ends: dict[int, int] = {}
    for owner, index in dies.items():
        ends[index] = ends.get(index, 0) + _bytes(owner)
    live = most = 0
    for index, node in enumerate(flow.nodes):
        live += _bytes(node) if node in flow.stored else 0
        most = max(most, live)
        live -= ends.get(index, 0)
    return most


@final
class _Flow:
    """The nodes of a graph that depend on an input, and which of their values are stored."""

    def __init__(self, graph: Graph) -> None:
        self.sites = {site.node for site in graph.sites()}
        constant: set[fx.Node] = set()
        self.nodes: list[fx.Node] = []
        for node in graph.nodes:
            operands = node.all_input_nodes
            made = node.op == "call_function" and operands and constant.issuperset(operands)
            if node.op == "get_attr" or made:
                constant.add(node)
            else:
                self.nodes.append(node)
        self.stored = {node for node in self.nodes if self._is_stored(node)}

    def _is_stored(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return bool(_tensors(node))
        if node.op != "call_function" or is_view(node) or not _tensors(node):
            return False
        if node in self.sites or not _is_loop(node):
            return True
        readers = _readers(node)
        if len(readers) > 2 or any(_name(reader) in _NORMS for reader in readers):
            return True
        return any(reader in self.sites or not _is_loop(reader) for reader in readers)

    def leaves(self, node: fx.Node) -> list[fx.Node]:
        """Stored values and weights that the loop of ``node`` reads."""
        found: dict[fx.Node, None] = {}
        waiting, seen = list(node.all_input_nodes), set()
        while waiting:
            value = waiting.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.stored or value.op == "get_attr":
                found[value] = None
            else:
                waiting += value.all_input_nodes
        return list(found)

    def owners(self, node: fx.Node) -> list[fx.Node]:
        """The stored values whose memory is read with ``node``."""
        return [node] if node in self.stored else [v for v in self.leaves(node) if v in self.stored]


def is_view(node: fx.Node) -> bool:
    """True for an op that moves nothing, or only where its reader would, as a quantiser does."""
    return node.op == "call_function" and (node.target in VIEWS or node.target is FAKE_QUANTIZE)


def _name(node: fx.Node) -> str:
    target: Any = node.target
    return str(getattr(target, "_opname", getattr(target, "__name__", target)))


def _is_loop(node: fx.Node) -> bool:
    """True for what a compiler may fuse with its neighbours."""
    if node.op != "call_function" or is_view(node):
        return False
    space = getattr(node.target, "namespace", "aten")
    return space == "aten" and _name(node) not in _MATMULS and "attention" not in _name(node)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Users of ``node``, seen through views."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if is_view(user):
            waiting += user.users
        else:
            found[user] = None
    return list(found)


def _computing(node: fx.Node) -> Cost:
    """Operations of one node, without what it reads and writes."""
    values, name = float(_values(node)), _name(node)
    if is_view(node):
        return NOTHING
    if node.target in (ROTATE, KRONECKER):
        return _rotation(node)
    if name in _MATMULS:
        width = _contracted(node, name)
        form = FLOAT_FORMAT.get(_tensors(node)[0].dtype, "fp32")
        return Cost({form: 2.0 * values * width}, 0.0)
    weight = 8.0 if name in _NORMS else 10.0 if name in _HEAVY else 1.0
    return Cost({"pointwise": weight * values}, 0.0, calls=0.0)


def _contracted(node: fx.Node, name: str) -> int:
    """Products that one value of a matmul sums up."""
    if name != "einsum":
        operand = node.args[1 if name in ("addmm", "baddbmm") else 0]
        assert isinstance(operand, fx.Node)
        return hint(operand.meta["val"].shape[-1])
    inputs, _, kept = str(node.args[0]).replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    operands: Any = node.args[1]
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        shape = operand.meta["val"].shape
        if "..." in letters:  # what the dots stand for is kept
            head, _, tail = letters.partition("...")
            letters, shape = head + tail, (*shape[: len(head)], *shape[len(shape) - len(tail) :])
        sizes |= dict(zip(letters, map(hint, shape), strict=True))
    return math.prod(size for letter, size in sizes.items() if letter not in kept)


def _rotation(node: fx.Node) -> Cost:
    value = _tensors(node)[0]
    if node.target is ROTATE:
        block = node.args[2]
        assert isinstance(block, int)
        orders = sum(hadamard.factors(block) or (0, block))
    else:
        factors = [arg.meta["val"].shape[-1] for arg in node.args[1:3] if isinstance(arg, fx.Node)]
        orders = sum(map(hint, factors))
    form = FLOAT_FORMAT.get(value.dtype, "fp32")
    return Cost({form: 2.0 * _values(node) * orders}, 0.0)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [entry for entry in values if isinstance(entry, torch.Tensor)]


def _values(node: fx.Node) -> int:
    return sum(math.prod(map(hint, value.shape)) for value in _tensors(node))


def _bytes(node: fx.Node) -> int:
    return sum(math.prod(map(hint, value.shape)) * value.dtype.itemsize for value in _tensors(node))
