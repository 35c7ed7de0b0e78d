"""Blocks that are the same program with other weights: compiled once, called many times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.blocks import Block
from vdqc.ir.graph import Graph
from vdqc.ir.printer import op_name, print_type
from vdqc.ir.site import note


@final
@dataclass(frozen=True)
class Template:
    """One program and the blocks that run it, in program order; ``text`` is its canonical form."""

    text: str
    blocks: tuple[Block, ...]


def isomorphic_blocks(graph: Graph) -> list[Template]:
    """Blocks in classes of equal text: values renamed, weights by their path inside the block.

    Equal text means equal ops, constants, dtypes, symbolic shapes, weight shapes, schemes and
    outputs, so that one block's code may run with another's weights and inputs.
    """
    classes: dict[str, list[Block]] = {}
    for block in graph.blocks():
        classes.setdefault(block_text(block), []).append(block)
    return [Template(text, tuple(blocks)) for text, blocks in classes.items()]


def block_text(block: Block) -> str:
    """The canonical text of one block."""
    names: dict[fx.Node, str] = {}
    lines = []

    def operand(value: Any) -> str:
        match value:
            case fx.Node():
                if value not in names:
                    names[value] = _outside(value, block, len(names))
                return names[value]
            case list() | tuple():
                return f"[{', '.join(map(operand, value))}]"
            case torch.device():
                return str(value)
        return repr(value)

    for node in block.nodes:
        operands = [operand(arg) for arg in node.args]
        operands += [f"{key}={operand(value)}" for key, value in node.kwargs.items()]
        scheme = note(node).get("scheme", "")
        names[node] = f"%{len(names)}"
        lines.append(
            f"{names[node]} = {op_name(node.target)}:{_overload(node)}({', '.join(operands)}) "
            f": {print_type(node.meta.get('val'))} {scheme}".rstrip()
        )
    lines.append(f"return [{', '.join(names[node] for node in block.outputs)}]")
    return "\n".join(lines)


def _outside(node: fx.Node, block: Block, index: int) -> str:
    kind = print_type(node.meta.get("val"))
    if node.op == "get_attr":
        name = str(node.target)
        inside = name.removeprefix(f"{block.name}.")
        return f"@{inside if inside != name else 'outside'}: {kind}"
    return f"%in{index}: {kind}"


def _overload(node: fx.Node) -> str:
    return str(getattr(node.target, "_overloadname", ""))
