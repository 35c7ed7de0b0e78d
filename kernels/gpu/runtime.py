"""What every launch needs: a Triton that is new enough, the generation of the GPU, operands.

``operand`` compares device, dtype and shape (InputError, expected and got); a tensor that is not
contiguous, or does not start at a multiple of 16 bytes, is copied.

Error: none of its own.
Source: ours.
"""

import functools
import importlib.metadata
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError, LoweringError
from vdqc.base.target import of_capability

#: Oldest Triton that compiles the sources here.
MIN_TRITON = (3, 5)
#: GPU generations with kernels, oldest first.
ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm120")

#: Generation of the GPU that launches are compiled for while there is none (``absent``).
ABSENT: ContextVar[str | None] = ContextVar("ABSENT", default=None)


def check_triton() -> None:
    """Raise LoweringError unless a Triton is there that is new enough."""
    found = triton_version()
    wanted = ".".join(map(str, MIN_TRITON))
    if found is None:
        raise LoweringError(
            f"expected Triton {wanted} or newer for a GPU, got none",
            "pip install triton, or compile with --target cpu",
            code="triton",
        )
    if minor_version(found) < MIN_TRITON:
        raise LoweringError(
            f"expected Triton {wanted} or newer for a GPU, got {found}",
            "pip install --upgrade triton, or compile with --target cpu",
            code="triton",
        )


@functools.cache
def triton_version() -> str | None:
    """Version of the Triton that would be imported, or None."""
    try:
        import triton
    except ImportError:
        return None
    return str(getattr(triton, "__version__", None) or importlib.metadata.version("triton"))


def minor_version(version: str) -> tuple[int, int]:
    """``"3.6.0" -> (3, 6)``."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def is_interpreted() -> bool:
    """True if kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return _is_on("TRITON_INTERPRET")


def is_plain() -> bool:
    """True if no guarded variant may run (``VDQC_PLAIN=1``): see ``guard``."""
    return _is_on("VDQC_PLAIN")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "true", "on", "yes")


def arch_of(device: torch.device) -> str:
    """The generation whose kernels run on ``device``: the newest of its major version.

    The interpreter is given those of sm80, which every GPU can run.
    """
    if device.type != "cuda":
        return ABSENT.get() or ARCHS[0]
    return _arch_of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _arch_of_index(index: int) -> str:
    return arch_of_capability(*torch.cuda.get_device_capability(index))


def arch_of_capability(major: int, minor: int) -> str:
    """``(8, 6) -> sm80``, ``(12, 1) -> sm120``; LoweringError below 8.0 and for unknown majors."""
    found = of_capability(major, minor)
    if found is None:
        raise LoweringError(
            f"expected a GPU of {', '.join(ARCHS)}, got sm{major}{minor}",
            "run the program on the CPU: --target cpu",
            code="device",
        )
    return found.name


def operand(
    name: str,
    tensor: Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``tensor``, contiguous and aligned to 16 bytes (copied if it was not); None in ``shape`` is
    any size.

    Raises InputError for another dtype, shape or device.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputError(f"{name}: expected {words}, got {str(tensor.dtype)[6:]}", code="operand")
    if shape is not None and not _fits(tensor.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name}: expected shape [{wanted}], got {list(tensor.shape)}", code="operand"
        )
    if device is not None and tensor.device != device:
        raise InputError(f"{name}: expected it on {device}, got {tensor.device}", code="operand")
    if tensor.device.type != "cuda" and not (is_interpreted() or ABSENT.get()):
        raise InputError(
            f"{name}: expected a tensor on a GPU, got {tensor.device}",
            "TRITON_INTERPRET=1, set before triton is imported, runs kernels on the CPU",
            code="operand",
        )
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _fits(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(
        size is None or size == have for size, have in zip(wanted, found, strict=True)
    )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, not where the data is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@functools.cache
def compile_errors() -> tuple[type[BaseException], ...]:
    """What Triton raises when a kernel does not compile or does not fit the GPU."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (CompilationError, OutOfResources, PTXASError, RuntimeError)


def first_line(error: BaseException) -> str:
    """The error's first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
