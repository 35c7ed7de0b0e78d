"""Chooses the samples worth calibrating on; every pass behind it learns from those.

::

    ctx.samples: N candidates  ->  ``count`` of them, read one by one as before

``random``, ``uniform`` (evenly spaced along trajectories) and ``timestep`` (one from each equal
share of the timesteps) need nothing; ``nfds`` leaves out what is unlike the pool and spreads over
clusters of how frames change; ``salient`` takes the candidates where sampling moves most and
quantisation hurts most, and needs a pool recorded along trajectories.

Source: ``nfds``: Feng et al., QuantVGGT, arXiv 2509.21302, section 3.3; ``salient``: Feng et al.,
S2Q-VDiT, arXiv 2508.04016, section 3.2.
Invariant: the graph stays as it is. A choice depends on the candidates and the seed, not on their
order (``uniform`` of samples without trajectories is by their order); the probe on which passes are
measured stays the first sample that the user gave.
Online: nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from vdqc.base.diagnostics import ConfigError
from vdqc.base.options import check_belongs, check_seed
from vdqc.engine.diverse import Filter, Quota, Reference, Similarity, left_out, nfds, noise_score
from vdqc.engine.features import candidate_features, saliences
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.engine.pool import Pool, Subset, candidates, sample_keys
from vdqc.engine.selection import (
    Choice,
    MatrixNorm,
    Neighbour,
    random_choice,
    require_enough,
    salient,
    stability,
    timestep_spread,
    uniform,
)
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample


class Method(enum.StrEnum):
    """How samples are chosen."""

    RANDOM = "random"
    UNIFORM = "uniform"
    TIMESTEP = "timestep"
    NFDS = "nfds"
    SALIENT = "salient"


@final
@dataclass(frozen=True)
class Select(Pass):
    """Replaces the samples by a choice of them.

    Attributes:
        method: ``random``, ``uniform``, ``timestep``, ``nfds`` or ``salient``.
        count: how many; the papers take 20 or 40.
        seed: added to the run's own.
        repeats: seeds over which the report measures how stable the choice is.
        clusters: nfds: of how frames change.
        drop: nfds: share of the candidates left out as noise.
        filter: nfds: ``zscore``, ``iqr`` or ``none``.
        reference: nfds: frames are compared with the ``first``, the ``mean`` or the one before.
        similarity: nfds: of whole frames, or averaged token by token.
        quota: nfds: ``equal`` shares of all clusters, or ``proportional`` to their sizes.
        layers: nfds: how many of the last blocks are monitored.
        latent: salient: name of the input that is denoised; found by itself if empty.
        norm: salient: ``spectral`` or ``frobenius``.
        neighbour: salient: the sampler's ``previous`` or ``next`` step.
        per_prompt: salient: at most so many of one trajectory; ``none`` for no limit.
    """

    method: Method = Method.RANDOM
    count: int = 40
    seed: int = 0
    repeats: int = 5
    clusters: int = 8
    drop: float = 0.2
    filter: Filter = Filter.ZSCORE
    reference: Reference = Reference.FIRST
    similarity: Similarity = Similarity.FRAME
    quota: Quota = Quota.EQUAL
    layers: int = 4
    latent: str = ""
    norm: MatrixNorm = MatrixNorm.SPECTRAL
    neighbour: Neighbour = Neighbour.PREVIOUS
    per_prompt: int | None = None

    name: ClassVar[str] = "select"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.CAPTURED, Stage.ANNOTATED})
    exact: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_seed(self.seed, "select.seed")
        for option in ("count", "repeats", "clusters", "layers"):
            if getattr(self, option) < 1:
                value = getattr(self, option)
                raise ConfigError(f"select.{option}: expected 1 or more, got {value}")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"select.drop: expected 0 up to, not including, 1, got {self.drop:g}")
        check_belongs(self, _BELONGS)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Choose; facts: what was chosen and why, what was left out, stability over seeds."""
        samples = ctx.samples
        require_enough(self.count, len(samples))
        choose, facts = self.selector(graph, ctx)
        chosen = choose(self.seed + ctx.seed)
        if self.method in (Method.UNIFORM, Method.SALIENT):
            agreement = stability(choose, [self.seed + ctx.seed])  # no seed takes part
        else:
            first = self.seed + ctx.seed
            agreement = stability(choose, range(first, first + self.repeats))
        ctx.use(Subset(samples, sorted(choice.index for choice in chosen)))
        return PassResult(
            0,
            {
                "method": str(self.method),
                "candidates": len(samples),
                **({"pool": samples.hash} if isinstance(samples, Pool) else {}),
                "chosen": _described(samples, chosen),
                "stability": agreement,
                **facts,
            },
        )

    def selector(
        self, graph: Graph, ctx: Context
    ) -> tuple[Callable[[int], list[Choice]], dict[str, Any]]:
        """A choice for each seed (features are measured once), and facts about the candidates."""
        samples = ctx.samples
        if self.method is Method.UNIFORM and candidates(samples) is None:
            keys = [f"{place:09d}" for place in range(len(samples))]  # the order is all there is
        else:
            keys = sample_keys(samples)
        match self.method:
            case Method.UNIFORM:
                return (lambda seed: uniform(keys, self.count)), {}
            case Method.RANDOM:
                return (lambda seed: random_choice(keys, self.count, seed)), {}
            case Method.TIMESTEP:
                timesteps = [_timestep(samples, index) for index in range(len(samples))]
                return (lambda seed: timestep_spread(keys, timesteps, self.count, seed)), {}
            case Method.SALIENT:
                return self._salient(graph, ctx, keys)
        return self._diverse(graph, ctx, keys)

    def _salient(
        self, graph: Graph, ctx: Context, keys: list[str]
    ) -> tuple[Callable[[int], list[Choice]], dict[str, Any]]:
        diffusion, quantisation = saliences(
            graph,
            ctx.samples,
            latent=self.latent,
            norm=self.norm,
            neighbour=self.neighbour,
            progress=ctx.progress,
        )
        prompts = [candidate.seed for candidate in candidates(ctx.samples) or ()]
        chosen = salient(
            diffusion, quantisation, keys, self.count, prompts=prompts, per_prompt=self.per_prompt
        )
        return (lambda seed: chosen), {
            "trajectories": len({prompts[choice.index] for choice in chosen})
        }

    def _diverse(
        self, graph: Graph, ctx: Context, keys: list[str]
    ) -> tuple[Callable[[int], list[Choice]], dict[str, Any]]:
        features = candidate_features(
            graph,
            ctx.samples,
            layers=self.layers,
            reference=self.reference,
            similarity=self.similarity,
            progress=ctx.progress,
        )

        def choose(seed: int) -> list[Choice]:
            return nfds(
                features,
                keys,
                self.count,
                seed,
                clusters=self.clusters,
                drop=self.drop,
                rule=self.filter,
                quota=self.quota,
            )

        score = noise_score(features)
        dropped = [
            {"index": index, "score": round(float(score[index]), 3)}
            for index in left_out(features, keys, self.drop, self.filter)
        ]
        return choose, {"noise": dropped}


_DIVERSE = ("clusters", "drop", "filter", "reference", "similarity", "quota", "layers")
_SALIENT = ("latent", "norm", "neighbour", "per_prompt")
_BELONGS = (
    *((option, "method", (Method.NFDS,)) for option in _DIVERSE),
    *((option, "method", (Method.SALIENT,)) for option in _SALIENT),
)


def _timestep(samples: Sequence[Sample], index: int) -> float | None:
    found = candidates(samples)
    return found[index].timestep if found is not None else samples[index].timestep


def _described(samples: Sequence[Sample], chosen: Sequence[Choice]) -> list[dict[str, Any]]:
    """JSON about each choice, in the order of the pool."""
    found = candidates(samples)
    rows = []
    for choice in sorted(chosen, key=lambda choice: choice.index):
        row: dict[str, Any] = {"index": choice.index, "timestep": _timestep(samples, choice.index)}
        if found is not None:
            row |= {"seed": found[choice.index].seed, "step": found[choice.index].step}
        rows.append({**row, "why": choice.why})
    return rows
