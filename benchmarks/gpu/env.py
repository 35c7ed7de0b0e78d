"""Where operands live, how large they are, and which route of an op is called.

On a GPU sizes are those of the case and ops are called as a program calls them. In a dry run (no
GPU) sizes shrink to a few tiles and the CUDA route of an op runs on CPU tensors in Triton's
interpreter, so that everything but the speed is exercised.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.target import TARGETS, Target, detect
from vdqc.kernels.base import Cost, Kernel

ROOT = Path(__file__).resolve().parents[2]
#: What stands between TRITON_INTERPRET and a right result; shared with the kernels' tests.
SHIM = ROOT / "tests" / "kernels" / "gpu" / "conftest.py"


class SkipError(Exception):
    """This cannot run here, for the reason given."""


@final
@dataclass(frozen=True)
class Env:
    """One machine.

    Attributes:
        dry: no GPU; tiny sizes, no times.
        ceilings: what was measured in this run: ``copy_gbs``, ``bf16_tflops`` ...
    """

    device: str
    dry: bool
    target: Target
    ceilings: Mapping[str, float] = field(default_factory=dict)

    def rows(self, count: int) -> int:
        """``count`` rows of a GEMM or tokens, or a few odd ones in a dry run."""
        return min(count, 70) if self.dry else count

    def width(self, channels: int) -> int:
        """``channels``, or a few whole eights in a dry run."""
        return min(channels, 136 if channels % 256 else 128) if self.dry else channels

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Gaussian values: data that is all zeros runs faster than real data does."""
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def codes(self, *shape: int, bits: int = 8) -> Tensor:
        """int8 codes in the symmetric range of ``bits``."""
        top = 2 ** (bits - 1) - 1
        return torch.randint(-top, top + 1, shape, device=self.device, dtype=torch.int8)

    def scales(self, *shape: int) -> Tensor:
        """float32 scales around 0.01."""
        return torch.rand(*shape, device=self.device) * 0.01 + 0.005

    def predicted_ms(self, cost: Cost) -> float:
        """What lowering believes that a call takes."""
        return cost.us(self.target) * 1e-3


def make(dry: bool, ceilings: Mapping[str, float] | None = None) -> Env:
    """The environment of this process; a dry run prepares the interpreter first."""
    if dry:
        interpret()
        return Env("cpu", True, TARGETS["sm90"], ceilings or {})
    if not torch.cuda.is_available():
        raise SkipError("no GPU here: --dry checks everything but the speed")
    return Env("cuda", False, detect(), ceilings or {})


def interpret() -> None:
    """Kernels run in Triton's interpreter from now on; before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    spec = importlib.util.spec_from_file_location("vdqc_interpreter_shim", SHIM)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def route(kernel: Kernel, env: Env) -> Callable[..., Any]:
    """The op as a program calls it; in a dry run its CUDA route, on CPU tensors.

    Raises SkipError for an op whose GPU route is its reference: there is nothing to measure.
    """
    from torch._library.custom_ops import OPDEFS

    name = kernel.op.name().split(".")[0]
    routes = OPDEFS[name]._backend_fns  # what ``register_kernel`` was given, by device type
    if "cuda" not in routes:
        raise SkipError(f"{kernel.name} has no kernel on a GPU yet")
    return routes["cuda"] if env.dry else kernel.op


def kernel(name: str) -> Kernel:
    """The kernel of that name; SkipError if this checkout has none."""
    from vdqc.kernels.table import KERNELS

    if name not in KERNELS:
        raise SkipError(f"this checkout has no kernel '{name}'")
    module, _, constant = KERNELS[name].partition(":")
    found: Kernel = getattr(importlib.import_module(module), constant)
    return found
