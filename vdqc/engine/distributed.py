"""Workers that train one model on different samples: gradients averaged, one of them writes.

Under ``torchrun`` each process runs the whole compilation; the trainer splits the samples. Without
it there is one worker and every function here does nothing.

Error: VdqcError [worker-lost] where a worker is gone. Sums over workers run in another order than
in one process: equal to float rounding.
Source: torch.distributed: gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch import distributed as dist

from vdqc.base.diagnostics import VdqcError

#: How long a worker waits for another before it gives up; caching a block is the longest wait.
PATIENCE = timedelta(minutes=30)


@final
@dataclass(frozen=True)
class Workers:
    """This process among ``size`` workers."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True for the one that writes."""
        return self.rank == 0

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the workers, in float64 and back: one message."""
        if self.size == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
        with _lost_is_named(self):
            dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [
            part.reshape(tensor.shape).to(tensor.dtype)
            for part, tensor in zip(parts, tensors, strict=True)
        ]

    def share(self, value: Any) -> Any:
        """What the first worker holds."""
        if self.size == 1:
            return value
        box = [value]
        with _lost_is_named(self):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every worker is here."""
        self.total([torch.zeros(1)])  # on the CPU: a barrier of nccl asks for a GPU of its own


def is_first_worker() -> bool:
    """True for the process that writes results: the only one, or worker 0 of ``torchrun``."""
    return os.environ.get("RANK", "0") == "0"


def own_place(out: Path) -> Path:
    """Where this process may write: ``out`` for the first worker, else a folder gone at exit."""
    if is_first_worker():
        return out
    folder = tempfile.mkdtemp(prefix="vdqc-worker-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / out.name


@contextmanager
def workers(backend: str | None = None) -> Iterator[Workers]:
    """The workers that ``torchrun`` started, or this process alone.

    Where there are GPUs, nccl takes what is on one and gloo what is on the CPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        yield Workers()
        return
    started = not dist.is_initialized()
    if started:
        backend = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Workers(dist.get_rank(), dist.get_world_size())
    finally:
        if started:
            dist.destroy_process_group()


@contextmanager
def _lost_is_named(group: Workers) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistBackendError is one
        raise VdqcError(
            f"worker {group.rank} of {group.size} lost another one: {str(error).splitlines()[0]}",
            "it was killed or ran out of memory: see its own output",
            "run the same command again: with a checkpoint, finished blocks are not trained again",
            code="worker-lost",
        ) from error
