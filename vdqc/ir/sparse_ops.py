"""Sparse attention in the ``vdqc::`` dialect: one op that names a policy and the sizes of a video.

The mask is no value of the graph. It would be a tensor whose size depends on a density, three more
for the order of the tokens, and sixteen nodes at every site; as text and sizes it is one node that
prints what was decided, survives every resolution and length that the graph does, and is written
into a program as it is. Sizes come from the graph's inputs as integers, so that a compiler with
dynamic shapes traces the op once. Lowering spells it out.

Source: Xi et al., Sparse VideoGen, arXiv 2502.01776; Yang et al., QuantSparse, arXiv 2509.23681,
equations 11 to 15 (``reparameterized_attention``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vdqc.base.block_mask import expand, kept_blocks
from vdqc.base.sparsity import MaskPolicy
from vdqc.base.video_mask import reorder, video_mask


@torch.library.custom_op("vdqc::sparse_attention", mutates_args=())
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """softmax(q kᵀ scale) v over the pairs of blocks that ``policy`` keeps.

    query, key, value  float[B, H, T, D], [B, H, T, D], [B, H, T, E] in the order of the video
    heads    int64[H]: which of the policy's masks each head gets; None: decided by the call
    dense    bool[]: True attends to everything; None: never
    layout   frames, tokens of a frame, text tokens, 1 if text comes first, tokens in a row of a
             frame (0: unknown); sizes may be symbolic
    policy   text of a ``MaskPolicy``
    valid    bool[B, T]: keys that exist. Keys of the video all do, and where some do not, text
             comes last; None: all do
    returns  float[B, H, T, E], in the order of the video; zeros for a query without keys

    Backward: that of attention with the mask of the forward; the choice of blocks has no gradient.
    """
    with torch.no_grad():
        return plain(query, key, value, heads, dense, layout, policy, scale, valid)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    """``sparse_attention`` as torch ops, differentiable; writes out one head's mask at a time."""
    parsed = MaskPolicy.parse(policy)
    operands = (query.detach(), key.detach(), value.detach())
    mask = video_mask(*operands, heads, dense, layout, policy, scale, valid=valid)
    moved = [query, key, value]
    exists = None if valid is None else valid[:, None, :, None].expand(-1, query.shape[1], -1, -1)
    if parsed.reorders:
        moved = [reorder(x, mask.order, mask.which) for x in moved]
        exists = None if exists is None else reorder(exists, mask.order, mask.which)
    columns = mask.counts.shape[-1]
    kept = kept_blocks(mask.starts, mask.counts, mask.ids, columns)
    tokens, outputs = query.shape[2], []
    for head in range(query.shape[1]):
        own = expand(kept[:, head : head + 1], parsed.block, parsed.block, tokens, tokens)
        q, k, v = (x[:, head : head + 1] for x in moved)
        if exists is not None:
            own = own & exists[:, head : head + 1].mT
        outputs.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scale)
        )
    out = torch.cat(outputs, 1)
    return reorder(out, mask.place, mask.which) if parsed.reorders else out.contiguous()


@sparse_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    valid: Tensor | None = None,
) -> Tensor:
    return query.new_empty([*query.shape[:-1], value.shape[-1]])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5], inputs[-1])
    ctx.rest = inputs[5:8]
    ctx.nothing = (None,) * (len(inputs) - 3)


def _sparse_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, heads, dense, valid = ctx.saved_tensors
    layout, policy, scale = ctx.rest
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        q, k, v = leaves
        out = plain(q, k, v, heads, dense, layout, policy, scale, valid)
    return (*torch.autograd.grad(out, leaves, grad), *ctx.nothing)


sparse_attention.register_autograd(_sparse_backward, setup_context=_setup)


@torch.library.custom_op("vdqc::reparameterized_attention", mutates_args=())
def reparameterized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    cache: str,
    valid: Tensor | None = None,
) -> Tensor:
    """Sparse attention plus what its mask dropped when it was last compared with dense attention.

    Operands as of ``sparse_attention``; ``cache`` is the text of a ``CachePolicy``. A call by
    itself has no past, so it is one that compares: the result is that of dense attention.
    Lowering makes two programs of a graph with this op: one that compares, one that reuses.
    """
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, _keys_alone(valid), scale=scale).contiguous()


def _keys_alone(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid[:, None, None, :]


@reparameterized_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: Tensor | None,
    dense: Tensor | None,
    layout: list[int],
    policy: str,
    scale: float,
    cache: str,
    valid: Tensor | None = None,
) -> Tensor:
    return query.new_empty([*query.shape[:-1], value.shape[-1]])


def _dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, _, _, valid = ctx.saved_tensors
    mask, scale = _keys_alone(valid), ctx.rest[2]
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        q, k, v = leaves
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return (*torch.autograd.grad(out, leaves, grad), *ctx.nothing)


reparameterized_attention.register_autograd(_dense_backward, setup_context=_setup)

SPARSE_ATTENTION = torch.ops.vdqc.sparse_attention.default
REPARAMETERIZED_ATTENTION = torch.ops.vdqc.reparameterized_attention.default
