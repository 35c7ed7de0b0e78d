"""The block mask builder on Triton: one program ranks, cuts and writes one row of scores.

The n-th largest score is found by bisection over the 32 bits of a key that orders like the score;
blocks above it are kept, blocks equal to it in order of place until n are kept. Ids come out
ascending by a running sum, so nothing is sorted.

Error: as in ``vdqc.kernels.block_mask``.
Source: ours.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.kernels.gpu.runtime import on_device, operand
from vdqc.kernels.gpu.variants import Variant

#: A row must fit the registers of one program.
MAX_COLUMNS = 4096


@triton.jit
def _largest_with(weight, key, wanted):
    """The greatest threshold t with sum(weight[key >= t]) >= wanted (the least key if none)."""
    low = tl.full([], -2147483648, tl.int64)  # always enough
    high = tl.full([], 2147483648, tl.int64)  # never enough
    for _ in range(32):
        middle = (low + high) >> 1
        enough = tl.sum(tl.where(key >= middle, weight, 0.0), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low


@triton.jit
def choose_row(
    scores, starts, counts, ids, rows, columns, keep, mass, lead, tail, lead_keys, tail_keys,
    block_q, block_k, width, MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of one head; text rows share the ids 0 ... columns - 1 at the front."""
    program = tl.program_id(0)
    head, row = program // rows, program % rows
    place = tl.arange(0, BLOCK)
    inside = place < columns
    if program == 0:
        tl.store(ids + place, place, mask=inside)
    if (row < lead) | (row >= rows - tail):
        tl.store(starts + program, 0)
        tl.store(counts + program, columns)
        return
    score = tl.load(scores + program.to(tl.int64) * columns + place, mask=inside, other=0.0)
    always = (place < lead_keys) | (place >= columns - tail_keys)
    if block_k > 0:
        first = row * block_q // block_k
        last = ((row + 1) * block_q - 1) // block_k
        always = always | ((place >= first) & (place <= last))
    always = always & inside
    free = inside & (always == 0)
    score = score + 0.0  # -0 and 0 are equal
    bits = score.to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    key = tl.where(free, key, -2147483649)  # below every threshold
    sure = tl.sum(always.to(tl.int32), 0)
    more = tl.maximum(tl.minimum(keep, columns) - sure, 0)
    if MASS:
        top = tl.max(tl.where(inside, score, float("-inf")), 0)
        p = tl.where(inside, tl.exp(score - top), 0.0)
        left = mass * tl.sum(p, 0) - tl.sum(tl.where(always, p, 0.0), 0)
        limit = _largest_with(tl.where(free, p, 0.0), key, left)
        above = tl.sum(tl.where(key > limit, p, 0.0), 0)
        equal = tl.max(tl.where(key == limit, p, 0.0), 0)
        ties = tl.where(equal > 0, tl.ceil((left - above) / equal), 0.0).to(tl.int32)
        ties = tl.minimum(ties, tl.sum((key == limit).to(tl.int32), 0))
        needed = tl.sum((key > limit).to(tl.int32), 0) + tl.maximum(ties, 0)
        more = tl.maximum(more, tl.where(left > 0, needed, 0))
    limit = _largest_with(tl.where(free, 1.0, 0.0), key, more.to(tl.float32))
    over = key > limit
    equal = (key == limit) & free
    room = more - tl.sum(over.to(tl.int32), 0)
    equal = equal & (tl.cumsum(equal.to(tl.int32), 0) <= room)
    kept = always | over | equal
    count = tl.sum(kept.to(tl.int32), 0)
    start = columns + (head * (rows - lead - tail) + row - lead) * width
    tl.store(starts + program, start)
    tl.store(counts + program, count)
    tl.store(ids + start + tl.cumsum(kept.to(tl.int32), 0) - 1, place, mask=kept)
    tl.store(ids + start + place, 0, mask=(place >= count) & (place < width))


def chosen(
    scores: Tensor,
    width: int,
    keep: int,
    mass: float,
    text_rows: list[int],
    always_keys: list[int],
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``vdqc_kernels::block_mask_topk`` from its scores f32[B, H, R, C]."""
    batch, heads, rows, columns = scores.shape
    scores = operand("scores", scores, torch.float32)
    starts = torch.empty(batch, heads, rows, dtype=torch.int32, device=scores.device)
    counts = torch.empty_like(starts)
    inner = rows - sum(text_rows)
    room = columns + batch * heads * inner * width
    ids = torch.empty(room, dtype=torch.int32, device=scores.device)
    if starts.numel() == 0:
        return starts, counts, torch.arange(columns, dtype=torch.int32, device=scores.device)
    block = max(triton.next_power_of_2(columns), 16)
    with on_device(scores):
        choose_row[(starts.numel(),)](
            scores,
            starts,
            counts,
            ids,
            rows,
            columns,
            keep,
            mass,
            *text_rows,
            *always_keys,
            block_q,
            block_k,
            width,
            MASS=mass > 0,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return starts, counts, ids


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 8)


def _variant(mass: bool, block: int) -> Variant:
    signature: dict[str, Any] = {
        name: "i32" for name in choose_row.arg_names if name not in ("MASS", "BLOCK")
    }
    signature |= dict.fromkeys(("starts", "counts", "ids"), "*i32")
    signature |= {"scores": "*fp32", "mass": "fp32"}
    return Variant(
        f"block_mask/{'mass' if mass else 'keep'}-{block}",
        choose_row,
        signature,
        {"MASS": mass, "BLOCK": block},
        {"num_warps": _warps(block), "num_stages": 1},
    )


#: 118.8k tokens are 929 blocks of 128.
VARIANTS = [_variant(False, 1024), _variant(True, 1024), _variant(True, MAX_COLUMNS)]
