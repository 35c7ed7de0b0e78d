"""Inline assembly by its meaning: each text with the function on 32-bit words that it computes.

A word holds four 8-bit lanes. Triton compiles byte arithmetic lane by lane; only as assembly does
it become one instruction for four lanes. The interpreter runs ``MEANING[text]`` (numpy, uint32
words) where a GPU runs the text. Three decoders of sub-byte codes are built here, for each number
of bits and each plane (run of columns, 8 / width of the lowest part):

* ``TOP_BITS``: the code in the top bits of its lane, the bits below zero. No sign extension: the
  integer GEMM of such lanes is ``2^(8 - bits)`` times too large, exactly.
* ``MULTIPLIED``: the code times a whole number, ``|product| <= 127``. With u = code + 2^(bits - 1)
  the word of lanes ``(u - 2^(bits-1)) m + 128`` is linear in the word of u, and no lane of the
  result leaves 0 ... 255, so one multiplication of whole words is right whatever carries on the
  way; flipping bit 7 of each lane makes it signed.
* ``WITH_SIGNS``: a 4-bit code with a binary residual, in the same way.

Error: none.
Source: lanes as digits of one number: Lin et al., QServe, arXiv 2405.04532, section 5.2.2, and
Hu et al., LiquidGEMM, arXiv 2509.01229, section 4; planes and MSB alignment are ours.
"""

from collections.abc import Callable, Sequence
from typing import Any

import triton.language as tl

#: Numpy function on uint32 words for each text given to ``tl.inline_asm_elementwise``.
MEANING: dict[str, Callable[..., Any]] = {}


def _lanes(value: int) -> int:
    return (value & 0xFF) * 0x01010101


def parts_of(bits: int) -> tuple[int, ...]:
    """Widths of the parts that ``vdqc.base.packing`` stores a code in, highest bits first."""
    return tuple(part for part in (4, 2, 1) if bits & part)


def planes_of(bits: int) -> int:
    """Runs of columns that one byte of the lowest part holds one code of each."""
    return 8 // parts_of(bits)[-1]


def _moves(bits: int, plane: int) -> list[tuple[int, int]]:
    """For each part: how far its byte moves left to be MSB-aligned, and the bits of a lane that it
    then fills.
    """
    found, filled = [], 0
    for part in parts_of(bits):
        run = plane // (planes_of(bits) * part // 8)
        found.append((8 - filled - part - run * part, ((1 << part) - 1) << (8 - filled - part)))
        filled += part
    return found


def _top_bits(bits: int, plane: int) -> str:
    """``$0`` = codes of ``plane`` from the bytes of each part ``$1 ...``, MSB-aligned."""
    steps = _moves(bits, plane)
    text = _gather(steps) + "mov.b32 $0, v; }"
    MEANING[text] = lambda *words: _meaning(steps, words)
    return text


def _multiplied(bits: int, plane: int) -> str:
    """As ``_top_bits``, not aligned but times the multiplier: behind the parts, one int32 for each
    lane, all four equal.
    """
    steps = _moves(bits, plane)
    low, half = 8 - bits, 1 << (bits - 1)
    text = (
        _gather(steps)
        + f"shr.u32 v, v, {low}; xor.b32 v, v, {_lanes(half)}; sub.u32 v, v, {_lanes(half)}; "
        + f"mad.lo.u32 v, v, ${1 + len(steps)}, {_lanes(128)}; xor.b32 $0, v, {_lanes(128)}; }}"
    )

    def meaning(*words: Any) -> Any:
        *packed, factors = words
        codes = (_meaning(steps, packed) >> low) ^ _lanes(half)
        factor = factors.reshape(-1)[::4].reshape(codes.shape)
        return ((codes - _lanes(half)) * factor + _lanes(128)) ^ _lanes(128)

    MEANING[text] = meaning
    return text


def _with_signs(bits: int, plane: int) -> str:
    """``16 q + c (2b - 1)`` from 5-bit codes 2 q + b; c behind the parts as in ``_multiplied``.

    The word of lanes ``(16 q + 128) + c (2 b - 1)`` is linear as well; bit 7 flipped adds the 128.
    """
    steps = _moves(bits, plane)
    (left, mask), (right, sign) = steps
    text = (
        _gather([(left, mask)])
        + _shift("t", "$2", right - 3)
        + f"and.b32 t, t, {_lanes(sign >> 3)}; mad.lo.u32 t, t, 2, {-_lanes(1) % 2**32}; "
        + f"xor.b32 v, v, {_lanes(128)}; mad.lo.u32 v, t, $3, v; xor.b32 $0, v, {_lanes(128)}; }}"
    )

    def meaning(*words: Any) -> Any:
        first, last, factors = words
        factor = factors.reshape(-1)[::4].reshape(first.shape)
        signs = _meaning([(right - 3, sign >> 3)], [last])
        value = _meaning([(left, mask)], [first]) ^ _lanes(128)
        return (value + (2 * signs - _lanes(1)) * factor) ^ _lanes(128)

    MEANING[text] = meaning
    return text


def _gather(steps: Sequence[tuple[int, int]]) -> str:
    text = "{ .reg .b32 v, t; "
    for index, (left, mask) in enumerate(steps):
        goal, source = ("t" if index else "v"), f"${index + 1}"
        text += _shift(goal, source, left) + f"and.b32 {goal}, {goal}, {_lanes(mask)}; "
        if index:
            text += "or.b32 v, v, t; "
    return text


def _shift(goal: str, source: str, left: int) -> str:
    """Move ``source`` left, or right if negative; what crosses a lane is masked by the caller."""
    if left > 0:
        return f"shl.b32 {goal}, {source}, {left}; "
    return f"shr.u32 {goal}, {source}, {-left}; "


def _meaning(steps: Sequence[tuple[int, int]], words: Sequence[Any]) -> Any:
    value: Any = 0
    for (left, mask), word in zip(steps, words, strict=True):
        moved = word << left if left > 0 else word >> -left
        value = value | (moved & _lanes(mask))
    return value


def _table(text: Callable[[int, int], str]) -> tl.constexpr:
    """Texts at index 8 * bits + plane, for 2 to 7 bits."""
    return tl.constexpr(
        tuple(
            text(bits, plane) if 2 <= bits <= 7 and plane < planes_of(bits) else ""
            for bits in range(8)
            for plane in range(8)
        )
    )


TOP_BITS: tl.constexpr = _table(_top_bits)
MULTIPLIED: tl.constexpr = _table(_multiplied)
WITH_SIGNS: tl.constexpr = tl.constexpr(tuple(_with_signs(5, plane) for plane in range(8)))
#: Registers of a text with that many parts: the result and a word for each.
REGISTERS: tl.constexpr = tl.constexpr(tuple(",".join(["=r"] + ["r"] * n) for n in range(8)))
