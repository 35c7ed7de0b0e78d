"""Low-rank branches beside a linear: their factors, and a gain for each frame.

W float[N, K]; a branch of rank R adds (x·downᵀ)·upᵀ with down float[R, K] and up float[N, R]. With
the singular values of a matrix M = U·S·Vᵀ, the factors of least squared error are::

    up = U[:, :R]·√S[:R]        down = √S[:R]·V[:, :R]ᵀ        |M - up·down|² = sum of S[i > R]²

so that both have the same gram matrix, diag(S[:R]).

The gain of frame i: eta_i = softmax over frames of 1 - cos(x_i, Q(x)_i), what quantisation turned;
omega_i = share of sum |x| that frame i holds; M_i = eta_i / omega_i.

Error: exact up to ``EXACT`` rows or columns; beyond, block power iteration, whose squared error is
within a percent of the least on matrices without structure.
Source: Eckart and Young, Psychometrika 1, 1936; Li et al., SVDQuant, arXiv 2411.05007, section 4.2;
Feng et al., Q-VDiT, arXiv 2505.22167, section 3.2 (frame gain).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Least side of a matrix up to which all singular values are computed.
EXACT = 1024
_OVERSAMPLED, _ITERATIONS = 16, 6


def leading_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up [N, rank], down [rank, K]) whose product is the nearest to ``matrix`` of that rank.

    In the dtype of ``matrix``, computed in float64 where all singular values are.
    """
    if min(matrix.shape) <= EXACT:
        u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    else:
        u, s, vt = _power_iteration(matrix.float(), rank + _OVERSAMPLED)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(matrix.dtype), (root[:, None] * vt[:rank]).to(matrix.dtype)


def _power_iteration(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], rank, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vt


def alternating_factors(
    weight: Tensor,
    rank: int,
    quantised: Callable[[Tensor], Tensor],
    error: Callable[[Tensor], float],
    rounds: int,
) -> tuple[Tensor, Tensor, int]:
    """Factors for a branch beside Q(W - up·down), and how many rounds were of use.

    The first are those of W itself. Each round after it takes those of W - Q(W - up·down), the
    part that the quantised rest leaves, while ``error`` of the difference to W falls.
    """
    up, down = leading_factors(weight, rank)
    left = quantised(weight - up @ down)
    best, least, used = (up, down), error(weight - up @ down - left), 1
    for _ in range(1, rounds):
        up, down = leading_factors(weight - left, rank)
        left = quantised(weight - up @ down)
        found = error(weight - up @ down - left)
        if not found < least:
            break
        best, least, used = (up, down), found, used + 1
    return *best, used


def frame_gain(cosine: Tensor, magnitude: Tensor) -> Tensor:
    """M float[F] from each frame's cos(x, Q(x)) and sum |x|; 1 for a frame of zeros."""
    eta = (1 - cosine.double()).softmax(0)
    total = magnitude.double().sum()
    omega = magnitude.double() / total if float(total) > 0 else torch.full_like(eta, 1 / len(eta))
    return torch.where(omega > 0, eta / omega, 1.0)
