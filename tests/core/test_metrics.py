"""PSNR, SSIM and flicker against values worked out by hand and the properties that define them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vdqc.base import metrics
from vdqc.base.diagnostics import InputError


def video(seed: int = 0, frames: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(2, 1, frames, size, size, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_constant_offset_is_its_square_in_db():
    x = torch.full((1, 1, 2, 8, 8), 0.5)
    assert metrics.psnr_db(x + 0.1, x) == pytest.approx(20.0, abs=1e-5)
    assert metrics.psnr_db(x, x) == math.inf


def test_ssim_of_two_constants_is_the_luminance_term():
    a, b = torch.full((1, 1, 1, 16, 16), 0.2), torch.full((1, 1, 1, 16, 16), 0.8)
    expected = (2 * 0.2 * 0.8 + 1e-4) / (0.04 + 0.64 + 1e-4)
    assert metrics.ssim(a, b) == pytest.approx(expected, rel=1e-6)


def test_ssim_of_a_negative_is_negative():
    x = video()
    assert metrics.ssim(1 - x, x) < 0


@settings(derandomize=True, deadline=None, max_examples=10)
@given(seed=st.integers(0, 1000), noise=st.floats(0.01, 0.2))
def test_both_measures_are_symmetric_and_fall_with_noise(seed, noise):
    x = video(seed)
    little = x + noise * (video(seed + 1) - 0.5)
    much = x + 2 * noise * (video(seed + 1) - 0.5)
    assert metrics.ssim(x, x) == pytest.approx(1.0)
    assert metrics.ssim(little, x) == pytest.approx(metrics.ssim(x, little))
    assert metrics.ssim(much, x) < metrics.ssim(little, x) < 1
    assert metrics.psnr_db(little, x) - metrics.psnr_db(much, x) == pytest.approx(
        20 * math.log10(2), abs=1e-4
    )


def test_ssim_window_shrinks_to_a_small_frame():
    assert metrics.ssim(video(size=4), video(size=4)) == pytest.approx(1.0)


def test_flicker_is_the_mean_step_between_frames():
    x = torch.zeros(1, 1, 3, 4, 4)
    x[:, :, 1] = 1.0
    assert metrics.flicker(x) == 1.0
    assert metrics.flicker(x[:, :, :1]) == 0.0
    assert metrics.flicker(torch.zeros(1, 3, 4, 4)) == 0.0


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(InputError, match=r"expected a video \[2, 1, 3, 16, 16\]"):
        metrics.psnr_db(video(frames=2), video())
    with pytest.raises(InputError, match="expected a video"):
        metrics.flicker(torch.zeros(3))
    with pytest.raises(InputError, match="not-finite"):
        metrics.psnr_db(video() / 0, video())
