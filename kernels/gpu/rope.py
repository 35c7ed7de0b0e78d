"""Norm, rotary embedding, codes and block sums of queries or keys, on a GPU.

A program takes some tokens of one sequence and goes over its heads: the table of angles is read
once, a norm across heads reads its tokens twice, the second time from L2. Both members of a pair
are in one thread, whichever channels they are. Sums of tokens are written per program, in a fixed
order; means of blocks are made of them by two small torch ops, nothing is atomic.

With smoothing there are two launches: one for the sums, whose total is the mean over tokens, one
for the codes.

Error: as ``vdqc.kernels.rope_quantize``.
Source: see ``vdqc.kernels.rope_quantize``.
"""

from dataclasses import dataclass
from typing import final

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.kernels.gpu.device import magnitude, symmetric_codes, symmetric_scale
from vdqc.kernels.gpu.operands import FLOATS, parameter
from vdqc.kernels.gpu.runtime import on_device, operand
from vdqc.kernels.gpu.steps import deviation
from vdqc.kernels.gpu.variants import Variant


@triton.jit
def _pair(
    x, base, known, HALF: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Both members of each pair, float32[ROWS, P]; ``base`` and ``known`` are [ROWS, 1]."""
    place = tl.arange(0, P)[None, :]
    if INTERLEAVED:
        channel = tl.arange(0, 2 * P)[None, :]
        both = tl.load(x + base + channel, mask=known & (channel < 2 * HALF), other=0.0)
        both = tl.reshape(both.to(tl.float32), (ROWS, P, 2))
        one, other = tl.split(both)
    else:
        real = known & (place < HALF)
        one = tl.load(x + base + place, mask=real, other=0.0).to(tl.float32)
        other = tl.load(x + base + HALF + place, mask=real, other=0.0).to(tl.float32)
    return one, other


@triton.jit
def _put(
    out, base, known, one, other, HALF: tl.constexpr, ROWS: tl.constexpr, P: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The inverse of ``_pair``, in the dtype of ``out``."""
    place = tl.arange(0, P)[None, :]
    one, other = one.to(out.dtype.element_ty), other.to(out.dtype.element_ty)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * P)[None, :]
        both = tl.reshape(tl.join(one, other), (ROWS, 2 * P))
        tl.store(out + base + channel, both, mask=known & (channel < 2 * HALF))
    else:
        real = known & (place < HALF)
        tl.store(out + base + place, one, mask=real)
        tl.store(out + base + HALF + place, other, mask=real)


