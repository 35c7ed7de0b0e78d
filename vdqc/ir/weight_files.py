"""Writes weights of any total size to safetensors files, one tensor in memory at a time.

A safetensors file is 8 bytes of header length, a JSON header, and the raw bytes of every tensor in
a row: the header follows from shapes alone, so that bytes can be copied as they are read. Files
above ``shard_bytes`` are split and listed in an index, as Hugging Face libraries do.
Source: the format's own description, github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from vdqc.base.diagnostics import ArtifactError
from vdqc.ir.weights import STORED_DTYPES, StoredTensor

SHARD_BYTES = 2_000_000_000
_CHUNK_BYTES = 64 << 20
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}

Weight = Tensor | StoredTensor
#: Wraps an iterable with a progress bar: ``(items, description) -> items``.
Progress = Callable[[Any, str], Any]


def write_weights(
    folder: Path,
    weights: Mapping[str, Weight],
    shard_bytes: int | None = None,
    *,
    write: Callable[[Path, Mapping[str, Weight]], None] | None = None,
    progress: Progress = lambda items, description: items,
) -> list[str]:
    """Write ``weights.safetensors``, or shards and their index; returns the names of the files.

    ``write(file, weights)`` writes each file, by default ``write_file``.
    """
    files = weight_shards(weights, shard_bytes)
    for name, keys in progress(list(files.items()), "write weights"):
        (write or write_file)(folder / name, {key: weights[key] for key in keys})
    if len(files) == 1:
        return list(files)
    index = {
        "metadata": {"total_size": sum(map(weight_bytes, weights.values()))},
        "weight_map": {key: name for name, keys in files.items() for key in keys},
    }
    index_name = "weights.safetensors.index.json"
    (folder / index_name).write_text(json.dumps(index, indent=1))
    return [*files, index_name]


def weight_shards(
    weights: Mapping[str, Weight], shard_bytes: int | None = None
) -> dict[str, list[str]]:
    """Names of the weights in each file, by the name of the file; ``SHARD_BYTES`` unless given."""
    shards = _shards(weights, shard_bytes or SHARD_BYTES)
    if len(shards) == 1:
        return {"weights.safetensors": shards[0]}
    return {
        f"weights-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def write_file(
    file: Path, weights: Mapping[str, Weight], about: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file; stored tensors are copied in slices of some rows.

    Tensors are laid out by falling size of their elements, so that each starts aligned.
    """
    order = sorted(weights, key=lambda key: -weights[key].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(about or {})}}
    end = 0
    for key in order:
        start, end = end, end + weight_bytes(weights[key])
        header[key] = {
            "dtype": _dtype_name(key, weights[key].dtype),
            "shape": list(weights[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for key in order:
            _copy(weights[key], stream)


def weight_bytes(weight: Weight) -> int:
    """Bytes that ``weight`` takes in a file."""
    return math.prod(weight.shape) * weight.dtype.itemsize


def _shards(weights: Mapping[str, Weight], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for key, weight in weights.items():
        if shards[-1] and filled + weight_bytes(weight) > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += weight_bytes(weight)
    return shards


def _dtype_name(key: str, dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise ArtifactError(f"weight '{key}' has dtype {dtype}, which safetensors cannot hold")
    return _NAMES[dtype]


def _copy(weight: Weight, stream: IO[bytes]) -> None:
    for part in _parts(weight):
        flat = part.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            stream.write(flat.view(torch.uint8).numpy().data)


def _parts(weight: Weight) -> Iterator[Tensor]:
    if isinstance(weight, Tensor):
        yield weight
    elif not weight.shape or weight.nbytes <= _CHUNK_BYTES:
        yield weight.read()
    else:
        rows = max(1, _CHUNK_BYTES * weight.shape[0] // weight.nbytes)
        for start in range(0, weight.shape[0], rows):
            yield weight.read_rows(start, min(start + rows, weight.shape[0]))
