"""How close a generated video is to the one it should be: PSNR, SSIM, flicker.

Videos are float tensors ``[N, C, F, H, W]`` with values in [0, 1]; images ``[N, C, H, W]`` count as
videos of one frame. Both videos of a comparison come from the same seed: otherwise these numbers
compare two works, not two renderings of one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from vdqc.base.diagnostics import InputError

#: SSIM stabilisers (K1 L)² and (K2 L)² for a range L = 1, and the width of its window in pixels.
_C1, _C2 = 0.01**2, 0.03**2
_WINDOW, _SIGMA = 11, 1.5


def psnr_db(video: Tensor, reference: Tensor) -> float:
    """Peak signal to noise in dB: 10 log10(1 / mean squared error); inf where they are equal."""
    a, b = _pair(video, reference)
    mse = float((a - b).square().mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(video: Tensor, reference: Tensor) -> float:
    """Mean structural similarity over frames and channels, in [-1, 1]; 1 where they are equal.

    A Gaussian window of 11 pixels and sigma 1.5, without padding; smaller where a frame is smaller.
    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity",
    IEEE TIP 2004, eq. 13.
    """
    a, b = (_frames(v) for v in _pair(video, reference))
    window = _gaussian(min(_WINDOW, a.shape[-2], a.shape[-1]))
    mean_a, mean_b = F.conv2d(a, window), F.conv2d(b, window)
    var_a = F.conv2d(a * a, window) - mean_a**2
    var_b = F.conv2d(b * b, window) - mean_b**2
    cov = F.conv2d(a * b, window) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return float((luminance * (2 * cov + _C2) / (var_a + var_b + _C2)).mean())


def flicker(video: Tensor) -> float:
    """Mean absolute difference of neighbouring frames, in [0, 1]; 0 for a still or a single frame.

    VBench calls 1 minus this temporal flickering. Source: Huang et al., VBench, arXiv 2311.17982.
    """
    frames = _video(video).double()
    if frames.shape[2] < 2:
        return 0.0
    return float((frames[:, :, 1:] - frames[:, :, :-1]).abs().mean())


def _pair(video: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if video.shape != reference.shape:
        raise InputError(f"expected a video {list(reference.shape)}, got {list(video.shape)}")
    return _video(video).double(), _video(reference).double()


def _video(video: Tensor) -> Tensor:
    if video.ndim == 4:
        video = video.unsqueeze(2)
    if video.ndim != 5:
        raise InputError(f"expected a video [N, C, F, H, W], got {list(video.shape)}")
    if not bool(torch.isfinite(video).all()):
        raise InputError("the video holds NaN or infinity", code="not-finite")
    return video


def _frames(video: Tensor) -> Tensor:
    """``[N, C, F, H, W] -> [N C F, 1, H, W]``."""
    return video.reshape(-1, 1, *video.shape[-2:])


def _gaussian(size: int) -> Tensor:
    """float64[1, 1, size, size], sums to one."""
    distance = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    row = torch.exp(-(distance**2) / (2 * _SIGMA**2))
    row = row / row.sum()
    return torch.outer(row, row)[None, None]
