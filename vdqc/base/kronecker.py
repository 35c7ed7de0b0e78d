"""Rotations made of two small matrices, x · (L ⊗ R), and orthogonal matrices that can be trained.

A matrix over K = a·b channels as a Kronecker product costs K·(a + b) multiply-adds a token instead
of K², and has a·a + b·b entries to learn. The Cayley transform maps any square matrix to a
rotation, smoothly, so that plain gradient steps stay on the orthogonal group.

Source: Sun et al., FlatQuant, arXiv 2410.09426, section 3.1 (Kronecker decomposition); Cayley, "Sur
quelques propriétés des déterminants gauches", J. reine angew. Math. 32 (1846).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdqc.base import hadamard


def cayley(raw: Tensor) -> Tensor:
    """The rotation (I - A)(I + A)⁻¹ of the skew matrix A = raw - rawᵀ; the identity for zeros.

    ``raw``: float[n, n], any values: I + A is never singular.
    """
    skew = raw - raw.T
    identity = torch.eye(raw.shape[0], dtype=raw.dtype, device=raw.device)
    # both factors are functions of A and commute
    return torch.linalg.solve(identity + skew, identity - skew).contiguous()


def kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x · (left ⊗ right) along the last axis.

    x       float[..., a·b]; computed in the wider dtype of x and the factors, float32 at least
    left    float[a, a]
    right   float[b, b]
    returns shape and dtype of x, contiguous
    """
    compute = torch.promote_types(torch.promote_types(x.dtype, left.dtype), torch.float32)
    value = x.to(compute).reshape(*x.shape[:-1], left.shape[0], right.shape[0])
    value = left.to(compute).T @ (value @ right.to(compute))
    return value.reshape(x.shape).to(x.dtype).contiguous()


def square_factors(width: int) -> tuple[int, int]:
    """(a, b), a·b = width, a ≤ b, nearest to a square; (1, width) for a prime."""
    a = next(a for a in range(math.isqrt(width), 0, -1) if width % a == 0)
    return a, width // a


def hadamard_factors(width: int) -> tuple[int, int] | None:
    """The pair (a, b) of least a + b whose members are both Hadamard orders, or None."""
    for a in range(math.isqrt(width), 0, -1):
        if width % a == 0 and hadamard.is_order(a) and hadamard.is_order(width // a):
            return a, width // a
    return None
