"""How products with packed weights are launched, W2 to W7 x A8 and x A4; their offline variants.

``packed_matmul`` and ``packed_linear`` have the signatures of the ops. A width that 8 does not
divide has a tail the planes do not reach, and multipliers of some odd sizes differ between lanes
that are decoded as one (``_lanes_differ``): the weight is then unpacked to int8 first, once per
call.

Error: that of the kernel, ``packed_tiles``.
Source: ours.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.base.packing import packed_bytes, unpack
from vdqc.kernels.gpu import assembly, gemm
from vdqc.kernels.gpu.epilogue import ENDS, NO_END, Epilogue, epilogue, types
from vdqc.kernels.gpu.launch_config import Config, configuration
from vdqc.kernels.gpu.packed_tiles import packed_gemm
from vdqc.kernels.gpu.runtime import arch_of, on_device, operand
from vdqc.kernels.gpu.variants import INT8_MMA, Variant, configurations


def packed_matmul(
    codes: Tensor,
    packed: Tensor,
    bits: int,
    multiplier: Tensor | None,
    binary: bool = False,
    config: Config | None = None,
) -> Tensor:
    """The op of that name: ``codes i8[M, K] -> i32[M, N]``."""
    out = torch.empty(codes.shape[0], packed.shape[0], dtype=torch.int32, device=codes.device)
    _run(codes, packed, bits, multiplier, 8, binary, out, Epilogue(), NO_END, config)
    return out


def packed_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    packed: Tensor,
    bits: int,
    multiplier: Tensor | None,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    weight_sum: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    row_sum: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    code_bits: int = 8,
    binary: bool = False,
    config: Config | None = None,
) -> Tensor:
    """The op of that name."""
    n = packed.shape[0]
    if weight_zero_point is not None and row_sum is None and code_bits == 4:
        row_sum = _unpacked(codes).sum(-1, dtype=torch.int32)
    end, constants = epilogue(
        codes,
        n,
        scale,
        zero_point,
        weight_scale,
        weight_zero_point,
        weight_sum,
        bias,
        row_sum,
        activation,
        gate,
        residual,
        down,
        up,
    )
    out = torch.empty(*codes.shape[:-1], n, dtype=dtype, device=codes.device)
    flat = codes.reshape(-1, codes.shape[-1])
    _run(flat, packed, bits, multiplier, code_bits, binary, out, end, constants, config)
    return out


def _unpacked(codes: Tensor) -> Tensor:
    """int8[..., K] from codes packed by four bits."""
    wide = 2 * codes.shape[-1]
    return unpack(codes.reshape(-1, codes.shape[-1]), 4, wide).reshape(*codes.shape[:-1], wide)


def _wide_weight(
    packed: Tensor, bits: int, depth: int, multiplier: Tensor | None, binary: bool
) -> Tensor:
    """int8[N, K], as ``vdqc.kernels.integer.unpack_weight``."""
    weight = unpack(packed, bits, depth)
    if multiplier is None:
        return weight
    weight, factor = weight.unflatten(-1, (multiplier.shape[1], -1)), multiplier.unsqueeze(-1)
    if binary:
        return ((weight >> 1) * 16 + (2 * (weight & 1) - 1) * factor).flatten(-2)
    return (weight * factor).flatten(-2)


def _run(
    codes: Tensor,
    packed: Tensor,
    bits: int,
    multiplier: Tensor | None,
    code_bits: int,
    binary: bool,
    out: Tensor,
    end: Epilogue,
    constants: dict[str, Any],
    config: Config | None,
) -> None:
    if code_bits not in (4, 8) or not 1 <= bits <= 8:
        raise InputError(
            f"expected weights of 1 to 8 bits and codes of 4 or 8, got {bits} and {code_bits}"
        )
    if binary and (bits != 5 or multiplier is None):
        raise InputError(f"expected 5-bit codes and a multiplier with binary, got {bits} bits")
    codes = operand("codes", codes, torch.uint8 if code_bits == 4 else torch.int8, (None, None))
    m, depth = codes.shape[0], codes.shape[1] * 8 // code_bits
    packed = operand("packed", packed, torch.uint8, (None, packed_bytes(bits, depth)), codes.device)
    n, groups = packed.shape[0], 1
    if multiplier is not None:
        multiplier = operand("multiplier", multiplier, torch.int8, (n, None), codes.device)
        groups = multiplier.shape[1]
        if groups == 0 or depth % groups:
            raise InputError(f"multiplier: expected a divisor of K = {depth} groups, got {groups}")
    if m == 0 or n == 0:
        return
    unpacked = depth % 8 != 0 or bits in (1, 8)
    run = 0 if unpacked else depth // assembly.planes_of(bits)
    size = depth // groups if groups > 1 else 0
    if unpacked or (multiplier is not None and _lanes_differ(run, size, codes)):
        weight = _wide_weight(packed, bits, depth, multiplier, binary)
        gemm.run(_unpacked(codes) if code_bits == 4 else codes, weight, out, end, constants, config)
        return
    if config is None:
        config = configuration(_op(bits, code_bits, groups, binary), codes, n, depth)
    block = _block_k(config.block_k, math.gcd(run, size))
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n)
    with on_device(codes):
        packed_gemm[(tiles,)](
            codes,
            packed,
            multiplier,
            out,
            m,
            n,
            run,
            end,
            BITS=bits,
            CODE_BITS=code_bits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=block,
            GROUP=config.group_m,
            WHOLE=run % block == 0,
            SIZE=size,
            ONE_GROUP=size > 0 and size % block == 0 and run % block == 0,
            BINARY=binary,
            SLICES=config.slices,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
            **constants,
        )


def _op(bits: int, code_bits: int, groups: int, binary: bool) -> str:
    """The row of configurations: w5s with binary planes, w3a8g with groups, w4a4, else w3a8."""
    if binary:
        return f"w{bits}s"
    if groups > 1 and bits <= 5:  # more bits leave no room for multiples in eight
        return f"w{bits}a8g"
    return "w4a4" if bits == code_bits == 4 else f"w{bits}a8"


def _lanes_differ(run: int, size: int, codes: Tensor) -> bool:
    """True if four lanes that share a factor may not be of one group of one row.

    They are neighbours in K, from a multiple of 4 of a plane on, and a group may end between them.
    Triton 3.9 has another layout on sm100 where planes are no multiple of 16 wide: the lanes are
    then four rows.
    """
    if size and math.gcd(run, size) % 4:
        return True
    return run % 16 != 0 and arch_of(codes.device) == "sm100"


def _block_k(wanted: int, width: int) -> int:
    """The greatest power of two up to ``wanted`` that divides ``width``; ``wanted`` if below 32."""
    fits = min(wanted, width & -width)
    return fits if fits >= 32 else wanted


def _variant(
    op: str,
    config: Config,
    archs: tuple[str, ...],
    name: str = "plain",
    bits: int = 4,
    code_bits: int = 8,
    size: int = 0,
    binary: bool = False,
    end: Epilogue | None = None,
    rank: int = 1,
    activation: str = "none",
) -> Variant:
    pointers = {"a": "*u8" if code_bits == 4 else "*i8", "b": "*u8", "out": "*bf16"}
    constants = {
        "BITS": bits,
        "CODE_BITS": code_bits,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP": config.group_m,
        "WHOLE": True,
        "SIZE": size,
        "ONE_GROUP": True,
        "BINARY": binary,
        "SLICES": config.slices,
        "ACTIVATION": activation,
        "RANK": rank,
    }
    if size or binary:
        pointers["multiplier"] = "*i8"
    else:
        constants["multiplier"] = None
    return Variant(
        name=f"{op}-{config.tile}/{name}",
        fn=packed_gemm,
        signature={
            **pointers,
            **{"n_rows": "i32", "n_cols": "i32", "run": "i32"},
            "e": types(bias=True) if end is None else end,
        },
        constexprs=constants,
        options={"num_warps": config.warps, "num_stages": config.stages},
        archs=archs,
        expects=INT8_MMA if config.block_n >= 64 else {},
        aligned=("n_cols", "run"),
    )


def _variants() -> Iterator[Variant]:
    for config, archs in configurations("w4a8"):
        for name, end in ENDS.items():
            yield _variant("w4a8", config, archs, name, **end)
    formats: list[tuple[str, dict[str, Any]]] = [
        *((f"w{bits}a8g", {"bits": bits, "size": 128}) for bits in (4, 2, 3, 5)),
        ("w4a4", {"code_bits": 4}),
        *((f"w{bits}a8", {"bits": bits}) for bits in (2, 3, 5, 6, 7)),
        ("w5s", {"bits": 5, "binary": True}),
    ]
    for op, given in formats:
        for config, archs in configurations(op):
            yield _variant(op, config, archs, **given)
    few: list[tuple[str, dict[str, Any]]] = [("w4a8", {}), *formats[:1]]
    for m, served in ((1, few), (64, few + formats[1:4])):
        for op, given in served:
            for config, archs in configurations(op, m):
                yield _variant(op, config, archs, **given)


VARIANTS = list(_variants())
