"""When a compiled model compares dense with sparse attention, and when it reuses what it kept.

A call is *where* it stands (timestep), *whose* it is (branch of guidance) and *how large*. Branches
are told apart by the name that diffusers' ``cache_context`` gives, and by what conditions the call:
two prompts never share a residual. The cache refreshes a branch

* at its first step of a video, and every ``interval`` steps;
* with a warning, where the branch's steps do not follow each other: skipped, repeated, backwards;
* with a warning, where sizes changed in mid-video, or where the residuals do not fit the memory.

A video ends where the timestep goes back to where the video began, or before; timesteps may fall or
rise. A step counts as skipped if another branch ran in between, or if the timestep jumped by more
than ``JUMP`` times the step before. Refreshing gives what dense attention gives, so whatever is
detected costs time and not quality.

Source: Yang et al., QuantSparse, arXiv 2509.23681, section 3.2; the state machine: ours.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.base.residual import CachePolicy, Reference, Residual
from vdqc.ir.signature import Signature

#: Schedules shifted as usual change their step by less than this from one to the next.
JUMP = 1.8
_CONDITION = re.compile(r"encoder|text|pooled|class_labels|prompt|context|caption")

Program = Callable[..., Any]
Key = tuple[str, tuple[float, ...]]


@final
@dataclass
class Branch:
    """What is kept for one branch of guidance.

    Attributes:
        step: the video's step in which it last ran.
        refreshed: the step in which it last compared.
        row: comparisons since then without a reuse between them.
        repeats: it ran twice in one step, so its calls cannot be told apart.
        fits: its residuals fit the memory.
    """

    shapes: tuple[Any, ...]
    step: int
    refreshed: int = -1
    row: int = 0
    repeats: bool = False
    fits: bool = True
    residuals: list[Residual] = field(default_factory=list)


@final
class ResidualCache:
    """Runs a call through the one program or the other; see the module's text.

    Attributes:
        refreshes, reuses: how many calls each program has run since the model was loaded.
    """

    def __init__(self, policy: CachePolicy, count: int, signature: Signature) -> None:
        self.policy = policy
        self._count = count  # of residuals: the last outputs of the program that refreshes
        self.refreshes = 0
        self.reuses = 0
        self.name = ""
        paths = [entry.path for entry in signature.inputs]
        if policy.timestep not in paths:
            raise InputError(f"expected an input '{policy.timestep}', got {', '.join(paths)}")
        self._timestep = paths.index(policy.timestep)
        self._condition = [i for i, path in enumerate(paths) if _CONDITION.search(path)]
        self._branches: dict[Key, Branch] = {}
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next call begins a video."""
        self._branches.clear()
        self._first = self._now = self._gap = 0.0
        self._direction = 0
        self._step = self._jump = -1

    @property
    def nbytes(self) -> int:
        """Bytes of all residuals that are kept now."""
        kept = [r.nbytes for branch in self._branches.values() for r in branch.residuals]
        return sum(kept)

    @torch.no_grad()
    def run(self, inputs: Sequence[Any], refresh: Program, reuse: Program) -> tuple[Any, ...]:
        """The model's outputs for one call; both programs take ``inputs`` first."""
        self._advance(_number(inputs[self._timestep]))
        key = (self.name, tuple(_sum(inputs[i]) for i in self._condition))
        shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in inputs)
        branch = self._branches.get(key)
        if branch is None or self._must_compare(branch, shapes):
            return self._compare(key, shapes, inputs, refresh)
        branch.step, branch.row = self._step, 0
        ahead = self._step - branch.refreshed
        self.reuses += 1
        branch.residuals, now = self._moved(branch, ahead)
        return tuple(reuse(*inputs, *now))

    # -- where a call stands --------------------------------------------------------------------

    def _advance(self, time: float) -> None:
        if self._step < 0:
            self._begin(time)
            return
        gap = abs(time - self._now)
        if gap == 0:
            return
        direction = 1 if time > self._now else -1
        if self._direction not in (0, direction):
            back_at_first = (time - self._first) * self._direction <= 0
            if not back_at_first:
                _warn(
                    f"the timestep went from {self._now:g} to {time:g}, back into a video that "
                    f"began at {self._first:g}",
                    "call reset_cache() between videos",
                )
            self._begin(time)
            return
        if self._gap and gap > JUMP * self._gap:
            _warn(f"the timestep went from {self._now:g} to {time:g}: steps were skipped")
            self._step += 1  # so that no branch stands right before this step
            self._jump = self._step + 1
        self._direction, self._gap, self._now = direction, gap, time
        self._step += 1

    def _begin(self, time: float) -> None:
        self.reset()
        self._first = self._now = time
        self._step = 0

    def _must_compare(self, branch: Branch, shapes: tuple[Any, ...]) -> bool:
        if branch.shapes != shapes:
            _warn(f"sizes changed in mid-video, from {branch.shapes} to {shapes}")
            return True
        if branch.step == self._step and not branch.repeats:
            _warn(
                f"a step was repeated at timestep {self._now:g}: this branch runs dense",
                "calls of several branches need different prompts or cache_context(name)",
            )
            branch.repeats = True
        if branch.repeats or not branch.fits:
            return True
        if branch.step != self._step - 1:
            if self._jump != self._step:  # else it was said already
                _warn(f"a branch skipped steps before timestep {self._now:g}")
            return True
        adjacent = self.policy.second and self.policy.reference is Reference.ADJACENT
        if adjacent and branch.row == 1:
            return True
        return self._step - branch.refreshed >= self.policy.interval - adjacent

    # -- the two programs -----------------------------------------------------------------------

    def _compare(
        self, key: Key, shapes: tuple[Any, ...], inputs: Sequence[Any], refresh: Program
    ) -> tuple[Any, ...]:
        self.refreshes += 1
        outputs = tuple(refresh(*inputs))
        own, residuals = outputs[: -self._count], list(outputs[-self._count :])
        del outputs  # each residual goes as soon as what is kept of it is made
        old, branch = self._branches.get(key), Branch(shapes, self._step, self._step)
        self._branches[key] = branch
        if old is not None:
            branch.repeats, branch.fits = old.repeats, old.fits
        if branch.repeats or not branch.fits:
            return own
        before: list[Residual | None] = [None] * self._count
        span = self._step - old.refreshed if old is not None else 0
        near = span == 1 or self.policy.reference is Reference.REFRESH
        branch.row = 1
        if old is not None and old.shapes == shapes and old.residuals and span > 0 and near:
            before, branch.row = list(old.residuals), 2
        branch.residuals = [Residual.of(self.policy, residuals.pop(0), was, span) for was in before]
        self._keep_within_memory(branch)
        return own

    def _moved(self, branch: Branch, steps: int) -> tuple[list[Residual], list[Tensor]]:
        moved = [residual.ahead(self.policy, steps) for residual in branch.residuals]
        return moved, [part for r in moved for part in r.inputs(self.policy)]

    def _keep_within_memory(self, branch: Branch) -> None:
        limit = self.policy.memory * 2**30
        if limit and self.nbytes > limit:
            _warn(
                f"the residuals take {self.nbytes / 2**30:.3f} GiB, {self.policy.memory:g} are "
                "allowed: this branch runs dense",
                "compile with more memory, or with store=int8 or store=lowrank",
            )
            branch.residuals, branch.fits = [], False


def _number(value: Any) -> float:
    """The timestep of a call: the largest, where tokens or samples have their own."""
    return float(value.max()) if isinstance(value, Tensor) else float(value)


def _sum(value: Any) -> float:
    """Tells what conditions two calls apart."""
    return float(value.double().sum()) if isinstance(value, Tensor) else float(value)


def _warn(message: str, note: str = "") -> None:
    advice = f" ({note})" if note else ""
    warnings.warn(f"residual cache: {message}; refreshed{advice}", stacklevel=4)
