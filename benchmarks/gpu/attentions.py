"""Block-sparse attention, its int8 form, its residual, and the mask builder.

Masks keep the same number of key blocks in every row: the text blocks and random others; text
queries keep all. Tokens are rounded down to whole blocks so that FlexAttention can take the same
mask. Work is what is executed, 4 D for each score of a kept block, held against dense cuDNN in the
same run: the ratio to the peer ``cudnn dense`` is the speed-up, the fraction of the ceiling the
efficiency. ``with mask`` also builds the mask (block means, scores, choice) in every call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import cases, checks, peers, routes
from benchmarks.gpu.cases import Model
from benchmarks.gpu.env import Env, route
from benchmarks.gpu.names import AUTO, PLAIN, WITH_MASK
from benchmarks.gpu.peers import Call, Peer
from benchmarks.gpu.trial import Case, Op, Trial, Work
from vdqc.base.block_mask import BlockMask, block_means, blocks, compress, expand
from vdqc.kernels.base import Cost
from vdqc.kernels.block_mask import BLOCK_MASK_TOPK
from vdqc.kernels.quantize_rows import quantize_rows
from vdqc.kernels.sparse_attention import (
    SPARSE_ATTENTION,
    SPARSE_ATTENTION_INT8,
    SparseAttentionProblem,
)

BF16 = torch.bfloat16
DENSITIES = (0.25, 0.15, 0.5, 1.0)


def random_mask(env: Env, model: Model, tokens: int, density: float, block: int) -> BlockMask:
    """``density`` of the key blocks in every row that is no text."""
    heads = 2 if env.dry else model.heads
    count, text = blocks(tokens, block), blocks(model.text, block)
    text = min(text, count // 2)
    keep = max(text + 1, round(density * count))
    scores = torch.rand(1, heads, count, count, device=env.device)
    scores[..., count - text :] = 2
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept.scatter_(-1, scores.topk(keep, -1).indices, True)
    kept[:, :, count - text :] = True
    return BlockMask(*compress(kept), tokens, tokens, block, block)


def _qkv(env: Env, model: Model, tokens: int) -> tuple[Tensor, ...]:
    """As models give them: ``[B, S, H, D]`` seen as ``[B, H, S, D]``."""
    heads = 2 if env.dry else model.heads
    shape = (1, tokens, heads, model.head_dim)
    return tuple(env.normal(*shape).transpose(1, 2) for _ in range(3))


def _tokens(env: Env, model: Model, block: int) -> int:
    return 3 * block if env.dry else (model.tokens + model.text) // block * block


def _problem(q: Tensor, mask: BlockMask, int8: bool, residual: int) -> SparseAttentionProblem:
    batch, heads, tokens, width = q.shape
    return SparseAttentionProblem(
        batch, heads, tokens, tokens, width, BF16, mask.density(), mask.block_q, mask.block_k, int8,
        residual,
    )  # fmt: skip


def _work(q: Tensor, mask: BlockMask) -> Work:
    problem = _problem(q, mask, False, 0)
    return Work(problem.scores * 4 * problem.width, f"dense{problem.width}")


def trial(env: Env, model: Model, density: float, block: int = 128) -> Trial:
    """bf16 at one density."""
    tokens = _tokens(env, model, block)
    q, k, v = _qkv(env, model, tokens)
    mask = random_mask(env, model, tokens, density, block)
    call, scale = route(SPARSE_ATTENTION, env), q.shape[-1] ** -0.5
    args = (q, k, v, mask.starts, mask.counts, mask.ids, scale, block, block)
    build = builder(env, model, q, k, density, block)
    notes: dict[str, str] = {}
    ours: dict[str, Call] = {
        AUTO: lambda: call(*args),
        PLAIN: routes.plain(lambda: call(*args)),
        WITH_MASK: lambda: call(q, k, v, *build(), scale, block, block),
    }

    def verify() -> None:
        with routes.watched() as watch:
            _verify_rows(checks.ran_poisoned(ours[AUTO]), q, k, v, mask)
        notes[AUTO] = watch.note
        _verify_rows(checks.ran_poisoned(ours[PLAIN]), q, k, v, mask)

    found = {
        "cudnn dense": Peer(lambda: peers.cudnn(q, k, v)),
        "flex, same mask": Peer(lambda: peers.flex(q, k, v, mask), bold=True),
    }
    if density == 1.0:
        found["flash-attention 2 dense"] = Peer(lambda: peers.flash2(q, k, v))
    if not env.dry and density in (0.25, 0.15):
        found["cudnn dense, mask included"] = Peer(lambda: peers.cudnn(q, k, v), WITH_MASK)
    cost = {AUTO: SPARSE_ATTENTION.cost(_problem(q, mask, False, 0))}
    return Trial(ours, found, _work(q, mask), verify, cost, notes)


def builder(env: Env, model: Model, q: Tensor, k: Tensor, density: float, block: int) -> Call:
    """Block means of queries and keys, scores and choice; the same number of blocks a row."""
    choose = route(BLOCK_MASK_TOPK, env)
    count = blocks(q.shape[2], block)
    text = min(blocks(model.text, block), count // 2)
    keep, scale = max(text + 1, round(density * count)), q.shape[-1] ** -0.5

    def build() -> Any:
        means = block_means(q, block), block_means(k, block)
        return choose(*means, scale, keep, 0.0, [0, text], [0, text], block, block)

    return build


def _verify_rows(
    found: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, added: Tensor | None = None
) -> None:
    """Some query rows of the first and last head, in float32."""
    checks.finite("attention", [found])
    rows = checks.sampled_rows(q.shape[2], 24).to(q.device)
    kept = mask.kept()
    for head in {0, q.shape[1] - 1}:
        own = kept[0, head % kept.shape[1], rows // mask.block_q]
        allowed = expand(own, 1, mask.block_k, rows.numel(), mask.keys)
        scores = q[0, head, rows].float() @ k[0, head].float().T * q.shape[-1] ** -0.5
        expected = scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v[0, head].float()
        if added is not None:
            expected = expected + added[0, head, rows]
        checks.close(f"head {head}", found[0, head, rows], expected)


def int8_trial(env: Env, model: Model, density: float, residual: bool = False) -> Trial:
    """int8 scores; with ``residual`` the int8 residual of the second-order cache is added."""
    tokens = _tokens(env, model, 128)
    q, k, v = _qkv(env, model, tokens)
    mask = random_mask(env, model, tokens, density, 128)
    (qc, qs), (kc, ks) = quantize_rows(q, 127, False), quantize_rows(k, 127, False)
    extra = quantize_rows(env.normal(*q.shape), 127, False) if residual else (None, None)
    at = (mask.starts, mask.counts, mask.ids, q.shape[-1] ** -0.5, 128, 128)
    call, wide = route(SPARSE_ATTENTION_INT8, env), route(SPARSE_ATTENTION, env)
    notes: dict[str, str] = {}
    ours: dict[str, Call] = {
        AUTO: lambda: call(qc, qs, kc, ks, v, *at, *extra),
        PLAIN: routes.plain(lambda: call(qc, qs, kc, ks, v, *at, *extra)),
    }
    dense_q, dense_k = (qc * qs), (kc * ks)
    added = None if extra[0] is None or extra[1] is None else extra[0] * extra[1]

    def verify() -> None:
        with routes.watched() as watch:
            _verify_rows(checks.ran_poisoned(ours[AUTO]), dense_q, dense_k, v, mask, added)
        notes[AUTO] = watch.note
        _verify_rows(checks.ran_poisoned(ours[PLAIN]), dense_q, dense_k, v, mask, added)

    found = {"vdqc bf16, same mask": Peer(lambda: lambda: wide(q, k, v, *at))}
    if residual:
        found["without residual"] = Peer(lambda: lambda: call(qc, qs, kc, ks, v, *at))
    elif density == 1.0:
        found["cudnn dense"] = Peer(lambda: peers.cudnn(q, k, v))
        found["sageattention dense"] = Peer(
            lambda: peers.sageattention(*(x.contiguous() for x in (q, k, v))), bold=True
        )
    cost = {AUTO: SPARSE_ATTENTION_INT8.cost(_problem(q, mask, True, int(residual)))}
    return Trial(ours, found, _work(q, mask), verify, cost, notes)


def mask_trial(env: Env, model: Model) -> Trial:
    """The builder beside its reference and beside the dense attention that it saves."""
    tokens = _tokens(env, model, 128)
    q, k, v = _qkv(env, model, tokens)
    build = builder(env, model, q, k, 0.15, 128)
    count = blocks(tokens, 128)
    text = min(blocks(model.text, 128), count // 2)
    keep = max(text + 1, round(0.15 * count))
    scale = q.shape[-1] ** -0.5

    def reference() -> Any:
        means = block_means(q, 128), block_means(k, 128)
        tail = (scale, keep, 0.0, [0, text], [0, text], 128, 128)
        return BLOCK_MASK_TOPK.reference(*means, *tail)

    def verify() -> None:
        found = checks.ran_poisoned(build)
        for name, one, other in zip(("starts", "counts"), found, reference(), strict=False):
            checks.same(name, one, other)

    moved = 2.0 * q.numel() * q.element_size()
    return Trial(
        {AUTO: build},
        {
            "eager reference": Peer(lambda: reference),
            "cudnn dense": Peer(lambda: peers.cudnn(q, k, v)),
        },
        Work(moved, "copy"),
        verify,
        {AUTO: Cost({}, moved)},
    )


#: Queries, keys, channels of a head, size of blocks.
SHAPES = [(1, 63, 64, 64), (300, 300, 128, 128), (257, 1000, 128, 128), (200, 260, 64, 128)]
DRY_SHAPES = [(70, 140, 64, 64)]


def check(env: Env, int8: bool) -> None:
    """Odd sizes, both widths of heads, rows without keys, a residual, padded text."""
    of = SPARSE_ATTENTION_INT8 if int8 else SPARSE_ATTENTION
    call = route(of, env)
    for index, (queries, keys, width, block) in enumerate(DRY_SHAPES if env.dry else SHAPES):
        q = env.normal(2, queries, 3, width).transpose(1, 2)
        k, v = (env.normal(2, keys, 3, width).transpose(1, 2) for _ in range(2))
        shape = (1, 3, blocks(queries, block), blocks(keys, block))
        kept = torch.rand(shape, device=env.device) < 0.6
        kept[0, 0, 0] = False
        mask = (*compress(kept), width**-0.5, block, block)
        extra: tuple[Tensor | None, ...] = (None, None, None)
        if index % 2 == 0:
            length = torch.tensor([keys, max(1, keys - 60)], dtype=torch.int32, device=env.device)
            extra = (*quantize_rows(env.normal(2, 3, queries, width), 127, False), length)
        head: tuple[Tensor, ...] = (q, k, v)
        if int8:
            head = (*quantize_rows(q, 127, False), *quantize_rows(k, 127, False), v)
        found = checks.ran_poisoned(call, *head, *mask, *extra)
        expected = of.reference(*head, *mask, *extra)
        checks.close(f"{of.name} {queries}x{keys}x{width}", found, expected)


def check_mask(env: Env) -> None:
    """The same blocks as the reference, by number and by probability."""
    call = route(BLOCK_MASK_TOPK, env)
    for rows in (5,) if env.dry else (1, 5, 80, 260, 929):
        means = env.normal(1, 2, rows, 64).float(), env.normal(1, 2, rows, 64).float()
        tail = (0.125, max(1, rows // 4), 0.0, [0, 0], [0, min(1, rows)], 128, 128)
        found = checks.ran_poisoned(call, *means, *tail)
        expected = BLOCK_MASK_TOPK.reference(*means, *tail)
        for name, one, other in zip(("starts", "counts", "ids"), found, expected, strict=True):
            checks.same(name, one, other)


def _name(model: Model, density: float) -> str:
    return f"{model.name}/density-{round(100 * density)}"


def _cases(int8: bool) -> tuple[Case, ...]:
    found = []
    models = (cases.HUNYUAN_33K, cases.COG_2B, cases.HUNYUAN_119K, cases.WAN_33K, cases.WAN_76K)
    for index, model in enumerate(models):
        for place, density in enumerate(DENSITIES):
            rank = 0 if index == 0 and place != 2 else (1 if index < 3 and place < 2 else 2)
            found.append(_case(model, density, int8, rank))
    return tuple(found)


def _case(model: Model, density: float, int8: bool, rank: int) -> Case:
    def build(env: Env) -> Trial:
        return int8_trial(env, model, density) if int8 else trial(env, model, density)

    return Case(_name(model, density), build, rank, f"{model.head_dim}")


def _small_blocks(model: Model) -> Case:
    name = f"{_name(model, 0.15)}/blocks-64"
    return Case(name, lambda env: trial(env, model, 0.15, 64), 1, "64x64")


def _residual(model: Model) -> Case:
    name = f"{_name(model, 0.15)}/residual"
    return Case(name, lambda env: int8_trial(env, model, 0.15, True), 1, "residual")


OPS: tuple[Op, ...] = (
    Op(
        "attention",
        lambda env: check(env, False),
        (*_cases(False), _small_blocks(cases.HUNYUAN_33K)),
    ),
    Op(
        "attention-int8",
        lambda env: check(env, True),
        (*_cases(True), _residual(cases.HUNYUAN_33K)),
    ),
    Op(
        "mask",
        check_mask,
        tuple(
            Case(model.name, lambda env, model=model: mask_trial(env, model), rank)  # type: ignore[misc]
            for model, rank in ((cases.HUNYUAN_33K, 0), (cases.HUNYUAN_119K, 1))
        ),
    ),
)
