"""Every kernel variant that is compiled offline, for all GPU generations, without a GPU.

A module of kernels lists its own as ``VARIANTS``; ``collect`` reads those lists.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from vdqc.kernels.gpu.launch_config import Config, best_config
from vdqc.kernels.gpu.runtime import ARCHS

#: Modules of this package with a list ``VARIANTS``.
MODULES = (
    "gemm",
    "tma_gemm",
    "packed_gemm",
    "weight_only",
    "attention",
    "block_mask",
    "quantize_variants",
    "rope",
)


@final
@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel, specialised as at launch.

    Attributes:
        name: ``<op>/<what is special>``, unique.
        fn: the ``@triton.jit`` function.
        signature: argument to type (``*i8``, ``*bf16``, ``i32``, ``fp32``,
            ``tensordesc<i8[128, 128]>``, a NamedTuple of such words, None and numbers); what is
            missing here is in ``constexprs``.
        constexprs: argument to value; also arguments that are None.
        options: ``num_warps`` and ``num_stages``.
        archs: generations to compile for.
        expects: what the opcode of the matrix multiply looks like, a regular expression for each
            generation; generations that are missing may use any, or none.
        aligned: integer arguments that are multiples of 16; pointers always are.
    """

    name: str
    fn: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=lambda: {"num_warps": 4, "num_stages": 3})
    archs: tuple[str, ...] = ARCHS
    expects: Mapping[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()


#: Opcodes of an int8 matrix multiply; sm100 has a unit that Triton 3.6 does not use yet.
INT8_MMA: Mapping[str, str] = {
    "sm80": r"IMMA\.16832\.S8",
    "sm89": r"IMMA\.16832\.S8",
    "sm90": r"IGMMA\.64x\d+x32\.S8",
    "sm100": r"UTCIMMA|IMMA\.16832\.S8",
    "sm120": r"IMMA\.16832\.S8",
}
#: Opcodes of an fp8 (e4m3) matrix multiply; sm80 has none.
FP8_MMA: Mapping[str, str] = {
    "sm89": r"QMMA\.16832\.F32\.E4M3",
    "sm90": r"QGMMA\.64x\d+x32\.F32\.E4M3",
    "sm100": r"UTCQMMA|QMMA\.16832",
    "sm120": r"QMMA\.16832\.F32\.E4M3",
}
#: Opcodes of a bfloat16 matrix multiply.
BF16_MMA: Mapping[str, str] = {
    "sm80": r"HMMA\.16816",
    "sm89": r"HMMA\.16816",
    "sm90": r"HGMMA\.64x\d+x16",
    "sm100": r"UTCHMMA|HMMA\.16816",
    "sm120": r"HMMA\.16816",
}


def configurations(op: str, m: int = 1 << 20) -> list[tuple[Config, tuple[str, ...]]]:
    """What each generation runs ``op`` with for ``m`` rows, and which generations share it."""
    found: dict[Config, list[str]] = {}
    for arch in ARCHS:
        found.setdefault(best_config(op, arch, {"m": m}), []).append(arch)
    return [(config, tuple(archs)) for config, archs in found.items()]


def collect() -> list[Variant]:
    """All variants, in the order of ``MODULES``."""
    found = []
    for module in MODULES:
        found += importlib.import_module(f"vdqc.kernels.gpu.{module}").VARIANTS
    return found
