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

    %a, %b = aten.unbind(aten.reshape(%h, [B, T, H, D/2, 2]), -1)
    %p = aten.reshape(aten.stack([-%b, %a], -1), [B, T, H, D])
    %q = aten.permute(%h * %cos + %p * %sin, [0, 2, 1, 3])
        ->  %q = vdqc_kernels.rope(%h, ..., %cos, %sin, 0, True, 128)      tables [T, D]

    the same behind the swap, on [B, H, T, D], or of pairs as complex numbers  ->  the same kernel

    aten.permute(aten.cat([%r, %text], 1))   ->  aten.cat([%q, aten.permute(%text)], 2)
    the same, %r and %text slices of one %h  ->  one rope over all of %h, its table as long as %r
    %h[:, :, %n:] = %r, behind the swap      ->  one rope over all of %h, from token %n on
    anything else behind %r                  ->  one rope, swapped back
    %r of [B, T, H D], tables as wide        ->  one rope over [B, T H, 1, D]

A norm of each head comes after the reshape; ``lowering.rope_forms`` knows the spellings. Codes are
made before tokens are brought in the order of a mask, which moves codes and scales instead. A mask
that does not look at queries and keys is given values to take its sizes from; where it looks, codes
are quantised from the rotated values. Everything is float32 inside, rounded once.

Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.ir.graph import Graph
from vdqc.ir.learned import cast
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS
from vdqc.kernels.rope_quantize import ROPE, ROPE_QUANTIZE
from vdqc.kernels.token_order import TOKEN_ORDER
from vdqc.kernels.video_mask import VIDEO_MASK
from vdqc.lowering.operands import only_user
from vdqc.lowering.rope_forms import (
    Turned,
    complex_product,
    cut_from,
    partnered,
    readers_past_casts,
    scattered,
    turned_halves,
    uncast,
)

A = torch.ops.aten
#: Tokens of a block of means, which nothing reads yet.
_BLOCK = 128
#: Channels of a piece, at most, where heads are not told apart.
_PIECE = 128


def fuse_rope(graph: Graph) -> tuple[int, int]:
    """Fuse in place; (rotary embeddings, quantisers behind them) that became one kernel."""
    ropes = sum(_fuse_rope(graph, n) for n in graph.nodes if n.target is A.cat.default)
    ends = (A.add.Tensor, A.reshape.default)
    ropes += sum(_fuse_partner(graph, n) for n in graph.nodes if n.target in ends)
    codes = sum(_fuse_codes(graph, n) for n in graph.nodes if n.target is QUANTIZE_ROWS.op)
    return ropes, codes


# norm and rotation --------------------------------------------------------------------------------


def _fuse_rope(graph: Graph, cat: fx.Node) -> bool:
    found = turned_halves(cat)
    way = only_user(cat)
    if found is None or way is None or not _swaps_heads_and_tokens(way):
        return False
    graph.replace(way, _emit(graph, found, found.heads, cat))
    graph.module.graph.eliminate_dead_code()
    return True


def _tables(graph: Graph, rope: Turned, before: fx.Node) -> list[fx.Node]:
    """cos and sin as [T, D/2 or D], or [B, T, D/2 or D]."""
    flat = []
    for table in rope.tables:
        rank = table.meta["val"].ndim
        rows = graph.call(A.select.int, table, rank - 1 - rope.tokens, 0, before=before)
        if rank == 4 and table.meta["val"].shape[0] == 1:
            rows = graph.call(A.select.int, rows, 0, 0, before=before)
        flat.append(rows)
    if len(flat) == 1:
        pairs = graph.call(A.view_as_real.default, flat[0], before=before)
        flat = [graph.call(A.select.int, pairs, -1, part, before=before) for part in (0, 1)]
    return _narrow(graph, rope, flat, before)


def _narrow(graph: Graph, rope: Turned, tables: list[fx.Node], before: fx.Node) -> list[fx.Node]:
    """``tables`` in a dtype that the kernel takes, where the model has one."""
    if rope.heads.meta["val"].dtype == torch.float64:
        return tables
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return [
        rows if rows.meta["val"].dtype in narrow else cast(graph, rows, torch.float32, before)
        for rows in tables
    ]


