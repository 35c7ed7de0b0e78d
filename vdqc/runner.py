"""Runs a compiled model: a whole generation of its source, or one forward pass on its probe."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.check import counted_calls
from vdqc.compiler import PROBE
from vdqc.ir.signature import IntInput, Signature
from vdqc.ir.source import load_source
from vdqc.loading import load
from vdqc.report import png


@final
@dataclass(frozen=True)
class RunResult:
    """Output tensors by name (``video`` for a generation), and how long it took."""

    tensors: dict[str, Tensor]
    seconds: float
    what: str


@torch.no_grad()
def run(
    artifact: Path,
    model: Path | None = None,
    *,
    seed: int = 0,
    component: str | None = None,
    reference: bool = False,
    progress: Callable[[Any, str], Any] = lambda items, description: items,
) -> RunResult:
    """``generate(compiled, seed)`` of the source ``model``, else one forward pass on the probe.

    ``reference`` as for ``load``.
    """
    compiled = load(artifact, reference=reference)
    if model is not None:
        source = load_source(model, component=component)
        if source.generate is None:
            raise InputError(
                f"expected {model} to have generate(model, seed), it has none",
                "without --model one forward pass runs on the probe in the artifact",
            )
        start = time.perf_counter()
        with counted_calls(compiled, progress(itertools.count(), "generate")):
            video = source.generate(compiled, seed)
        return RunResult({"video": video}, time.perf_counter() - start, f"generate, seed {seed}")
    inputs = probe_inputs(compiled.signature, load_file(artifact / PROBE))
    start = time.perf_counter()
    outputs = compiled.program(*inputs)
    seconds = time.perf_counter() - start
    tensors = {f"output_{i}": value for i, value in enumerate(outputs) if isinstance(value, Tensor)}
    return RunResult(tensors, seconds, "one forward pass on the probe")


def probe_inputs(signature: Signature, probe: Mapping[str, Tensor]) -> list[Any]:
    """The program's inputs from the tensors that compile kept; integers were kept as tensors."""
    integers = {entry.path for entry in signature.inputs if isinstance(entry, IntInput)}
    leaves = {path: int(v) if path in integers else v for path, v in probe.items()}
    return signature.check({**signature.statics, **leaves})


def write_frames(result: RunResult, folder: Path) -> None:
    """Every frame of every generated video as ``video<n>_frame<f>.png``; raises InputError."""
    video = result.tensors.get("video")
    if video is None:
        raise InputError("expected a generated video, got one forward pass", "give --model")
    if video.ndim not in (4, 5):
        raise InputError(
            f"expected images [N, C, H, W] or videos [N, C, F, H, W], generate() gave "
            f"{list(video.shape)}"
        )
    video = video if video.ndim == 5 else video.unsqueeze(2)
    folder.mkdir(parents=True, exist_ok=True)
    for n, frames in enumerate(video):
        for f in range(frames.shape[1]):
            (folder / f"video{n}_frame{f:03d}.png").write_bytes(png.encode(frames[:, f]))


def write_tensors(result: RunResult, file: Path) -> None:
    """The output tensors as safetensors."""
    copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in result.tensors.items()}
    save_file(copies, file)
