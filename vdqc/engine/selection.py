"""Which candidates are worth calibrating on: plain draws, and the salient ones.

Selectors return ``Choice``s: indices into the pool, each with its reason. They order candidates by
``keys`` (names that do not depend on the place) before they draw, so that the pool's order does not
matter. ``vdqc.engine.diverse`` holds Noise-Filtered Diverse Sampling.

Salient Data Selection: N candidate latents x_t of trajectories, as tokens × channels [n, d]::

    C_diff  = |x_t - x_(t-1)|² / |x_t|²        neighbour in the sampler's own steps
    C_quant = |x_tᵀ x_t|₂                      the greatest eigenvalue: quantisation's Hessian
    C       = minmax(C_diff) · minmax(C_quant) over the pool; the greatest are chosen

Error: InputError where more is asked for than there is.
Source: Feng et al., S2Q-VDiT, arXiv 2508.04016, section 3.2. The paper leaves open which neighbour,
which norm, and whether one prompt may take all: ``Neighbour``, ``MatrixNorm``, ``per_prompt``.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError


@final
@dataclass(frozen=True)
class Choice:
    """One chosen candidate and why."""

    index: int
    why: str


def require_enough(count: int, available: int, note: str = "") -> None:
    """Raise InputError if ``count`` candidates are not to be had."""
    if count < 1:
        raise InputError(f"expected to select at least 1 sample, got {count}")
    if count > available:
        raise InputError(
            f"expected at least {count} samples to select from, got {available}",
            *([note] if note else []),
            "record more trajectories, or ask for fewer samples",
            code="too-few-samples",
        )


def key_order(keys: Sequence[str]) -> list[int]:
    """Indices in the order of their keys."""
    return sorted(range(len(keys)), key=keys.__getitem__)


def draw(indices: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
    """``count`` of ``indices`` at random, without repetition, in the order drawn."""
    order = torch.randperm(len(indices), generator=generator)[:count]
    return [indices[at] for at in order.tolist()]


def uniform(keys: Sequence[str], count: int) -> list[Choice]:
    """Evenly spaced along the keys, that is along trajectories and their steps."""
    require_enough(count, len(keys))
    order, total = key_order(keys), len(keys)
    places = [((2 * at + 1) * total) // (2 * count) for at in range(count)]
    return [Choice(order[place], f"{place + 1} of {total}, evenly spaced") for place in places]


def random_choice(keys: Sequence[str], count: int, seed: int) -> list[Choice]:
    """Uniformly at random."""
    require_enough(count, len(keys))
    generator = torch.Generator().manual_seed(seed)
    return [Choice(index, "at random") for index in draw(key_order(keys), count, generator)]


def timestep_spread(
    keys: Sequence[str], timesteps: Sequence[float | None], count: int, seed: int
) -> list[Choice]:
    """One at random from each of ``count`` equal shares of the candidates by timestep."""
    require_enough(count, len(keys))
    if any(timestep is None for timestep in timesteps):
        raise InputError(
            "expected a timestep for every sample, got samples without one",
            "give Sample(..., timestep=t), or select otherwise",
        )
    order = sorted(key_order(keys), key=lambda index: -float(timesteps[index] or 0.0))
    generator = torch.Generator().manual_seed(seed)
    edges = [at * len(order) // count for at in range(count + 1)]
    chosen = []
    for low, high in itertools.pairwise(edges):
        (index,) = draw(order[low:high], 1, generator)
        ends = [float(timesteps[order[at]] or 0.0) for at in (low, high - 1)]
        chosen.append(Choice(index, f"timesteps {ends[0]:g} to {ends[1]:g}"))
    return chosen


# -- salient --------------------------------------------------------------------------------------


class Neighbour(enum.StrEnum):
    """``previous``: the sampler's step before; ``next``: the one after. The step at the end of a
    trajectory takes the only one it has.
    """

    PREVIOUS = "previous"
    NEXT = "next"


class MatrixNorm(enum.StrEnum):
    """``spectral``: the greatest eigenvalue of xᵀx; ``frobenius``: what a library's norm gives."""

    SPECTRAL = "spectral"
    FROBENIUS = "frobenius"


