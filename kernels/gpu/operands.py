"""What fused quantisers are given and what they give, in the form their kernels take.

Error: none.
Source: ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError
from vdqc.base.packing import packed_bytes
from vdqc.kernels.gpu.runtime import operand
from vdqc.kernels.prologue import Prologue

#: Dtypes of values that kernels read; float64 runs as the reference.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@final
@dataclass(frozen=True, eq=False)
class Form:
    """How a row becomes codes.

    Attributes:
        qmax: greatest code if symmetric.
        bits: range if asymmetric.
        packed: two codes in a byte, as ``vdqc.base.packing`` has them.
        sums: also the sum of each row's codes.
        down: ``[K, R]`` of a low-rank branch, or None.
        clip: one number that the ends of a row's range are multiplied by, or None.
    """

    qmax: int
    bits: int = 8
    asymmetric: bool = False
    packed: bool = False
    sums: bool = True
    down: Tensor | None = None
    clip: Tensor | None = None


@final
@dataclass(frozen=True, eq=False)
class Quantised:
    """Codes ``[..., K]`` and what goes with a row, ``[..., 1]``; None where not asked for.

    Attributes:
        low: ``[..., R]`` in the dtype of x.
        stream: the sum with the gated residual, in the shape and dtype of x.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    sums: Tensor | None
    low: Tensor | None
    stream: Tensor | None


def allocate(x: Tensor, form: Form, residual: bool) -> Quantised:
    """The results of quantising x, not yet written."""
    lead, width = x.shape[:-1], x.shape[-1]

    def rows(dtype: torch.dtype, size: int = 1) -> Tensor:
        return torch.empty((*lead, size), dtype=dtype, device=x.device)

    return Quantised(
        rows(torch.uint8, packed_bytes(4, width)) if form.packed else rows(torch.int8, width),
        rows(torch.float32),
        rows(torch.int32) if form.asymmetric else None,
        rows(torch.int32) if form.sums else None,
        None if form.down is None else rows(x.dtype, form.down.shape[1]),
        torch.empty_like(x) if residual else None,
    )


def clip_ratio(form: Form, x: Tensor) -> Tensor | None:
    """What kernels multiply the ends of a range by: float[1], or None."""
    if form.clip is None:
        return None
    if form.clip.numel() != 1:
        raise InputError(f"clip: expected one number, got shape {list(form.clip.shape)}")
    return operand("clip", form.clip.reshape(1), FLOATS, [1], x.device)


def arguments(
    x: Tensor, steps: Prologue, form: Form, y: Tensor | None, gate: Tensor | None
) -> dict[str, Any]:
    """What all kernels take by these names; x is contiguous."""
    width, device = x.shape[-1], x.device
    gates, gate_every, gate_stride = per_group("gate", gate, x)
    scale, scale_every, scale_stride = per_group("mod_scale", steps.mod_scale, x)
    shift, shift_every, shift_stride = per_group("mod_shift", steps.mod_shift, x)
    return {
        "x": x,
        "y": None if y is None else operand("y", y, FLOATS, list(x.shape), device),
        "gate": gates,
        "weight": parameter("norm_weight", steps.norm_weight, [width], device),
        "bias": parameter("norm_bias", steps.norm_bias, [width], device),
        "scale": scale,
        "shift": shift,
        "smooth": parameter("smooth", steps.smooth, [width], device),
        "signs": parameter("signs", steps.signs, [None], device),
        "post": parameter("post", steps.post, [width], device),
        "rows": x.numel() // width,
        "width": width,
        "gate_every": gate_every,
        "gate_stride": gate_stride,
        "scale_every": scale_every,
        "scale_stride": scale_stride,
        "shift_every": shift_every,
        "shift_stride": shift_stride,
        "clip": clip_ratio(form, x),
        "eps": steps.eps,
        "NORM": steps.norm,
        "ACTIVATION": steps.activation,
    }


def parameter(
    name: str, value: Tensor | None, shape: Sequence[int | None], device: torch.device
) -> Tensor | None:
    """A tensor of any float dtype, contiguous; None stays None."""
    return None if value is None else operand(name, value, FLOATS, shape, device)


def per_group(name: str, value: Tensor | None, x: Tensor) -> tuple[Tensor | None, int, int]:
    """(values, rows of x that share one of its rows, elements from one such row to the next).

    ``value`` broadcasts to x; it is copied only where its rows are not a fixed distance apart.
    """
    if value is None:
        return None, 1, 0
    try:
        spread = value.expand(x.shape)
    except RuntimeError as error:
        raise InputError(
            f"{name}: expected a shape that broadcasts to {list(x.shape)}, got {list(value.shape)}"
        ) from error
    if value.device != x.device or value.dtype not in FLOATS:
        spread = operand(name, spread, FLOATS, device=x.device)
    axes = [
        (size, stride)
        for size, stride in zip(spread.shape[:-1], spread.stride()[:-1], strict=True)
        if size != 1
    ]
    every = 1
    while axes and axes[-1][1] == 0:
        every *= axes.pop()[0]
    evenly = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(axes))
    if evenly and (spread.stride(-1) == 1 or x.shape[-1] == 1):
        return spread, every, axes[-1][1] if axes else 0
    return spread.contiguous(), 1, x.shape[-1]


def hadamard_matrix(order: int, device: torch.device, transposed: bool = False) -> Tensor:
    """bf16[order, order] of +1 and -1."""
    return hadamard.matrix_on(device, order, torch.bfloat16, transposed)
