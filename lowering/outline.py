"""Equal blocks of a program become instances of one class, so that ``torch.compile`` compiles one.

A program is cut into its repeated blocks (children of a module list) and what lies before, between
and after them. Each piece becomes a GraphModule: weights under names local to the block, values
numbered, inputs in order of use. Blocks whose code and weight shapes are then equal share a class;
a block that differs keeps its own. What a block computes for all of them (a cast, the codes of the
text) moves out in front. Values do not change.

Source: the partition follows ``nn_module_stack``, which ``torch.export`` records on every node.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, fx, nn

from vdqc.ir.blocks import block_name

#: A value shared by blocks moves out of the first one if it takes at most so many nodes ...
_MOST_HOISTED = 16
#: ... of which none is one of these.
_HEAVY = ("linear", "matmul", "attention", "conv", "mm", "spelled")


@final
@dataclass(frozen=True)
class Region:
    """One piece: its nodes in order, and the block they belong to ("" between blocks)."""

    block: str
    nodes: tuple[fx.Node, ...]


def outline(program: fx.GraphModule) -> fx.GraphModule:
    """``program`` as a chain of submodules; ``program`` itself if blocks cannot be cut out."""
    regions = partition(program.graph)
    if not any(region.block for region in regions):
        return program
    root, graph = nn.Module(), fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    classes: dict[Any, type[fx.GraphModule]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = graph.placeholder(node.name)
    for index, region in enumerate(regions):
        name = region.block.replace(".", "_") or f"part_{index}"
        child, inputs, outputs = extract(program, region)
        child.__class__ = classes.setdefault((child.code, _shapes(child)), type(child))
        root.add_module(name, child)
        for value in inputs:
            if value.op == "get_attr" and value not in values:
                values[value] = graph.get_attr(_bind(root, program, value))
        call = graph.call_module(name, tuple(values[value] for value in inputs))
        for position, value in enumerate(outputs):
            values[value] = graph.call_function(operator.getitem, (call, position))
    output = next(iter(reversed(program.graph.nodes)))
    for value in output.all_input_nodes:
        if value.op == "get_attr" and value not in values:
            values[value] = graph.get_attr(_bind(root, program, value))
    graph.output(fx.map_arg(output.args[0], lambda value: values[value]))
    return fx.GraphModule(root, graph, class_name="Program")


def partition(graph: fx.Graph) -> list[Region]:
    """The pieces of ``graph`` in an order that can run; one piece if its blocks are interleaved."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    block = {node: block_name(node) for node in nodes}
    _hoist_shared(nodes, block)
    index = {name: i for i, name in enumerate(dict.fromkeys(filter(None, block.values())))}
    rank: dict[fx.Node, int] = {}  # 2i + 1: block i; 2i + 2: between block i and i + 1
    for node in nodes:
        operands = [value for value in node.all_input_nodes if value in block]
        ready = max((rank[value] + (rank[value] % 2) for value in operands), default=0)
        if not block[node]:
            rank[node] = ready
            continue
        rank[node] = 2 * index[block[node]] + 1
        outside = [value for value in operands if block[value] != block[node]]
        if any(rank[value] > rank[node] for value in outside):
            return [Region("", tuple(nodes))]
    pieces: dict[int, list[fx.Node]] = {}
    for node in nodes:
        pieces.setdefault(rank[node], []).append(node)
    return [Region(block[piece[0]], tuple(piece)) for _, piece in sorted(pieces.items())]


def _hoist_shared(nodes: list[fx.Node], block: dict[fx.Node, str]) -> None:
    """Move light values that other blocks read, and what they are made of, out of their block."""
    for node in nodes:
        own = block[node]
        if own and any(block.get(user, own) not in (own, "") for user in node.users):
            made_of = _light_closure(node, block)
            for member in made_of:
                block[member] = ""


def _light_closure(node: fx.Node, block: Mapping[fx.Node, str]) -> list[fx.Node]:
    """Nodes of ``node``'s block that it depends on; empty if they are many or heavy."""
    found: dict[fx.Node, None] = {}
    queue = [node]
    while queue:
        current = queue.pop()
        if current in found or block.get(current, "") != block[node]:
            if block.get(current, "") not in ("", block[node]):
                return []  # made of another block's values
            continue
        if len(found) == _MOST_HOISTED or _is_heavy(current):
            return []
        found[current] = None
        queue += current.all_input_nodes
    return list(found)


def _is_heavy(node: fx.Node) -> bool:
    name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", "")))
    return any(word in name for word in _HEAVY)


def extract(
    program: fx.GraphModule, region: Region
) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """(module of the region, values of ``program`` it takes, values it returns as a tuple)."""
    inside = set(region.nodes)
    prefix = f"{region.block}." if region.block else ""
    inputs = [value for value in _operands(region) if not _is_own(value, prefix)]
    outputs = [node for node in region.nodes if any(user not in inside for user in node.users)]
    holder, graph, names = nn.Module(), fx.Graph(), _numbered()
    values: dict[fx.Node, fx.Node] = {}
    for value in inputs:
        values[value] = graph.create_node("placeholder", next(names), name=f"i{len(values)}")
    for node in region.nodes:
        for operand in node.all_input_nodes:
            if operand not in values:
                target = _bind(holder, program, operand, prefix)
                values[operand] = graph.create_node("get_attr", target, name=next(names))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda value: values[value])
        copied = graph.create_node(node.op, node.target, args, kwargs, name=next(names))
        copied.meta = dict(node.meta)
        values[node] = copied
    graph.output(tuple(_dense(graph, node, values[node]) for node in outputs))
    return fx.GraphModule(holder, graph, class_name="Block"), inputs, outputs


def _dense(graph: fx.Graph, node: fx.Node, value: fx.Node) -> fx.Node:
    """``value`` in row-major order: a compiler keeps whatever order a block gets, for all blocks.

    A patch embedding ends in a transpose; without this the whole residual stream stayed transposed
    (measured on a CPU, one layer of 4096 x 1536: elementwise kernels 168 ms, now 121).
    """
    if not isinstance(node.meta["val"], Tensor):
        return value
    return graph.call_method("contiguous", (value,))


def _operands(region: Region) -> list[fx.Node]:
    """What the region reads and does not compute, in order of use."""
    inside = set(region.nodes)
    found = (value for node in region.nodes for value in node.all_input_nodes)
    return [value for value in dict.fromkeys(found) if value not in inside]


def _is_own(value: fx.Node, prefix: str) -> bool:
    """True for a weight that lives in the region: of its block, or any one between blocks."""
    return value.op == "get_attr" and str(value.target).startswith(prefix)


def _numbered() -> Iterator[str]:
    index = 0
    while True:
        yield f"v{index}"
        index += 1


def _bind(holder: nn.Module, program: fx.GraphModule, node: fx.Node, prefix: str = "") -> str:
    """Give ``holder`` the tensor that a ``get_attr`` names, under its name without ``prefix``."""
    name = str(node.target)
    tensor: Any = program
    for part in name.split("."):
        tensor = getattr(tensor, part)
    local = name.removeprefix(prefix)
    *path, leaf = local.split(".")
    owner = holder
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    if not hasattr(owner, leaf):
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    return local


def _shapes(module: fx.GraphModule) -> tuple[Any, ...]:
    tensors: list[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors)
