"""Linear with packed weights and float activations for few rows, on Triton.

``weight_only_linear`` has the signature of the op. The time of a product with few rows is that of
reading the weight: it is read packed, once, and dequantised in registers as the left operand. Where
the columns alone do not occupy the GPU, K is split over programs whose float32 partial sums are
added in a fixed order, so results do not vary.

More than ``MOST_ROWS`` rows, or a width or number of bits that the planes do not serve (8 does not
divide K; 1 and 8 bits), take the reference: the weight dequantised once, then cuBLAS.

Error: one rounding of each weight to the dtype of x, as in the reference; sums in float32.
Source: as ``assembly``; split of K: Osama et al., Stream-K, arXiv 2301.03598, section 3 (fixed
split).
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.base.packing import packed_bytes
from vdqc.kernels.gpu import assembly
from vdqc.kernels.gpu.epilogue import FLOATS
from vdqc.kernels.gpu.launch_config import Config, configuration
from vdqc.kernels.gpu.planes import lanes, load_bytes
from vdqc.kernels.gpu.runtime import on_device, operand
from vdqc.kernels.gpu.variants import BF16_MMA, Variant, configurations

#: Above this the integer or float GEMM of a dequantised weight is faster.
MOST_ROWS = 64
#: Programs that occupy every GPU here.
_PROGRAMS = 264


@triton.jit
def weight_only_gemm(
    x,
    b,
    scale,
    zero,
    bias,
    out,
    n_rows,
    n_cols,
    run,
    steps,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """``steps`` blocks of columns of every plane, for one tile: a slice of K, written to its own
    ``out[split]``. SIZE: columns of a group, 0 for one group.
    """
    FIRST: tl.constexpr = 4 if BITS >= 4 else 2
    LAST: tl.constexpr = 1 if BITS % 2 == 1 else (2 if BITS % 4 == 2 else 4)
    PLANES: tl.constexpr = 8 // LAST
    TILES: tl.constexpr = FIRST // LAST
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin = tl.program_id(2) * steps * BLOCK_K
    inner = tl.arange(0, BLOCK_K)
    safe = tl.minimum(cols, n_cols - 1).to(tl.int64)
    x += tl.minimum(rows, n_rows - 1)[None, :] * (run * PLANES)
    b += safe[:, None] * (run * (BITS // LAST))
    groups = run * PLANES // SIZE if SIZE > 0 else 1
    scale += safe[:, None] * groups
    if zero is not None:
        zero += safe[:, None] * groups
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for start in range(begin, tl.minimum(begin + steps * BLOCK_K, run), BLOCK_K):
        k = start + inner
        inside = k < run
        for tile in tl.static_range(TILES):
            first = load_bytes(b + tile * run + k[None, :], inside[None, :], WHOLE)
            middle = first
            last = first
            if BITS == 7:
                middle = load_bytes(b + (4 + tile % 2) * run + k[None, :], inside[None, :], WHOLE)
            if LAST < FIRST:
                last = load_bytes(b + (BITS // LAST - 1) * run + k[None, :], inside[None, :], WHOLE)
            for index in tl.static_range(8 // FIRST):
                column = (index * TILES + tile) * run + start
                left = lanes(first, middle, last, None, BITS, index * TILES + tile, False)
                left = _floats(left, scale, zero, column, inner, BITS, SIZE, ONE_GROUP)
                right = load_bytes(x + (column + inner)[:, None], inside[:, None], WHOLE)
                left = left.to(right.dtype)
                total = tl.dot(left, right, total, input_precision="tf32x3", out_dtype=tl.float32)
    wanted = (rows < n_rows)[None, :] & (cols < n_cols)[:, None]
    if bias is not None:
        total += tl.load(bias + safe).to(tl.float32)[:, None]
    at = (tl.program_id(2) * n_rows + rows)[None, :].to(tl.int64) * n_cols + cols[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _floats(
    codes,
    scale,
    zero,
    column,
    inner,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
):
    """(code - zero) scale of MSB-aligned codes: both by a power of two, which rounds nothing."""
    STEP: tl.constexpr = 2.0 ** (8 - BITS)
    group = 0
    if SIZE > 0:
        group = column // SIZE if ONE_GROUP else (column + inner)[None, :] // SIZE
    value = codes.to(tl.float32)
    if zero is not None:
        value -= tl.load(zero + group) * STEP
    return value * (tl.load(scale + group) / STEP)


def weight_only_linear(
    x: Tensor,
    packed: Tensor,
    bits: int,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    config: Config | None = None,
    split: int | None = None,
) -> Tensor:
    """The op of that name; ``serves`` must be true."""
    lead, k, n, device = x.shape[:-1], x.shape[-1], packed.shape[0], x.device
    x = operand("x", x, FLOATS).reshape(-1, k)
    packed = operand("packed", packed, torch.uint8, (None, packed_bytes(bits, k)), device)
    scale = operand("weight_scale", weight_scale, torch.float32, (n, None), device)
    zero = weight_zero_point
    if zero is not None:
        zero = operand("weight_zero_point", zero, torch.float32, scale.shape, device)
    if bias is not None:
        bias = operand("bias", bias, FLOATS, (n,), device)
    m, groups = x.shape[0], scale.shape[1]
    if m == 0 or n == 0:
        return torch.empty(*lead, n, dtype=x.dtype, device=device)
    # in float32 a tile of 64 rows spills, and on sm100 gives an empty kernel
    few = x[:16] if x.dtype == torch.float32 else x
    config = config or configuration(_op(bits), few, n, k)
    run = k // assembly.planes_of(bits)
    size = 0 if groups == 1 else k // groups
    fits = math.gcd(run, size) & -math.gcd(run, size)
    block = min(config.block_k, fits) if fits >= 16 else config.block_k
    tiles = triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m)
    blocks = triton.cdiv(run, block)
    split = min(blocks, split or max(1, min(8, _PROGRAMS // (tiles[0] * tiles[1]))))
    steps = triton.cdiv(blocks, split)
    split = triton.cdiv(blocks, steps)
    partial = split > 1
    dtype = torch.float32 if partial else x.dtype
    out = torch.empty(split, m, n, dtype=dtype, device=device)
    with on_device(x):
        weight_only_gemm[(*tiles, split)](
            x,
            packed,
            scale,
            zero,
            None if partial else bias,
            out,
            m,
            n,
            run,
            steps,
            BITS=bits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=block,
            WHOLE=run % block == 0,
            SIZE=size,
            ONE_GROUP=size > 0 and size % block == 0 and run % block == 0,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )
    if partial:
        whole = out.sum(0)
        out = (whole if bias is None else whole + bias).to(x.dtype)
    return out.reshape(*lead, n)


def _op(bits: int) -> str:
    """The row of configurations: every plane's columns of x are staged, so many need flat tiles."""
    return "weight_only" if assembly.planes_of(bits) <= 2 else "weight_only_planes"


