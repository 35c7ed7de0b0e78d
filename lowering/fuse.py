"""RoPE from interleaved pairs to halves, by reordering the rows of the projections before it.

::

    q = norm(linear(x, W, b), w)                     q = norm(linear(x, P W, P b), P w)
    a, b = unbind(reshape(q, [.., D/2, 2]), -1)  ->  a, b = unbind(reshape(q, [.., 2, D/2]), -2)
    r[.., 0::2] = a cos - b sin                      r = cat([a cos - b sin,
    r[.., 1::2] = a sin + b cos                               a sin + b cos], -1)

P takes channel 2i of each head to i and channel 2i + 1 to i + D/2. Query and key are reordered
alike, so their products are those of before, summed in another order; nothing else may read them.

Pairs that lie next to each other force a shuffle on every load and store; halves are plain vectors
(measured on a CPU, 4096 x 1536: 11 ms to 2.6 ms).

Source: Su et al., RoFormer, arXiv 2104.09864, section 3.4.2 (either pairing is the same rotation).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.ir.graph import Graph
from vdqc.ir.site import Site, SiteKind

A = torch.ops.aten
_CARRIES_CHANNELS = {A.permute.default, A.transpose.int, A._to_copy.default, A.clone.default}


@final
@dataclass(frozen=True)
class RowOrder:
    """Order in which a site's output channels are wanted: new channel i is old ``rows[i]``.

    ``width`` is that of a head.
    """

    rows: Tensor
    width: int


@final
@dataclass(frozen=True)
class _Rope:
    """One recognised rotation of a query or key: the nodes that the rewrite touches."""

    linear: fx.Node
    norm: fx.Node | None
    heads: fx.Node
    pairs: fx.Node
    unbound: fx.Node
    even: fx.Node
    odd: fx.Node
    result: fx.Node
    width: int


def reorder_rope(graph: Graph, packed: Collection[str]) -> dict[str, RowOrder]:
    """Rewrite every attention whose query and key are both rotated in pairs.

    ``packed`` are the linear sites whose weights will be packed: packing applies the row orders
    that are returned, by site.
    """
    linears = {site.node: site for site in graph.sites(kind=SiteKind.LINEAR)}
    orders: dict[str, RowOrder] = {}
    for site in graph.sites(kind=SiteKind.ATTENTION):
        ropes = [_find(operand) for operand in site.node.args[:2]]
        if any(rope is None or not _is_packed(rope, linears, packed) for rope in ropes):
            continue
        found = [rope for rope in ropes if rope is not None]
        if found[0].width != found[1].width or found[0].linear is found[1].linear:
            continue
        for rope in found:
            orders[linears[rope.linear].name] = _rewrite(graph, rope)
    return orders


def _is_packed(rope: _Rope, linears: dict[fx.Node, Site], packed: Collection[str]) -> bool:
    return rope.linear in linears and linears[rope.linear].name in packed


def _find(value: Any) -> _Rope | None:
    """The rotation that made ``value``, if it has the form above and nothing else reads it."""
    odd = _back(value, lambda node: node.target in _CARRIES_CHANNELS)
    even: Any = odd.args[0] if _is_scatter(odd, 1) else None
    if not _is_scatter(even, 0) or not _only(even, odd):
        return None
    parts = _product_sources(even.args[1]) | _product_sources(odd.args[1])
    unbound = {part.args[0] for part in parts}
    if len(unbound) != 1:
        return None
    halves: Any = unbound.pop()
    pairs: Any = halves.args[0]
    heads: Any = pairs.args[0]
    shape = list(heads.meta["val"].shape)
    if (
        halves.target is not A.unbind.int
        or halves.args[1] not in (-1, len(shape))
        or pairs.target is not A.reshape.default
        or len(shape) != 4
        or list(pairs.meta["val"].shape)[-2:] != [shape[-1] // 2, 2]
        or even.args[0].target is not A.empty_like.default
        or heads.target is not A.reshape.default
        or not set(heads.users) <= {pairs, even.args[0]}
        or set(pairs.users) != {halves}
    ):
        return None
    return _with_projection(heads, pairs, halves, even, odd)


def _with_projection(
    heads: Any, pairs: fx.Node, halves: fx.Node, even: fx.Node, odd: fx.Node
) -> _Rope | None:
    before: Any = heads.args[0]
    norm: fx.Node | None = None
    if before.target in (A.rms_norm.default, A.layer_norm.default):
        if list(before.args[1]) != [before.meta["val"].shape[-1]] or not _only(before, heads):
            return None
        before, norm = before.args[0], before
    if before.target is not A.linear.default or len(before.users) != 1:
        return None
    width = int(heads.meta["val"].shape[-1])
    return _Rope(before, norm, heads, pairs, halves, even, odd, odd, width)


def _back(node: Any, through: Callable[[fx.Node], bool]) -> Any:
    """The first node against the flow that is not gone ``through``; None past a shared one."""
    while isinstance(node, fx.Node) and through(node) and len(node.users) == 1:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and len(node.users) == 1 else None


def _is_scatter(node: Any, start: int) -> bool:
    """True for ``slice_scatter(_, _, last axis, start, end, 2)`` over the whole axis."""
    if not isinstance(node, fx.Node) or node.target is not A.slice_scatter.default:
        return False
    _, _, axis, first, end, step = (*node.args, *[None] * (6 - len(node.args)))[:6]
    ndim = node.meta["val"].ndim
    whole = end is None or (isinstance(end, int) and end >= node.meta["val"].shape[-1])
    return bool(axis in (-1, ndim - 1) and (first or 0) == start and step == 2 and whole)


def _product_sources(node: Any) -> set[fx.Node]:
    """The two operands that come from the pairs, in ``a c - b s`` or ``a s + b c``."""
    node = _uncast(node)
    if not isinstance(node, fx.Node) or node.target not in (A.sub.Tensor, A.add.Tensor):
        return set()
    sources = set()
    for product in map(_uncast, node.args[:2]):
        if not isinstance(product, fx.Node) or product.target is not A.mul.Tensor:
            return set()
        sources |= {arg for arg in map(_uncast, product.args) if _is_unbound(arg)}
    return sources


def _uncast(node: Any) -> Any:
    return node.args[0] if isinstance(node, fx.Node) and node.target is A._to_copy.default else node


def _is_unbound(node: Any) -> bool:
    """True for one of the values that an ``unbind`` gives."""
    return (
        isinstance(node, fx.Node)
        and node.target is operator.getitem
        and node.args[0].target is A.unbind.int  # type: ignore[union-attr]
    )


def _only(node: fx.Node, user: fx.Node) -> bool:
    return set(node.users) == {user}


def _rewrite(graph: Graph, rope: _Rope) -> RowOrder:
    """Apply the rewrite to one query or key; the order that its projection must take."""
    channels = int(rope.linear.meta["val"].shape[-1])
    order = half_split(channels, rope.width)
    if rope.norm is not None:
        for index in range(2, 3 if rope.norm.target is A.rms_norm.default else 4):
            _reorder(graph, rope.norm, index, order)
    sizes = list(rope.pairs.args[1])  # type: ignore[arg-type]
    pairs = graph.call(
        A.reshape.default, rope.heads, [*sizes[:-2], 2, rope.width // 2], before=rope.pairs
    )
    graph.replace(rope.pairs, pairs)
    graph.set_operand(rope.unbound, 1, pairs.meta["val"].ndim - 2)
    halves = [rope.even.args[1], rope.odd.args[1]]
    graph.replace(rope.odd, graph.call(A.cat.default, halves, -1, before=rope.odd))
    return RowOrder(order, rope.width)


def _reorder(graph: Graph, norm: fx.Node, index: int, order: Tensor) -> None:
    weight = norm.args[index] if len(norm.args) > index else None
    if not isinstance(weight, fx.Node):
        return
    name = f"kernel.half_split.{norm.name}_{'weight' if index == 2 else 'bias'}"
    if weight.op == "get_attr":
        owner, _, leaf = str(weight.target).rpartition(".")
        name = f"{owner}.kernel.{leaf}"
    graph.set_operand(norm, index, graph.set_param(name, graph.evaluate(weight)[order]))


def half_split(channels: int, width: int) -> Tensor:
    """int64[channels]: within each head of ``width``, even channels first, then odd ones."""
    return torch.arange(channels).reshape(-1, width // 2, 2).transpose(1, 2).reshape(-1)
