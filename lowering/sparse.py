"""Sparse attention spelled out in kernels: the mask, the way to its order, attention, the way back.

::

    %o = vdqc.sparse_attention(%q, %k, %v, @heads, None, [F, S, 0, 0, W], 'svg{density=0.25}', s)
    -->
    %m = vdqc_kernels.video_mask(%q, %k, %v, @heads, None, [F, S, 0, 0, W], 'svg{...}', s)
    %a = vdqc_kernels.token_order(%q, %m[0], %m[2])        likewise %k, %v
    %p = vdqc_kernels.sparse_attention(%a, ..., %m[3], %m[4], %m[5], s, 128, 128)
    %o = vdqc_kernels.token_order(%p, %m[1], %m[2])

Policies that keep the order of the video need no ``token_order``. Of padded text, keys that exist
come first (``key_order``, where they do not anyway) and their number is an operand.
``reparameterized_attention`` adds dense attention and ``compare``, where ``vdqc.lowering.residual``
later cuts the program in two. Where no sparse kernel runs, the mask is written out for torch's own
attention.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from vdqc.base.sparsity import MaskPolicy
from vdqc.base.target import Target
from vdqc.base.video_mask import density
from vdqc.ir.analysis.key_masks import valid_come_first
from vdqc.ir.graph import Graph
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import note, set_note
from vdqc.ir.sparse_ops import REPARAMETERIZED_ATTENTION, SPARSE_ATTENTION
from vdqc.kernels import sparse_attention as kernel
from vdqc.kernels.attention import ATTENTION, torch_attention_cost
from vdqc.kernels.base import AttentionProblem
from vdqc.kernels.compare import COMPARE
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS
from vdqc.kernels.token_order import TOKEN_ORDER
from vdqc.kernels.video_mask import DENSE_MASK, KEY_ORDER, VIDEO_MASK
from vdqc.lowering.rules import hint

_aten = torch.ops.aten
_SCORES = (None, None, "int8/token/dynamic")
SPARSE_TARGETS = (SPARSE_ATTENTION, REPARAMETERIZED_ATTENTION)


def is_sparse(node: fx.Node) -> bool:
    """True if ``node`` is an attention that ``sparsify`` made."""
    return node.target in SPARSE_TARGETS


def has_integer_scores(node: fx.Node) -> bool:
    """True if queries and keys of a sparse attention are codes of 8 bits, one scale a token, or
    will be.
    """
    return bool(note(node).get("integer_scores")) or all(
        isinstance(x, fx.Node) and x.target is FAKE_QUANTIZE and x.args[1:] == _SCORES
        for x in node.args[:2]
    )


def sparse_problem(graph: Graph, node: fx.Node) -> kernel.SparseAttentionProblem:
    """The problem of one sparse attention, at the sizes of the captured example."""
    query, key = (node.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    batch, heads, queries, width = (hint(size) for size in query.shape)
    policy = MaskPolicy.parse(str(node.args[6]))
    chosen = node.args[3]
    classes = graph.evaluate(chosen) if isinstance(chosen, fx.Node) else None
    return kernel.SparseAttentionProblem(
        batch,
        heads,
        queries,
        hint(key.shape[2]),
        width,
        query.dtype,
        density(layout_hint(node), str(policy), classes),
        policy.block,
        policy.block,
        int8=has_integer_scores(node),
    )


def dense_problem(problem: kernel.SparseAttentionProblem) -> AttentionProblem:
    """The same attention with nothing left out."""
    p = problem
    return AttentionProblem(p.batch, p.heads, p.queries, p.keys, p.width, p.dtype)


def layout_hint(node: fx.Node) -> list[int]:
    """The layout at the sizes of the captured example."""
    sizes = cast("list[Any]", node.args[5])
    return [hint(size.meta["val"]) if isinstance(size, fx.Node) else int(size) for size in sizes]


def emit_sparse(graph: Graph, node: fx.Node, chosen: str, target: Target) -> None:
    """Replace one sparse attention by kernels; ``chosen`` is the kernel, or ``aten``."""

    def call(op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call(op, *args, before=node, **kwargs)

    query, key, value, heads, dense, layout, text, scale = node.args[:8]
    policy = MaskPolicy.parse(str(text))
    integer = chosen == kernel.SPARSE_ATTENTION_INT8.name
    if integer:  # codes are made where tokens have their places
        query, key = (x.args[0] for x in (query, key))  # type: ignore[union-attr]
    valid = valid_of(node)
    seen = () if valid is None else (valid,)
    made = call(VIDEO_MASK.op, query, key, value, heads, dense, layout, text, scale, *seen)
    order, place, index, *mask = (call(operator.getitem, made, i) for i in range(6))
    operands, length = [query, key, value], None
    orders = [(order, index) if policy.reorders else None] * 3
    if valid is not None:
        length = call(_aten.sum.dim_IntList, valid, [1], dtype=torch.int32)
        if not valid_come_first(valid):
            video = call(operator.mul, *layout[:2])  # type: ignore[index, misc]
            pair = call(KEY_ORDER.op, order, index, valid, video)
            orders[1:] = [tuple(call(operator.getitem, pair, i) for i in range(2))] * 2  # type: ignore[list-item]
    operands = [
        x if way is None else call(TOKEN_ORDER.op, x, *way, None, None)
        for x, way in zip(operands, orders, strict=True)
    ]
    block = policy.block
    extra = (None, None, length)
    if integer:
        codes: list[fx.Node] = []
        for x in operands[:2]:
            both = call(QUANTIZE_ROWS.op, x, 127, False)
            codes += (call(operator.getitem, both, i) for i in range(2))
        sparse = call(
            kernel.SPARSE_ATTENTION_INT8.op,
            *codes, operands[2], *mask, scale, block, block, *extra,
        )  # fmt: skip
    elif chosen == kernel.SPARSE_ATTENTION.name:
        op = kernel.SPARSE_ATTENTION.op
        sparse = call(op, *operands, *mask, scale, block, block, *extra)
    else:
        written = call(DENSE_MASK.op, *mask, block, query, length)
        attend = _aten.scaled_dot_product_attention.default
        sparse = call(attend, *operands, written, scale=scale)
    if policy.reorders or chosen == "aten":
        back = place if policy.reorders else order
        sparse = call(TOKEN_ORDER.op, sparse, back, index, None, None)
    result = sparse
    if node.target is REPARAMETERIZED_ATTENTION:
        full = _emit_dense(graph, node, target)
        result = call(COMPARE.op, full, sparse, node.args[8])
    graph.replace(node, result)
    set_note(result, kernel=chosen, policy=str(policy))


def valid_of(node: fx.Node) -> fx.Node | None:
    """Which keys of a sparse attention exist, if not all do."""
    at = 9 if node.target is REPARAMETERIZED_ATTENTION else 8
    valid = node.args[at] if len(node.args) > at else node.kwargs.get("valid")
    return valid if isinstance(valid, fx.Node) else None


def _emit_dense(graph: Graph, node: fx.Node, target: Target) -> fx.Node:
    problem = dense_problem(sparse_problem(graph, node))
    query, key, value, scale = (*node.args[:3], node.args[7])
    mask = valid_of(node)
    for axis in (1, 1) if mask is not None else ():
        mask = graph.call(_aten.unsqueeze.default, mask, axis, before=node)
    faster = ATTENTION.cost(problem).us(target) <= torch_attention_cost(problem).us(target)
    if ATTENTION.supports(problem, target) is None and faster:
        return graph.call(ATTENTION.op, query, key, value, mask, scale, before=node)
    attend = _aten.scaled_dot_product_attention.default
    return graph.call(attend, query, key, value, mask, scale=scale, before=node)
