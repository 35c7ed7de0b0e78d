"""W8A8 on Triton: ``codes[M, K] x weight[N, K]^T`` of int8 or fp8 (e4m3), any epilogue.

``int8_matmul``, ``int8_linear`` and ``fp8_linear`` have the signatures of the ops. Every size is
allowed: rows and columns beyond the edge are read at the last one and not written, columns of K
beyond it are zeros. On Hopper ``tma_gemm`` does the work where it can.

Error: the integer part is exact while K <= 131072; see ``epilogue`` for the rest. Sums of fp8 are
float32 in name: Hopper keeps about 13 bits of fraction while it adds (relative error up to 1e-3 at
K = 4096), as ``torch._scaled_mm`` does with fast accumulation.
Source: grouped tile order as in Triton's own tutorial on matrix multiplication; the rest is ours.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdqc.kernels.gpu import tma_gemm
from vdqc.kernels.gpu.epilogue import ENDS, NO_END, Epilogue, epilogue, tile_of, write_tile
from vdqc.kernels.gpu.launch_config import Config, configuration
from vdqc.kernels.gpu.runtime import on_device, operand
from vdqc.kernels.gpu.variants import FP8_MMA, INT8_MMA, Variant, configurations


@triton.jit
def byte_gemm(
    a,
    b,
    out,
    n_rows,
    n_cols,
    depth,
    e,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    FP8: tl.constexpr,
    SLICES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
):
    """One tile of the result; WHOLE: BLOCK_K divides K."""
    row, col = tile_of(tl.program_id(0), n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a += tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * depth + k[None, :]
    b += tl.minimum(cols, n_cols - 1).to(tl.int64)[None, :] * depth + k[:, None]
    SUM: tl.constexpr = tl.float32 if FP8 else tl.int32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for start in range(0, depth, BLOCK_K):
        if WHOLE:
            left = tl.load(a)
            right = tl.load(b)
        else:
            left = tl.load(a, mask=(start + k)[None, :] < depth, other=0.0 if FP8 else 0)
            right = tl.load(b, mask=(start + k)[:, None] < depth, other=0.0 if FP8 else 0)
        total = tl.dot(left, right, total, out_dtype=SUM)
        a += BLOCK_K
        b += BLOCK_K
    write_tile(
        total,
        out,
        row * BLOCK_M,
        col * BLOCK_N,
        n_rows,
        n_cols,
        depth,
        e,
        False,
        SLICES,
        ACTIVATION,
        RANK,
    )


def int8_matmul(codes: Tensor, weight: Tensor, config: Config | None = None) -> Tensor:
    """``codes i8[M, K], weight i8[N, K] -> i32[M, N]``."""
    codes = operand("codes", codes, torch.int8, (None, None))
    weight = operand("weight", weight, torch.int8, (None, codes.shape[1]), codes.device)
    out = torch.empty(codes.shape[0], weight.shape[0], dtype=torch.int32, device=codes.device)
    run(codes, weight, out, Epilogue(), NO_END, config)
    return out


def int8_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    *fused: Any,
    config: Config | None = None,
    **named: Any,
) -> Tensor:
    """The op of that name; ``fused`` and ``named`` are its arguments from ``row_sum`` on."""
    n, k = weight.shape
    codes = operand("codes", codes, torch.int8, (*codes.shape[:-1], k))
    weight = operand("weight", weight, torch.int8, None, codes.device)
    end, constants = epilogue(
        codes,
        n,
        scale,
        zero_point,
        weight_scale,
        weight_zero_point,
        weight_sum,
        bias,
        *fused,
        **named,
    )
    out = torch.empty(*codes.shape[:-1], n, dtype=dtype, device=codes.device)
    run(codes.reshape(-1, k), weight, out, end, constants, config)
    return out


def fp8_linear(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """The op of that name."""
    n, k = weight.shape
    codes = operand("codes", codes, torch.float8_e4m3fn, (*codes.shape[:-1], k))
    weight = operand("weight", weight, torch.float8_e4m3fn, None, codes.device)
    fused = (activation, gate, residual, down, up)
    end, constants = epilogue(codes, n, scale, None, weight_scale, None, None, bias, None, *fused)
    out = torch.empty(*codes.shape[:-1], n, dtype=dtype, device=codes.device)
    run(codes.reshape(-1, k), weight, out, end, constants, config)
    return out


def run(
    codes: Tensor,
    weight: Tensor,
    out: Tensor,
    end: Epilogue,
    constants: dict[str, Any],
    config: Config | None,
) -> None:
    """Launch on checked operands ``[M, K]`` and ``[N, K]``."""
    (m, k), n = codes.shape, weight.shape[0]
    if m == 0 or n == 0:
        return
    if config is None:
        op = "int8_gemm" if codes.dtype == torch.int8 else "fp8_gemm"
        config = configuration(tma_gemm.kind(codes, out, end), codes, n, k)
        if tma_gemm.fits(config, k, end, constants["RANK"]):
            wanted = config

            def plain(other: Tensor) -> None:
                usual = configuration(op, codes, n, k)
                run(codes, weight, other, end, constants, usual)

            tma_gemm.run(codes, weight, out, end, constants, wanted, plain)
            return
        config = configuration(op, codes, n, k)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with on_device(codes):
        byte_gemm[(tiles,)](
            codes,
            weight,
            out,
            m,
            n,
            k,
            end,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=config.group_m,
            WHOLE=k % config.block_k == 0,
            FP8=codes.dtype != torch.int8,
            SLICES=config.slices,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
            **constants,
        )


def _variant(
    config: Config,
    archs: tuple[str, ...],
    name: str,
    end: Epilogue,
    rank: int = 1,
    activation: str = "none",
    fp8: bool = False,
) -> Variant:
    expects = FP8_MMA if fp8 else INT8_MMA
    word = "*fp8e4nv" if fp8 else "*i8"
    return Variant(
        name=f"{'fp8' if fp8 else 'int8'}_gemm-{config.tile}/{name}",
        fn=byte_gemm,
        signature={
            **{"a": word, "b": word, "out": "*bf16" if end.scale else "*i32"},
            **{"n_rows": "i32", "n_cols": "i32", "depth": "i32", "e": end},
        },
        constexprs={
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": config.group_m,
            "WHOLE": True,
            "FP8": fp8,
            "SLICES": config.slices,
            "ACTIVATION": activation,
            "RANK": rank,
        },
        options={"num_warps": config.warps, "num_stages": config.stages},
        archs=archs,
        expects=expects if config.block_m >= 64 else {},
        aligned=("n_cols", "depth"),
    )


def _variants() -> Iterator[Variant]:
    for config, archs in configurations("int8_gemm"):
        for name, end in ENDS.items():
            yield _variant(config, archs, name, **end)
        yield _variant(config, archs, "sums", Epilogue())
    for config, archs in configurations("fp8_gemm"):
        for name in ("plain", "gelu", "gated", "rank32"):
            able = tuple(arch for arch in archs if arch != "sm80")
            yield _variant(config, able, name, **ENDS[name], fp8=True)
    for m in (1, 64):
        for config, archs in configurations("int8_gemm", m):
            yield _variant(config, archs, "plain", **ENDS["plain"])


VARIANTS = list(_variants())
