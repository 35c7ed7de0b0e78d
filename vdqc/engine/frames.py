"""Which frame each token of a sequence belongs to: what frame relations and samplers need to know.

T tokens, F frames, S tokens of one frame. Tokens of no frame (text, registers) have index -1.

Error: one InputError where frames are asked of tokens that have none, or that differ in size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.ir.signature import IntInput, Signature, evaluate


@final
@dataclass(frozen=True)
class FrameMap:
    """int64[T]: the frame of each token, 0 ... F - 1, or -1 for a token of no frame."""

    index: Tensor

    @staticmethod
    def of(
        frames: int, per_frame: int, *, text: int = 0, text_first: bool = False, major: bool = True
    ) -> FrameMap:
        """F·S video tokens, frame by frame (or position by position), and text on one side."""
        index = torch.arange(frames)
        index = index.repeat_interleave(per_frame) if major else index.repeat(per_frame)
        beside = torch.full((text,), -1)
        return FrameMap(torch.cat((beside, index) if text_first else (index, beside)))

    @property
    def tokens(self) -> int:
        """T, with those of no frame."""
        return self.index.numel()

    @cached_property
    def frames(self) -> int:
        """F."""
        return int(self.index.amax()) + 1 if self.index.numel() else 0

    @cached_property
    def video(self) -> Tensor:
        """bool[T]: the tokens that belong to a frame."""
        return self.index >= 0

    @cached_property
    def members(self) -> Tensor:
        """int64[F, S]: the tokens of each frame, in their order; raises InputError."""
        counts = torch.bincount(self.index[self.video].cpu(), minlength=self.frames).tolist()
        if not counts or len(set(counts)) != 1:
            raise InputError(
                f"expected frames of equally many tokens, got {counts or 'no frames'}",
                "check the token to frame map",
                code="no-frames",
            )
        # stable: within a frame tokens keep their order; tokens of no frame sort before all
        order = self.index.argsort(stable=True)[self.tokens - sum(counts) :]
        return order.reshape(self.frames, counts[0])


def site_frames(tokens: Mapping[str, Any], sizes: Mapping[str, int]) -> FrameMap | None:
    """The map of one attention's query tokens, or None where shapes did not tell.

    ``tokens``: what ``annotate`` notes at an attention site; ``sizes``: see ``sizes_of``.
    """
    if not tokens.get("frames"):
        return None
    text = int(evaluate(tokens["text"], sizes)) if tokens.get("text") else 0
    return FrameMap.of(
        int(evaluate(tokens["frames"], sizes)),
        int(evaluate(tokens["tokens_per_frame"], sizes)),
        text=text,
        text_first=bool(tokens.get("text_first")),
        major=bool(tokens.get("frame_major", True)),
    )


def sizes_of(signature: Signature, inputs: Sequence[Any]) -> dict[str, int]:
    """Symbol to size for one call's bound inputs, as ``Signature.bind`` returns them."""
    sizes: dict[str, int] = {}
    for entry, value in zip(signature.inputs, inputs, strict=True):
        if isinstance(entry, IntInput):
            pairs = [(entry.size, int(value))]
        else:
            pairs = list(zip(entry.sizes, map(int, value.shape), strict=True))
        sizes.update({size: actual for size, actual in pairs if isinstance(size, str)})
    return {name: size for name, size in sizes.items() if name.isidentifier()}
