"""The passes as data, read from their classes: what ``vdqc passes`` prints."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import typing
from typing import Any

from vdqc.engine.pass_manager import Pass
from vdqc.engine.recipe import PassTable, load_pass


def catalog(table: PassTable) -> list[dict[str, Any]]:
    """One JSON dictionary per pass, in table order."""
    return [describe(load_pass(name, table)) for name in table]


def describe(cls: type[Pass]) -> dict[str, Any]:
    """Name, summary, stages, exactness, source and options of one pass, all JSON."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    hints = typing.get_type_hints(cls)
    documented = _documented(inspect.getdoc(cls) or "")
    return {
        "name": cls.name,
        "summary": (text or cls.__doc__ or "").strip().partition("\n")[0].rstrip("."),
        "at": [str(stage) for stage in sorted(cls.at)],
        "to": str(cls.to) if cls.to is not None else None,
        "exact": cls.exact,
        "source": _section(text, "Source"),
        "invariant": _section(text, "Invariant"),
        "online": _section(text, "Online"),
        "options": [
            {
                "name": field.name,
                "type": getattr(hints[field.name], "__name__", str(hints[field.name])),
                "default": _json(field.default),
                "text": documented.get(field.name, ""),
            }
            for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        ],
        "doc": text,
    }


def _section(text: str, title: str) -> str:
    """The paragraph after ``title:``, on one line."""
    match = re.search(rf"^\s*{title}:\s*(.+?)(?=\n\s*\n|\n\s*[A-Z]\w+:|\Z)", text, re.S | re.M)
    return " ".join(match[1].split()) if match else ""


def _documented(text: str) -> dict[str, str]:
    """Attribute name to its text, from an ``Attributes:`` section."""
    _, _, body = text.partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w[\w, ]*): (.+(?:\n {8,}.+)*)", body, re.M)
    return {
        name.strip(): " ".join(words.split()) for names, words in found for name in names.split(",")
    }


def _json(value: Any) -> Any:
    if value is dataclasses.MISSING:
        return None
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
