"""Block-sparse attention on Triton: online softmax over the key blocks of a compressed mask.

One program computes a block of queries of one head. ``plain`` loads through pointers and runs on
every GPU. ``specialised`` (sm90) loads through TMA descriptors in a warp of its own while two
groups of warps multiply; it serves after it has agreed with ``plain`` once. Programs go head by
head, so that the keys and values of one head stay in L2, and within a head longest row first, so
that no long row (text queries) is left to run alone at the end.

Scores are in units of log2: p = 2^(s scale log2(e) - m). Only tiles that reach beyond the last key
are masked; ``specialised`` cannot branch, so with a ragged number of keys it masks every tile,
which takes a quarter more instructions between the multiplies: pad keys to whole blocks if you can.

What the compiler accepts in ``specialised`` was found by compiling (Triton 3.6 and 3.9): queries
must come through a descriptor, on 3.6 one made on the host, on 3.9 one made in the kernel; scales
of tokens through one-dimensional descriptors, as a pointer to a vector is refused; no branch and no
other multiply beside the loop.

Error: scores and sums in float32, probabilities rounded to the dtype of value (relative 2^-9 for
bfloat16); int8 codes are summed exactly.
Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 1; Zhang et al., SageAttention, arXiv
2410.02367, section 4 (int8 scores).
"""

import triton
import triton.language as tl


@triton.jit
def _program(starts, counts, order, heads, rows, mask_b, mask_h):
    """Batch, head and row of this program; where its ids begin, how many there are."""
    program = tl.program_id(0)
    row = program % rows
    b, h = program // rows // heads, program // rows % heads
    place = b * mask_b + h * mask_h
    if order is not None:
        row = tl.load(order + place + row)
    return b, h, row, tl.load(starts + place + row), tl.load(counts + place + row)


@triton.jit
def _masked(scores, first, length, BLOCK_N: tl.constexpr):
    """Minus infinity for keys from ``length`` on."""
    exists = tl.arange(0, BLOCK_N) < length - first
    return tl.where(exists[None, :], scores, float("-inf"))


@triton.jit
def _softmax(scores, top, total, factor):
    """Probabilities of one tile, the new maximum and sum, and the factor of what was before."""
    new_top = tl.maximum(top, tl.max(scores, 1) * factor)
    p = tl.exp2(scores * factor[:, None] - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return p, new_top, total * shrink + tl.sum(p, 1), shrink


@triton.jit
def _finish(
    acc, total, out, residual, residual_scale, head, row, queries,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Normalise, add the residual, write; a row without keys is zeros."""
    tokens = row * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = tokens[:, None] < queries
    place = head.to(tl.int64) * queries + tokens
    at = place[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if residual is not None:
        added = tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        if residual_scale is not None:
            scale = tl.load(residual_scale + place, mask=tokens < queries, other=0.0)
            added = added * scale[:, None]
        acc += added
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def plain(
    q, k, v, out, q_scale, k_scale, starts, counts, ids, order, residual, residual_scale,
    key_length, scale, heads, rows, queries, keys,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, mask_b, mask_h,
    WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Any GPU; a key block is SPLIT tiles of BLOCK_N keys."""
    b, h, row, start, count = _program(starts, counts, order, heads, rows, mask_b, mask_h)
    tokens = row * BLOCK_M + tl.arange(0, BLOCK_M)
    channels, out_channels = tl.arange(0, WIDTH)[None, :], tl.arange(0, OUT_WIDTH)[None, :]
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    at = b64 * q_b + h64 * q_h + tokens.to(tl.int64)[:, None] * q_s + channels
    query = tl.load(q + at, mask=tokens[:, None] < queries, other=0)
    k += b64 * k_b + h64 * k_h
    v += b64 * v_b + h64 * v_h
    length = keys
    if key_length is not None:
        length = tl.minimum(tl.load(key_length + b), keys)
    factor = tl.zeros([BLOCK_M], tl.float32) + scale
    if q_scale is not None:
        q_scale += (b64 * heads + h) * queries
        k_scale += (b64 * heads + h) * keys
        factor = factor * tl.load(q_scale + tokens, mask=tokens < queries, other=0.0)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, OUT_WIDTH], tl.float32)
    for i in range(0, count * SPLIT):
        first = (tl.load(ids + start + i // SPLIT) * SPLIT + i % SPLIT) * BLOCK_N
        near = first + tl.arange(0, BLOCK_N)
        exists, far = near < keys, near.to(tl.int64)[:, None]
        key = tl.load(k + far * k_s + channels, mask=exists[:, None], other=0)
        if q_scale is not None:
            scores = tl.dot(query, key.T, out_dtype=tl.int32).to(tl.float32)
            scores = scores * tl.load(k_scale + near, mask=exists, other=0.0)[None, :]
        else:
            scores = tl.dot(query, key.T)
        if MASKED and first + BLOCK_N > length:
            scores = _masked(scores, first, length, BLOCK_N)
        p, top, total, shrink = _softmax(scores, top, total, factor)
        value = tl.load(v + far * v_s + out_channels, mask=exists[:, None], other=0)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    _finish(
        acc, total, out, residual, residual_scale, b * heads + h, row, queries, OUT_WIDTH, BLOCK_M
    )


@triton.jit
def specialised(
    q, k, v, out, q_scale, k_scale, starts, counts, ids, order, residual, residual_scale,
    key_length, scale, heads, rows, queries, keys, q_b, q_h, q_s, scales, mask_b, mask_h,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr, HOST_Q: tl.constexpr,
):  # fmt: skip
    """k and v are descriptors of [B, H, tokens, WIDTH], k_scale one of [B * H * tokens].

    If HOST_Q, q is a descriptor of rows in which block ``row`` begins at row b q_b + h q_h + row
    BLOCK_M, column h q_s; else a pointer with those strides, and q_scale one to ``scales`` values.
    """
    b, h, row, start, count = _program(starts, counts, order, heads, rows, mask_b, mask_h)
    head = b * heads + h
    if HOST_Q:
        query = q.load([b * q_b + h * q_h + row * BLOCK_M, h * q_s])
    else:
        base = q + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        rows_of_q = tl.make_tensor_descriptor(base, [queries, WIDTH], [q_s, 1], [BLOCK_M, WIDTH])
        query = rows_of_q.load([row * BLOCK_M, 0])
    length = keys
    if key_length is not None:
        length = tl.minimum(tl.load(key_length + b), keys)
    factor = tl.zeros([BLOCK_M], tl.float32) + scale
    if q_scale is not None:
        if HOST_Q:
            factor = factor * q_scale.load([head * queries + row * BLOCK_M])
        else:
            all_scales = tl.make_tensor_descriptor(q_scale, [scales], [1], [BLOCK_M])
            factor = factor * all_scales.load([head * queries + row * BLOCK_M])
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for i in tl.range(0, count * SPLIT, warp_specialize=True):
        first = (tl.load(ids + start + i // SPLIT) * SPLIT + i % SPLIT) * BLOCK_N
        key = k.load([b, h, first, 0]).reshape(BLOCK_N, WIDTH)
        if q_scale is not None:
            scores = tl.dot(query, key.T, out_dtype=tl.int32).to(tl.float32)
            scores = scores * k_scale.load([head * keys + first])[None, :]
        else:
            scores = tl.dot(query, key.T)
        if MASKED:
            scores = _masked(scores, first, length, BLOCK_N)
        p, top, total, shrink = _softmax(scores, top, total, factor)
        value = v.load([b, h, first, 0]).reshape(BLOCK_N, WIDTH)
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    _finish(acc, total, out, residual, residual_scale, head, row, queries, WIDTH, BLOCK_M)
