"""How block-sparse attention is launched: operands, tiles, descriptors; its offline variants.

Programs go head by head, so that the keys and values of one head stay in L2, and within a head
longest row first, so that no long row (text queries) is left to run alone at the end. Operands may
be strided (``[B, S, H, D]`` seen as ``[B, H, S, D]``) and are then not copied.

Error: that of the kernels, ``attention_tiles``.
Source: ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import triton
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.kernels.gpu.attention_tiles import plain, specialised
from vdqc.kernels.gpu.guard import agrees, guarded
from vdqc.kernels.gpu.launch_config import Config, best_config
from vdqc.kernels.gpu.runtime import ARCHS, arch_of, on_device, operand, triton_version
from vdqc.kernels.gpu.variants import BF16_MMA, INT8_MMA, Variant

_LOG2_E = 1.4426950408889634
_FLOATS = (torch.bfloat16, torch.float16)
_WIDTHS = (16, 32, 64, 128)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    counts: Tensor,
    ids: Tensor,
    scale: float,
    block_q: int,
    block_k: int,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    key_length: Tensor | None = None,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    config: Config | None = None,
    sort: bool = True,
) -> Tensor:
    """``vdqc_kernels::sparse_attention``; with q_scale and k_scale its int8 sibling.

    ``config`` and ``sort`` (longest row first) are for tests and tuning.
    """
    if not scale > 0:
        raise InputError(f"expected a positive scale, got {scale}", code="operand")
    width, device, int8 = query.shape[3], query.device, q_scale is not None
    _check(width, value.shape[3], block_q, block_k)
    q = _strided("query", query, (torch.int8,) if int8 else _FLOATS)
    i32, f32 = torch.int32, torch.float32
    call = _Operands(
        q,
        _strided("key", key, (q.dtype,)),
        _strided("value", value, _FLOATS if int8 else (q.dtype,)),
        _given("q_scale", q_scale, f32),
        _given("k_scale", k_scale, f32),
        operand("starts", starts, i32, device=device),
        operand("counts", counts, i32, device=device),
        operand("ids", ids, i32, device=device),
        _given("residual", residual, (*_FLOATS, f32, torch.int8)),
        _given("residual_scale", residual_scale, f32),
        _given("key_length", key_length, i32),
        scale * _LOG2_E,
        block_q,
        block_k,
        sort,
    )
    if query.numel() == 0:
        return call.output()
    arch = arch_of(device)
    config = config or configuration(arch, width, 8 if int8 else 16, device.index)
    with on_device(query):
        if config.variant != "ws" or not _fits_specialised(call, config):
            return _plain(call, config)
        parts = ["int8" if int8 else "bf16", str(width), f"n{config.block_n}"]
        parts += ["residual"] * (residual is not None)
        parts += ["masked"] * call.masked(config.block_n)
        return guarded(
            f"sparse_attention/ws-{'-'.join(parts)}",
            lambda: _specialised(call, config),
            lambda: _plain(call, _SAFE),
            agrees,
        )


def _check(width: int, out_width: int, block_q: int, block_k: int) -> None:
    if width not in _WIDTHS or out_width not in _WIDTHS:
        raise InputError(f"expected heads of {_WIDTHS} channels, got {width} and {out_width}")
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if size not in (16, 32, 64, 128):
            raise InputError(f"expected a {name} of 16, 32, 64 or 128, got {size}", code="operand")


def _given(
    name: str, x: Tensor | None, dtypes: torch.dtype | tuple[torch.dtype, ...]
) -> Tensor | None:
    return None if x is None else operand(name, x, dtypes)


def _strided(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """``x``, copied unless descriptors take it: its channels are neighbours, its rows begin at 16
    bytes, and none repeats.
    """
    if x.stride(-1) == 1 and _steps_fit(x) and x.data_ptr() % 16 == 0 and x.dtype in dtypes:
        return x
    x = operand(name, x, dtypes)
    # an axis of one keeps any step through contiguous()
    return x if _steps_fit(x) else x.clone(memory_format=torch.contiguous_format)


def _steps_fit(x: Tensor) -> bool:
    row = 16 // x.element_size()
    return all(step > 0 and step % row == 0 for step in x.stride()[:-1])


@final
@dataclass(frozen=True)
class _Operands:
    """One checked call; ``factor`` is the scale of scores times log2(e)."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    starts: Tensor
    counts: Tensor
    ids: Tensor
    residual: Tensor | None
    residual_scale: Tensor | None
    key_length: Tensor | None
    factor: float
    block_q: int
    block_k: int
    sort: bool

    @property
    def rows(self) -> int:
        return self.starts.shape[2]

    def masked(self, tile: int) -> bool:
        """True if a tile of keys may reach beyond the last one."""
        return self.key_length is not None or self.k.shape[2] % tile != 0

    def output(self) -> Tensor:
        shape = [*self.q.shape[:3], self.v.shape[3]]
        return torch.empty(shape, dtype=self.v.dtype, device=self.v.device)

    def common(self) -> dict[str, Any]:
        """Arguments that both kernels take."""
        order = None
        if self.sort and self.rows > 1:
            order = self.counts.argsort(-1, descending=True).to(torch.int32)
        _, heads, queries, _ = self.q.shape
        stride_b, stride_h, _ = self.starts.stride()
        return {
            "starts": self.starts,
            "counts": self.counts,
            "ids": self.ids,
            "order": order,
            "residual": self.residual,
            "residual_scale": self.residual_scale,
            "key_length": self.key_length,
            "scale": self.factor,
            "heads": heads,
            "rows": self.rows,
            "queries": queries,
            "keys": self.k.shape[2],
            "mask_b": stride_b if self.starts.shape[0] > 1 else 0,
            "mask_h": stride_h if self.starts.shape[1] > 1 else 0,
            "BLOCK_M": self.block_q,
        }

    def programs(self) -> tuple[int]:
        return (self.q.shape[0] * self.q.shape[1] * self.rows,)


