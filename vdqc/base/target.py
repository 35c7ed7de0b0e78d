"""Facts of a machine that lowering chooses by: what it multiplies, how fast, how fast it reads.

Peaks are dense (no structured sparsity). The CPU's are per core, of the libraries that run there,
measured on one with AVX512-VNNI and AVX512-BF16 but no AMX; ``vdqc.lowering.machine`` measures the
machine at hand. Source: NVIDIA data sheets for the GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from vdqc.base.diagnostics import ConfigError, nearest


@final
@dataclass(frozen=True)
class Target:
    """One machine. ``peak`` maps a multiply format to tera-operations per second.

    Attributes:
        name: the word the user types: ``cpu``, ``sm80`` ... ``sm120``.
        device: torch device type.
        peak: ``fp32 | bf16 | int8 | fp8 | int4`` to T(FL)OP/s; absent where there is no such unit.
            ``softmax``, values: on a GPU its exponentials, 16 a clock and multiprocessor. On a CPU
            also ``sdpa`` and ``conv``, operations of torch's own attention and convolution;
            ``pointwise``, light operations on one value inside a fused loop.
        bandwidth: main-memory GB/s.
        shared_memory: bytes per thread block (0 on the CPU).
        call_us: fixed time of calling one op.
    """

    name: str
    device: str
    peak: Mapping[str, float]
    bandwidth: float
    shared_memory: int = 0
    call_us: float = 5.0

    @staticmethod
    def parse(text: str) -> Target:
        """The target of that name; ``auto`` is the GPU that is there, else the CPU."""
        if text == "auto":
            return detect()
        if text not in TARGETS:
            raise ConfigError(f"unknown target '{text}'", nearest(text, [*TARGETS, "auto"]))
        return TARGETS[text]

    def __str__(self) -> str:
        return self.name


#: One Zen 5 core: MKL, oneDNN and ATen.
CPU_PEAK: Mapping[str, float] = {
    "fp32": 0.09,
    "bf16": 0.38,
    "int8": 0.82,
    "sdpa": 0.08,
    "conv": 0.15,
    "softmax": 0.003,
    "pointwise": 0.022,
}
_ALL = (
    Target("cpu", "cpu", CPU_PEAK, 20.0, call_us=30.0),
    Target(
        "sm80",
        "cuda",
        {"fp32": 19.5, "bf16": 312, "int8": 624, "int4": 1248, "softmax": 2.4},
        2039,
        163 << 10,
    ),
    Target(
        "sm89",
        "cuda",
        {"fp32": 91, "bf16": 181, "int8": 362, "fp8": 362, "softmax": 5.7},
        864,
        99 << 10,
    ),
    Target(
        "sm90",
        "cuda",
        {"fp32": 67, "bf16": 989, "int8": 1979, "fp8": 1979, "softmax": 3.7},
        4800,
        227 << 10,
    ),
    Target(
        "sm100",
        "cuda",
        {"fp32": 80, "bf16": 2250, "int8": 4500, "fp8": 4500, "softmax": 4.4},
        8000,
        227 << 10,
    ),
    Target(
        "sm120",
        "cuda",
        {"fp32": 105, "bf16": 210, "int8": 838, "fp8": 419, "softmax": 6.5},
        1792,
        99 << 10,
    ),
)
TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}


def detect() -> Target:
    """The target of this machine's first GPU (see ``of_capability``), or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return TARGETS["cpu"]
    major, minor = torch.cuda.get_device_capability()
    found = of_capability(major, minor)
    if found is None:
        raise ConfigError(
            f"this GPU is sm{major}{minor}, for which vdqc has no target",
            "choose one with --target",
        )
    return found


def of_capability(major: int, minor: int) -> Target | None:
    """The newest target of a GPU's major version that is no newer than it; None if there is none.

    It stands in for GPUs between two: sm80 for sm86 and sm87, sm100 for sm103, sm120 for sm121.
    Their peaks differ and their shared memory may be less, which launches look at.
    """
    fits = [n for n in range(minor, -1, -1) if f"sm{major}{n}" in TARGETS]
    return TARGETS[f"sm{major}{fits[0]}"] if fits else None
