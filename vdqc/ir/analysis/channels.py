"""Channels followed upwards: which channels of an operand are which channels of a value.

Reshapes, permutes, splits and concatenations only move channels; ``sources`` undoes one such op.
The channels of a value are given by coordinates: ``{axis: position per channel}`` over the axes
that make up the channel index (``[B, H, T, D]`` heads have two, a linear's output has one).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import numpy.typing as npt
import sympy
import torch
from torch import Tensor, fx

from vdqc.ir.site import note

A = torch.ops.aten
Index = npt.NDArray[np.int64]


@final
@dataclass(frozen=True)
class Channels:
    """n channels of ``node``: channel i sits at ``coords[axis][i]`` on each channel axis.

    ``d`` tells which channel of the value that the walk began at each of them is.
    """

    node: fx.Node
    coords: Mapping[int, Index]
    d: Index

    @staticmethod
    def last_axis(node: fx.Node) -> Channels:
        """All channels of ``node``'s last axis."""
        value = node.meta["val"]
        channels = np.arange(int(value.shape[-1]))
        return Channels(node, {value.ndim - 1: channels}, channels)

    def only(self, keep: npt.NDArray[np.bool_]) -> Channels:
        """The channels where ``keep`` holds."""
        return Channels(self.node, {a: c[keep] for a, c in self.coords.items()}, self.d[keep])

    def moved(self, node: fx.Node, coords: Mapping[int, Index]) -> Channels:
        """The same channels as coordinates of another node."""
        return Channels(node, coords, self.d)


class Refused(Exception):
    """The walk cannot go on; the text says why."""


def shape(node: fx.Node) -> list[Any]:
    """Sizes of a tensor as ints and sympy expressions; empty for anything else."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return []
    return [s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape]


def operand(node: fx.Node, index: int = 0) -> fx.Node:
    """A tensor operand of ``node``."""
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value


def describe(node: fx.Node) -> str:
    """``gelu (%gelu_3)``, or a site's name."""
    site = note(node).get("site")
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", node.op))
    return str(site or f"{name} (%{node.name})")


def require_private(node: fx.Node, readers: Sequence[fx.Node]) -> None:
    """Raise Refused if anyone but ``readers`` reads ``node``."""
    for user in node.users:
        if user not in readers and user.target is not A.sym_size.int:
            raise Refused(f"%{node.name} is also read by {describe(user)}")


def sources(value: Channels) -> list[Channels] | None:
    """The operands that ``value``'s channels come from, or None if its op does more than move.

    Raises Refused where moving mixes channels with other axes, or an operand has other readers.
    """
    rule = _MOVES.get(value.node.target) if value.node.op == "call_function" else None
    return None if rule is None else rule(value)


def _same(value: Channels) -> list[Channels]:
    source = operand(value.node)
    require_private(source, [value.node])
    return [value.moved(source, value.coords)]


def _permute(value: Channels) -> list[Channels]:
    node, source = value.node, operand(value.node)
    rank = len(shape(node))
    if node.target is A.transpose.int:
        order = list(range(rank))
        a, b = int(node.args[1]) % rank, int(node.args[2]) % rank  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    else:
        order = [axis % rank for axis in node.args[1]]  # type: ignore[union-attr, operator, misc]
    require_private(source, [node])
    return [value.moved(source, {order[axis]: c for axis, c in value.coords.items()})]


def _unsqueeze(value: Channels) -> list[Channels]:
    source = operand(value.node)
    axis = int(value.node.args[1]) % len(shape(value.node))  # type: ignore[arg-type]
    require_private(source, [value.node])
    coords = {a - (a > axis): c for a, c in value.coords.items() if a != axis}
    return [value.moved(source, coords)]


