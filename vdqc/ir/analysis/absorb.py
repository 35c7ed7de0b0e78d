"""Where a per-channel scale or a rotation of an activation can go so that it costs nothing.

``smooth`` wants ``x · diag(d)`` in front of a group of peers, ``rotate`` wants ``x · R``. Both ask
here which operands further up can carry the factor, so that the value comes out scaled or rotated
and the function stays the same. The answer is a list of edits, which a pass carries out::

    fold = absorb_scale(graph, value, readers)
    for edit in fold.edits:
        edit.node.args[edit.operand] <- operand * edit.factor(d)
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, fx

from vdqc.ir.analysis.channels import (
    Channels,
    Index,
    Refused,
    describe,
    require_private,
    shape,
    sources,
)
from vdqc.ir.graph import Graph

A = torch.ops.aten


class Cost(enum.StrEnum):
    """What one edit costs at run time."""

    FREE = "free"  # the operand is a function of weights: folded once
    SMALL = "small"  # a value without a token axis, such as adaLN's [B, 1, D] scale
    ONLINE = "online"  # one more multiply on a whole activation


@final
@dataclass(frozen=True)
class ScaleEdit:
    """Multiply operand ``operand`` of ``node`` along ``axis`` by a piece of d.

    Attributes:
        node, operand: ``node.args[operand]`` is replaced, for this node alone. ``operand`` is -1
            for the value of ``node`` itself: its readers get ``node * d`` (the online form).
        axis: the operand's channel axis (0 for weight rows, biases, norm weights; -1 for values).
        at: first channel of the operand that changes; ``at + stop - start`` is the end.
        start, stop: the channels of d that are used.
        size: length of the operand along ``axis``.
        ndim: number of the operand's axes.
        plus_one: the operand is a bias that feeds ``1 + scale``: it becomes
            ``bias * d + (d - 1)``, an absent one ``d - 1``.
        cost: what it costs at run time.
    """

    node: fx.Node
    operand: int
    axis: int
    at: int
    start: int
    stop: int
    size: int
    ndim: int
    cost: Cost
    plus_one: bool = False

    def factor(self, d: Tensor) -> Tensor:
        """d's piece, ones elsewhere, shaped to broadcast against the operand."""
        full = torch.ones(self.size, dtype=d.dtype, device=d.device)
        full[self.at : self.at + self.stop - self.start] = d[self.start : self.stop]
        shape = [1] * self.ndim
        shape[self.axis] = self.size
        return full.reshape(shape)


@final
@dataclass(frozen=True)
class ScaleFold:
    """How ``value · diag(d)`` is had for positive d.

    ``edits`` is complete: carried out together they scale exactly the value that the readers see.
    ``reason`` says why a part stayed ONLINE; it is "" where every edit is FREE or SMALL.
    """

    edits: tuple[ScaleEdit, ...]
    reason: str = ""

    @property
    def cost(self) -> Cost:
        """The dearest edit's cost."""
        order = list(Cost)
        return max((edit.cost for edit in self.edits), key=order.index, default=Cost.FREE)


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


def absorb_scale(graph: Graph, value: fx.Node, readers: Collection[fx.Node]) -> ScaleFold:
    """Edits that scale the last axis of ``value`` as ``readers`` see it, cheapest known form.

    ``readers`` are the users of ``value`` that the caller compensates (peers). Where ``value`` has
    other users, or nothing above can carry d, the answer is one online multiply with the reason.
    An absent (None) norm weight becomes d itself.
    """
    try:
        require_private(value, list(readers))
        return _ScaleWalk(graph).fold(Channels.last_axis(value))
    except Refused as refusal:
        return ScaleFold((_online(Channels.last_axis(value)),), str(refusal))


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


# scales -----------------------------------------------------------------------------------------

_WEIGHTED: dict[
    Any, tuple[tuple[int, ...], int]
] = {  # op: (operands that carry d, the value's channel axis, or -1 for the last)
    A.linear.default: ((1, 2), -1),
    A.layer_norm.default: ((2, 3), -1),
    A.rms_norm.default: ((2,), -1),
    A.conv1d.default: ((1, 2), 1),
    A.conv2d.default: ((1, 2), 1),
    A.conv3d.default: ((1, 2), 1),
}
_NORMS = (A.layer_norm.default, A.rms_norm.default)
_ORDER = list(Cost)


