"""Wan and HunyuanVideo blocks in plain torch: the same code over bf16 and over quantised kernels.

Written from the published architectures, because the GPU's machine has no diffusers: shapes, norms,
modulation, rotary embedding, residuals and the order of operations are those of the real blocks;
weights are random, batches hold one sample. A block is a module whose ``Site``s hold the weights,
called with an ``Engine``:

============ =================================================================================
Float        LayerNorm, linear, GELU, RoPE, SDPA (cuDNN): torch.compile fuses what it can
Quantised    ``fused_quantize`` -> codes shared by the linears that read them -> ``int8_linear`` or
             ``packed_linear`` with bias, GELU, gate and residual in the epilogue; ``rope`` with the
             norm of queries and keys; block-sparse or dense attention
============ =================================================================================

The calls are placed by hand where lowering can place them, so this measures kernels in a block;
``lowered`` measures the compiler. Embedders and the final layer of a model, under 1 % of its time,
are left out. A mask is built in every call that uses one.

Source: diffusers' ``transformer_wan.py`` and ``transformer_hunyuan_video.py`` for the structure;
Peebles and Xie, DiT, arXiv 2212.09748.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.cases import Model
from vdqc.base.block_mask import block_means, blocks
from vdqc.base.packing import pack
from vdqc.kernels.attention import ATTENTION
from vdqc.kernels.block_mask import BLOCK_MASK_TOPK
from vdqc.kernels.fused_quantize import FUSED_QUANTIZE
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, quantize_rows
from vdqc.kernels.rope_quantize import ROPE
from vdqc.kernels.sparse_attention import SPARSE_ATTENTION

BF16 = torch.bfloat16


class Site(nn.Module):
    """One linear: ``weight``, ``bias`` and, if quantised, ``scale`` (bits 8 or 4, else 16)."""

    def __init__(self, width_in: int, width_out: int, bits: int, device: str) -> None:
        super().__init__()
        self.bits = bits
        weight = torch.randn(width_out, width_in, device=device) * width_in**-0.5
        bias = torch.randn(width_out, device=device) * 0.02
        self.bias = nn.Parameter(bias.to(BF16), requires_grad=False)
        if bits == 16:
            self.weight = nn.Parameter(weight.to(BF16), requires_grad=False)
            return
        codes, scale = quantize_rows(weight.to(BF16), 2 ** (bits - 1) - 1, False)
        self.weight = nn.Parameter(pack(codes, 4) if bits == 4 else codes, requires_grad=False)
        self.register_buffer("scale", scale.squeeze(-1))


class Engine(Protocol):
    """What a block asks for; ``rows`` is what ``enter`` gave and linears read."""

    def enter(
        self,
        x: Tensor,
        norm: str = "none",
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Any:
        """Norm and modulation, ready to be multiplied."""
        ...

    def linear(
        self,
        rows: Any,
        site: Site,
        gelu: bool = False,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``residual + gate * gelu(rows weightᵀ + bias)``."""
        ...

    def turn(
        self, x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, across: bool = False
    ) -> Tensor:
        """Norm and rotary embedding of queries or keys: ``[B, S, H, D] -> [B, H, S, D]``."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
        """Self attention of ``[B, H, S, D]``; the last ``text`` tokens are text."""
        ...

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention to a few text tokens, never sparse."""
        ...


