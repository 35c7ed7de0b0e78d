"""Times of GPU functions: events around each call, a cold L2, ours and the peers in turns.

Before each call a buffer larger than L2 is written, and the stream then waits as long as the host
takes to enqueue the call, so that the events stand around the work and not around Python. Functions
take turns: a change of clocks falls on all alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

Call = Callable[[], Any]

#: Bytes written before each call; L2 of an H200 holds 60 MB.
_FLUSH = 256 << 20
_WARM_UP = 2
#: Calls of one function: at least, at most, and the time (ms) beyond which it is enough.
_LEAST, _MOST, _ENOUGH = 5, 60, 200.0
#: A call longer than these (ms) is timed three times, or once, not ``_LEAST`` times.
_LONG, _VERY_LONG = 500.0, 5000.0
#: ``torch.cuda._sleep`` counts clock cycles; this many go by in a millisecond at most.
_CYCLES_PER_MS = 2_000_000


@final
@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    p50: float
    p20: float
    p80: float
    count: int


def summarise(samples: list[float]) -> Times:
    """Percentiles of ``samples``."""
    if len(samples) == 1:
        return Times(samples[0], samples[0], samples[0], 1)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Times(statistics.median(samples), cuts[1], cuts[7], len(samples))


def time_together(functions: Mapping[str, Call], enough: float = _ENOUGH) -> dict[str, Times]:
    """Times of each function; they take turns."""
    flush = _flush_buffer()
    waits = {name: _warm_up(call) for name, call in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    waiting = set(functions)
    while waiting:
        for name, call in functions.items():
            if name in waiting:
                samples[name].append(_once(call, flush, waits[name]))
                if _is_enough(samples[name], enough):
                    waiting.discard(name)
    return {name: summarise(found) for name, found in samples.items()}


def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH, dtype=torch.int8, device="cuda")


def _is_enough(samples: list[float], enough: float) -> bool:
    least = _LEAST if samples[0] < _LONG else 3 if samples[0] < _VERY_LONG else 1
    return len(samples) >= _MOST or (len(samples) >= least and sum(samples) >= enough)


def _warm_up(call: Call) -> float:
    """Milliseconds that the host takes to enqueue ``call``, once it is compiled."""
    host = 0.0
    for _ in range(_WARM_UP):
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        if time.perf_counter() - start > 1.0:
            break
    return min(host * 1e3, 5.0)


def _once(call: Call, flush: torch.Tensor, wait_ms: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush.zero_()
    torch.cuda._sleep(int(1.5 * wait_ms * _CYCLES_PER_MS))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def median_ms(call: Call) -> float:
    """The median of one function alone."""
    return time_together({"": call})[""].p50


def peak_bytes(call: Call) -> int:
    """Device memory that ``call`` needs beyond what is allocated already."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before
