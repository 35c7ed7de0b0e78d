"""Kernels run in Triton's interpreter, on CPU tensors, wherever there is no GPU.

``TRITON_INTERPRET`` counts when a function is decorated, so it is set before a kernel is imported.
The shim below makes right what the interpreter does not do: a ``tl.dot`` of bfloat16 (silently
wrong: it multiplies bit patterns), rounding to bfloat16 (it cuts off), ``tl.fma`` (up to Triton 3.6
it rounds twice), inline assembly (registered per text with a numpy function), and loop bounds under
Triton 3.6 with numpy 2.4.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _install_shim() -> None:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from vdqc.kernels.gpu.assembly import MEANING

    builder: Any = interpreter.InterpreterBuilder
    if getattr(builder, "vdqc_shim", False):
        return
    builder.vdqc_shim = True
    plain_dot, plain_patch = builder.create_dot, interpreter._patch_lang_tensor
    plain_cast = builder.cast_impl

    def as_float(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, as_float(a), as_float(b), *rest)

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        words = [np.ascontiguousarray(value.data).view(np.uint32) for value in values]
        wide = values[0].data.dtype == np.float32
        kind = (np.float32, tl.float32) if wide else (np.int8, tl.int8)
        found = MEANING[text](*words).view(kind[0]).reshape(values[0].data.shape)
        handle = interpreter.TensorHandle(found, kind[1])
        return type("Results", (), {"get_result": lambda self, index: handle})()

    def patch(tensor: Any, *scope: Any) -> None:
        plain_patch(tensor, *scope)
        for name in ("__index__", "__int__"):
            assign = scope[0].set_attr if scope else setattr
            assign(tensor, name, lambda self: int(self.handle.data.item()))

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return plain_cast(self, source, dtype)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        quiet = ((bits >> 16) | 0x40).astype(np.uint16)
        return interpreter.TensorHandle(
            np.where(np.isnan(source.data), quiet, rounded), dtype.scalar
        )

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        value = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(value.astype(z.data.dtype), z.dtype.scalar)

    builder.cast_impl = cast_impl
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        builder.create_fma = create_fma
    builder.create_dot = create_dot
    builder.create_inline_asm = create_inline_asm
    interpreter._patch_lang_tensor = patch


def _decorate_for_the_interpreter() -> None:
    """If another test imported triton first, its library of functions was decorated for a GPU."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for module in (tl, tl.standard):
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, InterpretedFunction(value.fn))


if DEVICE == "cpu":
    _install_shim()
    _decorate_for_the_interpreter()


@pytest.fixture(autouse=True)
def _ieee() -> Iterator[None]:
    """Infinities and NaNs are results here: numpy, which is the interpreter, need not warn."""
    import numpy as np

    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of values that no kernel would leave behind."""
    plain_empty, plain_like, plain_new = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point():
            return tensor.view(torch.uint8).fill_(0xFF).view(tensor.dtype)
        return tensor.fill_(torch.iinfo(tensor.dtype).max - 5)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(plain_empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(plain_like(*a, **k)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: fill(plain_new(self, *a, **k))
    )


@pytest.fixture
def device() -> str:
    """``cuda`` where there is one, else ``cpu`` (the interpreter)."""
    return DEVICE
