"""What a comparison of both models found, as data: steps, videos, times, sites, thresholds.

``vdqc.check`` measures it; the report, the summary and ``vdqc report`` read it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, final

from torch import Tensor

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.observe import SiteTime
from vdqc.site_errors import SeenMask, SiteError


@final
@dataclass(frozen=True)
class StepError:
    """Error of the compiled model on one call of the float trajectory.

    ``timestep`` is None where the call names none. ``free_error`` is the relative error of the same
    call when each model goes its own way from the same noise: it holds what earlier calls moved.
    None where no whole generation was run.
    """

    call: int
    timestep: float | None
    relative_error: float
    sqnr_db: float
    free_error: float | None = None

    @property
    def free_sqnr_db(self) -> float | None:
        """The free-running error in dB."""
        if self.free_error is None:
            return None
        return math.inf if self.free_error == 0 else -20 * math.log10(self.free_error)


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
    """Everything ``vdqc check`` found.

    Attributes:
        frames: what both models generated for the first seed, if anything.
        sites: error of every site and block on the calls of ``steps``.
        times: of every site's kernel on the first sample.
        predicted: seconds of every site, under "" of what runs between them, for the first sample
            under ``torch.compile``; empty if nobody predicted.
        masks: the last sparse mask of every attention that makes one.
    """

    steps: tuple[StepError, ...]
    videos: tuple[VideoQuality, ...]
    timings: tuple[Timing, ...]
    bytes_float: int
    bytes_compiled: int
    frames: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    sites: tuple[SiteError, ...] = ()
    times: tuple[SiteTime, ...] = ()
    predicted: Mapping[str, float] = field(default_factory=dict)
    masks: Mapping[str, SeenMask] = field(default_factory=dict, compare=False)

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
        plain = replace(self, frames=None, sites=(), masks={})
        data = asdict(plain, dict_factory=_finite)
        del data["frames"], data["masks"]
        data["sites"] = [_site_json(site) for site in self.sites]
        return {**data, "sqnr_db": _number(self.sqnr_db), "worst_call": self.worst.call}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> CheckResult:
        """What ``to_json`` wrote, without frames and masks; raises InputError for anything else."""
        try:
            return CheckResult(
                tuple(StepError(**_infinite(step, "sqnr_db")) for step in data["steps"]),
                tuple(VideoQuality(**_infinite(video, "psnr_db")) for video in data["videos"]),
                tuple(Timing(**timing) for timing in data["timings"]),
                data["bytes_float"],
                data["bytes_compiled"],
                sites=tuple(_site_from_json(site) for site in data.get("sites", ())),
                times=tuple(SiteTime(**entry) for entry in data.get("times", ())),
                predicted=data.get("predicted", {}),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"expected what vdqc check writes with -o, got something else: {error!r}",
                "write it again with this version: vdqc check ARTIFACT --model MODEL -o FILE",
            ) from error


@final
@dataclass(frozen=True)
class Thresholds:
    """What must be reached; None where nothing was asked."""

    min_sqnr: float | None = None
    min_psnr: float | None = None
    min_ssim: float | None = None
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        for name, wanted in asdict(self).items():
            if wanted is not None and math.isnan(wanted):
                raise ConfigError(f"{name}: expected a number, got nan")

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
                    "the model file needs generate(model, seed), which gives images [N, C, H, W] "
                    "or videos [N, C, F, H, W]"
                    + (", and accuracy(video, seed)" if what == "accuracy" else ""),
                )
            if not all(value >= wanted for value in values):  # NaN is a miss
                worst = next((value for value in values if math.isnan(value)), min(values))
                found.append(f"{what} {worst:.4g} is below {wanted:g}")
        return found


# json ---------------------------------------------------------------------------------------------


def _site_json(site: SiteError) -> dict[str, Any]:
    """Decibels to a hundredth; null where equal, "" where the call did not reach the site."""
    values = ["" if v is None else _number(round(v, 2)) for v in site.sqnr_db]
    entry = {"name": site.name, "block": site.block, "kind": site.kind, "sqnr_db": values}
    return {**entry, "why": site.why} if site.why else entry


def _site_from_json(data: Mapping[str, Any]) -> SiteError:
    values = tuple(None if v == "" else math.inf if v is None else v for v in data["sqnr_db"])
    return SiteError(data["name"], data["block"], data["kind"], values, data.get("why", ""))


def _infinite(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {**data, key: math.inf if data[key] is None else data[key]}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in pairs}
