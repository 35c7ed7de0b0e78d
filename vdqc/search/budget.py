"""What a search may spend and must reach: ``size=0.35,time=0.8`` and ``sqnr=30``.

A number alone is a share of the float model's weights, or of its predicted time; with a unit it is
bytes (``2GB``, ``700MiB``) or time (``12ms``).

Error: ConfigError for an unknown key, a key said twice, a number that does not read as one, a share
outside 0 ... 1 or an unknown unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from vdqc.base.diagnostics import ConfigError, nearest
from vdqc.text import duration, size

#: Bytes, and microseconds, of one unit.
_SIZE: Mapping[str, float] = {
    "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip
_TIME: Mapping[str, float] = {"us": 1, "ms": 1e3, "s": 1e6}
_UNITS = {"size": _SIZE, "time": _TIME}
_NUMBER = re.compile(r"(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([A-Za-z]*)")


@final
@dataclass(frozen=True)
class Amount:
    """Bytes or microseconds, or a share of what the float model takes."""

    value: float
    is_share: bool

    def of(self, whole: float) -> float:
        """In bytes or microseconds, for a float model that takes ``whole``."""
        return self.value * whole if self.is_share else self.value


@final
@dataclass(frozen=True)
class Budget:
    """Limits of a search; None where nothing was said. ``floor_db`` is the least SQNR."""

    size: Amount | None = None
    time: Amount | None = None
    floor_db: float | None = None
    text: str = ""

    @property
    def floor_error(self) -> float:
        """The greatest relative squared error that reaches the floor."""
        return math.inf if self.floor_db is None else 10 ** (-self.floor_db / 10)

    @staticmethod
    def parse(budget: str | None, floor: str | None) -> Budget:
        """From the texts of ``--budget`` and ``--floor``; raises ConfigError."""
        if budget is None and floor is None:
            raise ConfigError(
                "expected --budget or --floor, got neither",
                "e.g. --budget size=0.35,time=0.8 or --floor sqnr=30",
            )
        spent = _pairs(budget or "", "--budget", ("size", "time"))
        reached = _pairs(floor or "", "--floor", ("sqnr",))
        if budget is not None and not spent:
            raise ConfigError("--budget: expected size=..., time=... or both, got nothing")
        if floor is not None and not reached:
            raise ConfigError("--floor: expected sqnr=<dB>, got nothing")
        amounts = {key: _amount(key, value) for key, value in spent.items()}
        texts = [f"{key}={value}" for key, value in [*spent.items(), *reached.items()]]
        decibels = _decibels(reached["sqnr"]) if reached else None
        return Budget(amounts.get("size"), amounts.get("time"), decibels, ",".join(texts))


def _pairs(text: str, option: str, keys: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in keys:
            raise ConfigError(f"{option}: unknown key '{key}'", nearest(key, keys))
        if not equals or not value:
            raise ConfigError(f"{option}: expected {key}=<value>, got '{item}'")
        if key in found:
            raise ConfigError(f"{option}: '{key}' is said twice")
        found[key] = value
    return found


def _amount(key: str, text: str) -> Amount:
    units = _UNITS[key]
    match = _NUMBER.fullmatch(text)
    if match is None:
        known = ", ".join(units)
        raise ConfigError(
            f"--budget: expected {key} as a number, got '{text}'",
            f"a share of the float model's ({key}=0.5), or with a unit: {known}",
        )
    value, unit = float(match[1]), match[2]
    if unit and unit not in units:
        raise ConfigError(f"--budget: unknown unit '{unit}' of {key}", nearest(unit, units))
    if unit:
        return Amount(value * units[unit], is_share=False)
    if not 0 < value <= 1:
        raise ConfigError(
            f"--budget: expected {key} as a share in 0 ... 1, got {text}",
            f"an amount needs a unit: {key}={text}{'GB' if key == 'size' else 'ms'}",
        )
    return Amount(value, is_share=True)


def _decibels(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"--floor: expected sqnr in dB, got '{text}'", "e.g. --floor sqnr=30")
    return value


def shown(key: str, amount: float, whole: float) -> str:
    """``18.9 MB (0.35)``: an amount, and its share of the float model's."""
    text = size(amount) if key == "size" else duration(amount * 1e-6)
    return f"{text} ({amount / whole:.3f} of float)" if whole > 0 else text
