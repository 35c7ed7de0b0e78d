"""Recipes: which passes run, in which order, with which options, and which sites get which scheme.

Text and objects convert both ways: ``parse_passes("rotate,smooth{alpha=0.6}", table)`` and
``",".join(map(str, passes))``. Tables of passes are passed in: the engine knows no pass by name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import importlib
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from vdqc.base.diagnostics import ConfigError, nearest
from vdqc.base.scheme import QuantScheme
from vdqc.engine.pass_manager import Pass, Rule

#: Pass name to ``module:Class``; loaded when asked for, so that listing names imports nothing.
PassTable = Mapping[str, str]

_ITEM = re.compile(r"\s*(?P<name>[A-Za-z_][\w-]*)\s*(\{(?P<options>[^{}]*)\})?\s*(,|$)")


@final
@dataclass(frozen=True)
class Recipe:
    """Passes in order and rules for sites; ``str`` is the pass list."""

    passes: tuple[Pass, ...]
    rules: tuple[Rule, ...] = ()

    @staticmethod
    def parse(
        text: str | Sequence[str], table: PassTable, schemes: Sequence[str] = ("w8a8",)
    ) -> Recipe:
        """The recipe for a pass list and ``[glob=]scheme`` texts; raises ConfigError."""
        return Recipe(parse_passes(text, table), tuple(parse_rule(scheme) for scheme in schemes))

    def __str__(self) -> str:
        return ",".join(str(item) for item in self.passes)


def parse_rule(text: str) -> Rule:
    """``w8a8`` (every site) or ``blocks.0.*=none``."""
    select, equals, scheme = text.rpartition("=")
    return Rule(select if equals else "*", QuantScheme.parse(scheme))


def load_pass(name: str, table: PassTable) -> type[Pass]:
    """The class behind a name; raises ConfigError with the nearest known name."""
    if name not in table:
        raise ConfigError(f"unknown pass '{name}'", nearest(name, table), code="unknown-pass")
    module, _, attribute = table[name].partition(":")
    cls: type[Pass] = getattr(importlib.import_module(module), attribute)
    return cls


def parse_passes(text: str | Sequence[str], table: PassTable) -> tuple[Pass, ...]:
    """``rotate,smooth{alpha=0.6},quant``, or texts of such passes, to pass objects."""
    if not isinstance(text, str):
        parts = list(text)
        if wrong := [part for part in parts if not isinstance(part, str)]:
            raise ConfigError(
                f"expected the passes as texts, got one of type {type(wrong[0]).__name__}",
                'write e.g. passes=["rotate", "smooth{alpha=0.6}", "quant"]',
            )
        text = ",".join(parts)
    passes, position = [], 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise ConfigError(
                f"cannot read the pass list at '{text[position:]}'",
                "expected name or name{option=value,...}, separated by commas",
            )
        pairs = _pairs(match["name"], match["options"] or "")
        passes.append(make_pass(match["name"], pairs, table))
        position = match.end()
    if not passes:
        raise ConfigError("the pass list is empty", "expected e.g. rotate,smooth,quant")
    return tuple(passes)


def make_pass(name: str, options: Mapping[str, str], table: PassTable) -> Pass:
    """A pass from option texts; raises ConfigError for an unknown or ill-typed option."""
    cls = load_pass(name, table)
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in options.items():
        if key not in fields:
            raise ConfigError(
                f"pass '{name}' has no option '{key}'",
                nearest(key, fields) if fields else "it has no options",
                code="unknown-option",
            )
        values[key] = convert(value, fields[key], f"{name}.{key}")
    return cls(**values)


def convert(text: str, kind: Any, where: str) -> Any:
    """``text`` as a bool, int, float, str or enum; ``none`` where ``kind`` allows None.

    Of several kinds (``int | str``) the first that can read the text is taken.
    """
    if isinstance(kind, types.UnionType):
        if text == "none" and types.NoneType in kind.__args__:
            return None
        *others, kind = (part for part in kind.__args__ if part is not types.NoneType)
        for other in others:
            with contextlib.suppress(ConfigError):
                return convert(text, other, where)
    if kind is bool:
        if text not in ("true", "false"):
            raise ConfigError(f"{where}: expected true or false, got '{text}'")
        return text == "true"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        if text not in [member.value for member in kind]:
            raise ConfigError(
                f"{where}: got '{text}'", nearest(text, [str(member.value) for member in kind])
            )
        return kind(text)
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{where}: expected {kind.__name__}, got '{text}'") from error


def _pairs(name: str, text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ConfigError(f"expected option=value, got '{item}'")
        if key in pairs:
            raise ConfigError(
                f"{name}.{key}: expected one value, got '{pairs[key]}' and '{value}'",
                "leave one out",
            )
        pairs[key] = value
    return pairs