@final
@dataclass(frozen=True)
class Float:
    """bf16 through torch."""

    def enter(
        self, x: Tensor, norm: str = "none", scale: Tensor | None = None,
        shift: Tensor | None = None, weight: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """See ``Engine``."""
        if norm == "layer":
            x = functional.layer_norm(x.float(), x.shape[-1:], weight, None, 1e-6).to(x.dtype)
        if scale is not None and shift is not None:
            x = x * (1 + scale) + shift
        return x

    def linear(
        self, rows: Any, site: Site, gelu: bool = False, gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See ``Engine``."""
        y = functional.linear(rows, site.weight, site.bias)
        y = functional.gelu(y, approximate="tanh") if gelu else y
        y = y if gate is None else y * gate
        return y if residual is None else residual + y

    def turn(
        self, x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, across: bool = False
    ) -> Tensor:
        """See ``Engine``."""
        x = rms(x.flatten(-2), gain).unflatten(-1, x.shape[-2:]) if across else rms(x, gain)
        x = x if cos is None or sin is None else rotate(x, cos, sin)
        return x.transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
        """See ``Engine``."""
        return functional.scaled_dot_product_attention(q, k, v)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Engine``."""
        return functional.scaled_dot_product_attention(q, k, v)


@final
@dataclass(frozen=True)
class Quantised:
    """Kernels of ours; ``density`` 1 is dense attention."""

    density: float = 1.0

    def enter(
        self, x: Tensor, norm: str = "none", scale: Tensor | None = None,
        shift: Tensor | None = None, weight: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """See ``Engine``."""
        if norm == "none" and scale is None:
            return QUANTIZE_ROWS.op(x, 127, False)
        steps = (norm, weight, None, 1e-6, scale, shift, "none", None, None, 0)
        return FUSED_QUANTIZE.op(x, *steps, None, 8, False)[:2]

    def linear(
        self, rows: Any, site: Site, gelu: bool = False, gate: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See ``Engine``."""
        end = (None, "gelu_tanh" if gelu else "none", gate, residual)
        tail = (site.scale, None, None, site.bias, BF16, *end)
        if site.bits == 8:
            return INT8_LINEAR.op(*rows, None, site.weight, *tail)
        return PACKED_LINEAR.op(*rows, None, site.weight, site.bits, None, *tail)

    def turn(
        self, x: Tensor, gain: Tensor, cos: Tensor | None, sin: Tensor | None, across: bool = False
    ) -> Tensor:
        """See ``Engine``."""
        norm = "rms_across" if across else "rms"
        found: Tensor = ROPE.op(x, norm, gain, None, 1e-6, cos, sin, 0, True, 128)[0]
        return found

    @torch._dynamo.disable  # a graph break costs microseconds, a compilation per density much more
    def attend(self, q: Tensor, k: Tensor, v: Tensor, text: int) -> Tensor:
        """See ``Engine``."""
        if self.density >= 1:
            return ATTENTION.op(q, k, v, None, q.shape[-1] ** -0.5)
        scale, count = q.shape[-1] ** -0.5, blocks(q.shape[2], 128)
        # every block that holds a text token; the ragged last block may begin with video
        tail = count - (q.shape[2] - text) // 128 if text else 0
        keep = max(tail + 1, round(self.density * count))
        means = block_means(q, 128), block_means(k, 128)
        mask = BLOCK_MASK_TOPK.op(*means, scale, keep, 0.0, [0, tail], [0, tail], 128, 128)
        return SPARSE_ATTENTION.op(q, k, v, *mask, scale, 128, 128)

    def cross(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See ``Engine``."""
        return ATTENTION.op(q, k, v, None, q.shape[-1] ** -0.5)


def heads(x: Tensor, width: int) -> Tensor:
    """``[B, S, H D] -> [B, S, H, D]``."""
    return x.unflatten(-1, (-1, width))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    """Over the last axis, in float32."""
    return functional.rms_norm(x.float(), x.shape[-1:], weight.float(), 1e-6).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the first tokens of ``[B, S, H, D]``; ``cos, sin [S', D / 2]``."""
    turned = x[:, : cos.shape[0]].float().unflatten(-1, (-1, 2))
    even, odd = turned.unbind(-1)
    c, s = cos[:, None], sin[:, None]
    pairs = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2).to(x.dtype)
    return pairs if cos.shape[0] == x.shape[1] else torch.cat((pairs, x[:, cos.shape[0] :]), 1)


def merged(out: Tensor) -> Tensor:
    """``[B, H, S, D] -> [B, S, H D]``."""
    return out.transpose(1, 2).flatten(2)


class WanBlock(nn.Module):
    """Self attention, cross attention to text, feed-forward."""

    def __init__(self, model: Model, bits: int, device: str) -> None:
        super().__init__()
        d, self.head = model.width, model.head_dim

        def site(a: int, b: int) -> Site:
            return Site(a, b, bits, device)

        self.q, self.k, self.v, self.out = (site(d, d) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_out = (site(d, d) for _ in range(4))
        self.up, self.down = site(d, model.ffn), site(model.ffn, d)
        self.table = _vectors(6, d, device=device)
        self.gains = _vectors(5, d, device=device, around=1.0)

    def forward(
        self, engine: Engine, x: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x [B, S, D], text [B, T, D], time [B, 6, D]``."""
        shift, scale, gate, shift2, scale2, gate2 = (self.table + time).chunk(6, 1)
        rows = engine.enter(x, "layer", scale, shift)
        q, k = (heads(engine.linear(rows, site), self.head) for site in (self.q, self.k))
        q = engine.turn(q, self.gains[0], cos, sin, across=True)
        k = engine.turn(k, self.gains[1], cos, sin, across=True)
        v = heads(engine.linear(rows, self.v), self.head).transpose(1, 2)
        found = engine.enter(merged(engine.attend(q, k, v, 0)))
        x = engine.linear(found, self.out, gate=gate, residual=x)
        rows, words = engine.enter(x, "layer", weight=self.gains[2].float()), engine.enter(text)
        q = heads(engine.linear(rows, self.cross_q), self.head)
        k = heads(engine.linear(words, self.cross_k), self.head)
        q = engine.turn(q, self.gains[3], None, None, across=True)
        k = engine.turn(k, self.gains[4], None, None, across=True)
        v = heads(engine.linear(words, self.cross_v), self.head).transpose(1, 2)
        found = engine.cross(q, k, v)
        x = engine.linear(engine.enter(merged(found)), self.cross_out, residual=x)
        rows = engine.enter(x, "layer", scale2, shift2)
        inner = engine.enter(engine.linear(rows, self.up, gelu=True))
        return engine.linear(inner, self.down, gate=gate2, residual=x), text


class DoubleBlock(nn.Module):
    """HunyuanVideo: video and text with weights of their own, one attention over both."""

    def __init__(self, model: Model, bits: int, device: str) -> None:
        super().__init__()
        d, self.head = model.width, model.head_dim
        self.streams = nn.ModuleList()
        for _ in range(2):
            sites = {name: Site(d, d, bits, device) for name in ("q", "k", "v", "out")}
            sites |= {"up": Site(d, model.ffn, bits, device)}
            sites |= {"down": Site(model.ffn, d, bits, device)}
            stream = nn.ModuleDict(sites)
            stream.table = _vectors(6, d, device=device)
            stream.gains = _vectors(2, self.head, device=device, around=1.0)
            self.streams.append(stream)

    def forward(
        self, engine: Engine, x: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x [B, S, D], text [B, T, D], time [B, 6, D]``."""
        parts: list[tuple[Tensor, ...]] = []
        chunks = []
        for stream, value in zip(self.streams, (x, text), strict=True):
            site: Any = stream
            shift, scale, *rest = (site.table + time).chunk(6, 1)
            rows = engine.enter(value, "layer", scale, shift)
            q, k, v = (heads(engine.linear(rows, site[name]), self.head) for name in "qkv")
            at = (cos, sin) if value is x else (None, None)
            q = engine.turn(q, site.gains[0], *at)
            k = engine.turn(k, site.gains[1], *at)
            parts.append((q, k, v.transpose(1, 2)))
            chunks.append(rest)
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts, strict=True))
        found = merged(engine.attend(q, k, v, text.shape[1])).split([x.shape[1], text.shape[1]], 1)
        out = []
        for index, value in enumerate((x, text)):
            site, (gate, shift2, scale2, gate2) = self.streams[index], chunks[index]
            rows = engine.enter(found[index].contiguous())
            value = engine.linear(rows, site["out"], gate=gate, residual=value)
            rows = engine.enter(value, "layer", scale2, shift2)
            inner = engine.enter(engine.linear(rows, site["up"], gelu=True))
            out.append(engine.linear(inner, site["down"], gate=gate2, residual=value))
        return out[0], out[1]


class SingleBlock(nn.Module):
    """HunyuanVideo: video and text as one sequence, attention and feed-forward side by side."""

    def __init__(self, model: Model, bits: int, device: str) -> None:
        super().__init__()
        d, f, self.head = model.width, model.ffn, model.head_dim
        self.q, self.k, self.v = (Site(d, d, bits, device) for _ in range(3))
        self.up, self.out = Site(d, f, bits, device), Site(d + f, d, bits, device)
        self.table = _vectors(3, d, device=device)
        self.gains = _vectors(2, self.head, device=device, around=1.0)

    def forward(
        self, engine: Engine, x: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``x [B, S, D], text [B, T, D], time [B, 6, D]``."""
        both = torch.cat((x, text), 1)
        shift, scale, gate = (self.table + time[:, :3]).chunk(3, 1)
        rows = engine.enter(both, "layer", scale, shift)
        q, k, v = (heads(engine.linear(rows, s), self.head) for s in (self.q, self.k, self.v))
        q = engine.turn(q, self.gains[0], cos, sin)
        k = engine.turn(k, self.gains[1], cos, sin)
        found = merged(engine.attend(q, k, v.transpose(1, 2), text.shape[1]))
        inner = torch.cat((found, engine.linear(rows, self.up, gelu=True)), -1)
        both = engine.linear(engine.enter(inner), self.out, gate=gate, residual=both)
        # not both[:, :n]: its first stride would be another, and the next block compiled anew
        return both[0, : x.shape[1]][None], both[0, x.shape[1] :][None]


class Stack(nn.Module):
    """Blocks after each other, each compiled: equal blocks share one compilation."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, engine: Engine, x: Tensor, text: Tensor, *rest: Tensor) -> Tensor:
        """The video tokens."""
        for part in self.parts:
            x, text = part(engine, x, text, *rest)
        return x

    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(t.nbytes for t in [*self.parameters(), *self.buffers()])


def _vectors(count: int, width: int, device: str, around: float = 0.0) -> nn.Parameter:
    value = around + 0.1 * torch.randn(count, width, device=device)
    return nn.Parameter(value.to(BF16), requires_grad=False)


def stack(model: Model, share: float, bits: int, device: str, seed: int) -> Stack:
    """``share`` of the model's blocks (1: all; of HunyuanVideo a third are double) with weights
    from ``seed``: the same before quantisation whatever ``bits`` is.
    """
    count = max(1, round(model.layers * share))
    kinds: list[Any] = [WanBlock] * count
    if model.name.startswith("hunyuan"):
        kinds = [DoubleBlock] * max(1, count // 3) + [SingleBlock] * max(1, count - count // 3)
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(seed)
        return Stack([kind(model, bits, device) for kind in kinds]).eval()
