"""The one spelling of each op: what ``canonicalize`` turns the captured spellings into.

``respelled`` names an op anew without changing its value, ``noop_source`` tells which ops have no
effect at all. Both rest on the graph being functional: nothing writes, so a copy is its source.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.ir.graph import Graph
from vdqc.ir.sizes import SizeBuilder, size_expression

A = torch.ops.aten
#: Where a slice ends that takes all there is.
END = 9223372036854775807
#: Target, operands and keyword operands of a node.
Spelling = tuple[Any, tuple[Any, ...], dict[str, Any]]


def respelled(graph: Graph, node: fx.Node) -> Spelling | None:
    """The canonical spelling of ``node``, or None if it has no other or its sizes are unknown."""
    rule = _SPELLINGS.get(node.target) if node.op == "call_function" else None
    try:
        return rule(graph, node) if rule is not None else None
    except KeyError:  # a size that the inputs do not tell: the old spelling stands
        return None


def noop_source(node: fx.Node) -> fx.Node | None:
    """The operand that ``node`` equals bit for bit, or None if it does something."""
    if node.op != "call_function" or not node.args:
        return None
    if node.target is A.cat.default:
        return _rejoined(node)
    source = node.args[0]
    if not isinstance(source, fx.Node) or not _same_type(source, node):
        return None
    once = node.target is A.repeat_interleave.self_int and node.args[1] == 1
    if once or node.target in _COPIES:
        return None if _strides_matter(node) or _escapes(node, source) else source
    if node.target is A.slice_scatter.default:  # over all there is, as an assignment to x[:]
        new = node.args[1]
        if not isinstance(new, fx.Node) or not _same_type(new, node) or _escapes(node, new):
            return None
        return new
    if node.target is A.slice.Tensor:
        return source if (len(node.args) < 5 or node.args[4] == 1) else None
    if node.target is A.dropout.default:
        return source if not node.args[2] else None
    neutral = 1 if node.target in _ONE else 0 if node.target in _ZERO else None
    other = node.args[1] if len(node.args) > 1 else None
    if neutral is not None and isinstance(other, (int, float)) and other == neutral:
        return source
    return None


def _rejoined(node: fx.Node) -> fx.Node | None:
    """What was cut into consecutive slices that ``node`` puts together again, or None."""
    parts, dim = node.args
    assert isinstance(parts, (list, tuple))
    if not all(isinstance(part, fx.Node) and part.target is A.slice.Tensor for part in parts):
        return None
    cuts = [part.args for part in parts]  # type: ignore[union-attr]
    source, axis = cuts[0][0], cuts[0][1]
    if any(len(cut) != 4 or cut[0] is not source or cut[1] != axis for cut in cuts):
        return None
    bounds = [0, *(cut[3] for cut in cuts)]
    if (
        dim != axis
        or bounds[-1] != END
        or any(cut[2] != bound for cut, bound in zip(cuts, bounds, strict=False))
    ):
        return None
    return source if isinstance(source, fx.Node) else None


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta.get("val"), b.meta.get("val")
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.dtype == y.dtype
        and x.device == y.device
        and x.ndim == y.ndim
        and all(
            size_expression(m) == size_expression(n) for m, n in zip(x.shape, y.shape, strict=True)
        )
    )


def _strides_matter(node: fx.Node) -> bool:
    """True if an op that needs certain strides reads ``node``, which makes them, through views."""
    if node.target not in _DENSE:
        return False
    frontier, seen = list(node.users), set()
    while frontier:
        user = frontier.pop()
        if user.target in _STRIDED:
            return True
        if user.target in VIEWS and user not in seen:
            seen.add(user)
            frontier.extend(user.users)
    return False


def _escapes(node: fx.Node, source: fx.Node) -> bool:
    """True if dropping the copy would hand an input or a weight itself to the caller."""
    if source.op not in ("placeholder", "get_attr"):
        return False
    return any(user.op == "output" for user in node.users)


_COPIES = {
    A.clone.default,
    A.contiguous.default,
    A.alias.default,
    A.detach.default,
    A.lift_fresh_copy.default,
    A.type_as.default,
    A._to_copy.default,
    A.to.dtype,
    A.to.dtype_layout,
    A.to.device,
    A.to.other,
    A.expand.default,
    A.reshape.default,
}
#: Ops that only say where values lie, in canonical spelling and in those that stand where sizes are
#: not known; and copies, which move values for their reader alone.
VIEWS = frozenset(
    {
        A._unsafe_view.default,
        A.alias.default,
        A.chunk.default,
        A.contiguous.default,
        A.detach.default,
        A.expand.default,
        A.lift_fresh_copy.default,
        A.narrow.default,
        A.permute.default,
        A.reshape.default,
        A.select.int,
        A.slice.Tensor,
        A.split.Tensor,
        A.split.sizes,
        A.split_with_sizes.default,
        A.squeeze.default,
        A.squeeze.dim,
        A.squeeze.dims,
        A.t.default,
        A.transpose.int,
        A.unbind.int,
        A.unflatten.int,
        A.unsqueeze.default,
        A.view.default,
        A.view_as.default,
        operator.getitem,
    }
)
_DENSE = {A.clone.default, A.contiguous.default, A.repeat_interleave.self_int}
_STRIDED = {A.view_as_complex.default, A.as_strided.default, A.view.dtype}
_ONE = {A.mul.Tensor, A.div.Tensor}
_ZERO = {A.add.Tensor, A.sub.Tensor}


_Rule = Callable[[Graph, fx.Node], Spelling | None]


def _cast(graph: Graph, node: fx.Node) -> Spelling | None:
    value, source = node.meta["val"], node.args[0].meta["val"]  # type: ignore[union-attr]
    if value.device != source.device:
        return A._to_copy.default, (node.args[0],), {"dtype": value.dtype, "device": value.device}
    return A._to_copy.default, (node.args[0],), {"dtype": value.dtype}


def _renamed(target: Any) -> _Rule:
    return lambda graph, node: (target, node.args, dict(node.kwargs))


def _reshape(graph: Graph, node: fx.Node) -> Spelling | None:
    return A.reshape.default, (node.args[0], _size_operands(graph, node)), {}


def _expand(graph: Graph, node: fx.Node) -> Spelling | None:
    return A.expand.default, (node.args[0], _size_operands(graph, node)), {}


def _size_operands(graph: Graph, node: fx.Node) -> list[Any]:
    """Sizes of ``node``'s own value as operands; symbolic ones as nodes in front of it."""
    maker = SizeBuilder(graph, anchor=node)
    return [maker.operand(size) for size in node.meta["val"].shape]


