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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from vdqc.base import metrics, numerics
from vdqc.base.diagnostics import InputError
from vdqc.calls import flat_output, users_code
from vdqc.check_result import CheckResult, StepError, Timing, VideoQuality
from vdqc.ir.source import Source
from vdqc.observe import is_observable, site_times
from vdqc.site_errors import SiteErrors

Progress = Callable[[Any, str], Any]

#: Elements of an output that the free-running comparison keeps, about.
OUTPUT_LIMIT = 1 << 18

_ADVICE = "check that this is the model that the artifact was compiled from"


@torch.no_grad()
def check(
    compiled: nn.Module,
    source: Source,
    *,
    seeds: Sequence[int] = (0,),
    generation: bool = True,
    timing_runs: int = 5,
    torch_compile: bool = False,
    sites: bool = True,
    predicted: Mapping[str, float] | None = None,
    progress: Progress = lambda items, description: items,
) -> CheckResult:
    """Compare ``compiled`` with the model of ``source``, site by site unless ``sites`` is False.

    The trajectory is that of ``source.generate`` for the first seed, else the samples. Time is
    measured on the first sample, and under ``torch.compile`` too if asked; ``predicted`` is kept
    beside it (``vdqc.forecast``). Raises InputError.
    """
    steps: list[StepError] = []
    videos: list[VideoQuality] = []
    frames: tuple[Tensor, Tensor] | None = None
    recorder = SiteErrors(source.model, compiled) if sites and is_observable(compiled) else None
    if source.generate is not None and generation:
        for seed in seeds:
            calls = range(len(steps)) if steps else itertools.count()
            bar = progress(calls, f"float model, seed {seed}")
            first = seed == seeds[0]
            outputs = Outputs()
            with ExitStack() as looking:
                looking.enter_context(counted_calls(source.model, bar))
                if first:
                    looking.enter_context(_locked(source.model, compiled, steps, recorder))
                    looking.enter_context(outputs.kept(source.model))
                looking.enter_context(users_code("generate()", _ADVICE))
                reference = source.generate(source.model, seed)
            bar = progress(range(len(steps)), f"compiled model, seed {seed}")
            compared = outputs.compared(compiled) if first else nullcontext()
            with counted_calls(compiled, bar), compared, users_code("generate()", _ADVICE):
                video = source.generate(compiled, seed)
            if first:
                free = itertools.chain(outputs.errors, itertools.repeat(None))
                steps = [
                    replace(step, free_error=error)
                    for step, error in zip(steps, free, strict=False)
                ]
            if reference.ndim in (4, 5):  # PSNR is of frames
                videos.append(_quality(source, video, reference, seed))
            frames = frames or (reference.detach().cpu(), video.detach().cpu())
    else:
        with _locked(source.model, compiled, steps, recorder):
            for sample in progress(list(source.samples), "step-locked"):
                with users_code("the float model", _ADVICE):
                    source.model(**sample.inputs)
    if not steps:
        raise InputError(
            "expected generate(model, seed) to call the model it was given, it never did",
            "the step-locked error is measured on those calls",
        )
    inputs = source.samples[0].inputs
    times = site_times(compiled, inputs, timing_runs, progress)
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
        recorder.errors() if recorder else (),
        times,
        predicted or {},
        recorder.masks if recorder else {},
    )


@contextmanager
def _locked(
    model: nn.Module, compiled: nn.Module, steps: list[StepError], recorder: SiteErrors | None
) -> Iterator[None]:
    """``step_locked``, site by site as well where the compiled model shows its sites."""
    with recorder.recording() if recorder else nullcontext(), step_locked(model, compiled, steps):
        yield


@final
class Outputs:
    """A model's outputs over one generation, thinned out, and another model's error against them.

    ``errors`` are relative, one per call; they end where the other sampler makes fewer calls.
    """

    def __init__(self) -> None:
        self.errors: list[float] = []
        self._kept: list[Tensor] = []

    def kept(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, what ``model`` returns is kept."""
        return _shown(model, self._kept.append)

    def compared(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, what ``model`` returns is compared, call by call."""

        def compare(value: Tensor) -> None:
            call = len(self.errors)
            if call < len(self._kept) and self._kept[call].shape == value.shape:
                error = numerics.relative_error(value.double(), self._kept[call].double())
                self.errors.append(error)

        return _shown(model, compare)


@contextmanager
def _shown(model: nn.Module, show: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        flat = flat_output(output).float()
        # every k-th element, k odd: not the same channel or pixel each time
        show(flat[:: 2 * (len(flat) // OUTPUT_LIMIT // 2) + 1].clone())

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


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
