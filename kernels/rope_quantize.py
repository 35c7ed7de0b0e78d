"""Queries and keys from their projection to attention: norm, rotary embedding, codes, block means.

============== ========================= ==========================================================
x              float[B, T, H, D]         may be strided, such as a third of a joint projection
norm           none, rms, layer          over D, weight and bias [D]; ``rms_across``: over all
                                         heads, weight [H D]
cos, sin       None, float[R, D/2]       or [B, R, D/2]; pair i of the tokens start ... start + R is
                                         turned, the other tokens (text) are not; D in place of
                                         D/2: each channel has factors of its own
interleaved    bool                      pairs are channels 2i, 2i + 1; else i, i + D/2
smooth         bool                      subtract the mean over tokens; of keys, softmax does not
                                         see it
block          int                       tokens of a block of means
-> codes       i8[B, H, T, D]            ``rope_quantize``, symmetric
-> scale       f32[B, H, T, 1]           of a token of a head
-> out         dtype[B, H, T, D]         ``rope``: the values themselves, rounded once
-> means       f32[B, H, ceil(T/block), D]  of the values (before smoothing), for the mask builder
============== ========================= ==========================================================

Everything is float32 inside. A token with a NaN or an infinity has a scale that is one and codes 0;
with ``smooth`` so has every token of that head, as attention to such a key is NaN in float.

Error: means and norms sum in an order of their own; codes are exactly those of the values before
them (equal bit for bit with neither norm nor smoothing), else as ``fused_quantize``.
Source: Su et al., RoFormer, arXiv 2104.09864, eq. 34; Zhang et al., SageAttention, arXiv
2410.02367, section 4.2 (smoothed K); Zhang et al., SpargeAttn, arXiv 2502.18137, section 3.3 (means
of blocks).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.block_mask import block_means, blocks
from vdqc.base.diagnostics import InputError
from vdqc.base.target import Target
from vdqc.kernels.base import Cost, define
from vdqc.kernels.prologue import wide
from vdqc.kernels.quantize_rows import quantize_rows

NORMS = ("none", "rms", "layer", "rms_across")


@final
@dataclass(frozen=True)
class RopeProblem:
    """Heads to prepare for attention.

    Attributes:
        codes: int8 out; else the dtype of the model.
        smooth: the mean over tokens is subtracted, which reads the input twice.
    """

    batch: int
    tokens: int
    heads: int
    width: int
    dtype: torch.dtype
    codes: bool = True
    smooth: bool = False


def rope_quantize(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    interleaved: bool,
    smooth: bool,
    block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, means): the truth; see the module's text."""
    value = _value(x, norm, weight, bias, eps, cos, sin, start, interleaved)
    means = block_means(value, block)
    if smooth:
        value = value - value.mean(-2, keepdim=True)
    return *quantize_rows(value, 127, False), means


def rope(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    interleaved: bool,
    block: int,
) -> tuple[Tensor, Tensor]:
    """(out, means): the truth; see the module's text."""
    value = _value(x, norm, weight, bias, eps, cos, sin, start, interleaved)
    return value.to(x.dtype), block_means(value, block)


def _value(
    x: Tensor,
    norm: str,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    start: int,
    interleaved: bool,
) -> Tensor:
    """float32[B, H, T, D] (float64 for a float64 input), contiguous."""
    _check(x, norm, cos, sin, start)
    value = _normed(wide(x), norm, weight, bias, eps)
    if cos is not None and sin is not None:
        rotated = cos.shape[-2]
        turned = _turned(value[:, start : start + rotated], wide(cos), wide(sin), interleaved)
        if rotated < x.shape[1]:
            turned = torch.cat((value[:, :start], turned, value[:, start + rotated :]), 1)
        value = turned
    return value.transpose(1, 2).contiguous()


