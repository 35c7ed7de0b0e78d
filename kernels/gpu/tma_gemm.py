"""W8A8 on Hopper: operands by TMA, optionally with a warp that only loads.

The same product and epilogue as ``gemm.byte_gemm``; a tile of each operand is one instruction of
one thread, edges read as zeros. WS lets Triton split the program into a loading warp and two groups
of multiplying ones: 8.5 instructions per wgmma instead of 13. Codes are int8 or fp8 (e4m3).

What the compiler asks for (found by compiling; Triton 3.6 to 3.9): four warps, 128 rows, every load
of the loop by descriptor, no other ``tl.dot`` and no split of the tile after the loop. So the
low-rank branch of rank 16 or 32 goes to the plain kernel, and a tile with gate, residual, zero
points or a result of four bytes is 128 x 128. Descriptors come from the host under Triton 3.6;
newer versions only compile those made in the kernel. TMA itself needs rows of a multiple of 16
bytes.

Compiled, never run here: ``run`` compares the first result of each specialisation with the plain
kernel's (``guard.guarded``).

Error: as ``gemm``.
Source: warp roles: Shah et al., FlashAttention-3, arXiv 2407.08608, section 3.1; ours otherwise.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vdqc.kernels.gpu.epilogue import ENDS, Epilogue, tile_of, write_tile
from vdqc.kernels.gpu.guard import agrees, guarded
from vdqc.kernels.gpu.launch_config import Config
from vdqc.kernels.gpu.runtime import on_device, triton_version
from vdqc.kernels.gpu.variants import FP8_MMA, INT8_MMA, Variant, configurations

#: Triton compiles warp specialisation only with descriptors made in the kernel, from 3.7 on.
_IN_KERNEL = tuple(int(part) for part in str(triton_version()).split(".")[:2]) >= (3, 7)


@triton.jit
def tma_gemm(
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
    SLICES: tl.constexpr,
    FP8: tl.constexpr,
    WS: tl.constexpr,
    IN_KERNEL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
):
    """One tile; IN_KERNEL: ``a`` and ``b`` are pointers, not yet descriptors."""
    row, col = tile_of(tl.program_id(0), n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP)
    if IN_KERNEL:
        a = tl.make_tensor_descriptor(a, [n_rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
        b = tl.make_tensor_descriptor(b, [n_cols, depth], [depth, 1], [BLOCK_N, BLOCK_K])
    SUM: tl.constexpr = tl.float32 if FP8 else tl.int32
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=SUM)
    for start in tl.range(0, depth, BLOCK_K, warp_specialize=WS):
        left = a.load([row * BLOCK_M, start])
        right = b.load([col * BLOCK_N, start])
        total = tl.dot(left, right.T, total, out_dtype=SUM)
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


def fits(config: Config, depth: int, end: Epilogue, rank: int) -> bool:
    """True if ``config`` asks for this kernel and it can do the work; see the module's text."""
    if config.variant not in ("ws", "tma") or depth == 0 or depth % 16:
        return False
    return config.variant == "tma" or end.down is None or rank == 1


def kind(codes: Tensor, out: Tensor, end: Epilogue) -> str:
    """The op in the configuration files: what follows the sums decides how wide a tile can be.

    A 128 x 256 tile of four bytes an element does not fit in shared memory beside the operands; one
    of fp8 with a low-rank branch does not fit in registers (Triton 3.6).
    """
    wide = end.gate is None and end.residual is None and end.weight_zero_point is None
    wide = wide and out.element_size() == 2 and (end.down is None or codes.dtype == torch.int8)
    name = "int8_tma_gemm" if codes.dtype == torch.int8 else "fp8_tma_gemm"
    return name if wide else f"{name}_full"


