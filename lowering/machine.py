"""How fast the CPU at hand is: a target with the rates of its libraries, measured in a second.

Lowering chooses by ``TARGETS["cpu"]``, so that a model compiles to the same program everywhere;
what is predicted for the user is priced with these. Rates are those of the threads that torch uses
now. Every rate is the best of a few calls of what programs call:

============ =========================================================================
fp32, bf16    ``linear`` of 1024 x 1536 x 1536
int8          ``_int_mm`` of the same size
sdpa          torch's attention, 4 heads, 1024 x 1024 scores of 64
conv          ``conv2d`` of 64 channels, 3 x 3, 64 x 64 pixels
softmax       2^x of bfloat16[512, 4096] and its sums, as our attention has it
pointwise     an eighth of the time of ``exp`` of float32 values that stay in cache
bandwidth     an addition of arrays of 32 MB
call_us       an integer product of 8 x 16 x 16 through vdqc's own op
============ =========================================================================

Source: measured, for ``pointwise`` in ``vdqc.lowering.between``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn import functional

from vdqc.base.target import Target
from vdqc.kernels.integer import INT8_MATMUL

#: Seconds spent on one rate, and calls at least.
_SECONDS, _CALLS = 0.08, 5
#: Light operations in a fused loop that take as long as one ``exp``.
EXP_OPERATIONS = 8.0


def measured(target: Target) -> Target:
    """``target`` as fast as this machine is, if it is the CPU; itself if not."""
    return _measured(target.name, torch.get_num_threads()) if target.device == "cpu" else target


def rates(target: Target) -> dict[str, float]:
    """What it is priced by: T(FL)OP/s by format, ``bandwidth`` in GB/s, ``call_us``."""
    return {**target.peak, "bandwidth": target.bandwidth, "call_us": target.call_us}


@functools.cache
def _measured(name: str, threads: int) -> Target:
    """``threads`` is a key of the cache: torch uses them anyway."""
    target = Target.parse(name)
    with torch.inference_mode():
        peak = {form: round(rate() * 1e-12, 5) for form, rate in _RATES.items()}
        return replace(
            target,
            peak={**target.peak, **peak},
            bandwidth=round(_bandwidth(), 1),
            call_us=round(_call_us(), 1),
        )


def _seconds(call: Callable[[], object]) -> float:
    """Least seconds of a call, after two that are not counted: others may use the machine too."""
    call()
    call()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < _CALLS or time.perf_counter() - begin < _SECONDS:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def _linear(dtype: torch.dtype) -> float:
    x, w = (torch.randn(rows, 1536).to(dtype) for rows in (1024, 1536))
    return 2 * 1024 * 1536 * 1536 / _seconds(lambda: functional.linear(x, w))


def _int8() -> float:
    x, w = (torch.randint(-127, 128, (rows, 1536), dtype=torch.int8) for rows in (1024, 1536))
    return 2 * 1024 * 1536 * 1536 / _seconds(lambda: torch._int_mm(x, w.T))


def _sdpa() -> float:
    q, k, v = torch.randn(3, 1, 4, 1024, 64)
    attention = functional.scaled_dot_product_attention
    return 4 * 4 * 1024 * 1024 * 64 / _seconds(lambda: attention(q, k, v))


def _conv() -> float:
    x, w = torch.randn(1, 64, 64, 64), torch.randn(64, 64, 3, 3)
    return 2 * 9 * 64 * 64 * 64 * 64 / _seconds(lambda: functional.conv2d(x, w, padding=1))


def _softmax() -> float:
    x = torch.randn(512, 4096).bfloat16()
    out = torch.empty_like(x)  # in place, repeated calls would soon see nothing but infinity
    return x.numel() / _seconds(lambda: torch.exp2(x, out=out).sum(-1))


def _pointwise() -> float:
    x = torch.randn(2**16 * torch.get_num_threads())
    out = torch.empty_like(x)
    return EXP_OPERATIONS * x.numel() / _seconds(lambda: torch.exp(x, out=out))


def _bandwidth() -> float:
    """GB/s."""
    x, y, out = torch.ones(3, 2**23)
    return 3 * x.nbytes * 1e-9 / _seconds(lambda: torch.add(x, y, out=out))


def _call_us() -> float:
    x, w = (torch.ones(rows, 16, dtype=torch.int8) for rows in (8, 16))
    return 1e6 * _seconds(lambda: INT8_MATMUL.op(x, w))


_RATES: dict[str, Callable[[], float]] = {
    "fp32": functools.partial(_linear, torch.float32),
    "bf16": functools.partial(_linear, torch.bfloat16),
    "int8": _int8,
    "sdpa": _sdpa,
    "conv": _conv,
    "softmax": _softmax,
    "pointwise": _pointwise,
}
