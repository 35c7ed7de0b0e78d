"""Attention written out as two products around a softmax, and the one op that it is.

::

    softmax((q @ k.mT) * scale + mask) @ v  ->  scaled_dot_product_attention(q, k, v, mask, scale)

The products may be ``matmul``, ``bmm``, ``baddbmm`` or ``einsum``, their axes in any order; the
scale may stand on the query, the key or the scores; the mask may be added, or fill with minus
infinity or a number below -1e30; scores may be in float32 between narrow operands, and have their
maximum subtracted. Attention whose weights are read by more than the values stays as it is.

Source: Vaswani et al., arXiv 1706.03762, eq. 1; spellings of timm, of code with einops, of
    diffusers' first attention processors and of the UNets of arXiv 2105.05233 and 2112.10752.
Invariant: equal up to the rounding of scores, which the one op keeps in float32, and but for
    queries without any key, which get zeros where the softmax gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.ir.attention_scores import ScoreMask, Scores, positive_factor, scores_of, widens
from vdqc.ir.contraction import MOVES, PRODUCTS, Labelled, moved_axes, product
from vdqc.ir.graph import Graph
from vdqc.ir.names import name_attention
from vdqc.ir.pattern import Mismatch
from vdqc.ir.sizes import size_expression

A = torch.ops.aten
#: A fill from here down swallows any score that it is added to.
_SWALLOWS = -1e30
#: What an attention that is written out has in its middle.
SOFTMAXES = (A.softmax.int, A._softmax.default)


def fuse_attentions(graph: Graph, tell: Callable[[fx.Node, str], None]) -> int:
    """Fuse every attention that is written out; ``tell(softmax, reason)`` of the others."""
    count = 0
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in SOFTMAXES:
            continue
        written = _find(node)
        if isinstance(written, Mismatch):
            tell(node, written.reason)
        elif written is not None:
            _fuse(graph, written)
            count += 1
    return count


# match ------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Written:
    """One attention: operands and result with common labels; ``batch`` are theirs alone."""

    query: Labelled
    key: Labelled
    value: Labelled
    result: Labelled
    scale: float
    mask: ScoreMask | None
    #: labels of the scores, as the mask broadcasts to them
    scores: tuple[str, ...]
    batch: tuple[str, ...]
    #: labels of query tokens, key tokens, summed channels, channels of the values
    axes: tuple[str, str, str, str]


def _find(softmax: fx.Node) -> _Written | Mismatch | None:
    """The attention around ``softmax``; None if there is none, a Mismatch if it stays."""
    scores, path = scores_of(softmax.args[0]), _path(softmax)
    if scores is None or path is None:
        return None
    if isinstance(scores, Mismatch):
        return scores
    inside = {*scores.nodes, softmax, *path[:-1]}
    if any(user not in inside and user is not path[-1] for node in inside for user in node.users):
        return Mismatch("its scores or weights have other readers")
    order = list(range(softmax.meta["val"].ndim))
    for node in path[:-1]:
        order = [order[axis] for axis in moved_axes(node)] if node.target in MOVES else order
    second = product(path[-1])
    weights = path[-2] if len(path) > 1 else softmax
    if second is None or second.factor != 1.0 or second.added is not None:
        return Mismatch("its second product is no plain one")
    left, right = second.operands
    read, value = (left, right) if left.node is weights else (right, left)
    if value.node is weights:
        return Mismatch("its values are its weights")
    names = dict(zip(read.axes, (scores.product.axes[axis] for axis in order), strict=True))
    for label in (*value.axes, *second.axes):
        names.setdefault(label, f"value {label}")
    axis = softmax.args[1]
    assert isinstance(axis, int)
    result = Labelled(path[-1], second.axes).renamed(names)
    return _assembled(scores, scores.product.axes[axis], value.renamed(names), result)


def _path(softmax: fx.Node) -> list[fx.Node] | None:
    """The nodes from the softmax, through moves and casts, to the product that reads it."""
    node, path = softmax, []
    while len(node.users) == 1:
        node = next(iter(node.users))
        path.append(node)
        if node.target in PRODUCTS:
            return path
        if node.target not in (*MOVES, A._to_copy.default):
            return None
    return _path_beside(softmax, path)


def _path_beside(softmax: fx.Node, path: list[fx.Node]) -> list[fx.Node] | None:
    """The path although something else reads the weights: a reason to tell, not to fuse."""
    last = path[-1] if path else softmax
    readers = [user for user in last.users if user.target in PRODUCTS]
    return [*path, readers[0]] if readers else None


def _assembled(scores: Scores, keys: str, value: Labelled, result: Labelled) -> _Written | Mismatch:
    """Sort the axes into batch, query tokens, key tokens and channels, or say what does not fit."""
    first = scores.product
    query, key = sorted(first.operands, key=lambda operand: keys in operand.axes)
    if keys in query.axes or keys not in key.axes:
        return Mismatch("its softmax is not over keys")
    batch = tuple(label for label in first.axes if label in query.axes and label in key.axes)
    tokens = [label for label in first.axes if label not in (*batch, keys)]
    summed = [label for label in query.axes if label not in first.axes]
    made = [label for label in result.axes if label not in first.axes]
    own = {query: {*tokens, *summed}, key: {keys, *summed}, value: {keys, *made}}
    own[result] = {*tokens, *made}
    if [len(tokens), len(summed), len(made)] != [1, 1, 1] or any(
        {*operand.axes} != {*batch, *axes} for operand, axes in own.items()
    ):
        return Mismatch("its products sum over other axes than channels and keys")
    dtype = value.value.dtype
    (query, by_query), (key, by_key) = _source(query, dtype), _source(key, dtype)
    value = _unmoved(value)
    scale = scores.scale * by_query * by_key
    axes = (tokens[0], keys, summed[0], made[0])
    written = _Written(query, key, value, result, scale, scores.mask, first.axes, batch, axes)
    reason = _obstacle(written)
    return written if reason is None else Mismatch(reason)


def _source(operand: Labelled, dtype: torch.dtype) -> tuple[Labelled, float]:
    """What ``operand`` is a moved, scaled or (from ``dtype``) widened copy of, and the scale."""
    scale = 1.0
    while True:
        operand = _unmoved(operand)
        node = operand.node
        factor = positive_factor(node)
        cast = operand.value.dtype != dtype and widens(node)
        if factor is None and not cast:
            return operand, scale
        source = node.args[0]
        assert isinstance(source, fx.Node)
        operand, scale = Labelled(source, operand.axes), scale * (factor or 1.0)


def _unmoved(operand: Labelled) -> Labelled:
    while (before := operand.before_move()) is not None:
        operand = before
    return operand


def _obstacle(written: _Written) -> str | None:
    """Why this attention stays written out, or None."""
    operands = (written.query, written.key, written.value)
    if len(written.batch) not in (1, 2):
        return f"expected one or two axes of batch and heads, got {len(written.batch)}"
    dtypes = {operand.value.dtype for operand in (*operands, written.result)}
    if len(dtypes) > 1:
        return "its operands differ in dtype"
    sizes: dict[str, Any] = {}
    for operand in operands:
        for label, size in zip(operand.axes, operand.value.shape, strict=True):
            if sizes.setdefault(label, size_expression(size)) != size_expression(size):
                return "its operands broadcast"
    return None if written.mask is None else _mask_obstacle(written, written.mask)


def _mask_obstacle(written: _Written, mask: ScoreMask) -> str | None:
    value = mask.node.meta["val"]
    if written.scores != (*written.batch, *written.axes[:2]):
        return "its mask lies in another order than batch, heads, queries, keys"
    if mask.fill is None:
        same = value.dtype == written.query.value.dtype
        return None if same else "its mask has another dtype than its query"
    if value.dtype != torch.bool:
        return "its mask fills by other than booleans"
    return None if mask.fill <= _SWALLOWS else f"its mask fills with {mask.fill:g}"


# rewrite ----------------------------------------------------------------------------------------


def _fuse(graph: Graph, written: _Written) -> None:
    end = written.result.node
    tokens, keys, summed, made = written.axes

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call(op, *args, before=end, **kwargs)

    def ordered(operand: Labelled, *axes: str) -> fx.Node:
        order = [operand.axes.index(label) for label in axes]
        if order == sorted(order):
            return operand.node
        return call(A.permute.default, operand.node, order)

    operands = [
        ordered(written.query, *written.batch, tokens, summed),
        ordered(written.key, *written.batch, keys, summed),
        ordered(written.value, *written.batch, keys, made),
    ]
    mask = None if written.mask is None else _mask(written.mask, operands[0], call)
    merged = _heads_merged(operands) if len(written.batch) == 1 and mask is None else None
    if merged is not None:
        sizes: list[Any] = [operand.args[1] for operand in operands]
        attended = _attend(merged, None, written.scale, call)
        result = call(A.reshape.default, attended, [*sizes[0][:2], sizes[2][2]])
    elif len(written.batch) == 1:
        wide = [call(A.unsqueeze.default, operand, 1) for operand in operands]
        if mask is not None and mask.meta["val"].ndim == 3:
            mask = call(A.unsqueeze.default, mask, 1)
        result = call(A.select.int, _attend(wide, mask, written.scale, call), 1, 0)
    else:
        result = _attend(operands, mask, written.scale, call)
    result = ordered(Labelled(result, (*written.batch, tokens, made)), *written.result.axes)
    graph.replace(end, result)


def _attend(
    operands: Sequence[fx.Node], mask: fx.Node | None, scale: float, call: Callable[..., fx.Node]
) -> fx.Node:
    width = operands[0].meta["val"].shape[-1]
    usual = isinstance(width, int) and math.isclose(scale, width**-0.5, rel_tol=1e-12)
    node = call(
        A.scaled_dot_product_attention.default,
        *(operands if mask is None else (*operands, mask)),
        **({} if usual else {"scale": scale}),
    )
    name_attention(node)
    return node


def _mask(mask: ScoreMask, query: fx.Node, call: Callable[..., fx.Node]) -> fx.Node:
    """The mask as attention takes it: added in the query's dtype, or true where keys are seen."""
    if mask.fill is None:
        rows = mask.node.meta["val"].ndim > 1
        return mask.node if rows else call(A.unsqueeze.default, mask.node, 0)
    shown = mask.node if mask.shows else call(A.logical_not.default, mask.node)
    if mask.fill == -math.inf:
        return shown
    like = call(A.zeros_like.default, shown, dtype=query.meta["val"].dtype)
    hidden = call(A.logical_not.default, mask.node) if mask.shows else mask.node
    return call(A.masked_fill.Scalar, like, hidden, mask.fill)


def _heads_merged(operands: Sequence[fx.Node]) -> list[fx.Node] | None:
    """The ``[B, H, T, D]`` that all of ``[B * H, T, D]`` were made of, if they were."""
    sources = []
    for operand in operands:
        if operand.target is not A.reshape.default:
            return None
        source = operand.args[0]
        assert isinstance(source, fx.Node)
        whole, part = source.meta["val"].shape, operand.meta["val"].shape
        if len(whole) != 4 or [size_expression(s) for s in whole[2:]] != [
            size_expression(s) for s in part[1:]
        ]:
            return None
        sources.append(source)
    heads = {tuple(size_expression(s) for s in source.meta["val"].shape[:2]) for source in sources}
    return sources if len(heads) == 1 else None