def _fuse_partner(graph: Graph, total: fx.Node) -> bool:
    """What ends at ``total``: partners or complex products, and text beside that is not turned."""
    rope = partnered(total) if total.target is A.add.Tensor else complex_product(total)
    if rope is None:
        return False
    end = total
    while (reader := only_user(end)) is not None and uncast(reader) is not reader:
        end = reader
    if end.meta["val"].dtype != rope.heads.meta["val"].dtype:
        return False
    way = only_user(end)
    if rope.heads.meta["val"].ndim == 3:
        graph.replace(end, _emit_flat(graph, rope, end))
    elif rope.tokens == 2:  # heads come first already
        heads, start, result = scattered(rope.heads, end) or (rope.heads, 0, end)
        graph.replace(result, _emit(graph, rope, heads, result, start))
    elif way is not None and _swaps_heads_and_tokens(way):
        graph.replace(way, _emit(graph, rope, rope.heads, way))
    elif not _fuse_joined(graph, rope, end):  # something else in between, such as shared heads
        turned = _emit(graph, rope, rope.heads, end)
        graph.replace(end, graph.call(A.transpose.int, turned, 1, 2, before=end))
    graph.module.graph.eliminate_dead_code()
    return True


def _fuse_joined(graph: Graph, rope: Turned, end: fx.Node) -> bool:
    """``permute(cat([.., end, ..], 1))``: the permutation goes in front of the join."""
    join = only_user(end)
    if join is None or join.target is not A.cat.default or list(join.args[1:]) != [1]:
        return False
    swap = only_user(join)
    if swap is None or not _swaps_heads_and_tokens(swap):
        return False
    parts: list[fx.Node] = list(join.args[0])  # type: ignore[arg-type]
    whole = cut_from(rope.heads, [rope.heads if part is end else part for part in parts])
    if whole is not None and parts[0] is end:
        graph.replace(swap, _emit(graph, rope, whole, swap))
        return True
    turned = _emit(graph, rope, rope.heads, swap)
    swapped = [
        turned if part is end else graph.call(swap.target, part, *swap.args[1:], before=swap)
        for part in parts
    ]
    graph.replace(swap, graph.call(A.cat.default, swapped, 2, before=swap))
    return True


def _emit(graph: Graph, rope: Turned, heads: fx.Node, before: fx.Node, start: Any = 0) -> fx.Node:
    """The kernel in front of ``before``, over all tokens of ``heads``; [B, H, T, D]."""
    x, *norm = _norm(heads)
    if norm[0] == "rms_across":
        x = graph.call(A.reshape.default, x, heads.args[1], before=before)
    if rope.tokens == 2:
        swapped = _swaps_heads_and_tokens(x)
        x = x.all_input_nodes[0] if swapped else graph.call(A.transpose.int, x, 1, 2, before=before)
    tables = _tables(graph, rope, before)
    both = graph.call(ROPE.op, x, *norm, *tables, start, rope.interleaved, _BLOCK, before=before)
    return graph.call(operator.getitem, both, 0, before=before)


def _emit_flat(graph: Graph, rope: Turned, before: fx.Node) -> fx.Node:
    """The kernel over pieces of channels, each a token of one head with angles of its own."""
    readers = readers_past_casts(rope.heads)
    sizes: Any = next(node for node in readers if node.target is A.reshape.default).args[1]
    channels: int = rope.heads.meta["val"].shape[-1]
    width = math.gcd(channels, _PIECE)
    tables = []
    for table in rope.tables:
        one = table.meta["val"].shape[0] == 1
        shape = [-1, width] if one else [sizes[0], -1, width]
        tables.append(graph.call(A.reshape.default, table, shape, before=before))
    x = graph.call(A.reshape.default, rope.heads, [sizes[0], -1, 1, width], before=before)
    operands = (x, "none", None, None, 0.0, *_narrow(graph, rope, tables, before), 0, True, _BLOCK)
    both = graph.call(ROPE.op, *operands, before=before)
    turned = graph.call(operator.getitem, both, 0, before=before)
    return graph.call(A.reshape.default, turned, [*sizes[:2], channels], before=before)


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
    if moved is not None and only_user(moved) is not quantiser:
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


def _operand(node: fx.Node, index: int) -> fx.Node:
    value = node.args[index]
    assert isinstance(value, fx.Node)
    return value
