"""check() on models whose difference is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.check import check
from vdqc.check_result import Thresholds
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source


class Scale(nn.Module):
    """Multiplies by a number; ``calls`` counts."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.calls = 0

    def forward(self, x, timestep=None):
        self.calls += 1
        return x * self.factor


def generate(model, seed):
    x = torch.full((1, 1, 2, 16, 16), 0.5) + 0.01 * seed
    for t in (3.0, 2.0):
        x = model(x, timestep=torch.tensor([t]))
    return x


def source(**options):
    samples = [Sample({"x": torch.ones(2, 3)}, timestep=7.0)]
    return Source(Scale(1.0), samples, **options)


def test_step_locked_error_does_not_accumulate():
    result = check(Scale(1.01), source(generate=generate), timing_runs=0)
    assert [step.timestep for step in result.steps] == [3.0, 2.0]
    assert [step.relative_error for step in result.steps] == pytest.approx([0.01, 0.01], rel=1e-4)
    assert result.sqnr_db == pytest.approx(40, abs=0.01)
    # the video does: 0.5 against 0.5 * 1.01²
    assert result.videos[0].psnr_db == pytest.approx(-20 * math.log10(0.5 * 0.0201), abs=0.01)


def test_samples_stand_in_where_nothing_generates():
    result = check(Scale(0.9), source(), timing_runs=0)
    assert len(result.steps) == 1
    assert result.steps[0].relative_error == pytest.approx(0.1, rel=1e-5)
    assert result.videos == ()
    assert result.frames is None


def test_every_seed_is_generated_and_only_the_first_is_locked():
    made = source(generate=generate, accuracy=lambda video, seed: float(video.mean()))
    compiled = Scale(1.0)
    result = check(compiled, made, seeds=(4, 5), timing_runs=0)
    assert [video.seed for video in result.videos] == [4, 5]
    assert [video.accuracy for video in result.videos] == pytest.approx([0.54, 0.55])
    assert compiled.calls == 2 + 2 + 2
    assert math.isinf(result.sqnr_db)
    assert result.to_json()["sqnr_db"] is None


def test_the_float_model_is_left_without_hooks():
    made = source()
    check(Scale(1.0), made, timing_runs=2)
    assert not made.model._forward_hooks


def test_time_and_bytes_of_both_are_reported():
    result = check(Scale(1.0), source(), timing_runs=2)
    assert result.timings[0].runs == 2
    assert result.timings[0].speedup > 0
    assert (result.bytes_float, result.bytes_compiled) == (4, 4)


def test_thresholds_name_what_was_missed():
    result = check(Scale(1.01), source(generate=generate), timing_runs=0)
    assert Thresholds(min_sqnr=39.9, min_psnr=30).misses(result) == []
    (miss,) = Thresholds(min_sqnr=41).misses(result)
    assert miss == "sqnr 40 is below 41"
    with pytest.raises(InputError, match="accuracy"):
        Thresholds(min_accuracy=0.5).misses(result)


def test_nan_passes_no_gate():
    result = check(Scale(1.01), source(generate=generate), timing_runs=0)
    broken = replace(result, videos=(*result.videos, replace(result.videos[0], ssim=math.nan)))
    assert Thresholds(min_ssim=0.1).misses(broken) == ["ssim nan is below 0.1"]
    with pytest.raises(ConfigError, match="min_ssim: expected a number, got nan"):
        Thresholds(min_ssim=math.nan)


def test_faults_are_told_in_words():
    with pytest.raises(InputError, match="never did"):
        check(
            Scale(1.0),
            source(generate=lambda model, seed: torch.zeros(1, 1, 1, 4, 4)),
            timing_runs=0,
        )
    with pytest.raises(InputError, match="NaN or infinity"):
        check(Scale(math.nan), source(), timing_runs=0)

    def broken(model, seed):
        raise KeyError("prompt")

    with pytest.raises(InputError, match=r"generate\(\) failed: KeyError") as caught:
        check(Scale(1.0), source(generate=broken), timing_runs=0)
    assert "test_check.py" in str(caught.value)
