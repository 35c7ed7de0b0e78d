"""Inline assembly by its meaning: each text with the function on 32-bit words that it computes.

The interpreter runs ``MEANING[text]`` (numpy, uint32 words of four packed int8) where a GPU runs
the text; Triton compiles the four 8-bit operations of a word to one instruction only this way.

Error: none.
Source: ours.
"""

from collections.abc import Callable
from typing import Any

#: Numpy function on uint32 words for each text given to ``tl.inline_asm_elementwise``.
MEANING: dict[str, Callable[..., Any]] = {}