@triton.jit
def _rope(  # noqa: C901 - decided at compilation
    x, weight, bias, cos, sin, mean, out, scales, sums,
    tokens, heads, group, tiles, start, turned, angle_batch,
    x_batch, x_token, x_head, eps,
    NORM: tl.constexpr, INTERLEAVED: tl.constexpr, CODES: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, P: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) % tiles
    first_head = (tl.program_id(0) // tiles) * group
    batch = tl.program_id(1).to(tl.int64)
    token = tile * TOKENS + tl.arange(0, TOKENS)[:, None]
    live = token < tokens
    place = tl.arange(0, P)[None, :]
    real = live & (place < HALF)
    always = tl.full((1, 1), True, tl.int1)
    at = batch * x_batch + token.to(tl.int64) * x_token
    last_head = tl.minimum(first_head + group, heads)
    if cos is not None:
        angle = token - start
        fits = (angle >= 0) & (angle < turned)
        if WHOLE:
            angle_at = batch * angle_batch + angle.to(tl.int64) * (2 * HALF)
            cosine, cosine_2 = _pair(cos, angle_at, fits, HALF, TOKENS, P, INTERLEAVED)
            sine, sine_2 = _pair(sin, angle_at, fits, HALF, TOKENS, P, INTERLEAVED)
            cosine, cosine_2 = tl.where(fits, cosine, 1.0), tl.where(fits, cosine_2, 1.0)
        else:
            fits = fits & (place < HALF)
            angle_at = batch * angle_batch + angle.to(tl.int64) * HALF + place
            cosine = tl.load(cos + angle_at, mask=fits, other=1.0).to(tl.float32)
            sine = tl.load(sin + angle_at, mask=fits, other=0.0).to(tl.float32)
    if NORM == "rms_across":
        squares = tl.zeros((TOKENS, 1), tl.float32)
        for every in range(0, heads):
            base = at + tl.cast(every, tl.int64) * x_head
            one, other = _pair(x, base, live, HALF, TOKENS, P, INTERLEAVED)
            squares += tl.sum(one * one + other * other, 1, keep_dims=True)
        across = deviation(squares, heads * 2 * HALF, eps)

    for index in range(first_head, last_head):
        head = tl.cast(index, tl.int64)
        one, other = _pair(x, at + head * x_head, live, HALF, TOKENS, P, INTERLEAVED)
        if NORM == "layer":
            middle = tl.div_rn(tl.sum(one + other, 1, keep_dims=True), 2.0 * HALF)
            one = tl.where(real, one - middle, 0.0)
            other = tl.where(real, other - middle, 0.0)
        if NORM == "rms_across":
            one, other = one * across, other * across
        elif NORM != "none":
            squares = tl.sum(one * one + other * other, 1, keep_dims=True)
            within = deviation(squares, 2 * HALF, eps)
            one, other = one * within, other * within
        of_head = head * (2 * HALF) if NORM == "rms_across" else 0
        if weight is not None:
            left, right = _pair(weight, of_head, always, HALF, 1, P, INTERLEAVED)
            one, other = one * left, other * right
        if bias is not None:
            left, right = _pair(bias, of_head, always, HALF, 1, P, INTERLEAVED)
            one, other = one + left, other + right
        if WHOLE:
            one, other = one * cosine - other * sine, other * cosine_2 + one * sine_2
        elif cos is not None:
            one, other = one * cosine - other * sine, other * cosine + one * sine
        one, other = tl.where(real, one, 0.0), tl.where(real, other, 0.0)

        row = batch * heads + head
        if sums is not None:
            sum_at = (row * tiles + tile) * (2 * HALF)
            left, right = tl.sum(one, 0, keep_dims=True), tl.sum(other, 0, keep_dims=True)
            _put(sums, sum_at, always, left, right, HALF, 1, P, INTERLEAVED)
        if mean is not None:
            left, right = _pair(mean, row * (2 * HALF), always, HALF, 1, P, INTERLEAVED)
            one, other = tl.where(real, one - left, 0.0), tl.where(real, other - right, 0.0)
        if out is not None:
            to = row * tokens + token
            if CODES:
                top = tl.maximum(magnitude(one), magnitude(other))
                step, inverse, finite = symmetric_scale(tl.max(top, 1, keep_dims=True), None, 127)
                tl.store(scales + to, step, mask=live)
                one = symmetric_codes(one, step, inverse, finite, None, 127)
                other = symmetric_codes(other, step, inverse, finite, None, 127)
            _put(out, to * (2 * HALF), live, one, other, HALF, TOKENS, P, INTERLEAVED)


@final
@dataclass(frozen=True, eq=False)
class Rope:
    """The steps, by the names of ``vdqc.kernels.rope_quantize``."""

    norm: str
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    cos: Tensor | None
    sin: Tensor | None
    start: int
    interleaved: bool


def takes(x: Tensor, block: int) -> bool:
    """True if the kernel takes these heads and blocks; else the reference serves."""
    fits = x.shape[3] <= 256 and x.shape[0] <= 65535  # samples are an axis of the grid
    return x.dtype in FLOATS and fits and block % 16 == 0 and x.numel() > 0


def quantised(x: Tensor, steps: Rope, smooth: bool, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """``rope_quantize`` on a GPU."""
    batch, tokens, heads, width = x.shape
    codes = torch.empty((batch, heads, tokens, width), dtype=torch.int8, device=x.device)
    scale = torch.empty((batch, heads, tokens, 1), dtype=torch.float32, device=x.device)
    tile = _tile(steps, block)
    sums = _empty_sums(x, tile)
    if smooth:
        _launch(x, steps, tile, sums=sums)
        _launch(x, steps, tile, out=codes, scales=scale, mean=sums.sum(2) / tokens)
    else:
        _launch(x, steps, tile, out=codes, scales=scale, sums=sums)
    return codes, scale, _block_means(sums, tile, tokens, block)


def rotated(x: Tensor, steps: Rope, block: int) -> tuple[Tensor, Tensor]:
    """``rope`` on a GPU."""
    batch, tokens, heads, width = x.shape
    out = torch.empty((batch, heads, tokens, width), dtype=x.dtype, device=x.device)
    tile = _tile(steps, block)
    sums = _empty_sums(x, tile)
    _launch(x, steps, tile, out=out, sums=sums)
    return out, _block_means(sums, tile, tokens, block)


def _tile(steps: Rope, block: int) -> int:
    """Tokens of a program; fewer where it comes back to them, so that L2 holds them till then."""
    return 16 if steps.norm == "rms_across" or block % 32 else 32


def _empty_sums(x: Tensor, tile: int) -> Tensor:
    batch, tokens, heads, width = x.shape
    shape = (batch, heads, triton.cdiv(tokens, tile), width)
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _block_means(sums: Tensor, tile: int, tokens: int, block: int) -> Tensor:
    """f32[B, H, blocks, D] from sums of every ``tile`` tokens."""
    per, count = block // tile, triton.cdiv(tokens, block)
    padded = torch.nn.functional.pad(sums, (0, 0, 0, count * per - sums.shape[2]))
    first = torch.arange(count, device=sums.device) * block
    sizes = (tokens - first).clamp_max(block).to(sums.dtype)
    return padded.unflatten(2, (count, per)).sum(3) / sizes[:, None]


def _launch(
    x: Tensor,
    steps: Rope,
    tile: int,
    *,
    out: Tensor | None = None,
    scales: Tensor | None = None,
    sums: Tensor | None = None,
    mean: Tensor | None = None,
) -> None:
    batch, tokens, heads, width = x.shape
    if x.stride(3) != 1:
        x = operand("x", x, FLOATS)
    half, device, across = width // 2, x.device, steps.norm == "rms_across"
    channels = [heads * width if across else width]
    cos = _angles("cos", steps.cos, x)
    # a norm across heads has read all of them; else a program takes some
    group = heads if across else min(heads, 8)
    tiles = triton.cdiv(tokens, tile)
    with on_device(x):
        _rope[(tiles * triton.cdiv(heads, group), batch)](
            x,
            parameter("weight", steps.weight, channels, device),
            parameter("bias", steps.bias, channels, device),
            cos,
            _angles("sin", steps.sin, x),
            mean,
            out,
            scales,
            sums,
            tokens,
            heads,
            group,
            tiles,
            steps.start,
            0 if cos is None else cos.shape[-2],
            0 if cos is None or cos.ndim == 2 else cos.stride(0),
            x.stride(0),
            x.stride(1),
            x.stride(2),
            steps.eps,
            NORM=steps.norm,
            INTERLEAVED=steps.interleaved,
            CODES=scales is not None,
            HALF=half,
            TOKENS=tile,
            P=triton.next_power_of_2(half),
            WHOLE=cos is not None and cos.shape[-1] == width,
            num_warps=_warps(tile, half),
            enable_fp_fusion=False,
        )


def _warps(tile: int, half: int) -> int:
    """About 16 values a thread."""
    return 8 if tile * half >= 2048 else 4


def _angles(name: str, table: Tensor | None, x: Tensor) -> Tensor | None:
    if table is None:
        return None
    shape = [None, x.shape[3] if table.shape[-1] == x.shape[3] else x.shape[3] // 2]
    if table.ndim == 3:
        shape = [x.shape[0], *shape]
    return parameter(name, table, shape, x.device)


def _variant(
    name: str, width: int, norm: str, interleaved: bool, smooth: str = "", whole: bool = False
) -> Variant:
    """One launch: all at once, or one of the two that smoothing takes."""
    types = {
        "x": "*bf16", "weight": "*bf16", "cos": "*fp32", "sin": "*fp32", "out": "*i8",
        "scales": "*fp32", "sums": "*fp32", "mean": "*fp32", "tokens": "i32", "heads": "i32",
        "group": "i32", "tiles": "i32", "turned": "i32", "x_batch": "i32", "x_token": "i32",
        "x_head": "i32", "eps": "fp32",
    }  # fmt: skip
    absent = {"sums": ("out", "scales", "mean"), "codes": ("sums",)}.get(smooth, ("mean",))
    tile = _tile(Rope(norm, None, None, 0.0, None, None, 0, interleaved), 128)
    values = {
        "bias": None, "start": 0, "angle_batch": 0, "NORM": norm, "INTERLEAVED": interleaved,
        "CODES": smooth != "sums", "HALF": width // 2, "TOKENS": tile, "P": width // 2,
        "WHOLE": whole,
        **dict.fromkeys(absent),
    }  # fmt: skip
    return Variant(
        f"rope/{name}",
        _rope,
        {key: kind for key, kind in types.items() if key not in absent},
        values,
        {"num_warps": _warps(tile, width // 2), "num_stages": 2, "enable_fp_fusion": False},
        aligned=("x_batch", "x_token", "x_head"),
    )


VARIANTS = [
    _variant("64-layer-pairs", 64, "layer", True),
    _variant("128-rms-pairs", 128, "rms", True),
    _variant("128-rms-halves", 128, "rms", False),
    _variant("128-across-halves", 128, "rms_across", False),
    _variant("128-across-pairs-sums", 128, "rms_across", True, "sums"),
    _variant("128-across-pairs-codes", 128, "rms_across", True, "codes"),
    _variant("128-rms-pairs-whole", 128, "rms", True, whole=True),
    _variant("128-across-halves-whole", 128, "rms_across", False, whole=True),
]
