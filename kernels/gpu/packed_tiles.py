"""One tile of a product with packed weights on Triton: they stay packed up to the registers.

A row of codes is stored in runs of columns (``vdqc.base.packing``): a plane is one run of the
narrowest part, 8 / width of them. One step of the loop loads the bytes that hold ``BLOCK_K``
columns of every plane, and multiplies plane by plane with the activations of those columns. Lanes
are MSB-aligned, so the sum is 2^(8 - bits) times too large (2^(12 - bits) with packed activations)
and is shifted right at the end. With group multipliers, or a plane of residual signs, lanes are
whole weights instead.

The weights are the left operand (``BLOCK_N`` rows): on Hopper that one may come from registers, so
nothing is unpacked into memory.

Error: none in the integer part: 128 * 128 * K < 2^31 for K < 131072.
Source: as ``assembly``; swapping the operands so that weights are read from registers: humming and
LiquidGEMM, arXiv 2509.01229.
"""

import triton
import triton.language as tl

from vdqc.kernels.gpu.epilogue import tile_of, write_tile
from vdqc.kernels.gpu.planes import decode, lanes, load_bytes


@triton.jit
def packed_gemm(
    a,
    b,
    multiplier,
    out,
    n_rows,
    n_cols,
    run,
    e,
    BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BINARY: tl.constexpr,
    SLICES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RANK: tl.constexpr,
):
    """One tile of the result; ``run`` is the width of a plane.

    WHOLE: BLOCK_K divides the width of a plane. SIZE: columns of a group, 0 for one group or none
    (a constant, because a division is forty instructions). ONE_GROUP: a block of columns lies in
    one group. BINARY: codes are 2 q + b and stand for 16 q + multiplier (2b - 1).
    """
    FIRST: tl.constexpr = 4 if BITS >= 4 else 2
    LAST: tl.constexpr = 1 if BITS % 2 == 1 else (2 if BITS % 4 == 2 else 4)
    PLANES: tl.constexpr = 8 // LAST
    TILES: tl.constexpr = FIRST // LAST
    row, col = tile_of(tl.program_id(0), n_rows, n_cols, BLOCK_M, BLOCK_N, GROUP)
    rows = tl.minimum(row * BLOCK_M + tl.arange(0, BLOCK_M), n_rows - 1).to(tl.int64)
    cols = tl.minimum(col * BLOCK_N + tl.arange(0, BLOCK_N), n_cols - 1).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    depth = run * PLANES
    a += rows[None, :] * (run * (PLANES * CODE_BITS // 8)) + k[:, None]
    b += cols[:, None] * (run * (BITS // LAST)) + k[None, :]
    if multiplier is not None:
        multiplier += cols[:, None] * (depth // SIZE if SIZE > 0 else 1)
    factor = None
    if SIZE == 0 and multiplier is not None:
        factor = tl.load(multiplier).to(tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for start in range(0, run, BLOCK_K):
        inside = start + k < run
        for tile in tl.static_range(TILES):
            first = load_bytes(b + tile * run, inside[None, :], WHOLE)
            middle = first
            last = first
            if BITS == 7:
                middle = load_bytes(b + (4 + tile % 2) * run, inside[None, :], WHOLE)
            if LAST < FIRST:
                last = load_bytes(b + run * (BITS // LAST - 1), inside[None, :], WHOLE)
            for index in tl.static_range(8 // FIRST):
                total = _plane(
                    total,
                    a,
                    first,
                    middle,
                    last,
                    multiplier,
                    factor,
                    start,
                    run,
                    inside[:, None],
                    BITS,
                    CODE_BITS,
                    index * TILES + tile,
                    WHOLE,
                    SIZE,
                    ONE_GROUP,
                    BINARY,
                )
        a += BLOCK_K
        b += BLOCK_K
    if multiplier is None:
        total = total >> (8 - BITS)
    if CODE_BITS == 4:
        total = total >> 4
    write_tile(
        total,
        out,
        row * BLOCK_M,
        col * BLOCK_N,
        n_rows,
        n_cols,
        depth,
        e,
        True,
        SLICES,
        ACTIVATION,
        RANK,
    )


@triton.jit
def _plane(
    total,
    a,
    first,
    middle,
    last,
    multiplier,
    factor,
    start,
    run,
    inside,
    BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    PLANE: tl.constexpr,
    WHOLE: tl.constexpr,
    SIZE: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BINARY: tl.constexpr,
):
    """``total`` and the products of one block of columns of one plane."""
    right = _codes(a, inside, run, BITS, CODE_BITS, PLANE, WHOLE)
    if SIZE > 0:
        column = PLANE * run + start
        if not ONE_GROUP:
            column = (column + tl.arange(0, right.shape[0]))[None, :]
        factor = tl.load(multiplier + column // SIZE).to(tl.int32)
    left = lanes(first, middle, last, factor, BITS, PLANE, BINARY)
    return tl.dot(left, right, total, out_dtype=tl.int32)


@triton.jit
def _codes(
    a,
    inside,
    run,
    BITS: tl.constexpr,
    CODE_BITS: tl.constexpr,
    PLANE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The int8 right operand: activations of the columns of ``PLANE``; packed ones MSB-aligned."""
    if CODE_BITS == 8:
        found = load_bytes(a + PLANE * run, inside, WHOLE)
    else:
        HALF: tl.constexpr = 4 if BITS % 2 == 1 else (2 if BITS % 4 == 2 else 1)
        words = load_bytes(a + PLANE % HALF * run, inside, WHOLE)
        found = decode((words,), None, 4, PLANE // HALF, False)
    return found
