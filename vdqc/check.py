"""check(): how far a compiled model is from the float model, step by step and as a whole video.

Step-locked (teacher-forced) error compares both models on the same inputs along the float model's
own trajectory, so that it measures the compiled model and not the chaos of sampling: an early
rounding error moves a free-running trajectory, and its PSNR then compares two different videos.
Both are reported, because a user sees the second.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from vdqc.base import metrics, numerics
from vdqc.base.diagnostics import InputError
from vdqc.calls import flat_output, users_code
from vdqc.ir.source import Source

Progress = Callable[[Any, str], Any]

_ADVICE = "check that this is the model that the artifact was compiled from"


@final
@dataclass(frozen=True)
class StepError:
    """Error of the compiled model on one call of the float trajectory.

    ``timestep`` is None where the call names none.
    """

    call: int
    timestep: float | None
    relative_error: float
    sqnr_db: float


@final
@dataclass(frozen=True)
class VideoQuality:
    """One whole generation by both models from the same seed; NaN-free by construction.

    ``accuracy`` and ``accuracy_float`` are what the source's own ``accuracy(video, seed)`` says,
    None if it has none.
    """

    seed: int
    psnr_db: float
    ssim: float
    flicker: float
    flicker_float: float
    accuracy: float | None = None
    accuracy_float: float | None = None


@final
@dataclass(frozen=True)
class Timing:
    """Median seconds of a forward pass, both models in turns, in one process."""

    float_seconds: float
    compiled_seconds: float
    runs: int
    how: str

    @property
    def speedup(self) -> float:
        """How many times faster the compiled model is."""
        return self.float_seconds / self.compiled_seconds


@final
@dataclass(frozen=True)
class CheckResult:
    """Everything ``vdqc check`` found; ``frames`` are the videos of the first seed, if any."""

    steps: tuple[StepError, ...]
    videos: tuple[VideoQuality, ...]
    timings: tuple[Timing, ...]
    bytes_float: int
    bytes_compiled: int
    frames: tuple[Tensor, Tensor] | None = field(default=None, compare=False)

    @property
    def sqnr_db(self) -> float:
        """SQNR over all calls together: each call counts by the energy of its error."""
        errors = [step.relative_error**2 for step in self.steps]
        mean = sum(errors) / len(errors)
        return math.inf if mean == 0 else -10 * math.log10(mean)

    @property
    def worst(self) -> StepError:
        """The call with the greatest relative error."""
        return max(self.steps, key=lambda step: step.relative_error)

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; infinities become null."""
        data = asdict(replace(self, frames=None), dict_factory=_finite)
        data.pop("frames")
        return {**data, "sqnr_db": _number(self.sqnr_db), "worst_call": self.worst.call}


@final
@dataclass(frozen=True)
class Thresholds:
    """What must be reached; None where nothing was asked."""

    min_sqnr: float | None = None
    min_psnr: float | None = None
    min_ssim: float | None = None
    min_accuracy: float | None = None

    def misses(self, result: CheckResult) -> list[str]:
        """One sentence per threshold that ``result`` misses; InputError if it was not measured."""
        videos = result.videos
        measured = {
            "min_sqnr": [result.sqnr_db],
            "min_psnr": [video.psnr_db for video in videos],
            "min_ssim": [video.ssim for video in videos],
            "min_accuracy": [v.accuracy for v in videos if v.accuracy is not None],
        }
        found = []
        for name, wanted in asdict(self).items():
            if wanted is None:
                continue
            what = name.removeprefix("min_")
            values = measured[name]
            if not values:
                raise InputError(
                    f"expected a whole generation to measure {what}, got none",
                    "the model file needs generate(model, seed)"
                    + (" and accuracy(video, seed)" if what == "accuracy" else ""),
                )
            worst = min(values)
            if worst < wanted:
                found.append(f"{what} {worst:.4g} is below {wanted:g}")
        return found


