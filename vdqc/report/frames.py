"""The report's section on what both models generated: frames side by side, and as a loop.

Values outside [0, 1] are mapped from the float model's own range; where channels are neither grey
nor RGB the first is shown. What has no frames is named by its shape. Pictures are made smaller, so
that a page stays small whatever the size of the video.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdqc.check_result import CheckResult
from vdqc.report import png
from vdqc.report.page import Html, details, section, table, tag
from vdqc.text import count, decibel, size

#: Width in pixels of a strip of frames, and of the three panes of the loop.
STRIP, LOOP = 1200, 720
#: Strips wider than that are smoothed when they are fitted to the page; pixels of others are shown.
SOFT = 700
#: Screen pixels of a pixel of a strip, at most.
LARGEST = 8
#: Bytes of the loop; it is made smaller until it fits.
LOOP_BYTES = 1_200_000
#: Videos that are shown, and how many of them without unfolding.
VIDEOS, OPEN = 4, 2


def comparison(check: CheckResult) -> Html:
    """Pictures, and the numbers of every seed."""
    if check.frames is None:
        return Html("")
    reference, found = check.frames
    title = "The same seed, float and compiled"
    lead = (
        "Whole generations from the same noise. Small differences early in sampling move what "
        "follows, so these numbers mix error with divergence; the next section separates them."
    )
    if reference.ndim not in (4, 5) or reference.shape != found.shape or not reference.numel():
        return section(title, _no_frames(reference, found))
    floats, compiled, note = _shown(reference), _shown(found), ""
    low, high = float(floats.min()), float(floats.max())
    if low < -0.01 or high > 1.01:
        span = max(high - low, 1e-12)
        floats, compiled = (floats - low) / span, (compiled - low) / span
        note = f" Shown from {low:.3g} (black) to {high:.3g} (white)."
    if floats.shape[1] != reference.shape[1]:
        note += f" Of {reference.shape[1]} channels the first is shown."
    difference = (compiled - floats).abs()
    peak = float(difference.max())
    gain = 1.0 if peak == 0 else max(1.0, 2.0 ** math.floor(math.log2(1 / peak)))
    panes = (
        ("float", floats),
        ("compiled", compiled),
        (f"difference ×{gain:g}", difference * gain),
    )
    draw = _film if floats.shape[2] > 1 else _still
    films = [
        draw([(name, video[i]) for name, video in panes], i)
        for i in range(min(VIDEOS, len(floats)))
    ]
    more = [details(count(len(films) - OPEN, "video") + " more", *films[OPEN:])]
    loop = _loop(panes, gain)
    shown = [*films[:OPEN], *(more if len(films) > OPEN else []), loop, _numbers(check)]
    return section(title, lead + note, *shown)


def _no_frames(reference: Tensor, found: Tensor) -> str:
    """What can be said of outputs that are not pictures."""
    shape = f"Each generation is a tensor {list(reference.shape)}, which holds no frames to show"
    if reference.shape != found.shape:
        return f"{shape}; the compiled model's is {list(found.shape)}."
    scale = float(reference.abs().max()) if reference.numel() else 0.0
    if scale == 0:
        return f"{shape}."
    moved = float((reference - found).abs().max()) / scale
    return f"{shape}; it moved by up to {moved:.2%} of its largest value."


def _film(panes: list[tuple[str, Tensor]], index: int) -> Html:
    cells = []
    for name, video in panes:
        picture = png.strip(_shrunk(video, STRIP // min(12, max(1, video.shape[1]))), 12)
        fine = ' class="soft"' if picture.shape[-1] > SOFT else ""
        uri = png.data_uri(picture)
        width = LARGEST * picture.shape[-1]
        image = Html(
            f'<img{fine} style="max-width: {width}px" alt="video {index}: {name}" src="{uri}"/>'
        )
        cells += [tag("div", name), tag("div", image)]
    return tag("div", *cells, class_="films")


def _still(panes: list[tuple[str, Tensor]], index: int) -> Html:
    """Three pictures in a row."""
    shown = []
    for name, video in panes:
        picture = png.data_uri(_shrunk(video, STRIP // 3)[:, 0])
        image = Html(f'<img alt="image {index}: {name}" src="{picture}"/>')
        shown.append(tag("figure", image, tag("figcaption", name)))
    return tag("div", *shown, class_="pictures stills")


def _loop(panes: tuple[tuple[str, Tensor], ...], gain: float) -> Html:
    """The first video as an animation of its three panes; nothing for a still."""
    videos = [video[0] for _, video in panes]
    if videos[0].shape[1] < 2:
        return Html("")
    width = LOOP // 3
    while True:
        small = [_shrunk(video, width) for video in videos]
        wide = torch.cat([torch.nn.functional.pad(v, (0, 2)) for v in small], -1)
        data = png.encode_loop(wide[:, :64], frames_per_second=8)
        if len(data) <= LOOP_BYTES or width <= 40:
            break
        width = int(width * 0.75)
    alt = f"video 0 as a loop: float, compiled, difference times {gain:g}"
    image = Html(f'<img class="loop" alt="{alt}" src="{png.as_uri(data)}"/>')
    text = f"as a loop, with the difference beside it ({size(len(data))}, animated)"
    return details(text, tag("div", f"float, compiled, difference ×{gain:g}"), image)


def _numbers(check: CheckResult) -> Html:
    if not check.videos:
        return Html("")
    rows = [
        [
            str(v.seed),
            decibel(v.psnr_db),
            f"{v.ssim:.4f}",
            f"{v.flicker_float:.4f}",
            f"{v.flicker:.4f}",
            "" if v.accuracy_float is None else f"{v.accuracy_float:.1%}",
            "" if v.accuracy is None else f"{v.accuracy:.1%}",
        ]
        for v in check.videos
    ]
    headers = ["seed", "PSNR", "SSIM", "flicker, float", "compiled", "accuracy, float", "compiled"]
    return table(headers, rows, numbers=range(7))


def _shown(frames: Tensor) -> Tensor:
    """float[N, C, F, H, W] with C 1 or 3, of the videos that are shown."""
    video = (frames if frames.ndim == 5 else frames.unsqueeze(2))[:VIDEOS].detach().float()
    return video if video.shape[1] in (1, 3) else video[:, :1]


def _shrunk(video: Tensor, width: int) -> Tensor:
    """float[C, F, H, W], no wider than ``width``."""
    if video.shape[-1] <= width:
        return video
    height = max(1, round(video.shape[-2] * width / video.shape[-1]))
    frames = torch.nn.functional.adaptive_avg_pool2d(video.transpose(0, 1), (height, width))
    return frames.transpose(0, 1)