def _reshape(value: Channels) -> list[Channels]:
    source = operand(value.node)
    require_private(source, [value.node])
    out_shape, in_shape = shape(value.node), shape(source)
    coords: dict[int, Index] = {}
    done: set[int] = set()
    for outs, ins in aligned(out_shape, in_shape):
        touched = [axis for axis in outs if axis in value.coords]
        if not touched:
            continue
        if len(touched) != len(outs) or not all(isinstance(in_shape[a], int) for a in ins):
            raise Refused(f"{describe(value.node)} mixes channels with other axes")
        flat = np.ravel_multi_index(
            tuple(value.coords[a] for a in outs), tuple(out_shape[a] for a in outs)
        )
        split = np.unravel_index(flat, tuple(in_shape[a] for a in ins))
        coords.update({a: np.asarray(c) for a, c in zip(ins, split, strict=True)})
        done.update(outs)
    if any(a not in done and out_shape[a] != 1 for a in value.coords):
        raise Refused(f"{describe(value.node)} mixes channels with other axes")
    return [value.moved(source, coords)]


def aligned(outs: Sequence[Any], ins: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same elements in both shapes, from the last axis; size 1 left out.

    What cannot be aligned (sizes whose relation is unknown) is missing from the answer.
    """
    left = [axis for axis, size in enumerate(outs) if size != 1]
    right = [axis for axis, size in enumerate(ins) if size != 1]
    groups: list[tuple[list[int], list[int]]] = []
    while left and right:
        a, b = [left.pop()], [right.pop()]
        while (x := _product(outs, a)) != (y := _product(ins, b)):
            if isinstance(x, int) and isinstance(y, int):
                grow_left = x < y
            elif isinstance(x, int) or isinstance(y, int):
                grow_left = isinstance(x, int)
            else:
                grow_left = len(left) > len(right)
            pool, group = (left, a) if grow_left else (right, b)
            if not pool:
                return groups
            group.insert(0, pool.pop())
        groups.append((a, b))
    return groups


def _product(sizes: Sequence[Any], axes: Sequence[int]) -> Any:
    product = sympy.Integer(1)
    for axis in axes:
        product = product * sizes[axis]
    return int(product) if product.is_Integer else sympy.expand(product)


def _slice(value: Channels) -> list[Channels]:
    node, source = value.node, operand(value.node)
    axis = int(node.args[1]) % len(shape(node))  # type: ignore[arg-type]
    if axis not in value.coords:
        return _same(value)
    extent = shape(source)[axis]
    bounds = _bounds(node, extent)
    for user in source.users:
        apart = user is node or (
            user.target is A.slice.Tensor
            and int(user.args[1]) % len(shape(node)) == axis  # type: ignore[arg-type]
            and not set(_bounds(user, extent)) & set(bounds)
        )
        if not apart:
            raise Refused(f"%{source.name} is also read by {describe(user)}")
    moved = np.asarray(bounds)[value.coords[axis]]
    return [value.moved(source, {**value.coords, axis: moved})]


def _bounds(node: fx.Node, extent: Any) -> range:
    start, end, step = cast(tuple[Any, ...], (*node.args[2:5], 1)[:3])
    if not all(isinstance(v, int) for v in (extent, start, end, step)):
        raise Refused(f"{describe(node)} cuts channels at a size that varies")
    return range(int(extent))[slice(start, end, step)]


def _select(value: Channels) -> list[Channels]:
    node, source = value.node, operand(value.node)
    axis = int(node.args[1]) % len(shape(source))  # type: ignore[arg-type]
    return [_selected(value, source, axis, int(node.args[2]), [node])]  # type: ignore[arg-type]


def _selected(
    value: Channels, source: fx.Node, axis: int, position: int, readers: Sequence[fx.Node]
) -> Channels:
    coords = {a + (a >= axis): c for a, c in value.coords.items()}
    extent = shape(source)[axis]
    if set(source.users) == set(readers) and len(readers) == 1 and readers[0] is value.node:
        return value.moved(source, coords)  # the others are read by nobody: scale them too
    if not isinstance(extent, int):
        raise Refused(f"{describe(value.node)} selects from an axis whose size varies")
    for user in source.users:
        if user not in readers and not _selects_other(user, axis, position, source):
            raise Refused(f"%{source.name} is also read by {describe(user)}")
    return value.moved(source, {**coords, axis: np.full(len(value.d), position % extent)})


def _selects_other(user: fx.Node, axis: int, position: int, source: fx.Node) -> bool:
    if user.target is not A.select.int:
        return False
    same_axis = int(user.args[1]) % len(shape(source)) == axis  # type: ignore[arg-type]
    return same_axis and bool(user.args[2] != position)


def _getitem(value: Channels) -> list[Channels]:
    node, whole = value.node, operand(value.node)
    index = int(node.args[1])  # type: ignore[arg-type]
    twins = [user for user in whole.users if user.args[1] == index]
    if len(twins) > 1:
        raise Refused(f"%{whole.name} is also read by {describe(twins[1])}")
    if whole.target not in (A.split.Tensor, A.split_with_sizes.default, A.unbind.int):
        raise Refused(f"{describe(whole)} is not linear")
    source = operand(whole)
    require_private(source, [whole])
    if whole.target is A.unbind.int:
        axis = int(whole.args[1] if len(whole.args) > 1 else 0) % len(shape(source))  # type: ignore[arg-type]
        coords = {a + (a >= axis): c for a, c in value.coords.items()}
        if len(whole.users) > 1:
            coords[axis] = np.full(len(value.d), index)
        return [value.moved(source, coords)]
    axis = int(whole.args[2] if len(whole.args) > 2 else 0) % len(shape(node))  # type: ignore[arg-type]
    if axis not in value.coords:
        if len(whole.users) > 1:
            raise Refused(f"%{source.name} is also read through other parts of {describe(whole)}")
        return [value.moved(source, value.coords)]
    before = sum(int(piece.shape[axis]) for piece in whole.meta["val"][:index])
    return [value.moved(source, {**value.coords, axis: value.coords[axis] + before})]


def _cat(value: Channels) -> list[Channels]:
    node = value.node
    parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    stacked = node.target is A.stack.default
    axis = int(node.args[1] if len(node.args) > 1 else 0) % len(shape(node))  # type: ignore[arg-type]
    for part in parts:
        require_private(part, [node])
    if axis not in value.coords:
        rest = value.coords
        if stacked:
            rest = {a - (a > axis): c for a, c in value.coords.items()}
        return [value.moved(part, rest) for part in parts]
    found, start = [], 0
    for part in parts:
        extent = 1 if stacked else shape(part)[axis]
        if not isinstance(extent, int):
            raise Refused(f"{describe(node)} joins channels at a size that varies")
        inside = value.only((value.coords[axis] >= start) & (value.coords[axis] < start + extent))
        coords = {**inside.coords, axis: inside.coords[axis] - start}
        if stacked:
            coords = {a - (a > axis): c for a, c in coords.items() if a != axis}
        if len(inside.d):
            found.append(inside.moved(part, coords))
        start += extent
    return found


def _expand(value: Channels) -> list[Channels]:
    source = operand(value.node)
    require_private(source, [value.node])
    out_shape, in_shape = shape(value.node), shape(source)
    shift = len(out_shape) - len(in_shape)
    for axis in value.coords:
        if axis < shift or in_shape[axis - shift] != out_shape[axis]:
            raise Refused(f"{describe(value.node)}: several heads share one")
    return [value.moved(source, {a - shift: c for a, c in value.coords.items()})]


_MOVES: dict[Any, Callable[[Channels], list[Channels]]] = {
    A._to_copy.default: _same,
    A.clone.default: _same,
    A.permute.default: _permute,
    A.transpose.int: _permute,
    A.unsqueeze.default: _unsqueeze,
    A.reshape.default: _reshape,
    A.slice.Tensor: _slice,
    A.select.int: _select,
    operator.getitem: _getitem,
    A.cat.default: _cat,
    A.stack.default: _cat,
    A.expand.default: _expand,
}
