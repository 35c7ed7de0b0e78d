"""Runs a compiled model: a whole generation of its source, or one forward pass on its probe."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import InputError
from vdqc.compiled import load
from vdqc.compiler import PROBE
from vdqc.ir.source import load_source
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
    progress: Callable[[Any, str], Any] = lambda items, description: items,
) -> RunResult:
    """``generate(compiled, seed)`` of the source ``model``, else one forward pass on the probe."""
    compiled = load(artifact)
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
    inputs = load_file(artifact / PROBE)
    start = time.perf_counter()
    outputs = compiled.run_leaves(inputs)
    seconds = time.perf_counter() - start
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    tensors = {f"output_{index}": leaf for index, leaf in enumerate(leaves)}
    return RunResult(tensors, seconds, "one forward pass on the probe")


@contextmanager
def counted_calls(model: nn.Module, ticks: Iterable[Any]) -> Iterator[None]:
    """Advance ``ticks``, a progress bar, at every call of ``model``."""
    ticking = iter(ticks)
    handle = model.register_forward_hook(lambda *_: (next(ticking, None), None)[1])
    try:
        yield
    finally:
        handle.remove()
        close = getattr(ticks, "close", None)
        if close is not None:
            close()


def write_frames(result: RunResult, folder: Path) -> None:
    """Every frame of every generated video as ``video<n>_frame<f>.png``; raises InputError."""
    video = result.tensors.get("video")
    if video is None:
        raise InputError("expected a generated video, got one forward pass", "give --model")
    video = video if video.ndim == 5 else video.unsqueeze(2)
    folder.mkdir(parents=True, exist_ok=True)
    for n, frames in enumerate(video):
        for f in range(frames.shape[1]):
            (folder / f"video{n}_frame{f:03d}.png").write_bytes(png.encode(frames[:, f]))


def write_tensors(result: RunResult, file: Path) -> None:
    """The output tensors as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in result.tensors.items()}, file)