def _split(graph: Graph, node: fx.Node) -> Spelling | None:
    dim = _argument(node, 2, "dim", 0)
    extents = [piece.shape[dim] for piece in node.meta["val"]]
    whole = node.args[0].meta["val"].shape[dim]  # type: ignore[union-attr]
    if all(isinstance(extent, int) for extent in (*extents, whole)):
        if all(extent == extents[0] for extent in extents[:-1]) and extents[-1] <= extents[0]:
            return A.split.Tensor, (node.args[0], extents[0], dim), {}
        return A.split_with_sizes.default, (node.args[0], extents, dim), {}
    if node.target is A.split.sizes:
        return A.split_with_sizes.default, (node.args[0], node.args[1], dim), {}
    return None


def _slice(graph: Graph, node: fx.Node) -> Spelling | None:
    dim, start = _argument(node, 1, "dim", 0), _argument(node, 2, "start", None)
    end, step = _argument(node, 3, "end", None), _argument(node, 4, "step", 1)
    bounds = (0 if start is None else start, END if end is None else end)
    return A.slice.Tensor, (node.args[0], dim, *bounds, *((step,) if step != 1 else ())), {}


def _cat(graph: Graph, node: fx.Node) -> Spelling | None:
    return A.cat.default, (node.args[0], _argument(node, 1, "dim", 0)), {}


def _layer_norm(graph: Graph, node: fx.Node) -> Spelling | None:
    weight, bias = _argument(node, 2, "weight", None), _argument(node, 3, "bias", None)
    eps = _argument(node, 4, "eps", 1e-5)
    return A.layer_norm.default, (*node.args[:2], weight, bias, eps), {}


def _rms_norm(graph: Graph, node: fx.Node) -> Spelling | None:
    weight, eps = _argument(node, 2, "weight", None), _argument(node, 3, "eps", None)
    return A.rms_norm.default, (*node.args[:2], weight, eps), {}


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


_SPELLINGS: dict[Any, _Rule] = {
    **dict.fromkeys((A.view.default, A._unsafe_view.default), _renamed(A.reshape.default)),
    **dict.fromkeys(
        (
            A.squeeze.default,
            A.squeeze.dim,
            A.squeeze.dims,
            A.flatten.using_ints,
            A.unflatten.int,
            A.view_as.default,
            A.reshape_as.default,
        ),
        _reshape,
    ),
    A.expand_as.default: _expand,
    **dict.fromkeys(
        (
            A._to_copy.default,
            A.type_as.default,
            A.to.dtype,
            A.to.dtype_layout,
            A.to.device,
            A.to.other,
        ),
        _cast,
    ),
    **dict.fromkeys(
        (
            A.split_with_sizes.default,
            A.split.Tensor,
            A.split.sizes,
            A.chunk.default,
            A.unsafe_chunk.default,
            A.unsafe_split.Tensor,
        ),
        _split,
    ),
    A.slice.Tensor: _slice,
    A.layer_norm.default: _layer_norm,
    A.rms_norm.default: _rms_norm,
    **dict.fromkeys(
        (A.cat.default, A.concat.default, A.concatenate.default),
        _cat,
    ),
    A.mul.Scalar: _renamed(A.mul.Tensor),
    A.add.Scalar: _renamed(A.add.Tensor),
    A.sub.Scalar: _renamed(A.sub.Tensor),
    A.div.Scalar: _renamed(A.div.Tensor),
    A.swapaxes.default: _renamed(A.transpose.int),
    A.swapdims.default: _renamed(A.transpose.int),
}
