"""Weights that may live on disk: a tensor is read when asked for and dropped after use.

A graph keeps small and trained weights as ordinary tensors and large frozen ones as references into
safetensors files, so that a model larger than memory can be captured, rewritten and packed site by
site. Reading is by slices of a file opened per read: a mapping that is held open would count every
page ever touched as resident.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vdqc.base.diagnostics import InputError


@final
@dataclass(frozen=True)
class StoredTensor:
    """One tensor in one safetensors file."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        with safe_open(self.file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(self.key)
            return tensor.clone()

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first axis."""
        with safe_open(self.file, framework="pt") as handle:
            rows: Tensor = handle.get_slice(self.key)[start:stop]
            return rows.clone()

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


#: Tensors of fewer bytes are kept in memory.
SPILLED_BYTES = 1 << 20
#: Freed blocks of so many bytes go back to the system.
_RETURNED_BYTES = 8 << 20
_M_MMAP_THRESHOLD = -3  # glibc malloc.h


def return_freed_memory() -> None:
    """Have glibc give large blocks back when they are freed; elsewhere nothing.

    Its own threshold rises to 32 MiB, and below that a freed weight stays in the heap: streaming 10
    layers of 5120 channels then held 5.9 GiB (measured), growing with depth. Pieces of a weight
    that is being worked on stay below ours: fresh pages for each would take longer than the work.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def spill(value: Tensor, folder: Path) -> Tensor | StoredTensor:
    """``value`` in a file of its own under ``folder``, if it is large; else ``value`` itself.

    The file is named by what is in it, so that every run gives the same weight the same name.
    """
    if value.nbytes < SPILLED_BYTES:
        return value
    folder.mkdir(parents=True, exist_ok=True)
    dense = value.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{dense.dtype} {list(dense.shape)}".encode())
    digest.update(dense.reshape(-1).view(torch.uint8).numpy().data)
    file = folder / f"{digest.hexdigest()[:32]}.safetensors"
    part = folder / f"{uuid.uuid4().hex}.part"
    save_file({"value": dense}, part)
    part.replace(file)
    return StoredTensor(file, "value", tuple(value.shape), value.dtype)


#: Names that safetensors files give to dtypes.
STORED_DTYPES = {
    "C64": torch.complex64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """Every tensor of a safetensors file, from its header alone.

    Raises InputError for a file that is truncated or not safetensors.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (a handle, not a dictionary)
                view = handle.get_slice(key)
                yield StoredTensor(
                    file, key, tuple(view.get_shape()), STORED_DTYPES[view.get_dtype()]
                )
    except Exception as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{file} is not a readable safetensors file: {error}",
            "it is a pointer of Git LFS: fetch the file itself with 'git lfs pull'"
            if _is_pointer(file)
            else "fetch or export it again",
        ) from error


def _is_pointer(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(42) == b"version https://git-lfs.github.com/spec/v1"


def stored_folder(folder: Path) -> dict[str, StoredTensor]:
    """Name to tensor for a diffusers or transformers weight folder, sharded or not.

    Raises InputError for a file or a weight that the index names and the folder lacks.
    """
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        files = sorted(folder.glob("*.safetensors"))
        return {stored.key: stored for file in files for stored in stored_tensors(file)}
    named = _weight_map(indices[0])
    files = [folder / shard for shard in sorted(set(named.values()))]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(
            f"{folder} lacks {missing[0].name}, which its index names", "fetch that file too"
        )
    found = {stored.key: stored for file in files for stored in stored_tensors(file)}
    if absent := [key for key in named if key not in found]:
        raise InputError(
            f"{folder / named[absent[0]]} lacks the weight '{absent[0]}', which its index puts "
            "there",
            "the file is of another model or another save of it: fetch it again",
        )
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a weight to the name of its file."""
    try:
        named = json.loads(index.read_text())["weight_map"]
        return {str(key): str(file) for key, file in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not an index of weight files: {type(error).__name__}: {error}",
            "fetch or export it again",
        ) from error
