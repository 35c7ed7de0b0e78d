"""Kernel: one op of the ``vdqc_kernels::`` dialect, its truth, its routes and its price.

``define`` registers the op with torch (functional: nothing is mutated) and returns the description
that lowering chooses by. The reference runs wherever no faster route is registered; a GPU route is
added under the same name for dispatch key CUDA, so the graph does not change between machines.
Schemas speak of codes, scales and zero points only: integer results are equal on every target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch

from vdqc.base.scheme import QuantSpec
from vdqc.base.target import Target


@final
@dataclass(frozen=True)
class LinearProblem:
    """One linear to compute: ``[m, k] x [n, k]^T`` in a model of dtype ``dtype``.

    Attributes:
        weight, input: how the operands are quantised; None for float.
        integer_groups: group scales are whole multiples of one scale per output channel.
    """

    m: int
    n: int
    k: int
    dtype: torch.dtype
    weight: QuantSpec | None
    input: QuantSpec | None
    integer_groups: bool = False


@final
@dataclass(frozen=True)
class AttentionProblem:
    """One attention: ``queries`` x ``keys`` scores for each of ``batch * heads``, ``width``
    channels.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    dtype: torch.dtype
    masked: bool = False


Problem = LinearProblem | AttentionProblem


@final
@dataclass(frozen=True)
class Cost:
    """What one call does; ``us`` prices it on a machine.

    Attributes:
        ops: multiplications and additions, by format (``int8``, ``bf16``, ``fp32``), and the other
            units of ``Target.peak``.
        bytes: read and written in main memory.
        launch_us: fixed time beside that of calling.
        calls: of an op; each takes ``Target.call_us``.
        gpu: what the same call does on a GPU, where another route is another amount of work.
    """

    ops: Mapping[str, float]
    bytes: float
    launch_us: float = 0.0
    calls: float = 1.0
    gpu: Cost | None = None

    @staticmethod
    def of(data: Mapping[str, Any]) -> Cost:
        """The cost that ``dataclasses.asdict`` made ``data`` of."""
        gpu = data.get("gpu")
        return Cost(**{**data, "gpu": None if gpu is None else Cost.of(gpu)})

    def us(self, target: Target) -> float:
        """Time in microseconds; a format without a unit on ``target`` runs as fp32.

        On a GPU the roofline: the longer of computing and moving. A CPU's quantisers, products and
        epilogues are loops of their own and follow each other: the sum of both.
        """
        if self.gpu is not None and target.device == "cuda":
            return self.gpu.us(target)
        slowest = target.peak["fp32"]
        compute = sum(n / target.peak.get(form, slowest) for form, n in self.ops.items()) * 1e-6
        moving = self.bytes / target.bandwidth * 1e-3
        both = compute + moving if target.device == "cpu" else max(compute, moving)
        return self.calls * target.call_us + self.launch_us + both

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other."""
        forms = {*self.ops, *other.ops}
        ops = {f: self.ops.get(f, 0.0) + other.ops.get(f, 0.0) for f in sorted(forms)}
        launch_us, calls = self.launch_us + other.launch_us, self.calls + other.calls
        plain = self.gpu is None and other.gpu is None
        gpu = None if plain else (self.gpu or self) + (other.gpu or other)
        return Cost(ops, self.bytes + other.bytes, launch_us, calls, gpu)

    def __mul__(self, times: float) -> Cost:
        """``times`` such calls."""
        ops = {form: count * times for form, count in self.ops.items()}
        gpu = None if self.gpu is None else self.gpu * times
        return Cost(ops, self.bytes * times, self.launch_us * times, self.calls * times, gpu)


#: Peak format in which a float dtype is multiplied.
FLOAT_FORMAT: Mapping[torch.dtype, str] = {
    torch.float64: "fp32",
    torch.float32: "fp32",
    torch.float16: "bf16",
    torch.bfloat16: "bf16",
}


#: What takes no time.
NOTHING = Cost({}, 0.0, calls=0.0)


@final
@dataclass(frozen=True)
class Kernel:
    """One op; the functions are those given to ``define``.

    Attributes:
        supports: why a problem cannot run on a target, or None if it can.
        cost: what a problem costs.
        spelled: the same function in plain torch ops, around opaque ones where needed, for targets
            (keys are device types) whose compiler fuses it with its neighbours.
        cuda: the route on a GPU, if there is one.
    """

    name: str
    op: torch._ops.OpOverload
    reference: Callable[..., Any]
    supports: Callable[[Any, Target], str | None]
    cost: Callable[[Any], Cost]
    spelled: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    cuda: Callable[..., Any] | None = None


def define(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    supports: Callable[[Any, Target], str | None] = lambda problem, target: None,
    cost: Callable[[Any], Cost] = lambda problem: Cost({}, 0.0),
    spelled: Mapping[str, Callable[..., Any]] | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Kernel:
    """Register ``vdqc_kernels::<name>`` and describe it.

    reference  torch code that defines the result; its annotations are the schema
    fake       shapes and dtypes of the result, for tracing
    cpu        the fastest route on a CPU, if it is not the reference
    cuda       the route on an NVIDIA GPU; imports ``vdqc.kernels.gpu`` when it is called
    tags       what torch is to know of the op
    """
    op = torch.library.custom_op(f"vdqc_kernels::{name}", reference, mutates_args=(), tags=tags)
    op.register_fake(fake)
    if cpu is not None:
        op.register_kernel("cpu", cpu)
    if cuda is not None:
        op.register_kernel("cuda", cuda)
    overload = getattr(torch.ops.vdqc_kernels, name).default
    return Kernel(name, overload, reference, supports, cost, spelled or {}, cuda)