@torch.no_grad()
def check(
    compiled: nn.Module,
    source: Source,
    *,
    seeds: Sequence[int] = (0,),
    generation: bool = True,
    timing_runs: int = 5,
    torch_compile: bool = False,
    progress: Progress = lambda items, description: items,
) -> CheckResult:
    """Compare ``compiled`` with the model of ``source``.

    The trajectory is that of ``source.generate`` for the first seed, else the samples. Time is
    measured on the first sample, and under ``torch.compile`` too if asked. Raises InputError.
    """
    steps: list[StepError] = []
    videos: list[VideoQuality] = []
    frames: tuple[Tensor, Tensor] | None = None
    if source.generate is not None and generation:
        for seed in seeds:
            calls = range(len(steps)) if steps else itertools.count()
            bar = progress(calls, f"float model, seed {seed}")
            first = seed == seeds[0]
            locked = step_locked(source.model, compiled, steps) if first else nullcontext()
            with counted_calls(source.model, bar), locked, users_code("generate()", _ADVICE):
                reference = source.generate(source.model, seed)
            bar = progress(range(len(steps)), f"compiled model, seed {seed}")
            with counted_calls(compiled, bar), users_code("generate()", _ADVICE):
                video = source.generate(compiled, seed)
            videos.append(_quality(source, video, reference, seed))
            frames = frames or (reference.detach().cpu(), video.detach().cpu())
    else:
        with step_locked(source.model, compiled, steps):
            for sample in progress(list(source.samples), "step-locked"):
                with users_code("the float model", _ADVICE):
                    source.model(**sample.inputs)
    if not steps:
        raise InputError(
            "expected generate(model, seed) to call the model it was given, it never did",
            "the step-locked error is measured on those calls",
        )
    inputs = source.samples[0].inputs
    timings = time_both(source.model, compiled, inputs, timing_runs, "eager", progress)
    if torch_compile:
        compiled.compile()
        faster = torch.compile(source.model)
        timings += time_both(faster, compiled, inputs, timing_runs, "torch.compile", progress)
    return CheckResult(
        tuple(steps),
        tuple(videos),
        timings,
        weight_bytes(source.model),
        weight_bytes(compiled),
        frames,
    )


@contextmanager
def step_locked(model: nn.Module, compiled: nn.Module, steps: list[StepError]) -> Iterator[None]:
    """Inside, every call of ``model`` is repeated by ``compiled`` and compared, into ``steps``.

    A hook, not a wrapper: whatever asks the model for its config or dtype gets the model itself.
    """

    def compare(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        actual, expected = flat_output(compiled(*args, **kwargs)), flat_output(output)
        error = numerics.relative_error(actual, expected)
        if not math.isfinite(error):
            raise InputError(
                f"call {len(steps)}: an output holds NaN or infinity",
                "expected finite outputs of both models: check the float model first",
                code="not-finite",
            )
        sqnr = numerics.sqnr_db(actual, expected)
        steps.append(StepError(len(steps), _timestep(kwargs), error, sqnr))

    handle = model.register_forward_hook(compare, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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


def time_both(
    model: Callable[..., Any],
    compiled: nn.Module,
    inputs: Mapping[str, Any],
    runs: int,
    how: str,
    progress: Progress = lambda items, description: items,
) -> tuple[Timing, ...]:
    """Median time of both models, one call each in turns, after one call that is not counted."""
    if runs < 1:
        return ()
    models: tuple[Callable[..., Any], ...] = (model, compiled)
    seconds: tuple[list[float], list[float]] = ([], [])
    for run in progress(range(runs + 1), f"time, {how}"):
        for index, module in enumerate(models):
            start = time.perf_counter()
            module(**inputs)
            if run:
                seconds[index].append(time.perf_counter() - start)
    medians = [statistics.median(values) for values in seconds]
    return (Timing(medians[0], medians[1], runs, how),)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _quality(source: Source, video: Tensor, reference: Tensor, seed: int) -> VideoQuality:
    accuracy = source.accuracy
    return VideoQuality(
        seed,
        metrics.psnr_db(video, reference),
        metrics.ssim(video, reference),
        metrics.flicker(video),
        metrics.flicker(reference),
        accuracy(video, seed) if accuracy else None,
        accuracy(reference, seed) if accuracy else None,
    )


def _timestep(kwargs: Mapping[str, Any]) -> float | None:
    value = kwargs.get("timestep", kwargs.get("t"))
    if isinstance(value, Tensor):
        return float(value.flatten()[0]) if value.numel() else None
    return float(value) if isinstance(value, (int, float)) else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in pairs}
