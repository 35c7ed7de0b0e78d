"""What a mask drops, kept from the last step at which it was known: policy, mathematics, storage.

::

    D(t)  = dense(t) - sparse(t)                        known at a refresh, every ``interval`` steps
    D2(t) = rank_r(D(t) - D(t'))                        t': the refresh before, or the step before
    dense(t + j) ~ sparse(t + j) + D(t) + a D2(t)       a = 1 (hold), or j / (t - t') (linear)

Residuals are [B, H, T, E], one per attention. The factors of D2, [B, H, T, r] and [B, H, r, E], are
its best of that rank, through the E x E Gram matrix. Without a refresh before, D2 is 0.

Stores: ``resident`` (as it is, beside the model), ``host`` (as it is, in the host's memory, copied
when its layer runs), ``int8`` (codes, one scale per token), ``lowrank`` (D by its own factors).

Error: int8: half a step of 1/127 of the largest value of a token; lowrank: the singular values cut
off. Linear extrapolation is exact for a residual that moves linearly by a rank of at most r.
Source: Yang et al., QuantSparse, arXiv 2509.23681, equations 11 to 15 and proposition 3.3; the
paper holds, and does not say which t' it means: its timings decide for the refresh before.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError


class Extrapolation(enum.StrEnum):
    """How far the second-order term reaches."""

    HOLD = "hold"
    LINEAR = "linear"


class Reference(enum.StrEnum):
    """What the second-order term is the difference to."""

    REFRESH = "refresh"  # the refresh before: one dense step per interval
    ADJACENT = "adjacent"  # the step before: two dense steps per interval


class Store(enum.StrEnum):
    """How residuals are kept."""

    RESIDENT = "resident"
    HOST = "host"
    INT8 = "int8"
    LOWRANK = "lowrank"


@final
@dataclass(frozen=True)
class CachePolicy:
    """How the residuals of a model are kept and used; ``str`` is the text that ``parse`` reads.

    Attributes:
        order: 1 or 2.
        rank: of the second-order term, and of ``lowrank``.
        interval: steps from one refresh to the next.
        memory: GiB that all residuals together may take; 0 for no limit.
        timestep: which input says where a call stands.
    """

    order: int = 2
    rank: int = 16
    interval: int = 5
    extrapolation: Extrapolation = Extrapolation.HOLD
    reference: Reference = Reference.REFRESH
    store: Store = Store.RESIDENT
    memory: float = 0.0
    timestep: str = "timestep"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ConfigError(f"expected order 1 or 2, got {self.order}")
        least = 1 + (self.order == 2 and self.reference is Reference.ADJACENT)
        if self.interval < least:
            raise ConfigError(f"expected an interval of {least} or more, got {self.interval}")
        if self.rank < 0 or self.memory < 0 or (self.rank == 0 and self.store is Store.LOWRANK):
            raise ConfigError(
                f"expected a rank (0: no second order) and a memory of 0 or more, got {self.rank} "
                f"and {self.memory:g}"
            )

    @staticmethod
    def parse(text: str) -> CachePolicy:
        """The policy that ``text`` spells; raises ConfigError."""
        match = re.fullmatch(r"residual\{(.*)\}", text)
        try:
            assert match is not None
            pairs = dict(item.split("=", 1) for item in match[1].split(",") if item)
            kinds: dict[str, Any] = {
                "order": int, "rank": int, "interval": int, "extrapolation": Extrapolation,
                "reference": Reference, "store": Store, "memory": float, "timestep": str,
            }  # fmt: skip
            return CachePolicy(**{key: kinds[key](value) for key, value in pairs.items()})
        except (AssertionError, KeyError, ValueError) as error:
            raise ConfigError(f"cannot read the cache policy '{text}'") from error

    def __str__(self) -> str:
        parts = [
            f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}"
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default or f.name in ("order", "interval")
        ]
        return f"residual{{{','.join(parts)}}}"

    @property
    def second(self) -> bool:
        """True if there is a second-order term."""
        return self.order == 2 and self.rank > 0

    def nbytes(self, elements: int, tokens: int, width: int, itemsize: int) -> int:
        """Bytes of one residual of ``elements`` values, ``tokens`` rows of ``width``."""
        groups = elements // max(1, tokens * width)
        factors = groups * self.rank * (tokens + width) * itemsize
        kept = {
            Store.RESIDENT: elements * itemsize,
            Store.HOST: elements * itemsize,
            Store.INT8: elements + 4 * elements // max(1, width),
            Store.LOWRANK: factors,
        }[self.store]
        return kept + (factors if self.second else 0)


@final
@dataclass(frozen=True)
class Residual:
    """One attention's residual: ``kept``, in the form of its store, is D + ``reach`` · D2.

    ``left`` and ``right`` are the factors of D2; None where it is 0. ``span`` is the number of
    steps over which D2 was seen.
    """

    kept: tuple[Tensor, ...]
    left: Tensor | None
    right: Tensor | None
    reach: float
    span: int
    dtype: torch.dtype

    @staticmethod
    def of(policy: CachePolicy, now: Tensor, before: Residual | None, span: int) -> Residual:
        """The residual at a refresh, ``span`` steps after ``before`` was one."""
        left = right = None
        if policy.second and before is not None:
            earlier = before.at_refresh(policy).to(now.device)  # from the host, where it is kept
            left, right = low_rank(now - earlier, policy.rank)
        found = Residual(_stored(policy, now), left, right, 0.0, max(1, span), now.dtype)
        return found if policy.extrapolation is Extrapolation.LINEAR else found._at(policy, 1.0)

    def ahead(self, policy: CachePolicy, steps: int) -> Residual:
        """The residual ``steps`` after its refresh."""
        if policy.extrapolation is Extrapolation.HOLD:
            return self
        return self._at(policy, steps / self.span)

    def at_refresh(self, policy: CachePolicy) -> Tensor:
        """D alone, as far as the store kept it."""
        return self._at(policy, 0.0).value(policy)

    def value(self, policy: CachePolicy) -> Tensor:
        """D + reach · D2."""
        match policy.store:
            case Store.INT8:
                return self.kept[0].to(self.dtype) * self.kept[1].to(self.dtype)
            case Store.LOWRANK:
                left, right = self.inputs(policy)
                return left @ right
            case Store.HOST if self.left is not None:
                return self.kept[0].to(self.left.device)
        return self.kept[0]

    def inputs(self, policy: CachePolicy) -> tuple[Tensor, ...]:
        """What the program that reuses it takes; always of the same shapes."""
        if policy.store is not Store.LOWRANK or not policy.second:
            return self.kept
        left, right = self.kept
        if self.left is None or self.right is None:
            more = torch.zeros_like(left), torch.zeros_like(right)
        else:
            more = self.reach * self.left, self.right
        return torch.cat([left, more[0]], -1), torch.cat([right, more[1]], -2)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        tensors = [*self.kept, self.left, self.right]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def _at(self, policy: CachePolicy, reach: float) -> Residual:
        if self.left is None or self.right is None or reach == self.reach:
            return dataclasses.replace(self, reach=reach)
        if policy.store is Store.LOWRANK:  # added up where it is used
            return dataclasses.replace(self, reach=reach)
        change = reach - self.reach
        value = self.value(policy)
        flat = [x.flatten(0, 1) for x in (value, self.left, self.right)]
        moved = torch.baddbmm(*flat, alpha=change).reshape(value.shape)
        return dataclasses.replace(self, kept=_stored(policy, moved), reach=reach)


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left[..., T, r], right[..., r, E]): their product is the best of rank r for x[..., T, E]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    vectors = torch.linalg.eigh(wide.mT @ wide).eigenvectors[..., -rank:]
    return (wide @ vectors).to(x.dtype), vectors.mT.to(x.dtype).contiguous()


def _stored(policy: CachePolicy, value: Tensor) -> tuple[Tensor, ...]:
    match policy.store:
        case Store.INT8:
            scale = (value.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-12)
            codes = (value.float() / scale).round().clamp(-127, 127).to(torch.int8)
            return codes, scale
        case Store.LOWRANK:
            return low_rank(value, policy.rank)
        case Store.HOST:
            return (_on_host(value),)
    return (value,)


def _on_host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=False)