def serves(x: Tensor, bits: int) -> bool:
    """True if this kernel does the work; see the module's text."""
    few = x.numel() <= MOST_ROWS * x.shape[-1]
    return few and x.dtype in FLOATS and 2 <= bits <= 7 and x.shape[-1] % 8 == 0


def _variants() -> Iterator[Variant]:
    for m in (1, 64):
        for config, archs in configurations("weight_only", m):
            yield _variant("weight_only", "channel", config, archs, 4, "bf16")
            yield _variant("weight_only", "group128", config, archs, 4, "bf16", 128)
        for config, archs in configurations("weight_only_planes", m):
            yield _variant("weight_only_planes", "group128", config, archs, 7, "bf16", 128)
    for op, bits in (("weight_only", 4), ("weight_only_planes", 7)):
        for config, archs in configurations(op, 1):
            yield _variant(op, "fp32", config, archs, bits, "fp32", 128)


def _variant(
    op: str,
    name: str,
    config: Config,
    archs: tuple[str, ...],
    bits: int,
    floats: str,
    size: int = 0,
) -> Variant:
    zero = {"zero": "*fp32"} if size else {}
    return Variant(
        name=f"{op}-{config.tile}/{name}",
        fn=weight_only_gemm,
        signature={
            **{"x": f"*{floats}", "b": "*u8", "scale": "*fp32", "out": f"*{floats}"},
            **zero,
            **{"n_rows": "i32", "n_cols": "i32", "run": "i32", "steps": "i32"},
        },
        constexprs={
            **{"bias": None, "BITS": bits, "WHOLE": True, "ONE_GROUP": size > 0},
            **({} if zero else {"zero": None}),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "SIZE": size,
        },
        options={"num_warps": config.warps, "num_stages": config.stages},
        archs=archs,
        expects=BF16_MMA if config.block_n >= 64 and floats == "bf16" else {},
        aligned=("n_cols", "run"),
    )


VARIANTS = list(_variants())
