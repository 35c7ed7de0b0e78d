"""Where a rotation of an activation can go so that it costs nothing.

``rotate`` puts ``x · R`` in front of a group of peers, R orthogonal and block diagonal. ``fold``
asks here which linears further up can carry R in their rows, so that the value comes out rotated
and the function stays the same. The answer is a list of edits, which the pass carries out::

    fold = absorb_rotation(graph, value, readers, block)
    for edit in fold.edits:
        edit.node.args[edit.operand] <- Rᵀ · operand      (the rows that the edit names)

``absorb_scale`` answers the same for a scale per channel, which more ops can carry.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import fx

from vdqc.ir.analysis.channels import (
    Channels,
    Index,
    Refused,
    describe,
    require_private,
    shape,
    sources,
)
from vdqc.ir.analysis.operand_channels import attention_value, broadcast, runs
from vdqc.ir.graph import Graph

A = torch.ops.aten


@final
@dataclass(frozen=True)
class RotateEdit:
    """Rotate operand ``operand`` of the linear ``node`` (weight 1 or bias 2) along its output axis.

    ``operand[at : at + stop - start] <- R[start:stop, start:stop]ᵀ · operand[at : ...]`` where R is
    the block-diagonal rotation of the value (``value · R``).
    """

    node: fx.Node
    operand: int
    at: int
    start: int
    stop: int
    size: int


@final
@dataclass(frozen=True)
class RotationFold:
    """How ``value · R`` is had for an orthogonal R that is block diagonal with blocks of ``block``.

    No edits: the rotation stays online, and ``reason`` says why.
    """

    edits: tuple[RotateEdit, ...]
    reason: str = ""


def absorb_rotation(
    graph: Graph, value: fx.Node, readers: Collection[fx.Node], block: int
) -> RotationFold:
    """Edits that rotate the last axis of ``value`` by blocks of ``block`` as ``readers`` see it.

    Only linears that reach the value without any elementwise factor or nonlinearity can carry it;
    through attention (v to to_out) only if ``block`` divides the head dimension.
    """
    try:
        require_private(value, list(readers))
        return RotationFold(tuple(_rotated(graph, Channels.last_axis(value), block)))
    except Refused as refusal:
        return RotationFold((), str(refusal))


def _rotated(graph: Graph, value: Channels, block: int) -> list[RotateEdit]:
    node = value.node
    if node.op != "call_function":
        raise Refused(f"%{node.name} is an input of the program")
    if node.target is A.linear.default:
        return _rotate_rows(graph, value, block)
    if node.target in (A.scaled_dot_product_attention.default, A.matmul.default):
        value = attention_value(value)
        for axis, positions in value.coords.items():
            if axis != len(shape(value.node)) - 1:
                _require_whole_blocks(value, positions, block)
        return _rotated(graph, value, block)
    if node.target in (A.add.Tensor, A.sub.Tensor) and node.kwargs.get("alpha", 1) == 1:
        return [edit for side in (0, 1) for edit in _rotate_side(graph, value, side, block)]
    moved = sources(value)
    if moved is None:
        raise Refused(f"{describe(node)} does not commute with a rotation")
    if len(moved) > 1 or len(moved[0].d) < len(value.d):
        for part in moved:
            if np.any(np.bincount(part.d // block)[np.unique(part.d // block)] != block):
                raise Refused(f"a block of {block} crosses {describe(node)}")
    return [edit for part in moved for edit in _rotated(graph, part, block)]


def _rotate_side(graph: Graph, value: Channels, side: int, block: int) -> list[RotateEdit]:
    operand: Any = value.node.args[side]
    if not isinstance(operand, fx.Node):
        raise Refused(f"{describe(value.node)} adds a number")
    require_private(operand, [value.node])
    return _rotated(graph, value.moved(operand, broadcast(value, operand)), block)


def _require_whole_blocks(value: Channels, positions: Index, block: int) -> None:
    """Channels of one block must share their place on every axis but the last (one head)."""
    for first in np.unique(value.d // block):
        heads = np.unique(positions[value.d // block == first])
        if len(heads) > 1:
            raise Refused(f"a block of {block} crosses heads of {shape(value.node)[-1]} channels")


def _rotate_rows(graph: Graph, value: Channels, block: int) -> list[RotateEdit]:
    node = value.node
    axis = len(shape(node)) - 1
    if set(value.coords) != {axis}:
        raise Refused(f"the channels of {describe(node)} are not its outputs alone")
    edits = []
    for index in (1, 2):
        operand = node.args[index] if len(node.args) > index else None
        if operand is None:
            continue
        if not isinstance(operand, fx.Node) or not graph.is_constant(operand):
            raise Refused(f"{describe(node)} has a weight that is not constant")
        for at, start, stop in runs(value.coords[axis], value.d):
            if start % block or stop % block:
                raise Refused(f"a block of {block} crosses rows of {describe(node)}")
            edits.append(RotateEdit(node, index, at, start, stop, int(shape(node)[-1])))
    return edits
