"""Products of two values as sums over labelled axes, whichever op spells them.

::

    matmul(a[B, M, K], b[B, K, N])       a: batch0 m k, b: batch0 k n  ->  batch0 m n
    einsum("bthd,bshd->bhts", q, k)      q: b t h d,    k: b s h d     ->  b h t s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx

A = torch.ops.aten
#: Ops that only put axes in another order.
MOVES = (A.transpose.int, A.permute.default)
PRODUCTS = (A.matmul.default, A.bmm.default, A.baddbmm.default, A.einsum.default)


@final
@dataclass(frozen=True)
class Labelled:
    """A value, and a label for each of its axes."""

    node: fx.Node
    axes: tuple[str, ...]

    @property
    def value(self) -> Tensor:
        """The fake value."""
        value: Tensor = self.node.meta["val"]
        return value

    def renamed(self, names: dict[str, str]) -> Labelled:
        """The same value under other labels."""
        return Labelled(self.node, tuple(names[label] for label in self.axes))

    def before_move(self) -> Labelled | None:
        """What a transposed or permuted value was made of, labelled alike; None for others."""
        if self.node.target not in MOVES:
            return None
        source = self.node.args[0]
        assert isinstance(source, fx.Node)
        labels = dict(zip(moved_axes(self.node), self.axes, strict=True))
        return Labelled(source, tuple(labels[axis] for axis in range(len(labels))))


@final
@dataclass(frozen=True)
class Product:
    """``factor`` times the sum over labels that ``axes`` lacks, plus ``added``."""

    operands: tuple[Labelled, Labelled]
    axes: tuple[str, ...]
    factor: float = 1.0
    added: fx.Node | None = None


def product(node: fx.Node) -> Product | None:
    """``node`` as a product; None for other ops and for matrices that broadcast."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return None
    if node.target is A.einsum.default:
        return _einsum(node)
    left, right = node.args[-2:]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    rank = left.meta["val"].ndim
    if rank < 3 or right.meta["val"].ndim != rank:
        return None
    batch = tuple(f"batch{axis}" for axis in range(rank - 2))
    operands = Labelled(left, (*batch, "m", "k")), Labelled(right, (*batch, "k", "n"))
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    added = node.args[0] if node.target is A.baddbmm.default and beta != 0 else None
    if beta not in (0, 1):
        return None
    return Product(operands, (*batch, "m", "n"), float(alpha), added)  # type: ignore[arg-type]


def _einsum(node: fx.Node) -> Product | None:
    equation, values = node.args[:2]
    assert isinstance(equation, str)
    assert isinstance(values, (list, tuple))
    terms, arrow, result = equation.replace(" ", "").partition("->")
    texts = terms.split(",")
    if not arrow or len(values) != 2:
        return None
    dots = {
        value.meta["val"].ndim - len(text.replace("...", ""))
        for value, text in zip(values, texts, strict=True)
        if "..." in text
    }
    if len(dots) > 1:
        return None
    batch = [f"batch{axis}" for axis in range(max(dots, default=0))]
    left, right, axes = (_labels(text, batch) for text in (*texts, result))
    if any(len(set(labels)) != len(labels) for labels in (left, right, axes)):
        return None
    operands = Labelled(values[0], left), Labelled(values[1], right)  # type: ignore[arg-type]
    return Product(operands, axes)


def _labels(term: str, batch: Sequence[str]) -> tuple[str, ...]:
    """Labels of one term of an equation; ``batch`` are those of its dots."""
    head, dots, tail = term.partition("...")
    return (*head, *(batch if dots else ()), *tail)


def moved_axes(node: fx.Node) -> list[int]:
    """For every axis of a transposed or permuted value, the axis of its source."""
    rank: int = node.meta["val"].ndim
    if node.target is A.permute.default:
        order: Any = node.args[1]
        return [axis % rank for axis in order]
    axes = list(range(rank))
    a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]
    axes[a], axes[b] = axes[b], axes[a]
    return axes
