"""QK norm, rotary embedding and codes of queries and keys, in one kernel on GPUs.

::

    %n = aten.rms_norm(%x, [H D], @w, eps)
    %h = aten.reshape(%n, [B, T, H, D])
    %a, %b = aten.unbind(aten.reshape(%h, [B, T, H, 2, D/2]), -2)
    %r = aten.cat([%a * %cos - %b * %sin, %a * %sin + %b * %cos], -1)
    %q = aten.permute(%r, [0, 2, 1, 3])
        ->  %q = vdqc_kernels.rope(%h of %x, 'rms_across', @w, None, eps, %cos, %sin, 0, False, ..)

    %c = vdqc_kernels.quantize_rows(%q - mean(%q, 2), 127, False)
        ->  %c = vdqc_kernels.rope_quantize(%h of %x, ..., smooth=True)

Halves are what ``lowering.fuse`` makes of pairs; a norm of each head comes after the reshape. Codes
are made before tokens are brought in the order of a mask, which moves codes and scales instead. A
mask that does not look at queries and keys is given values to take its sizes from; where it looks,
codes are quantised from the rotated values. Everything is float32 inside, rounded once.

Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.ir.graph import Graph
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS
from vdqc.kernels.rope_quantize import ROPE, ROPE_QUANTIZE
from vdqc.kernels.token_order import TOKEN_ORDER
from vdqc.kernels.video_mask import VIDEO_MASK

A = torch.ops.aten
#: Tokens of a block of means, which nothing reads yet.
_BLOCK = 128
_WIDEST = 256


def fuse_rope(graph: Graph) -> tuple[int, int]:
    """Fuse in place; (rotary embeddings, quantisers behind them) that became one kernel."""
    ropes = sum(_fuse_rope(graph, n) for n in graph.nodes if n.target is A.cat.default)
    codes = sum(_fuse_codes(graph, n) for n in graph.nodes if n.target is QUANTIZE_ROWS.op)
    return ropes, codes


# norm and rotation --------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class _Rope:
    """``x`` is [B, T, H, D] once reshaped like ``heads``; tables are [.., T, 1, D/2]."""

    heads: fx.Node
    cos: fx.Node
    sin: fx.Node


def _fuse_rope(graph: Graph, cat: fx.Node) -> bool:
    found = _rope(cat)
    way = _only_user(cat)
    if found is None or way is None or not _swaps_heads_and_tokens(way):
        return False
    x, norm, weight, bias, eps = _norm(found.heads)
    before = cat
    if norm == "rms_across":
        x = graph.call(A.reshape.default, x, found.heads.args[1], before=before)
    tables = [_table(graph, table, before) for table in (found.cos, found.sin)]
    both = graph.call(ROPE.op, x, norm, weight, bias, eps, *tables, 0, False, _BLOCK, before=before)
    graph.replace(way, graph.call(operator.getitem, both, 0, before=before))
    graph.module.graph.eliminate_dead_code()
    return True


def _rope(cat: fx.Node) -> _Rope | None:
    """``cat([a cos - b sin, a sin + b cos], -1)`` where a and b are the halves of heads."""
    parts, axis = [*cat.args, 0][:2]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    rank = cat.meta["val"].ndim
    if rank != 4 or axis not in (-1, 3):
        return None
    first, second = map(_uncast, parts)
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
    return _Rope(heads, cos, sin)


def _product(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """(half of heads, table) of their product, seen through casts."""
    node = _uncast(node)
    if not isinstance(node, fx.Node) or node.target is not A.mul.Tensor:
        return None
    operands = [_uncast(operand) for operand in node.args[:2]]
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


def _table(graph: Graph, node: fx.Node, before: fx.Node) -> fx.Node:
    """The table as [T, D/2], or [B, T, D/2]."""
    flat = graph.call(A.select.int, node, 2, 0, before=before)
    if node.meta["val"].shape[0] == 1:
        flat = graph.call(A.select.int, flat, 0, 0, before=before)
    return flat


def _norm(heads: fx.Node) -> tuple[fx.Node, str, Any, Any, float]:
    """(input, norm, weight, bias, eps) of the norm that alone makes ``heads``, if there is one."""
    each = _norm_of(heads, heads.meta["val"].shape[-1])
    if each is not None:
        return each
    if heads.target is A.reshape.default:
        inner: Any = heads.args[0]
        shape = inner.meta["val"].shape
        if inner.target is A.rms_norm.default and len(inner.users) == 1 and len(shape) == 3:
            across = _norm_of(inner, shape[-1])
            if across is not None:
                return across[0], "rms_across", *across[2:]
    return heads, "none", None, None, 0.0


def _norm_of(node: fx.Node, width: Any) -> tuple[fx.Node, str, Any, Any, float] | None:
    if node.target not in (A.rms_norm.default, A.layer_norm.default):
        return None
    if list(node.args[1]) != [width]:  # type: ignore[arg-type]
        return None
    given: list[Any] = [*node.args, *[None] * (5 - len(node.args))]
    x, _, weight, *rest = given
    layer = node.target is A.layer_norm.default
    bias, eps = (rest[0], rest[1]) if layer else (None, rest[0])
    default = 1e-5 if layer else torch.finfo(node.meta["val"].dtype).eps
    return x, "layer" if layer else "rms", weight, bias, float(default if eps is None else eps)


def _swaps_heads_and_tokens(node: fx.Node) -> bool:
    if node.target is A.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    return node.target is A.transpose.int and set(node.args[1:]) == {1, 2}


# codes --------------------------------------------------------------------------------------------


def _fuse_codes(graph: Graph, quantiser: fx.Node) -> bool:
    """Codes of 8 bits straight from the rotation, where nothing else needs its values."""
    x, limit, per_tensor, *clip = quantiser.args
    if limit != 127 or per_tensor or clip or not isinstance(x, fx.Node):
        return False
    moved = x if x.target is TOKEN_ORDER.op and x.args[3] is None else None
    values: Any = x if moved is None else x.args[0]
    if moved is not None and _only_user(moved) is not quantiser:
        return False
    centred = _uncentred(values)
    rotated: Any = values if centred is None else centred
    if rotated.target is not operator.getitem or rotated.args[1] != 0:
        return False
    rope: Any = rotated.args[0]
    if rope.target is not ROPE.op or set(rope.users) != {rotated}:
        return False
    masks = [user for user in values.users if user not in (x, quantiser)]
    if not all(_looks_nowhere(mask, values) for mask in masks):
        return False
    for mask in masks:  # sizes are all it takes
        mask.replace_input_with(values, _operand(mask, 2))
    *steps, block = rope.args
    fused = graph.call(ROPE_QUANTIZE.op, *steps, centred is not None, block, before=rope)
    for part in list(quantiser.users):
        made = graph.call(operator.getitem, fused, part.args[1], before=rope)
        if moved is not None:
            made = graph.call(TOKEN_ORDER.op, made, *moved.args[1:], before=quantiser)
        graph.replace(part, made)
    graph.module.graph.eliminate_dead_code()
    return True


def _uncentred(node: fx.Node) -> fx.Node | None:
    """What ``node`` is less its mean over tokens, if nothing else reads either."""
    if node.target is not A.sub.Tensor or node.kwargs:
        return None
    values, mean = node.args
    if not (isinstance(values, fx.Node) and isinstance(mean, fx.Node)):
        return None
    if mean.target is not A.mean.dim or mean.args != (values, [2], True) or mean.kwargs:
        return None
    alone = set(values.users) == {mean, node} and set(mean.users) == {node}
    return values if alone else None


def _looks_nowhere(mask: fx.Node, values: fx.Node) -> bool:
    """True for a mask that needs sizes alone, where ``values`` of the same shape can give them."""
    if mask.target is not VIDEO_MASK.op:
        return False
    query, key, value, heads, _, _, text = mask.args[:7]
    policy = MaskPolicy.parse(str(text))
    if not MASKS[policy.name] or (heads is None and len(policy.masks) > 1):
        return False
    assert isinstance(value, fx.Node)
    same = str(value.meta["val"].shape) == str(values.meta["val"].shape)
    return same and value is not values and values in (query, key)


def _uncast(node: Any) -> Any:
    cast = isinstance(node, fx.Node) and node.target is A._to_copy.default
    return node.args[0] if cast and set(node.kwargs) == {"dtype"} else node


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _operand(node: fx.Node, index: int) -> fx.Node:
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value
