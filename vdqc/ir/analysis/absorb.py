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
from collections.abc import Collection
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, fx

from vdqc.ir.graph import Graph


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
    return ScaleFold((_online(value),), "not analysed")


def absorb_rotation(
    graph: Graph, value: fx.Node, readers: Collection[fx.Node], block: int
) -> RotationFold:
    """Edits that rotate the last axis of ``value`` by blocks of ``block`` as ``readers`` see it.

    Only linears that reach the value without any elementwise factor or nonlinearity can carry it;
    through attention (v to to_out) only if ``block`` divides the head dimension.
    """
    return RotationFold((), "not analysed")


def _online(value: fx.Node) -> ScaleEdit:
    shape = value.meta["val"].shape
    return ScaleEdit(value, -1, -1, 0, 0, int(shape[-1]), int(shape[-1]), len(shape), Cost.ONLINE)