def _check(x: Tensor, norm: str, cos: Tensor | None, sin: Tensor | None, start: int) -> None:
    if x.ndim != 4 or x.shape[3] % 2:
        raise InputError(f"x: expected [B, T, H, D] with an even D, got {list(x.shape)}")
    if norm not in NORMS:
        raise InputError(f"expected a norm of {', '.join(NORMS)}, got '{norm}'")
    if cos is None or sin is None:
        if cos is not sin:
            raise InputError("expected both cos and sin, or neither")
        return
    half, width = x.shape[3] // 2, x.shape[3]
    if cos.shape != sin.shape or cos.shape[-1] not in (half, width):
        raise InputError(
            f"cos, sin: expected [.., {half}] or [.., {width}] alike, got {list(cos.shape)} and "
            f"{list(sin.shape)}"
        )
    if not 0 <= start <= x.shape[1] - cos.shape[-2]:
        raise InputError(
            f"expected the {cos.shape[-2]} tokens from {start} on to be among {x.shape[1]}"
        )


def _normed(
    value: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = value.shape
    if norm == "rms_across":
        value = value.flatten(2)
    if norm == "layer":
        value = value - value.mean(-1, keepdim=True)
    if norm != "none":
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * wide(weight)
    if bias is not None:
        value = value + wide(bias)
    return value.reshape(shape)


def _turned(value: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    def members(row: Tensor) -> tuple[Tensor, Tensor]:
        if row.shape[-1] < value.shape[-1]:
            return row, row
        if interleaved:
            one, other = row.unflatten(-1, (-1, 2)).unbind(-1)
        else:
            one, other = row.chunk(2, -1)
        return one, other

    (one, other), cosines, sines = map(members, (value, cos.unsqueeze(-2), sin.unsqueeze(-2)))
    first = one * cosines[0] - other * sines[0]
    second = other * cosines[1] + one * sines[1]
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


def _fake_means(x: Tensor, block: int) -> Tensor:
    batch, tokens, heads, width = x.shape
    return x.new_empty([batch, heads, blocks(tokens, block), width], dtype=torch.float32)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, heads, width = x.shape
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    codes = x.new_empty([batch, heads, tokens, width], dtype=torch.int8)
    return codes, x.new_empty([batch, heads, tokens, 1], dtype=kind), _fake_means(x, rest[-1])


def _fake_rope(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, width = x.shape
    return x.new_empty([batch, heads, tokens, width]), _fake_means(x, rest[-1])


def _cuda(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    from vdqc.kernels.gpu.rope import Rope, quantised, takes

    *steps, smooth, block = rest
    _check(x, steps[0], steps[4], steps[5], steps[6])
    if not takes(x, block):
        return rope_quantize(x, *rest)
    return quantised(x, Rope(*steps), smooth, block)


def _cuda_rope(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    from vdqc.kernels.gpu.rope import Rope, rotated, takes

    *steps, block = rest
    _check(x, steps[0], steps[4], steps[5], steps[6])
    if not takes(x, block):
        return rope(x, *rest)
    return rotated(x, Rope(*steps), block)


def _supports(problem: RopeProblem, target: Target) -> str | None:
    if problem.width % 2 or not 2 <= problem.width <= 256:
        return f"heads of {problem.width} channels, not an even number up to 256"
    if problem.dtype == torch.float64 and target.device != "cpu":
        return "float64 has no kernel"
    return None


def _cost(problem: RopeProblem) -> Cost:
    size = problem.dtype.itemsize
    values = float(problem.batch * problem.tokens * problem.heads * problem.width)
    moved = size * (2 if problem.smooth else 1) + (1 if problem.codes else size)
    tables = problem.tokens * problem.width * 4.0
    return Cost({}, values * moved + tables + values / problem.width * 4)


ROPE_QUANTIZE = define(
    "rope_quantize",
    reference=rope_quantize,
    fake=_fake,
    cuda=_cuda,
    supports=_supports,
    cost=_cost,
    spelled={"cpu": rope_quantize},
)
ROPE = define(
    "rope",
    reference=rope,
    fake=_fake_rope,
    cuda=_cuda_rope,
    supports=_supports,
    cost=_cost,
    spelled={"cpu": rope},
)