@final
class _ScaleWalk:
    """Walks up from a value and collects edits; raises Refused where d cannot pass."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def fold(self, value: Channels) -> ScaleFold:
        """Edits for ``value``; a part of a concatenation that refuses is multiplied online."""
        reasons: list[str] = []
        edits = self._parts(value, reasons)
        return ScaleFold(tuple(edits), "; ".join(dict.fromkeys(reasons)))

    def _parts(self, value: Channels, reasons: list[str]) -> list[ScaleEdit]:
        parts = _channel_parts(value)
        if parts is None:
            return self.up(value)
        edits: list[ScaleEdit] = []
        for part in parts:
            try:
                edits += self.up(part)
            except Refused as refusal:
                reasons.append(str(refusal))
                edits.append(_online(part))
        if all(edit.cost is Cost.ONLINE for edit in edits):
            raise Refused("; ".join(dict.fromkeys(reasons)))
        return edits

    def up(self, value: Channels) -> list[ScaleEdit]:
        """Edits that scale ``value``, whose readers the caller has already accounted for."""
        node = value.node
        if node.op != "call_function":
            raise Refused(f"%{node.name} is an input of the program")
        if node.target in _WEIGHTED:
            return self._weighted(value)
        if node.target in (A.mul.Tensor, A.div.Tensor):
            return self._product(value)
        if node.target in (A.add.Tensor, A.sub.Tensor):
            return self._sum(value)
        if node.target in (A.relu.default, A.neg.default):  # d is positive
            return self._step(value, 0)
        if node.target in (A.scaled_dot_product_attention.default, A.matmul.default):
            return self.up(_attention_value(value))
        moved = sources(value)
        if moved is None:
            raise Refused(f"{describe(node)} is not linear")
        return [edit for part in moved for edit in self.up(part)]

    def _step(self, value: Channels, index: int) -> list[ScaleEdit]:
        operand = value.node.args[index]
        if not isinstance(operand, fx.Node):
            raise Refused(f"{describe(value.node)} adds a number")
        require_private(operand, [value.node])
        return self.up(value.moved(operand, _broadcast(value, operand)))

    def _weighted(self, value: Channels, plus_one: bool = False) -> list[ScaleEdit]:
        node = value.node
        operands, axis = _WEIGHTED[node.target]
        axis %= len(shape(node))
        if set(value.coords) != {axis}:
            raise Refused(f"the channels of {describe(node)} are not its outputs alone")
        if node.target in _NORMS and len(node.args[1]) != 1:  # type: ignore[arg-type]
            raise Refused(f"{describe(node)} normalises several axes")
        edits = []
        for index in operands:
            operand = node.args[index] if len(node.args) > index else None
            weight = index == operands[0]
            last = plus_one and not weight
            if operand is None and not (last or (weight and node.target in _NORMS)):
                continue
            if isinstance(operand, fx.Node) and not self.graph.is_constant(operand):
                raise Refused(f"{describe(node)} has a weight that is not constant")
            ndim = len(shape(operand)) if isinstance(operand, fx.Node) else 1
            size = int(shape(node)[axis])
            edits += _edits(node, index, 0, ndim, size, value.coords[axis], value.d, last)
        return edits

    def _product(self, value: Channels) -> list[ScaleEdit]:
        node = value.node
        options: list[list[ScaleEdit]] = []
        reasons = []
        sides = (0, 1) if node.target is A.mul.Tensor else (0,)
        for index in reversed(sides):
            try:
                options.append(self._factor(value, index))
            except Refused as refusal:
                reasons.append(str(refusal))
        if not options:
            raise Refused("; ".join(dict.fromkeys(reasons)))
        return min(options, key=_total)

    def _factor(self, value: Channels, index: int) -> list[ScaleEdit]:
        """Scale one operand of an elementwise op, by walking up or, if it is small, in place."""
        operand = value.node.args[index]
        if not isinstance(operand, fx.Node):
            raise Refused(f"{describe(value.node)} has a number for operand {index}")
        coords = _broadcast(value, operand)
        if self.graph.is_constant(operand):
            return self._in_place(value, operand, index, coords, Cost.FREE)
        try:
            require_private(operand, [value.node])
            edits = self.up(value.moved(operand, coords))
            if _total(edits) < _ORDER.index(Cost.SMALL) or not _is_small(operand, value.node):
                return edits
        except Refused:
            if not _is_small(operand, value.node):
                raise
        return self._in_place(value, operand, index, coords, Cost.SMALL)

    def _in_place(
        self,
        value: Channels,
        operand: fx.Node,
        index: int,
        coords: dict[int, Index],
        cost: Cost,
    ) -> list[ScaleEdit]:
        if len(coords) != 1:
            raise Refused(f"the channels of %{operand.name} lie on several axes")
        ((axis, positions),) = coords.items()
        sizes = shape(operand)
        return _edits(
            value.node, index, axis - len(sizes), len(sizes), sizes[axis], positions, value.d,
            cost=cost,
        )  # fmt: skip

    def _sum(self, value: Channels) -> list[ScaleEdit]:
        node = value.node
        if node.kwargs.get("alpha", 1) != 1:
            raise Refused(f"{describe(node)} scales an operand")
        left, right = node.args[:2]
        if right == 1 and node.target is A.add.Tensor and isinstance(left, fx.Node):
            require_private(left, [node])
            return self._one_plus(value.moved(left, value.coords))
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            raise Refused(f"{describe(node)} adds a number")
        return self._factor(value, 0) + self._factor(value, 1)

    def _one_plus(self, value: Channels) -> list[ScaleEdit]:
        """(1 + s) · d = 1 + (s · d + d - 1): rows and bias of the linear that makes s."""
        while value.node.target is not A.linear.default:
            moved = sources(value)
            if moved is None or len(moved) != 1:
                raise Refused(f"1 + {describe(value.node)} is not made by one linear")
            value = moved[0]
        if value.node.meta["val"].dtype.itemsize < 4:
            raise Refused(f"1 + {describe(value.node)} would cancel in half precision")
        return self._weighted(value, plus_one=True)


def _channel_parts(value: Channels) -> list[Channels] | None:
    """The parts of a concatenation of channels right above, or None."""
    node = value.node
    if node.target is not A.cat.default or len(value.coords) != 1:
        return None
    axis = int(node.args[1]) % len(shape(node))  # type: ignore[arg-type]
    return sources(value) if axis in value.coords else None


def _attention_value(value: Channels) -> Channels:
    """Attention weights mix tokens, so channels and heads of v pass through unchanged."""
    node = value.node
    operand = node.args[2 if node.target is A.scaled_dot_product_attention.default else 1]
    assert isinstance(operand, fx.Node)
    require_private(operand, [node])
    sizes, inner = shape(node), shape(operand)
    if len(sizes) != len(inner) or len(sizes) - 2 in value.coords:
        raise Refused(f"{describe(node)} mixes channels with tokens")
    if any(sizes[axis] != inner[axis] for axis in value.coords):
        raise Refused(f"{describe(node)}: several query heads share one value head")
    return value.moved(operand, value.coords)


def _broadcast(value: Channels, operand: fx.Node) -> dict[int, Index]:
    """``value``'s coordinates on an operand of an elementwise op."""
    sizes, inner = shape(value.node), shape(operand)
    shift = len(sizes) - len(inner)
    for axis in value.coords:
        if axis < shift or inner[axis - shift] != sizes[axis]:
            raise Refused(f"%{operand.name} is one number for several channels")
    return {axis - shift: positions for axis, positions in value.coords.items()}


