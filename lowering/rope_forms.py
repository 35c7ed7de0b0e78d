"""Which nodes turn queries and keys: the spellings of rotary embedding in canonical graphs.

::

    %a, %b = aten.unbind(aten.reshape(%h, [B, T, H, 2, D/2]), -2)           ``turned_halves``
    %r = aten.cat([%a * %cos - %b * %sin, %a * %sin + %b * %cos], -1)

    %a, %b = aten.unbind(aten.reshape(%h, [B, T, H, D/2, 2]), -1)           ``partnered``
    %p = aten.reshape(aten.stack([-%b, %a], -1), [B, T, H, D])
    %r = %h * %cos + %p * %sin

    %c = aten.view_as_complex(aten.reshape(%h, [B, T, H, D/2, 2]))          ``complex_product``
    %r = aten.reshape(aten.view_as_real(%c * %table), [B, T, H, D])

The first is what ``lowering.fuse`` makes of pairs, with tables [.., D/2]; the second is that of
diffusers' ``apply_rotary_emb`` with tables [.., D], also with halves, ``%p = cat([-%b, %a], -1)``,
behind the swap of heads and tokens, [B, H, T, D], or before heads are told apart, [B, T, H D] with
tables as wide. Casts may stand anywhere. Reads the graph, never edits it.

Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.spelling import END
from vdqc.lowering.operands import only_user

A = torch.ops.aten
#: Channels of a head that the kernel takes at most.
_WIDEST = 256


@final
@dataclass(frozen=True)
class Turned:
    """What is turned and by what.

    Attributes:
        heads: [B, T, H, D] or, where ``tokens`` is 2, [B, H, T, D]; [B, T, H D] of pairs where
            every head has angles of its own.
        tables: cos and sin, or cos + i·sin; [.., T, 1, D/2 or D], with ``tokens`` 2 [.., 1, T, D],
            [.., T, H D] where heads are.
        interleaved: pairs are channels that lie next to each other.
        tokens: axis of the tokens.
    """

    heads: fx.Node
    tables: tuple[fx.Node, ...]
    interleaved: bool
    tokens: int = 1


def turned_halves(cat: fx.Node) -> Turned | None:
    """``cat([a cos - b sin, a sin + b cos], -1)`` where a and b are the halves of heads."""
    parts, axis = [*cat.args, 0][:2]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    rank = cat.meta["val"].ndim
    if rank != 4 or axis not in (-1, 3):
        return None
    first, second = map(uncast, parts)
    if first.target is not A.sub.Tensor or second.target is not A.add.Tensor:
        return None
    if first.kwargs or second.kwargs:
        return None
    one, two = _product(first.args[0]), _product(first.args[1])
    if one is None or two is None:
        return None
    a, cos = one
    b, sin = two
    wanted = [{a, sin}, {b, cos}]
    given = [_product(operand) for operand in second.args[:2]]
    if any(pair is None for pair in given):
        return None
    if [set(pair) for pair in given if pair] not in (wanted, wanted[::-1]):
        return None
    heads = _heads(a, b)
    if heads is None or not (_is_table(cos, heads) and _is_table(sin, heads)):
        return None
    return Turned(heads, (cos, sin), False)


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(half of heads, table) of their product, seen through casts."""
    node = uncast(node)
    if not isinstance(node, fx.Node) or node.target is not A.mul.Tensor:
        return None
    operands = [uncast(operand) for operand in node.args[:2]]
    if not all(isinstance(operand, fx.Node) for operand in operands):
        return None
    halves = [operand for operand in operands if operand.target is operator.getitem]
    if len(halves) != 1:
        return None
    other = operands[1] if operands[0] is halves[0] else operands[0]
    return halves[0], other


