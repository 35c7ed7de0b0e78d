"""What is measured of an op: its checks, its cases, and of a case ours, peers, work and ceiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

from benchmarks.gpu.env import Env
from benchmarks.gpu.names import AUTO
from benchmarks.gpu.peers import Call, Peer
from vdqc.kernels.base import Cost


@final
@dataclass(frozen=True)
class Work:
    """What a call must do at least.

    Attributes:
        amount: operations, or bytes for ``copy``.
        kind: the ceiling it is held against, see ``ceilings.of``.
    """

    amount: float
    kind: str

    def rate(self, ms: float) -> float:
        """T(FL)OP/s, or GB/s for ``copy``."""
        return self.amount / ms * (1e-6 if self.kind == "copy" else 1e-9)

    @property
    def unit(self) -> str:
        """Of ``rate``."""
        return "GB/s" if self.kind == "copy" else "TOPS"


@final
@dataclass(frozen=True)
class Trial:
    """One case, built: operands exist.

    Attributes:
        ours: variant to call; ``auto`` is what a program gets.
        verify: compares what is timed with its reference on a sample; raises WrongError.
        cost: what lowering predicts with, per variant (``auto``'s where it is missing).
        notes: what a variant turned out to be, known after ``verify``.
        works: work of a variant, where it is not ``work``.
        derived: name to parts of the times of variants, such as 20 % dense and 80 % sparse steps.
        extra: more of ours, which may fail: as a peer does.
        resident: bytes of weights of each function; then peak memory is measured too.
    """

    ours: Mapping[str, Call]
    peers: Mapping[str, Peer]
    work: Work
    verify: Callable[[], Any]
    cost: Mapping[str, Cost] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    works: Mapping[str, Work] = field(default_factory=dict)
    derived: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    resident: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Peer] = field(default_factory=dict)

    def work_of(self, variant: str) -> Work:
        """The work of one variant."""
        return self.works.get(variant, self.work)

    def cost_of(self, variant: str) -> Cost | None:
        """The predicted cost of one variant."""
        return self.cost.get(variant, self.cost.get(AUTO))


@final
@dataclass(frozen=True)
class Case:
    """One shape of an op; ``rank`` 0 is measured first. ``key`` groups cases that differ in size
    only: a dry run takes one of each.
    """

    name: str
    build: Callable[[Env], Trial]
    rank: int = 1
    key: str = ""


@final
@dataclass(frozen=True)
class Op:
    """One op: checked on odd sizes first, then measured case by case.

    Attributes:
        seconds: limit of its check and of each of its cases.
    """

    name: str
    check: Callable[[Env], Any]
    cases: tuple[Case, ...]
    seconds: float = 120.0
