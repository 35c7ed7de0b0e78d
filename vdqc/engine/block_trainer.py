"""The optimiser loop of one piece: AdamW, cosine, a rate per kind of parameter, best state kept.

Samples are dealt into ``batch`` lanes; a step takes one sample of each lane. A worker has whole
lanes, and what a loss remembers it remembers by lane, so that any number of workers that divides
the batch takes the same steps as one process.

Error: InputError [gradient-not-finite] naming the parameter; what was best is put back first.
Source: Loshchilov and Hutter, AdamW, arXiv 1711.05101, and SGDR, arXiv 1608.03983, equation 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Protocol, final

import torch
from torch import Tensor, nn

from vdqc.base.diagnostics import Diagnostics, InputError
from vdqc.engine.distributed import Workers


class Loss(Protocol):
    """What is minimised."""

    weights: dict[str, float]

    def __call__(self, sample: int) -> tuple[Tensor, dict[str, float]]:
        """Loss of one sample and its parts."""

    def evaluate(self, samples: Sequence[int]) -> tuple[float, dict[str, float], int]:
        """Sums of loss and parts over samples, and their number; nothing changes."""

    @property
    def remembers(self) -> bool:
        """True if the order of the samples matters."""


@final
@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Attributes:
        rate, clip_rate, branch_rate, rounding_rate: base learning rates of transforms, of clips and
            steps, of low-rank branches, and of rounding, told apart by the last part of a
            parameter's name.
        floor: share of the base rate at the end of the cosine.
        check: epochs between evaluations; the best state is chosen among what was evaluated.
        patience: evaluations without an improvement of 0.1 % before training stops; 0 for never.
        ordered: lanes of neighbouring samples, for losses that follow a trajectory.
    """

    epochs: int = 15
    batch: int = 1
    rate: float = 5e-3
    clip_rate: float = 5e-2
    branch_rate: float = 1e-4
    rounding_rate: float = 1e-2
    decay: float = 0.0
    floor: float = 1e-3
    check: int = 3
    patience: int = 2
    seed: int = 0
    ordered: bool = False

    def for_workers(self, group: Workers, diagnostics: Diagnostics) -> Schedule:
        """The schedule with a batch that the workers share evenly, with a remark if it grew."""
        batch = math.ceil(self.batch / group.size) * group.size
        if batch != self.batch:
            diagnostics.remark(
                "",
                "batch",
                f"a batch of {self.batch} becomes {batch}, so that {group.size} workers share it",
            )
        return replace(self, batch=batch)

    def lanes(self, count: int) -> list[list[int]]:
        """The samples of each lane, in order."""
        if not self.ordered:
            return [list(range(lane, count, self.batch)) for lane in range(self.batch)]
        ends = [count * lane // self.batch for lane in range(self.batch + 1)]
        return [list(range(start, end)) for start, end in pairwise(ends)]

    def shard(self, count: int, group: Workers) -> list[int]:
        """Samples of one worker."""
        return sorted(chain(*self.lanes(count)[group.rank :: group.size]))

    def steps(self, count: int) -> int:
        """Optimiser steps of one piece."""
        return self.epochs * math.ceil(count / self.batch)

    def order(self, count: int, epoch: int, shuffled: bool) -> list[list[int]]:
        """Batches of one epoch, of all workers: one sample of each lane, lanes shuffled."""
        lanes = self.lanes(count)
        if shuffled:
            seed = (self.seed * 1_000_003 + epoch) % 2**64  # as torch takes a negative one
            generator = torch.Generator().manual_seed(seed)
            for lane in lanes:
                order = torch.randperm(len(lane), generator=generator).tolist()
                lane[:] = [lane[i] for i in order]
        longest = max((len(lane) for lane in lanes), default=0)
        return [[lane[i] for lane in lanes if i < len(lane)] for i in range(longest)]

    def rate_of(self, name: str) -> float:
        """Base rate of one parameter."""
        leaf = name.rpartition(".")[2]
        if "clip" in leaf or "step" in leaf:
            return self.clip_rate
        if leaf.startswith("rounding"):
            return self.rounding_rate
        return self.branch_rate if leaf.startswith("branch") else self.rate

    def factor(self, step: int, steps: int) -> float:
        """Share of the base rate at a step."""
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * step / steps))


@final
@dataclass(frozen=True)
class Outcome:
    """Mean loss over all samples before training and of the state that was kept."""

    start: float
    best: float
    epochs: int
    terms: dict[str, float]


