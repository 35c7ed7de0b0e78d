"""Reading the output of a block as pixels or as frames.

``[B, T, C]`` tokens, ``[B, C, H, W]`` an image, ``[B, C, F, H, W]`` a video. A pixel is one token
of any of them.

Error: InputError where frames are asked of an output that has none.
"""

from __future__ import annotations

import math

from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.engine.frames import FrameMap


def pixels(out: Tensor) -> Tensor:
    """[B, P, C]: every token or pixel with its channels last."""
    if out.ndim == 3:
        return out
    if out.ndim in (4, 5):
        return out.flatten(2).transpose(1, 2)
    raise InputError(
        f"expected an output [B, T, C], [B, C, H, W] or [B, C, F, H, W], got {list(out.shape)}"
    )


def pixel_count(out: Tensor) -> int:
    """P of ``pixels``."""
    return out.shape[1] if out.ndim == 3 else math.prod(out.shape[2:])


def per_pixel(weights: Tensor, out: Tensor) -> Tensor:
    """``weights`` [B, P], shaped to multiply ``out``."""
    if out.ndim == 3:
        return weights.unsqueeze(-1)
    return weights.reshape(weights.shape[0], 1, *out.shape[2:])


def frame_pixels(out: Tensor, frames: FrameMap | None) -> Tensor:
    """[B, F, S, C]: the pixels of each frame; raises InputError without frames."""
    reason = lacks_frames(out, frames)
    if reason:
        raise InputError(reason, code="no-frames")
    if out.ndim == 5:
        return out.permute(0, 2, 3, 4, 1).flatten(2, 3)
    assert frames is not None
    return out[:, frames.members.to(out.device)]


def lacks_frames(out: Tensor, frames: FrameMap | None) -> str:
    """Why ``frame_vectors`` cannot say which token is in which frame, or ""."""
    if out.ndim == 5:
        return ""
    if frames is None or out.ndim != 3:
        return (
            f"expected an output with a frame axis or a token to frame map, "
            f"got {list(out.shape)} and no map"
        )
    if frames.tokens != out.shape[1]:
        return f"expected a frame for each of {out.shape[1]} tokens, the map has {frames.tokens}"
    if frames.frames < 2:
        return f"expected at least two frames, got {frames.frames}"
    return ""