#: Up to this width eigenvalues are computed exactly, above it by power iteration.
_EXACT_WIDTH = 512


def diffusion_salience(latent: Tensor, neighbour: Tensor) -> float:
    """|x - neighbour|² / |x|² in float64."""
    if latent.shape != neighbour.shape:
        raise InputError(
            f"expected latents of one shape along a trajectory, got {list(neighbour.shape)} and "
            f"{list(latent.shape)}"
        )
    x, other = latent.double(), neighbour.double()
    return float((x - other).square().sum() / x.square().sum().clamp_min(1e-300))


def quantisation_salience(tokens: Tensor, norm: MatrixNorm = MatrixNorm.SPECTRAL) -> float:
    """Norm of xᵀx for tokens [B, n, d], averaged over B, in float64."""
    found = []
    for x in tokens.double():
        if norm is MatrixNorm.FROBENIUS:
            found.append(float((x.T @ x).norm()))
        elif x.shape[1] <= _EXACT_WIDTH:
            found.append(float(torch.linalg.eigvalsh(x.T @ x)[-1]))
        else:
            found.append(greatest_eigenvalue(x))
    return sum(found) / len(found)


def greatest_eigenvalue(x: Tensor, rounds: int = 5000, tolerance: float = 1e-13) -> float:
    """Of xᵀx, for x [n, d], by power iteration; d floats of memory beside x.

    Stops where a round changes the value by less than ``tolerance``, relative.
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(x.shape[1], generator=generator, dtype=x.dtype).to(x.device)
    vector /= vector.norm()
    value = 0.0
    for _ in range(rounds):
        product = x.T @ (x @ vector)
        size = float(product.norm())
        if size == 0 or abs(size - value) <= tolerance * size:
            return size
        vector, value = product / size, size
    return value


def minmax(values: Tensor) -> Tensor:
    """``values`` [N] brought to [0, 1]; all 0 where they are equal."""
    spread = values.amax() - values.amin()
    return torch.zeros_like(values) if spread == 0 else (values - values.amin()) / spread


def salient(
    diffusion: Sequence[float],
    quantisation: Sequence[float],
    keys: Sequence[str],
    count: int,
    *,
    prompts: Sequence[int] | None = None,
    per_prompt: int | None = None,
) -> list[Choice]:
    """The candidates of greatest salience, at most ``per_prompt`` of each prompt."""
    require_enough(count, len(keys))
    both = [minmax(torch.tensor(list(v), dtype=torch.float64)) for v in (diffusion, quantisation)]
    scores = both[0] * both[1]
    taken: dict[int, int] = {}
    chosen: list[Choice] = []
    for index in sorted(key_order(keys), key=lambda index: -float(scores[index])):
        prompt = prompts[index] if prompts is not None else 0
        if len(chosen) == count or (per_prompt is not None and taken.get(prompt, 0) >= per_prompt):
            continue
        taken[prompt] = taken.get(prompt, 0) + 1
        parts = f"{float(both[0][index]):.3f} diffusion × {float(both[1][index]):.3f} quantisation"
        chosen.append(Choice(index, f"salience {float(scores[index]):.4f} = {parts}"))
    require_enough(count, len(chosen), f"at most {per_prompt} of each prompt were allowed")
    return chosen


# -- how far a choice depends on the seed -----------------------------------------------------


def stability(choose: Callable[[int], Sequence[Choice]], seeds: Sequence[int]) -> dict[str, float]:
    """Agreement of the choices of several seeds.

    ``overlap``: mean over pairs of |both| / |either|, 1 if the seed does not matter; ``ever``: how
    many different candidates any seed chose.
    """
    sets = [frozenset(choice.index for choice in choose(seed)) for seed in seeds]
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    overlap = sum(pairs) / len(pairs) if pairs else 1.0
    return {"seeds": len(sets), "overlap": overlap, "ever": len(frozenset().union(*sets))}