#: What every GPU can run: no spills, 82 KiB of shared memory.
_SAFE = Config(block_n=64, warps=8, stages=2)


def configuration(arch: str, width: int, bits: int, device: int | None = None) -> Config:
    """Tiles of a key block for heads of ``width`` channels and scores from ``bits`` (8 or 16)."""
    problem = {"width": width, "bits": bits}
    return best_config("sparse_attention", arch, problem, device)


def _plain(call: _Operands, config: Config) -> Tensor:
    out = call.output()
    tile = min(config.block_n, call.block_k)
    plain[call.programs()](
        q=call.q,
        k=call.k,
        v=call.v,
        out=out,
        q_scale=call.q_scale,
        k_scale=call.k_scale,
        **call.common(),
        **_strides("q", call.q),
        **_strides("k", call.k),
        **_strides("v", call.v),
        WIDTH=call.q.shape[3],
        OUT_WIDTH=call.v.shape[3],
        BLOCK_N=tile,
        SPLIT=call.block_k // tile,
        MASKED=call.masked(tile),
        num_warps=config.warps if call.block_q > 64 else min(config.warps, 4),
        num_stages=config.stages,
    )
    return out


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_b": x.stride(0), f"{name}_h": x.stride(1), f"{name}_s": x.stride(2)}


def _fits_specialised(call: _Operands, config: Config) -> bool:
    width = call.q.shape[3]
    return (
        call.block_q == 128
        and width in (64, 128)
        and width == call.v.shape[3]
        and min(config.block_n, call.block_k) >= 64
        and call.k.shape[2] > 0  # a descriptor of nothing is refused
    )