def _heads(a: fx.Node, b: fx.Node) -> fx.Node | None:
    """[B, T, H, D] whose first and second half ``a`` and ``b`` are."""
    unbound: Any
    other: Any
    unbound, other = a.args[0], b.args[0]
    if unbound is not other or (a.args[1], b.args[1]) != (0, 1):
        return None
    if unbound.target is not A.unbind.int or unbound.args[1] not in (-2, 3):
        return None
    pairs: Any = unbound.args[0]
    if pairs.target is not A.reshape.default or set(pairs.users) != {unbound}:
        return None
    heads: Any = pairs.args[0]
    shape, split = heads.meta["val"].shape, pairs.meta["val"].shape
    if len(shape) != 4 or len(split) != 5 or set(heads.users) != {pairs}:
        return None
    width = shape[-1]
    if not isinstance(width, int) or width % 2 or width > _WIDEST:
        return None
    return heads if list(split[-2:]) == [2, width // 2] else None


def _is_table(node: fx.Node, heads: fx.Node) -> bool:
    """True for [1 or B, T, 1, D/2]."""
    shape, like = node.meta["val"].shape, heads.meta["val"].shape
    if len(shape) != 4 or shape[2] != 1 or shape[3] != like[3] // 2:
        return False
    return _equal(shape[1], like[1]) and (shape[0] == 1 or _equal(shape[0], like[0]))


def _equal(one: Any, other: Any) -> bool:
    return str(one) == str(other)


def partnered(total: fx.Node) -> Turned | None:
    """``h * cos + partner(h) * sin``, where nothing else reads h."""
    if total.kwargs or total.meta["val"].ndim not in (3, 4):
        return None
    products = [uncast(operand) for operand in total.args[:2]]
    if any(not isinstance(p, fx.Node) or p.target is not A.mul.Tensor for p in products):
        return None
    for one, other in (products, products[::-1]):
        for heads, cos in _operand_orders(one):
            for partner, sin in _operand_orders(other):
                source = _source_of_partner(partner)
                if source is None or source[0] is not heads:
                    continue
                reads = {*readers_past_casts(heads)}
                if reads != {one, source[1]} or not all(only_user(p) for p in products):
                    continue
                for axis in (1, 2) if total.meta["val"].ndim == 4 else (1,):
                    if all(_is_wide_table(table, heads, axis) for table in (cos, sin)):
                        return Turned(heads, (cos, sin), source[2], axis)
    return None


def complex_product(total: fx.Node) -> Turned | None:
    """Pairs of ``h`` as complex numbers times a table of them, where nothing else reads h."""
    real: Any = total.args[0]
    if not isinstance(real, fx.Node) or real.target is not A.view_as_real.default:
        return None
    product: Any = real.args[0]
    if product.target is not A.mul.Tensor or product.kwargs:
        return None
    for paired, table in (product.args[:2], product.args[1::-1]):
        if not isinstance(paired, fx.Node) or not isinstance(table, fx.Node):
            continue
        if paired.target is not A.view_as_complex.default:
            continue
        split: Any = paired.args[0]
        if split.target is not A.reshape.default:
            continue
        heads: Any = uncast(split.args[0])
        same = str(total.meta["val"].shape) == str(heads.meta["val"].shape)
        pairs = split.meta["val"].shape[-2:]
        if not same or not _fits(heads) or list(pairs) != [heads.meta["val"].shape[-1] // 2, 2]:
            continue
        alone = all(only_user(node) for node in (real, product, paired, split))
        if alone and readers_past_casts(heads) == [split] and _is_complex_table(table, heads):
            return Turned(heads, (table,), True)
    return None


def _is_complex_table(node: fx.Node, heads: fx.Node) -> bool:
    """True for [T, 1, D/2] or [1 or B, T, 1, D/2]; as ``_is_wide_table`` for T."""
    shape, like = node.meta["val"].shape, heads.meta["val"].shape
    if len(shape) not in (3, 4) or shape[-2] != 1 or shape[-1] != like[3] // 2:
        return False
    if isinstance(shape[-3], int) and not _equal(shape[-3], like[1]):
        return False
    return len(shape) == 3 or shape[0] == 1 or _equal(shape[0], like[0])


def _operand_orders(product: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    one, other = (uncast(operand) for operand in product.args[:2])
    if not (isinstance(one, fx.Node) and isinstance(other, fx.Node)):
        return []
    return [(one, other), (other, one)]


def _source_of_partner(node: fx.Node) -> tuple[fx.Node, fx.Node, bool] | None:
    """(h, what reads it, interleaved) where ``node`` is (-b, a) for h = (a, b)."""
    pairs = node.target is A.reshape.default
    joined: Any = node.args[0] if pairs else node
    op = A.stack.default if pairs else A.cat.default
    if not isinstance(joined, fx.Node) or joined.target is not op:
        return None
    if list(joined.args[1:]) not in ([-1], [joined.meta["val"].ndim - 1]):
        return None
    parts: Any = joined.args[0]
    if len(parts) != 2 or parts[0].target is not A.neg.default:
        return None
    b, a = parts[0].args[0], parts[1]
    if any(half.target is not operator.getitem for half in (a, b)):
        return None
    cut: Any = a.args[0]
    if cut is not b.args[0] or (a.args[1], b.args[1]) != (0, 1) or len(cut.users) != 2:
        return None
    if cut.target is A.split.Tensor and not pairs:
        return _halves(cut)
    if cut.target is not A.unbind.int:
        return None
    split: Any = cut.args[0]
    if split.target is not A.reshape.default or len(split.users) != 1:
        return None
    heads: Any = split.args[0]
    width, shape = heads.meta["val"].shape[-1], split.meta["val"].shape
    wanted = [width // 2, 2] if pairs else [2, width // 2]
    axes = (-1, len(shape) - 1) if pairs else (-2, len(shape) - 2)
    if list(shape[-2:]) != wanted or cut.args[1] not in axes:
        return None
    return (heads, split, pairs) if _fits(heads) or (pairs and _is_flat(heads)) else None


def _halves(cut: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """As ``_source_of_partner``, for a split in two along the channels."""
    heads, size, axis = cut.args
    if axis not in (-1, 3) or not _fits(heads) or size * 2 != heads.meta["val"].shape[-1]:
        return None
    return heads, cut, False


def _fits(heads: fx.Node) -> bool:
    """True for [B, T, H, D] with a D that the kernel takes."""
    shape = heads.meta["val"].shape
    width = shape[-1]
    return len(shape) == 4 and isinstance(width, int) and width % 2 == 0 and width <= _WIDEST


def _is_flat(heads: fx.Node) -> bool:
    """True for [B, T, H D] that can be cut into pieces which the kernel takes."""
    shape = heads.meta["val"].shape
    return len(shape) == 3 and isinstance(shape[-1], int) and shape[-1] % 8 == 0


def _is_wide_table(node: fx.Node, heads: fx.Node, axis: int) -> bool:
    """True for [1 or B, T, 1, D], with T at ``axis``, or for [1 or B, T, H D] where heads are.

    A T of other symbols is equal: the product would fail else.
    """
    shape, like = node.meta["val"].shape, heads.meta["val"].shape
    if len(shape) != len(like) or shape[-1] != like[-1]:
        return False
    if len(shape) == 4 and shape[3 - axis] != 1:
        return False
    if isinstance(shape[axis], int) and not _equal(shape[axis], like[axis]):
        return False
    return shape[0] == 1 or _equal(shape[0], like[0])


def readers_past_casts(node: fx.Node) -> list[fx.Node]:
    """Who reads ``node`` or a cast of it."""
    found: list[fx.Node] = []
    for user in node.users:
        found += [user] if uncast(user) is user else readers_past_casts(user)
    return found


def cut_from(heads: fx.Node, parts: list[fx.Node]) -> fx.Node | None:
    """What ``parts``, ``heads`` among them, are all slices of tokens of, in order; else None."""
    if any(part.target is not A.slice.Tensor or len(part.args) != 4 for part in parts):
        return None
    whole: Any = heads.args[0]
    if any(part.args[0] is not whole or part.args[1] != 1 for part in parts):
        return None
    bounds = [0, *(part.args[3] for part in parts)]
    starts = [part.args[2] for part in parts]
    if starts != bounds[:-1] or bounds[-1] != END or set(whole.users) != set(parts):
        return None
    return whole if _fits(whole) else None


def scattered(heads: fx.Node, turned: fx.Node) -> tuple[fx.Node, Any, fx.Node] | None:
    """(whole, start, result) where ``turned`` takes the place of ``heads``, its last tokens.

    All [B, H, T, D]; ``whole[:, :, start:] = turned``, as an assignment is captured.
    """
    if heads.target is not A.slice.Tensor or len(heads.args) != 4:
        return None
    whole: Any = heads.args[0]
    axis, start, end = heads.args[1:]
    result = only_user(turned)
    if (axis, end) != (2, END) or result is None or not _fits(whole):
        return None
    if result.target is not A.slice_scatter.default:
        return None
    if result.args != (whole, turned, axis, start, end) or set(whole.users) != {heads, result}:
        return None
    return whole, start, result


def uncast(node: Any) -> Any:
    """``node`` before a cast, if it is one."""
    cast = isinstance(node, fx.Node) and node.target is A._to_copy.default
    return node.args[0] if cast and set(node.kwargs) == {"dtype"} else node
