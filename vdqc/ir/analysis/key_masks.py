"""Attention masks that only say which keys exist, as padded text has them, read off the dataflow.

::

    %valid = cat([new_ones(.., [B, video]), %text], 1)      or  pad(%text, [video, 0], value=1)
                                                            or  arange < video + sum(%mask)
    %mask  = reshape(%valid, [B, 1, 1, T])                  or that, spread over queries,
                                                            or  that & its transpose

A mask of this form is ``bool[B, T]`` in one value of the graph. Every key of the video exists, and
the text comes after it; anything else is a mask of another kind, and None here. ``sum`` of a mask
counts as no less than zero.

Source: ours; the forms are those of the models that vdqc captures.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, final

import sympy
import torch
from torch import fx

from vdqc.ir.analysis.channels import shape

A = torch.ops.aten
_SAME = {A.clone.default, A.contiguous.default, A.alias.default, A.detach.default}
_AND = {A.__and__.Tensor, A.bitwise_and.Tensor, A.logical_and.default, operator.and_}
_FULL = {A.full.default, A.new_full.default, A.full_like.default}
_ONES = {A.ones.default, A.new_ones.default, A.ones_like.default}


@final
@dataclass(frozen=True)
class KeyMask:
    """One mask.

    Attributes:
        valid: bool[B, T], True where the key exists.
        queries: True if a query that does not exist as a key sees no keys at all.
    """

    valid: fx.Node
    queries: bool


def key_mask(mask: fx.Node, query: fx.Node, video: Any) -> KeyMask | None:
    """What ``mask`` says of the keys of an attention over ``video`` tokens, then text.

    ``video`` is a size in the symbols of the graph's values.
    """
    sizes = shape(query)
    rank = len(shape(mask))
    if rank != 4 or mask.meta["val"].dtype != torch.bool or not _equal(shape(mask)[3], sizes[2]):
        return None
    valid, queries = _along(mask, 3), False
    if valid is None and mask.target in _AND and not mask.kwargs:
        one, other = mask.args[:2]
        if isinstance(one, fx.Node) and isinstance(other, fx.Node):
            pairs = ((one, other), (other, one))
            found = {_along(a, 3) for a, b in pairs if _along(a, 3) is _along(b, 2)} - {None}
            valid, queries = (found.pop(), True) if len(found) == 1 else (None, False)
    if valid is None or not all(map(_equal, shape(valid), (sizes[0], sizes[2]))):
        return None
    return KeyMask(valid, queries) if _video_exists(valid, video) else None


def valid_come_first(valid: fx.Node) -> bool:
    """True if every sample's keys that exist are known to come before those that do not.

    ``valid`` is that of a ``KeyMask``.
    """
    if valid.target is A.masked_fill.Scalar or _is_less(valid.target):
        return True
    text = _text_of(valid)
    return text is not None and _is_sorted(text)


# the axis ---------------------------------------------------------------------------------------


def _along(node: Any, axis: int) -> fx.Node | None:
    """bool[B, T] such that ``node`` is its value at the batch and at ``axis``, whatever the rest.

    The batch is the first axis throughout.
    """
    while isinstance(node, fx.Node):
        sizes = shape(node)
        if len(sizes) == 2:
            return node if axis == 1 and node.meta["val"].dtype == torch.bool else None
        if node.kwargs or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        source = node.args[0]
        inner = shape(source)
        moved = _source_axis(node, source, axis, sizes, inner)
        if moved is None or not 0 < moved < len(inner):
            return None
        if not (_equal(inner[0], sizes[0]) and _equal(inner[moved], sizes[axis])):
            return None
        node, axis = source, moved
    return None


def _source_axis(
    node: fx.Node, source: fx.Node, axis: int, sizes: list[Any], inner: list[Any]
) -> int | None:
    """The axis of ``source`` that ``axis`` of ``node`` is, where the op moves nothing else."""
    rank = len(sizes)
    rest: Any = node.args[1:]
    match node.target:
        case A.unsqueeze.default:
            at = rest[0] % rank
            return None if at == 0 or at == axis else axis - (at < axis)
        case A.expand.default | A.repeat.default if len(inner) == rank:
            return axis
        case A.reshape.default | A.view.default:
            wide = [i for i, size in enumerate(sizes) if size != 1]
            if [sizes[i] for i in wide] != [size for size in inner if size != 1]:
                return None
            kept = [i for i, size in enumerate(inner) if size != 1]
            return kept[wide.index(axis)] if axis in wide and 0 in wide and 0 in kept else None
        case A.transpose.int:
            one, other = rest[0] % rank, rest[1] % rank
            if 0 in (one, other):
                return None
            return {one: other, other: one}.get(axis, axis)
        case A.permute.default:
            order = [at % rank for at in rest[0]]
            return order[axis] if order[0] == 0 else None
        case target if target in _SAME:
            return axis
    return None


# the video ----------------------------------------------------------------------------------------


def _video_exists(valid: fx.Node, video: Any) -> bool:
    """Whether the first ``video`` keys of every sample exist, whatever the inputs are."""
    match valid.target:
        case A.cat.default:
            parts, axis = [*valid.args, 0][:2]
            ones: Any = parts[0]  # type: ignore[index]
            return axis in (1, -1) and _is_true(ones) and _equal(shape(ones)[1], video)
        case A.pad.default | A.constant_pad_nd.default:
            return _text_of(valid) is not None and _equal(_size(valid.args[1][0]), video)  # type: ignore[index]
        case A.masked_fill.Scalar:
            ones, beyond, value = valid.args[:3]
            if not _is_true(ones) or value is not False or not isinstance(beyond, fx.Node):
                return False
            return beyond.target is A.ge.Tensor and _counts_from(beyond, video)
        case target if _is_less(target):
            return _counts_from(valid, video)
    return False


def _text_of(valid: fx.Node) -> fx.Node | None:
    """bool[B, text] that ones were put in front of."""
    if valid.target is A.cat.default:
        parts, axis = [*valid.args, 0][:2]
        if axis in (1, -1) and len(parts) == 2 and _is_true(parts[0]):  # type: ignore[arg-type, index]
            text: fx.Node = parts[1]  # type: ignore[index, assignment]
            return text
        return None
    if valid.target in (A.pad.default, A.constant_pad_nd.default):
        source, places, *rest = valid.args
        mode, value = rest if len(rest) == 2 else ("constant", *rest) if rest else ("constant", 0)
        front_alone = len(places) == 2 and places[1] == 0  # type: ignore[arg-type, index]
        if isinstance(source, fx.Node) and front_alone and (mode, value) == ("constant", 1):
            return source
    return None


def _is_true(node: Any) -> bool:
    """Whether every element is True."""
    if not isinstance(node, fx.Node):
        return False
    return node.target in _ONES or (node.target in _FULL and node.args[-1] in (True, 1))


def _is_less(target: Any) -> bool:
    return target is A.lt.Tensor


def _counts_from(compared: fx.Node, video: Any) -> bool:
    """Whether ``compared`` is ``arange`` against ``video`` plus a sum for each sample."""
    place, limit = compared.args[:2]
    if not isinstance(limit, fx.Node) or len(shape(limit)) != 2 or shape(limit)[1] != 1:
        return False
    while isinstance(place, fx.Node) and place.target in (A.unsqueeze.default, A.expand.default):
        place = place.args[0]
    while isinstance(limit, fx.Node) and limit.target in (A.unsqueeze.default, A.reshape.default):
        limit = limit.args[0]
    is_plain = isinstance(place, fx.Node) and place.target is A.arange.default
    if not is_plain or not isinstance(limit, fx.Node) or limit.target is not A.add.Tensor:
        return False
    terms = limit.args[:2]
    sums = [t for t in terms if isinstance(t, fx.Node) and t.target is A.sum.dim_IntList]
    return len(sums) == 1 and any(_equal(_size(t), video) for t in terms if t is not sums[0])


def _is_sorted(text: fx.Node) -> bool:
    """``gather(x, 1, argsort(cast(~x), stable))``: what is True comes first."""
    if text.target is not A.gather.default or text.args[1] not in (1, -1):
        return False
    source, _, order = text.args[:3]
    if not isinstance(order, fx.Node) or order.target is not A.argsort.stable:
        return False
    axis = order.kwargs.get("dim", order.args[2] if len(order.args) > 2 else -1)
    falling = order.kwargs.get("descending", order.args[3] if len(order.args) > 3 else False)
    key: Any = order.args[0]
    if key.target is A._to_copy.default:
        key = key.args[0]
    inverse = key.target in (A.bitwise_not.default, A.logical_not.default)
    return inverse and key.args[0] is source and axis in (1, -1) and not falling


def _size(value: Any) -> Any:
    """A size as a number or a sympy expression; None for anything else."""
    found = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(found, torch.SymInt):
        return found.node.expr
    return found if isinstance(found, int) else None


def _equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return False
    return bool(sympy.expand(sympy.sympify(one) - sympy.sympify(other)) == 0)
