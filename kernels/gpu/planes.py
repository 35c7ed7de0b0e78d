"""Packed codes to int8 lanes inside a kernel: the layout of ``vdqc.base.packing``, run by run.

A plane is one run of columns of the narrowest part, 8 / width of them. What a byte holds of a plane
is cut out by ``assembly``, four lanes at a time.

Error: none.
Source: as ``assembly``.
"""

import triton
import triton.language as tl

from vdqc.kernels.gpu.assembly import MULTIPLIED, REGISTERS, TOP_BITS, WITH_SIGNS


@triton.jit
def load_bytes(pointers, inside, WHOLE: tl.constexpr):
    """Packed bytes, zeros where not ``inside``; WHOLE: all are."""
    return tl.load(pointers) if WHOLE else tl.load(pointers, mask=inside, other=0)


@triton.jit
def lanes(
    first,
    middle,
    last,
    factor,
    BITS: tl.constexpr,
    PLANE: tl.constexpr,
    BINARY: tl.constexpr,
):
    """The int8 left operand from the bytes of each part of a code."""
    if BITS == 7:
        found = decode((first, middle, last), factor, BITS, PLANE, BINARY)
    elif BITS == 3 or BITS == 5 or BITS == 6:
        found = decode((first, last), factor, BITS, PLANE, BINARY)
    else:
        found = decode((first,), factor, BITS, PLANE, BINARY)
    return found


@triton.jit
def decode(words, factor, BITS: tl.constexpr, PLANE: tl.constexpr, BINARY: tl.constexpr):
    """int8 lanes of one plane from the words of each part, times ``factor`` if there is one."""
    if factor is None:
        found = tl.inline_asm_elementwise(
            TOP_BITS[8 * BITS + PLANE], REGISTERS[len(words)], words, tl.int8, True, 4
        )
    else:
        found = tl.inline_asm_elementwise(
            WITH_SIGNS[PLANE] if BINARY else MULTIPLIED[8 * BITS + PLANE],
            REGISTERS[len(words) + 4],
            words + (factor,),  # noqa: RUF005, Triton has no starred expressions
            tl.int8,
            True,
            4,
        )
    return found
