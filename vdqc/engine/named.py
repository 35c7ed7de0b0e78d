"""Named recipes: one TOML file each in ``vdqc/recipes``, or a file of the user's own.

::

    about = "..."                       # one sentence
    source = "..."                      # paper, or nothing
    claims = "..."                      # what the paper reports, in its own terms
    scheme = ["w4a6"]                   # as --scheme takes them; later ones win
    passes = ["select{method=salient}", "smooth{learn=true}", ...]
    departures = ["..."]                # where it is not what the paper says, and why

Error: ConfigError for a name that no file has (nearest offered) and for a file that does not read
like the above; passes and schemes are checked by the same parsers as on the command line.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from vdqc.base.diagnostics import ConfigError, nearest

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
SUFFIX = ".toml"
_TEXTS = ("about", "source", "claims")
_LISTS = ("scheme", "passes", "departures")


@final
@dataclass(frozen=True)
class NamedRecipe:
    """What a recipe file says; ``passes`` and ``scheme`` are texts for the usual parsers."""

    name: str
    passes: tuple[str, ...]
    scheme: tuple[str, ...] = ("w8a8",)
    about: str = ""
    source: str = ""
    claims: str = ""
    departures: tuple[str, ...] = ()

    @property
    def pass_list(self) -> str:
        """The passes as ``--passes`` takes them."""
        return ",".join(self.passes)

    def to_toml(self) -> str:
        """The text of the file; ``parse`` reads it back."""
        lines = [f"{key} = {_quoted(getattr(self, key))}" for key in _TEXTS if getattr(self, key)]
        for key in _LISTS:
            items = getattr(self, key)
            if len(items) < 2:
                lines.append(f"{key} = [{', '.join(map(_quoted, items))}]")
            else:
                lines += [f"{key} = [", *(f"    {_quoted(item)}," for item in items), "]"]
        return "\n".join(line for line in lines if line != "departures = []") + "\n"

    def to_json(self) -> dict[str, Any]:
        """For ``--json``."""
        lists = {key: list(getattr(self, key)) for key in _LISTS}
        return {"name": self.name, **{key: getattr(self, key) for key in _TEXTS}, **lists}


def names() -> list[str]:
    """The recipes that come with vdqc."""
    return sorted(path.stem for path in FOLDER.glob(f"*{SUFFIX}"))


def named(text: str) -> NamedRecipe:
    """The recipe of that name, or of that file (``.toml``); raises ConfigError."""
    path = Path(text) if text.endswith(SUFFIX) else FOLDER / f"{text}{SUFFIX}"
    if not path.is_file():
        if text.endswith(SUFFIX):
            raise ConfigError(f"expected a recipe file at {text}, found nothing")
        raise ConfigError(f"unknown recipe '{text}'", nearest(text, names()), code="unknown-recipe")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    return parse(path.stem, found)


def parse(name: str, found: Mapping[str, Any]) -> NamedRecipe:
    """A recipe from the content of its file; raises ConfigError."""
    for key in found:
        if key not in (*_TEXTS, *_LISTS):
            raise ConfigError(
                f"recipe {name}: unknown entry '{key}'", nearest(key, _TEXTS + _LISTS)
            )
    for key in _TEXTS:
        if not isinstance(found.get(key, ""), str):
            raise ConfigError(f"recipe {name}: expected '{key}' to be a text, got {found[key]!r}")
    for key in _LISTS:
        items = found.get(key, [])
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"recipe {name}: expected '{key}' to be a list of texts")
    if not found.get("passes"):
        raise ConfigError(f"recipe {name}: expected 'passes', a list of at least one pass")
    return NamedRecipe(
        name,
        tuple(found["passes"]),
        tuple(found.get("scheme") or NamedRecipe.scheme),
        found.get("about", ""),
        found.get("source", ""),
        found.get("claims", ""),
        tuple(found.get("departures", ())),
    )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
