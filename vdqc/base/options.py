"""Checks of options that several passes share. Error: ConfigError naming the option."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from vdqc.base.diagnostics import ConfigError

#: Bits of a seed: the sum of two, of a run and of a pass, is one that torch takes.
SEED_BITS = 62

#: An option, another one, and the values of that with which the first says anything.
Belongs = tuple[str, str, tuple[Any, ...]]


def check_seed(seed: int, where: str) -> None:
    """Raise ConfigError unless random generators take ``seed``, the value of ``where``."""
    if seed.bit_length() > SEED_BITS:
        raise ConfigError(f"{where}: expected a seed of at most {SEED_BITS} bits, got {seed}")


def check_belongs(item: Any, owners: Iterable[Belongs]) -> None:
    """Raise ConfigError where a pass has an option set that its other options leave unread."""
    defaults = {field.name: field.default for field in dataclasses.fields(item)}
    for option, other, values in owners:
        chosen = getattr(item, other)
        if chosen not in values and getattr(item, option) != defaults[option]:
            wanted = " or ".join(f"{other}={option_text(value)}" for value in values)
            raise ConfigError(
                f"{item.name}.{option} belongs to {wanted}, got {other}={option_text(chosen)}"
            )


def option_text(value: Any) -> str:
    """A value as pass lists spell it."""
    return str(value).lower() if isinstance(value, bool) else f"{value}"