def train(
    params: Mapping[str, nn.Parameter],
    loss: Loss,
    schedule: Schedule,
    count: int,
    group: Workers,
    tick: Callable[[], None],
) -> Outcome:
    """Train ``params`` in place on ``count`` samples; they end as the best state seen."""
    names = list(params)
    optimiser = torch.optim.AdamW(
        [{"params": [params[name]], "lr": schedule.rate_of(name)} for name in names],
        weight_decay=schedule.decay,
    )
    base = [entry["lr"] for entry in optimiser.param_groups]
    mine = set(schedule.shard(count, group))
    kept = _Best(params)
    steps, step, waited, epoch = schedule.steps(count), 0, 0, 0
    try:
        start, terms = _evaluate(loss, sorted(mine), group)
        kept.offer(start, terms)
        for epoch in range(1, schedule.epochs + 1):
            for batch in schedule.order(count, epoch, shuffled=not loss.remembers):
                for entry, rate in zip(optimiser.param_groups, base, strict=True):
                    entry["lr"] = rate * schedule.factor(step, steps)
                optimiser.zero_grad(set_to_none=True)
                _gradients(params, loss, [s for s in batch if s in mine], len(batch), group)
                optimiser.step()
                step += 1
                tick()
            if epoch % schedule.check and epoch != schedule.epochs:
                continue
            improved = kept.offer(*_evaluate(loss, sorted(mine), group))
            waited = 0 if improved else waited + 1
            if schedule.patience and waited >= schedule.patience:
                break
    finally:
        kept.restore()
        for value in params.values():
            value.grad = None
    return Outcome(start, kept.value, epoch, kept.terms)


def _gradients(
    params: Mapping[str, nn.Parameter],
    loss: Loss,
    samples: Sequence[int],
    count: int,
    group: Workers,
) -> None:
    """Gradients of the mean loss over a batch of ``count``, of which ``samples`` are mine."""
    failure: InputError | None = None
    try:
        for sample in samples:
            value, _ = loss(sample)
            (value / count).backward()
            _require_finite(params, sample)
    except InputError as error:
        failure = error
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params.values()]
    flag = torch.tensor(0.0 if failure is None else 1.0, device=gradients[0].device)
    if failure is not None and group.size == 1:
        raise failure
    # the others must hear of a failure, or they would wait for this worker
    *summed, failed = group.total([*gradients, flag])
    if failure is not None:
        raise failure
    if float(failed) > 0:
        raise InputError("another worker found a value that is not finite: see its output")
    for parameter, gradient in zip(params.values(), summed, strict=True):
        parameter.grad = gradient


def _require_finite(params: Mapping[str, nn.Parameter], sample: int) -> None:
    for name, value in params.items():
        if value.grad is not None and not bool(value.grad.isfinite().all()):
            bad = int((~value.grad.isfinite()).sum())
            raise InputError(
                f"the gradient holds NaN or infinity in {bad} of {value.grad.numel()} places "
                f"at sample {sample}",
                "the loss itself is finite: a rate is too large, or the dtype too narrow",
                code="gradient-not-finite",
                site=name,
            )


def _evaluate(loss: Loss, samples: Sequence[int], group: Workers) -> tuple[float, dict[str, float]]:
    """Mean loss and parts over the samples of all workers."""
    if group.is_first and group.size > 1 and not loss.weights:
        loss.evaluate(samples[:1])  # weights that are set at the first call: the same everywhere
    loss.weights.update(group.share(loss.weights))
    whole, parts, count = loss.evaluate(samples)
    numbers = torch.tensor([whole, *parts.values(), float(count)], dtype=torch.float64)
    whole, *values, count = group.total([numbers])[0].tolist()
    return whole / count, {name: value / count for name, value in zip(parts, values, strict=True)}


@final
class _Best:
    """The state of least loss."""

    def __init__(self, params: Mapping[str, nn.Parameter]) -> None:
        self.params = params
        self.value = math.inf
        self.terms: dict[str, float] = {}
        self.state = {name: value.detach().clone() for name, value in params.items()}

    def offer(self, value: float, terms: dict[str, float]) -> bool:
        """Keep the present state if it is better; True if it is by more than 0.1 %."""
        improved = value < self.value * 0.999
        if value < self.value:
            self.value, self.terms = value, terms
            for name, parameter in self.params.items():
                self.state[name].copy_(parameter.detach())
        return improved

    @torch.no_grad()
    def restore(self) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(self.state[name])
