"""Hadamard matrices of every order a width can be built from, and rotations made of them.

A Hadamard matrix H has entries +1 and -1 and H·Hᵀ = m·I. Orders come from three constructions:
doubling (Sylvester), q + 1 for a prime q = 3 mod 4 (Paley I), and 2(q + 1) for q = 1 mod 4, where q
is a prime or the square of one (Paley II). A wide rotation is a Kronecker product of two of them,
applied as two small matmuls.

Source: Paley, "On Orthogonal Matrices", J. Math. Phys. 12 (1933); Sylvester, Phil. Mag. 34 (1867).
"""

from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError

#: Largest order that is applied as one dense matmul; a larger one is split into two factors.
DENSE_LIMIT = 256

#: Values of a matrix that each core rotates at a time: they stay in its cache (measured, a bfloat16
#: weight of 5120 x 5120: 471 MB/s instead of 158), and two cores are not woken too often (from a
#: quarter of this to this: 625 to 884 MB/s).
_PIECE = 2**18


def is_order(order: int) -> bool:
    """True if ``hadamard(order)`` can be constructed here."""
    if order in (1, 2):
        return True
    return (
        order >= 4
        and order % 4 == 0
        and (
            _paley_field(order - 1, 3) is not None
            or _paley_field(order // 2 - 1, 1) is not None
            or is_order(order // 2)
        )
    )


@functools.lru_cache(maxsize=64)
def hadamard(order: int) -> Tensor:
    """int8[order, order] on the CPU, +1 and -1 with H·Hᵀ = order·I. Shared: do not write into it.

    Raises InputError for an order that no construction reaches.
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.int8, device="cpu")
    if order == 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    if is_order(order):
        if order % 8 == 0 and is_order(order // 2):
            return torch.kron(hadamard(2), hadamard(order // 2))
        if field := _paley_field(order - 1, 3):
            return _paley_one(*field)
        if field := _paley_field(order // 2 - 1, 1):
            return _paley_two(*field)
    raise InputError(
        f"no Hadamard matrix of order {order} can be constructed",
        f"nearest below: {largest_order(order - 1)}" if order > 1 else "an order is at least 1",
    )


@functools.cache
def matrix_on(device: torch.device, order: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    """``hadamard(order)``, or its transpose, as ``dtype`` on ``device``; shared, never dropped.

    Made in a thread of its own: Inductor warms up for a CUDA graph with all that the thread
    allocates taken from the graph's pool, and refuses what then outlives the call. A graph reads
    the matrix where it was when the graph was captured, so it stays there.
    """

    def made() -> Tensor:
        matrix = hadamard(order)
        matrix = (matrix.T if transposed else matrix).to(dtype).contiguous()
        return matrix.to(device)  # of memory that is not pinned: it is there on return

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(made).result()


def largest_order(limit: int, divides: int = 0) -> int:
    """The largest order up to ``limit`` that divides ``divides`` (0: any); at least 1."""
    return next(n for n in range(limit, 0, -1) if divides % n == 0 and is_order(n))


def factors(order: int) -> tuple[int, int] | None:
    """(a, b), a·b = order, such that a rotation of that order is H_a ⊗ H_b; None if there is none.

    a = 1 where one dense matmul serves; otherwise the pair with the least a + b, which is the cost
    per element of the two matmuls.
    """
    if order <= DENSE_LIMIT and is_order(order):
        return 1, order
    pairs = [
        (a, order // a)
        for a in range(2, math.isqrt(order) + 1)
        if order % a == 0 and is_order(a) and is_order(order // a)
    ]
    if pairs:
        return min(pairs, key=sum)
    return (1, order) if is_order(order) else None


def random_signs(width: int, seed: int) -> Tensor:
    """float32[width] on the CPU, +1 and -1, a function of the arguments alone."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randint(0, 2, (width,), generator=generator, device="cpu").float() * 2 - 1


def rotate(x: Tensor, signs: Tensor, block: int, inverse: bool = False) -> Tensor:
    """x · diag(signs) · H along the last axis, or x · Hᵀ · diag(signs) if ``inverse``.

    x       float[..., K]; computed in float32 at least and rounded once
    signs   float[K], each +1 or -1
    block   H is block diagonal of K / block normalised Hadamard matrices of this order
    returns shape and dtype of x, contiguous

    Raises InputError if ``block`` does not divide K or has no construction. Never holds K·K values.
    """
    width = x.shape[-1]
    pair = factors(block) if block > 0 and width % block == 0 else None
    if pair is None:
        raise InputError(f"expected a Hadamard order that divides {width}, got block {block}")
    compute = torch.promote_types(x.dtype, torch.float32)
    signs = signs.to(compute)
    if x.device.type == "cpu":
        left, right = (hadamard(order).to(compute) for order in pair)
    else:  # a copy from the CPU waits, which a CUDA graph must not
        left, right = (matrix_on(x.device, order, compute, False) for order in pair)
    if inverse:
        left, right = left.T, right.T

    def rotated(part: Tensor) -> Tensor:
        value = part.to(compute) if inverse else part.to(compute) * signs
        value = value.reshape(*part.shape[:-1], width // block, *pair) @ right
        if pair[0] > 1:
            value = left.T @ value
        value = value.reshape(part.shape).mul_(block**-0.5)
        return (value.mul_(signs) if inverse else value).to(x.dtype).contiguous()

    rows = max(1, _PIECE * torch.get_num_threads() // width)
    if x.ndim != 2 or len(x) <= rows or x.requires_grad or x.device.type != "cpu":
        return rotated(x)
    return torch.cat([rotated(part) for part in x.split(rows)])


def _paley_field(q: int, residue: int) -> tuple[int, int] | None:
    """(p, degree) of the field with q elements, if q = residue mod 4 and degree is 1 or 2."""
    if q < 3 or q % 4 != residue:
        return None
    if _is_prime(q):
        return q, 1
    root = math.isqrt(q)
    return (root, 2) if root * root == q and _is_prime(root) else None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _characters(p: int, degree: int) -> Tensor:
    """int8[q, q] with the quadratic character of a - b: 0, +1 for a square, -1 for the rest.

    In GF(p²) = GF(p)[w], w² = n no square, an element a + b·w is a square if its norm a² - n·b² is
    one in GF(p).
    """
    squares = {i * i % p for i in range(1, p)}
    values = [0] + [1 if i in squares else -1 for i in range(1, p)]
    legendre = torch.tensor(values, dtype=torch.int8, device="cpu")
    element = torch.arange(p, device="cpu")
    if degree == 1:
        return legendre[(element[:, None] - element[None, :]) % p]
    nonsquare = next(i for i in range(2, p) if i not in squares)
    a, b = (part.flatten() for part in torch.meshgrid(element, element, indexing="ij"))
    real, other = a[:, None] - a[None, :], b[:, None] - b[None, :]
    return legendre[(real * real - nonsquare * other * other) % p]


def _bordered(p: int, degree: int, corner: int) -> Tensor:
    """[[0, 1], [corner, Q]] of order q + 1, Q the characters: a conference matrix."""
    q = p**degree
    matrix = torch.ones(q + 1, q + 1, dtype=torch.int8, device="cpu")
    matrix[0, 0] = 0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = _characters(p, degree)
    return matrix


def _paley_one(p: int, degree: int) -> Tensor:
    """H = I + S, S skew; order q + 1."""
    return _bordered(p, degree, -1) + torch.eye(p**degree + 1, dtype=torch.int8, device="cpu")


def _paley_two(p: int, degree: int) -> Tensor:
    """H = S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]], S symmetric; order 2(q + 1)."""
    symmetric = _bordered(p, degree, 1)
    identity = torch.eye(symmetric.shape[0], dtype=torch.int8, device="cpu")
    inner = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(symmetric, hadamard(2)) + torch.kron(identity, inner)
