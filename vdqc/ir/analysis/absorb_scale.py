"""Where a per-channel scale of an activation can go so that it costs nothing.

``smooth`` puts ``x · diag(d)`` in front of a group of peers. ``fold`` asks here which operands
further up can carry d, so that the value comes out scaled and the function stays the same. The
answer is a list of edits, which the pass carries out::

    fold = absorb_scale(graph, value, readers)
    for edit in fold.edits:
        edit.node.args[edit.operand] <- operand * edit.factor(d)

``absorb_rotation`` answers the same for a rotation.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, final

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
from vdqc.ir.analysis.operand_channels import attention_value, broadcast, runs
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
            return self.up(attention_value(value))
        moved = sources(value)
        if moved is None:
            raise Refused(f"{describe(node)} is not linear")
        return [edit for part in moved for edit in self.up(part)]

    def _step(self, value: Channels, index: int) -> list[ScaleEdit]:
        operand = value.node.args[index]
        if not isinstance(operand, fx.Node):
            raise Refused(f"{describe(value.node)} adds a number")
        require_private(operand, [value.node])
        return self.up(value.moved(operand, broadcast(value, operand)))

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
        coords = broadcast(value, operand)
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
        for at, start, stop in runs(positions, d)
    ]


def _online(value: Channels) -> ScaleEdit:
    size, start = shape(value.node)[-1], int(value.d[0])
    count = len(value.d)
    at = int(next(iter(value.coords.values()))[0])
    rank = len(shape(value.node))
    return ScaleEdit(value.node, -1, -1, at, start, start + count, size, rank, Cost.ONLINE)
