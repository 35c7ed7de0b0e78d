"""Scores of an attention that is written out: a product of two values, scaled and masked.

::

    masked_fill((q @ k.mT).float() / 8, hidden, -inf)  ->  product q k, scale 1 / 8, mask
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.contraction import Product, product
from vdqc.ir.pattern import Mismatch

A = torch.ops.aten
#: How many steps scores may be from their product: a sum has two sources to look behind.
STEPS = 8


@final
@dataclass(frozen=True)
class ScoreMask:
    """``node`` is added to the scores; with a ``fill``, it tells which scores become that."""

    node: fx.Node
    fill: float | None = None
    #: true where scores stay
    shows: bool = False


@final
@dataclass(frozen=True)
class Scores:
    """``product * scale + mask``; ``nodes`` compute it."""

    product: Product
    scale: float
    mask: ScoreMask | None
    nodes: tuple[fx.Node, ...]


def scores_of(node: Any, steps: int = STEPS) -> Scores | Mismatch | None:
    """The scores that ``node`` is, ``steps`` behind a product at most; None if it is none."""
    if not isinstance(node, fx.Node) or steps < 0:
        return None
    made = product(node)
    if made is not None:
        mask = None if made.added is None else ScoreMask(made.added)
        return Scores(made, made.factor, mask, (node,))
    for step in _steps(node):
        inner = scores_of(step.source, steps - 1)
        if isinstance(inner, Mismatch):
            return inner
        if inner is None:
            continue
        if inner.mask is not None and step.mask is not None:
            return Mismatch("it has two masks")
        if inner.mask is not None and inner.mask.fill is None and step.scale != 1.0:
            return Mismatch("its scale multiplies its mask, too")
        nodes = (*inner.nodes, *step.beside, node)
        return Scores(inner.product, inner.scale * step.scale, step.mask or inner.mask, nodes)
    return None


@final
@dataclass(frozen=True)
class _Step:
    """One reading of a node as ``source * scale + mask``; ``beside`` belong to it."""

    source: Any
    scale: float = 1.0
    mask: ScoreMask | None = None
    beside: tuple[fx.Node, ...] = ()


def _steps(node: fx.Node) -> list[_Step]:
    """Every reading of ``node`` as scores that were scaled, masked, shifted or widened."""
    factor = positive_factor(node)
    if factor is not None:
        return [_Step(node.args[0], scale=factor)]
    match node.target, node.args:
        case A._to_copy.default, (source, *_) if widens(node):
            return [_Step(source)]
        case A.sub.Tensor, (source, fx.Node() as maximum) if _is_maximum(maximum, source):
            return [_Step(source, beside=(maximum,))]
        case A.add.Tensor, (fx.Node() as left, fx.Node() as right) if not node.kwargs:
            return [_Step(left, mask=ScoreMask(right)), _Step(right, mask=ScoreMask(left))]
        case A.masked_fill.Scalar, (source, fx.Node() as hidden, float() as fill):
            return [_Step(source, mask=ScoreMask(hidden, fill))]
        case A.where.ScalarOther, (fx.Node() as shown, source, float() as fill):
            return [_Step(source, mask=ScoreMask(shown, fill, shows=True))]
        case A.where.self, (fx.Node() as shown, source, fx.Node() as other):
            number = _number(other)
            if number is not None:
                return [_Step(source, mask=ScoreMask(shown, number, shows=True))]
    return []


def positive_factor(node: fx.Node) -> float | None:
    """The positive number that ``node`` multiplies its first operand by, or None."""
    if node.target not in (A.mul.Tensor, A.div.Tensor) or node.kwargs:
        return None
    number = node.args[1]
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number <= 0:
        return None
    return float(number) if node.target is A.mul.Tensor else 1.0 / number


def widens(node: fx.Node) -> bool:
    """True for a cast of floats that loses nothing."""
    if node.target is not A._to_copy.default:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = source.meta["val"], node.meta["val"]
    wide = before.is_floating_point() and torch.promote_types(before.dtype, after.dtype)
    return wide == after.dtype and before.device == after.device


def _is_maximum(node: fx.Node, scores: Any) -> bool:
    """True for the largest score of each query, which softmax does not feel."""
    last: int = node.meta["val"].ndim - 1
    match node.target, node.args:
        case A.amax.default, (source, [int() as axis], True):
            return source is scores and axis in (-1, last)
    return False


def _number(node: fx.Node) -> float | None:
    """The number that every element of ``node`` is, or None."""
    match node.target, node.args:
        case (A.full.default, (_, int() | float() as value)) | (
            A.scalar_tensor.default,
            (int() | float() as value,),
        ):
            return float(value)
    return None
