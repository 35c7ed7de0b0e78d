"""Shared memory of the GPU that is here, or of the target for one that is not.

A GPU between two targets runs the kernels of the older one and may have less: sm86 has 99 KiB
where sm80 has 163.

Error: none.
Source: ours.
"""

import functools
from typing import Any

import torch

from vdqc.base.target import TARGETS
from vdqc.kernels.gpu.runtime import arch_of


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on ``device``; of the target, for a GPU that is not there."""
    if device.type != "cuda":
        return TARGETS[arch_of(device)].shared_memory
    return of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def of_gpu(index: int) -> int:
    """Bytes that a program may have on the GPU of that index."""
    found: Any = torch.cuda.get_device_properties(index)  # torch's stubs lack the attribute
    return int(found.shared_memory_per_block_optin)


def has_less(index: int, arch: str) -> bool:
    """True if the GPU of that index has less than ``arch``, whose kernels it runs."""
    return of_gpu(index) < TARGETS[arch].shared_memory
