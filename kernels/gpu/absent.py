"""A GPU that is not there: launches compile for it, and nothing runs.

::

    with absent("sm90") as found:
        int8_linear(codes, scale, ...)      # tensors on torch's device "meta"
    found                                   # what Triton compiled, and where it keeps it

Triton is given a driver that names the GPU, loads nothing and launches nothing; all else is its own
way from a launch to a cubin, so specialisations, options and keys are those that the same launch
asks for on the GPU. Tensors on ``meta`` have shapes, no memory, and the address 0: a multiple of
16, as the addresses of torch's allocator are.

Error: none.
Source: ours.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import CacheManager, FileCacheManager

from vdqc.base.diagnostics import LoweringError
from vdqc.base.target import TARGETS
from vdqc.kernels.gpu.runtime import ABSENT, check_triton, is_interpreted

#: Files that Triton made, by its key: name to path, as ``byte_gemm.cubin``.
Compiled = dict[str, Mapping[str, Path]]


@contextmanager
def absent(arch: str) -> Iterator[Compiled]:
    """Launches inside compile for ``arch`` (``sm90``); gives what they compiled.

    Raises LoweringError without Triton, or under ``TRITON_INTERPRET``.
    """
    check_triton()
    if is_interpreted():
        raise LoweringError(
            "expected kernels decorated for a compiler, got those of the interpreter",
            "unset TRITON_INTERPRET",
        )
    found: Compiled = {}
    machine = _Driver(arch)
    before, token = driver._active, ABSENT.set(arch)
    driver.set_active(machine)
    try:
        with triton.knobs.cache.scope():
            triton.knobs.cache.manager_class = _noting(found)
            yield found
    finally:
        driver._active = before
        ABSENT.reset(token)
        machine.forget()


class _Driver(DriverBase):
    """What Triton asks of a machine, for one that only compiles."""

    def __init__(self, arch: str) -> None:
        self._index = int(arch[2:])  # no machine has as many GPUs
        self._compiled: set[Any] = set()
        properties = {"max_shared_mem": TARGETS[arch].shared_memory, "multiprocessor_count": 1}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            # module, function, registers, spills, threads that a block may have
            load_binary=lambda *kernel: (None, None, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._index, 32)

    def get_current_device(self) -> int:
        return self._index

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", self._index)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches one compiled kernel: nothing does."""
        self._compiled.add(source.fn)
        return lambda *arguments: None

    def forget(self) -> None:
        """Let Triton drop what it keeps in memory for this machine."""
        for function in self._compiled:
            function.device_caches.pop(self._index, None)


def _noting(kernels: Compiled) -> type[CacheManager]:
    """The manager of Triton's cache that is in use, noting what goes through it."""
    plain: Any = triton.knobs.cache.manager_class or FileCacheManager

    class Noting(CacheManager):
        def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
            self._key, self._kept = key, plain(key, override=override, dump=dump)

        def get_file(self, filename: str) -> str | None:
            return self._kept.get_file(filename)

        def put(self, data: Any, filename: str, binary: bool = True) -> str:
            return self._kept.put(data, filename, binary)

        def get_group(self, filename: str) -> dict[str, str] | None:
            group = self._kept.get_group(filename)
            if group:
                self._note(group)
            return group

        def put_group(self, filename: str, group: dict[str, str]) -> Any:
            self._note(group)
            return self._kept.put_group(filename, group)

        def _note(self, group: Mapping[str, str]) -> None:
            kernels[self._key] = {name: Path(path) for name, path in group.items()}

    return Noting
