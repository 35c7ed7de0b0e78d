"""Values that blocks exchange, for many samples, in bounded memory.

Up to ``memory`` bytes stay where they are; what comes after goes to a file that has no name: it is
gone when its last value is dropped and when the process dies, however it dies.

Error: none; values come back bit for bit, on their device.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError

_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(text: str, where: str = "memory") -> int:
    """``2GiB``, ``500MB`` or ``4096`` in bytes; raises ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMG]i?B)?", text.strip())
    if match is None or (match[2] or "") not in _UNITS:
        raise ConfigError(f"{where}: expected a size such as 2GiB or 500MB, got '{text}'")
    return int(float(match[1]) * _UNITS[match[2] or ""])


@final
@dataclass(frozen=True)
class _Spilled:
    """One tensor in an unnamed file; the file closes with its last tensor."""

    file: Any
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        count = self.shape.numel() if isinstance(self.shape, torch.Size) else 0
        buffer = bytearray(count * self.dtype.itemsize)
        read, view = 0, memoryview(buffer)
        while read < len(buffer):
            read += os.preadv(self.file.fileno(), [view[read:]], self.offset + read)
        value = torch.frombuffer(buffer, dtype=self.dtype) if buffer else torch.empty(0)
        return value.to(self.dtype).reshape(self.shape).to(self.device)


@final
class ActivationCache:
    """Values by (sample, key); whatever is not a tensor is kept as it is."""

    def __init__(self, memory: int, folder: Path | None = None) -> None:
        self.memory, self.folder = memory, folder
        self.held = 0
        self.peak_held = 0
        self.spilled = 0
        self._values: dict[tuple[int, str], Any] = {}
        self._file: Any = None
        self._end = 0

    def put(self, sample: int, key: str, value: Any) -> None:
        """Keep ``value``, detached."""
        if isinstance(value, Tensor):
            value = value.detach()
            if value.untyped_storage().nbytes() > 2 * value.nbytes:
                value = value.clone()  # a view would keep all of what it is a part of
            if self.held + value.nbytes > self.memory:
                value = self._spill(value)
            else:
                self.held += value.nbytes
                self.peak_held = max(self.peak_held, self.held)
        self._values[sample, key] = value

    def get(self, sample: int, key: str) -> Any:
        """The value; read from disk if it is there."""
        value = self._values[sample, key]
        return value.read() if isinstance(value, _Spilled) else value

    def has(self, sample: int, key: str) -> bool:
        """True if there is such a value."""
        return (sample, key) in self._values

    def keep_only(self, keys: Collection[str]) -> None:
        """Drop every value whose key is not among ``keys``; later values go to a new file."""
        for place in [place for place in self._values if place[1] not in keys]:
            value = self._values.pop(place)
            if isinstance(value, Tensor):
                self.held -= value.nbytes
        self._file, self._end = None, 0

    def _spill(self, value: Tensor) -> _Spilled:
        if self._file is None:
            self._file, self._end = tempfile.TemporaryFile(dir=self.folder, buffering=0), 0  # noqa: SIM115
        raw = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        written, view = 0, memoryview(raw.numpy().data)
        while written < len(view):
            written += os.pwrite(self._file.fileno(), view[written:], self._end + written)
        found = _Spilled(self._file, self._end, value.shape, value.dtype, value.device)
        self._end += raw.numel()
        self.spilled += raw.numel()
        return found
