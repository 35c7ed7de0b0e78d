"""Repeated blocks: which block of the model a node was captured in, and what enters and leaves it.

A block is a child of a ModuleList; one inside another belongs to the outermost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from torch import fx

_BLOCK = re.compile(r"(?:^|.*?\.)\w+\.\d+(?=\.|$)")


@final
@dataclass(frozen=True)
class Block:
    """One repeated block: its nodes in order, the values that enter and leave it."""

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def blocks_of(graph: fx.Graph) -> list[Block]:
    """Repeated blocks in program order, with their boundaries."""
    members: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (name := block_name(node)):
            members.setdefault(name, []).append(node)
    return [_bounded(name, nodes) for name, nodes in members.items()]


def block_name(node: fx.Node) -> str:
    """Name of the outermost ModuleList child that ``node`` was captured in, or ""."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if name := block_of(str(path)):
            return name
    return ""


def block_of(path: str) -> str:
    """Name of the outermost ModuleList child on a module path, or of a site's name, or ""."""
    match = _BLOCK.match(path.partition(":")[0])
    return match[0] if match else ""


def _bounded(name: str, nodes: list[fx.Node]) -> Block:
    inside = set(nodes)
    inputs = dict.fromkeys(
        operand
        for node in nodes
        for operand in node.all_input_nodes
        if operand not in inside and operand.op != "get_attr"
    )
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return Block(name, tuple(nodes), tuple(inputs), tuple(outputs))
