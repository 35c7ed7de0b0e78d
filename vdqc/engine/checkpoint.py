"""Trained parameters, one file a finished piece, so that a killed run goes on where it was.

A file appears whole or not at all (written beside, synced, renamed). Files live in a folder named
by everything that decides their content: the samples, the texts of all passes, the program with its
schemes, the weights. Another recipe, another scheme, another sample: another folder.

Error: a file that cannot be read counts as absent, with a warning.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import Diagnostics
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample

#: Values of each weight that enter a fingerprint.
_SPOTS = 1024


@final
@dataclass(frozen=True)
class Saved:
    """What one piece left: trained parameters by name, numbers."""

    params: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@final
@dataclass(frozen=True)
class Checkpoint:
    """Files of one run; ``folder`` None keeps nothing."""

    folder: Path | None

    def load(self, index: int, piece: str, diagnostics: Diagnostics) -> Saved | None:
        """What ``save`` wrote for this piece, or None."""
        file = self._file(index, piece)
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as handle:
                tensors = {key: handle.get_tensor(key).clone() for key in handle.keys()}  # noqa: SIM118
                facts = json.loads(handle.metadata()["facts"])
        except Exception as error:
            diagnostics.warning(
                piece, "damaged-checkpoint", f"{file} cannot be read ({error}): trained again"
            )
            return None
        return Saved(tensors, facts)

    def save(self, index: int, piece: str, saved: Saved, *, good: bool = True) -> Path | None:
        """Write one finished piece; not ``good``: one that went wrong, beside the finished ones."""
        file = self._file(index, piece)
        if file is None:
            return None
        file = file if good else file.with_suffix(".last-good.safetensors")
        dense = {k: value.detach().cpu().contiguous().clone() for k, value in saved.params.items()}
        write_atomically(file, save(dense, {"facts": json.dumps(dict(saved.facts))}))
        return file

    def _file(self, index: int, piece: str) -> Path | None:
        if self.folder is None:
            return None
        return self.folder / f"{index:03d}-{re.sub(r'[^A-Za-z0-9.]+', '-', piece)}.safetensors"


def write_atomically(file: Path, content: bytes) -> None:
    """``content`` in ``file``, whole or not at all, however the process ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_key(graph: Graph, samples: Iterable[Sample], texts: Iterable[str]) -> str:
    """16 hex digits of the weights (spots of each), the samples (every byte) and ``texts``."""
    digest = hashlib.sha256("\n".join(texts).encode())
    for name in sorted(graph.param_names()):
        value = graph.param(name).detach().flatten()
        spots = value[:: max(1, value.numel() // _SPOTS)]
        digest.update(f"{name} {value.dtype} {value.numel()}".encode())
        digest.update(_bytes(spots))
    for sample in samples:
        leaves, spec = pytree.tree_flatten(dict(sample.inputs))
        place = sample.timestep, sample.trajectory, sample.step, sample.branch
        digest.update(f"{spec} {place}".encode())
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode() + _bytes(leaf))
            else:
                digest.update(repr(leaf).encode())
    return digest.hexdigest()[:16]


def _bytes(value: Tensor) -> bytes:
    dense = value.detach().cpu().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
