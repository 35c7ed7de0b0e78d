"""What a fused quantiser does to a row before it takes codes: norm, modulation, rotation.

Along the last axis, in this order, each step optional::

    n = norm(x) * norm_weight + norm_bias        "layer", "rms" or "none"
    m = n * (1 + mod_scale) + mod_shift          adaLN: [B, 1, K] or one row a token
    a = activation(m)                            "gelu_tanh", "silu" or "none"
    v = (a * smooth * signs) H * post            H: Hadamard blocks of order ``block``

Everything is float32 inside (float64 for a float64 input) and is rounded once, by the quantiser: a
graph of separate ops rounds to bfloat16 after each, so it differs by one more drawing of rounding.

Error: norms sum in an order of their own: relative 1e-6; else IEEE float32, op for op.
Source: Peebles and Xie, DiT, arXiv 2212.09748, section 3.2 (adaLN); Xiao et al., SmoothQuant, arXiv
2211.10438, eq. 3; Ashkboos et al., QuaRot, arXiv 2404.00456, section 4; Feng et al., QuantVGGT,
arXiv 2509.21302, section 3.2 (a scale behind the rotation).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from vdqc.base import hadamard
from vdqc.base.diagnostics import InputError

NORMS = ("none", "layer", "rms")
ACTIVATIONS = ("none", "gelu_tanh", "silu")


@final
@dataclass(frozen=True, eq=False)
class Prologue:
    """The steps, as the module's text has them; a default skips its step.

    Attributes:
        mod_scale, mod_shift: ``[..., K]`` with the leading axes of x, or 1 in place of any.
        signs: float[K] of +1 and -1; given exactly where ``block`` is not 0.
        post: float[K], only where ``block`` is not 0; elsewhere ``smooth`` is the same.
    """

    norm: str = "none"
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-6
    mod_scale: Tensor | None = None
    mod_shift: Tensor | None = None
    activation: str = "none"
    smooth: Tensor | None = None
    signs: Tensor | None = None
    block: int = 0
    post: Tensor | None = None

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"expected a norm of {', '.join(NORMS)}, got '{self.norm}'")
        if self.activation not in ACTIVATIONS:
            expected = ", ".join(ACTIVATIONS)
            raise InputError(f"expected an activation of {expected}, got '{self.activation}'")
        if (self.signs is not None) != (self.block != 0):
            raise InputError(
                f"expected signs together with a block, got block {self.block} and "
                f"{'no ' if self.signs is None else ''}signs"
            )
        if self.post is not None and self.signs is None:
            raise InputError("expected post together with a block; without one give smooth")


def wide(x: Tensor) -> Tensor:
    """x in the dtype it is computed in: float32, or float64 for a float64 input."""
    return x if x.dtype == torch.float64 else x.float()


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    """``x + gate * y`` in float32, rounded once to the dtype of x; the stream later ops read."""
    update = wide(y) if gate is None else wide(gate) * wide(y)
    return (wide(x) + update).to(x.dtype)


def prologue(x: Tensor, steps: Prologue) -> Tensor:
    """The truth: v[..., K] in float32 (float64 for a float64 input)."""
    value = activated(modulated(normalised(wide(x), steps), steps), steps.activation)
    if steps.smooth is not None:
        value = value * wide(steps.smooth)
    if steps.signs is not None:
        value = hadamard.rotate(value, steps.signs, steps.block)
    return value if steps.post is None else value * wide(steps.post)


def normalised(value: Tensor, steps: Prologue) -> Tensor:
    """Over the last axis, with the biased variance."""
    if steps.norm == "layer":
        value = value - value.mean(-1, keepdim=True)
    if steps.norm != "none":
        value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + steps.eps)
    if steps.norm_weight is not None:
        value = value * wide(steps.norm_weight)
    return value if steps.norm_bias is None else value + wide(steps.norm_bias)


def modulated(value: Tensor, steps: Prologue) -> Tensor:
    """adaLN."""
    if steps.mod_scale is not None:
        value = value * (1 + wide(steps.mod_scale))
    return value if steps.mod_shift is None else value + wide(steps.mod_shift)


def activated(value: Tensor, activation: str) -> Tensor:
    """Elementwise."""
    if activation == "gelu_tanh":
        return functional.gelu(value, approximate="tanh")
    return functional.silu(value) if activation == "silu" else value
