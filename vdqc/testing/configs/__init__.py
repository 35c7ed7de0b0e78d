"""Tiny configurations of the real architectures, by family; here is what several families share.

They are the smallest that keep each architecture's structure: one or two blocks of each kind, four
heads of 16 channels. ``vdqc.testing.architectures`` makes models of them.
"""

from __future__ import annotations

from typing import Any

from vdqc.ir.inputs.draw import Config

#: Name of the architecture, class, configuration; the factory of its calls, if not the class's own.
Row = tuple[Any, ...]

HEADS: Config = {"num_attention_heads": 4, "attention_head_dim": 16}
LATENT: Config = {"in_channels": 4, "out_channels": 4}

CAPTIONED: Config = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "patch_size": 2,
    "sample_size": 8,
    "cross_attention_dim": 64,
    "caption_channels": 24,
}