def run(
    codes: Tensor,
    weight: Tensor,
    out: Tensor,
    end: Epilogue,
    constants: dict[str, Any],
    config: Config,
    plain: Callable[[Tensor], None],
) -> None:
    """Write ``out``; ``plain`` does the same with the plain kernel, into the tensor it is given."""
    present = "".join(str(int(member is not None)) for member in end)
    key = (
        f"{kind(codes, out, end)} {config.variant} {config.tile} {out.dtype} {present} "
        f"{constants['ACTIVATION']} {constants['RANK']}"
    )

    def primary() -> Tensor:
        launch(codes, weight, out, end, constants, config)
        return out

    def fallback() -> Tensor:
        other = torch.empty_like(out)
        plain(other)
        return other

    found = guarded(key, primary, fallback, agrees)
    if found is not out:
        out.copy_(found)


def launch(
    codes: Tensor,
    weight: Tensor,
    out: Tensor,
    end: Epilogue,
    constants: dict[str, Any],
    config: Config,
    in_kernel: bool = _IN_KERNEL,
) -> None:
    """Launch on checked operands ``[M, K]`` and ``[N, K]``, without a guard."""
    (m, k), n = codes.shape, weight.shape[0]
    a: Any = codes
    b: Any = weight
    if in_kernel:
        triton.set_allocator(_scratch)
    else:
        a = TensorDescriptor.from_tensor(codes, [config.block_m, config.block_k])
        b = TensorDescriptor.from_tensor(weight, [config.block_n, config.block_k])
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with on_device(codes):
        tma_gemm[(tiles,)](
            a,
            b,
            out,
            m,
            n,
            k,
            end,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP=config.group_m,
            SLICES=config.slices,
            FP8=codes.dtype != torch.int8,
            WS=config.variant == "ws",
            IN_KERNEL=in_kernel,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
            **constants,
        )


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _variant(
    config: Config,
    name: str,
    end: Epilogue,
    rank: int = 1,
    activation: str = "none",
    fp8: bool = False,
) -> Variant:
    m, n, k = config.block_m, config.block_n, config.block_k
    word = "fp8e4nv" if fp8 else "i8"
    operands = {"a": f"tensordesc<{word}[{m}, {k}]>", "b": f"tensordesc<{word}[{n}, {k}]>"}
    if _IN_KERNEL:
        operands = {"a": f"*{word}", "b": f"*{word}"}
    return Variant(
        name=f"{'fp8' if fp8 else 'int8'}_tma_gemm-{config.variant}-{config.tile}/{name}",
        fn=tma_gemm,
        signature={
            **operands,
            **{"out": "*bf16", "n_rows": "i32", "n_cols": "i32", "depth": "i32", "e": end},
        },
        constexprs={
            "BLOCK_M": m,
            "BLOCK_N": n,
            "BLOCK_K": k,
            "GROUP": config.group_m,
            "SLICES": config.slices,
            "FP8": fp8,
            "WS": config.variant == "ws",
            "IN_KERNEL": _IN_KERNEL,
            "ACTIVATION": activation,
            "RANK": rank,
        },
        options={"num_warps": config.warps, "num_stages": config.stages},
        archs=("sm90",),
        expects=FP8_MMA if fp8 else INT8_MMA,
        aligned=("n_cols", "depth"),
    )


def _variants() -> Iterator[Variant]:
    for op, names in (
        ("int8_tma_gemm", ("plain", "gelu", "rank1")),
        ("int8_tma_gemm_full", ("zero", "gated")),
        ("fp8_tma_gemm", ("plain", "gelu")),
        ("fp8_tma_gemm_full", ("gated", "rank1")),
    ):
        for config, archs in configurations(op):
            if "sm90" in archs:
                for name in names:
                    yield _variant(config, name, **ENDS[name], fp8=op.startswith("fp8"))


VARIANTS = [
    *_variants(),
    *(
        _variant(Config(128, 256, 128, 8, 3, slices=4, variant="tma"), name, **ENDS[name])
        for name in ("plain", "gated", "rank32")
    ),
]