def _specialised(call: _Operands, config: Config) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    out = call.output()
    tile, width = min(config.block_n, call.block_k), call.q.shape[3]
    host = host_queries()
    block = [1, 1, tile, width]
    q: Any = call.q
    q_scale: Any = call.q_scale
    k_scale: Any = call.k_scale
    at = _strides("q", call.q)
    if host:
        q, at = _query_rows(call.q, call.block_q)
    else:
        triton.set_allocator(_scratch)
    if q_scale is not None:
        flat = q_scale.flatten()
        q_scale = TensorDescriptor(flat, [flat.numel()], [1], [call.block_q]) if host else flat
        flat = k_scale.flatten()
        k_scale = TensorDescriptor(flat, [flat.numel()], [1], [tile])
    specialised[call.programs()](
        q=q,
        k=TensorDescriptor(call.k, call.k.shape, call.k.stride(), block),
        v=TensorDescriptor(call.v, call.v.shape, call.v.stride(), block),
        out=out,
        q_scale=q_scale,
        k_scale=k_scale,
        **call.common(),
        **at,
        scales=call.q.shape[:3].numel(),
        WIDTH=width,
        BLOCK_N=tile,
        SPLIT=call.block_k // tile,
        MASKED=call.masked(tile),
        HOST_Q=host,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def host_queries() -> bool:
    """True if this Triton splits a block of queries that comes through a host's descriptor."""
    major, minor = (triton_version() or "0.0").split(".")[:2]
    return (int(major), int(minor)) < (3, 7)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _query_rows(q: Tensor, block: int) -> tuple[Any, dict[str, int]]:
    """``q[B, H, S, D]`` as a matrix with tokens in rows, and where in it a head begins."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, tokens, width = q.shape
    if q.transpose(1, 2).is_contiguous():
        matrix, at = q.transpose(1, 2).reshape(batch * tokens, heads * width), (tokens, 0, width)
    else:
        matrix = q.contiguous().view(batch * heads * tokens, width)
        at = (heads * tokens, tokens, 0)
    descriptor = TensorDescriptor(matrix, matrix.shape, matrix.stride(), [block, width])
    return descriptor, dict(zip(("q_b", "q_h", "q_s"), at, strict=True))


def _variants() -> Iterator[Variant]:
    """What the configurations choose, with everything that can be added (``all``) and, where that
    matters most, with nothing; and what the guarded variant falls back to.
    """
    for bits, width in ((16, 128), (16, 64), (8, 128), (8, 64)):
        chosen: dict[Config, list[str]] = {}
        for arch in ARCHS:
            config = configuration(arch, width, bits)
            for needed in {config, _SAFE} if config.variant == "ws" else {config}:
                chosen.setdefault(needed, []).append(arch)
        for config, archs in chosen.items():
            yield _variant(bits, width, config, tuple(archs), everything=True)
            if config.variant == "ws":
                yield _variant(bits, width, config, tuple(archs), everything=False)


def _variant(
    bits: int, width: int, config: Config, archs: tuple[str, ...], *, everything: bool
) -> Variant:
    ws, tile, host = config.variant == "ws", config.block_n, host_queries()
    codes = "i8" if bits == 8 else "bf16"
    signature = {name: "*i32" for name in ("starts", "counts", "ids", "order")}
    signature |= {name: "i32" for name in ("heads", "rows", "queries", "keys", "mask_b", "mask_h")}
    signature |= {"out": "*bf16", "scale": "fp32"}
    optional = {"residual": "*i8", "residual_scale": "*fp32", "key_length": "*i32"}
    scales = {"q_scale": "*fp32", "k_scale": "*fp32"}
    strides = [f"{x}_{axis}" for x in ("q" if ws else "qkv") for axis in "bhs"]
    signature |= dict.fromkeys(strides, "i32")
    constants: dict[str, Any] = {"WIDTH": width, "BLOCK_M": 128, "BLOCK_N": tile}
    constants |= {"SPLIT": 128 // tile, "MASKED": everything}
    if ws:
        block = f"[1, 1, {tile}, {width}]"
        signature |= {"k": f"tensordesc<{codes}{block}>", "v": f"tensordesc<bf16{block}>"}
        signature |= {"q": f"tensordesc<{codes}[128, {width}]>" if host else f"*{codes}"}
        signature |= {"scales": "i32"}
        scales = {"q_scale": "tensordesc<fp32[128]>" if host else "*fp32"}
        scales |= {"k_scale": f"tensordesc<fp32[{tile}]>"}
        constants |= {"HOST_Q": host}
    else:
        signature |= {"q": f"*{codes}", "k": f"*{codes}", "v": "*bf16"}
        constants |= {"OUT_WIDTH": width}
    for names, given in ((optional, everything), (scales, bits == 8)):
        if given:
            signature |= names
        else:
            constants |= dict.fromkeys(names, None)
    kind = f"{config.variant}-{codes}-{width}-n{tile}w{config.warps}s{config.stages}"
    return Variant(
        f"sparse_attention/{kind}{'-all' * everything}",
        specialised if ws else plain,
        signature,
        constants,
        {"num_warps": config.warps, "num_stages": config.stages},
        archs,
        {arch: f"{BF16_MMA[arch]}|{INT8_MMA[arch]}" for arch in ARCHS} if bits == 8 else BF16_MMA,
        () if ws and host else tuple(strides),
    )


VARIANTS = list(_variants())