def _is_small(operand: fx.Node, result: fx.Node) -> bool:
    """True if ``operand`` is broadcast along an axis of ``result`` (adaLN's [B, 1, D])."""
    sizes, inner = shape(result), shape(operand)
    inner = [1] * (len(sizes) - len(inner)) + inner
    return any(a == 1 and b != 1 for a, b in zip(inner, sizes, strict=True))


def _total(edits: Sequence[ScaleEdit]) -> int:
    return max((_ORDER.index(edit.cost) for edit in edits), default=0)


def _edits(
    node: fx.Node,
    operand: int,
    axis: int,
    ndim: int,
    size: int,
    positions: Index,
    d: Index,
    plus_one: bool = False,
    cost: Cost = Cost.FREE,
) -> list[ScaleEdit]:
    return [
        ScaleEdit(node, operand, axis, at, start, stop, size, ndim, cost, plus_one)
        for at, start, stop in _runs(positions, d)
    ]


def _runs(positions: Index, d: Index) -> list[tuple[int, int, int]]:
    """(first position, first channel, end channel) of runs where both grow by one."""
    order = np.argsort(positions, kind="stable")
    positions, d = positions[order], d[order]
    if len(np.unique(positions)) != len(positions):
        raise Refused("one channel would need two factors")
    breaks = np.flatnonzero((np.diff(positions) != 1) | (np.diff(d) != 1)) + 1
    return [
        (int(p[0]), int(c[0]), int(c[-1]) + 1)
        for p, c in zip(np.split(positions, breaks), np.split(d, breaks), strict=True)
    ]


def _online(value: Channels) -> ScaleEdit:
    size, start = shape(value.node)[-1], int(value.d[0])
    count = len(value.d)
    at = int(next(iter(value.coords.values()))[0])
    rank = len(shape(value.node))
    return ScaleEdit(value.node, -1, -1, at, start, start + count, size, rank, Cost.ONLINE)


# rotations --------------------------------------------------------------------------------------


def _rotated(graph: Graph, value: Channels, block: int) -> list[RotateEdit]:
    node = value.node
    if node.op != "call_function":
        raise Refused(f"%{node.name} is an input of the program")
    if node.target is A.linear.default:
        return _rotate_rows(graph, value, block)
    if node.target in (A.scaled_dot_product_attention.default, A.matmul.default):
        value = _attention_value(value)
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
    return _rotated(graph, value.moved(operand, _broadcast(value, operand)), block)


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
        for at, start, stop in _runs(value.coords[axis], value.d):
            if start % block or stop % block:
                raise Refused(f"a block of {block} crosses rows of {describe(node)}")
            edits.append(RotateEdit(node, index, at, start, stop, int(shape(node)[-1])))
    return edits
