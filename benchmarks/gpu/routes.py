"""Which of an op's kernels runs: the automatic choice, the plain one by force, and what was chosen.

The configuration files decide between ``plain``, ``tma`` and ``ws`` kernels, and a ``ws`` kernel
that does not compile or disagrees with the plain one is replaced by it with a warning. ``plain``
takes the other rows out of the files' answer; ``Watch`` reads the choice and the warnings, so that
a row of results never carries the name of a kernel that did not run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

#: Stands for a bold attention configuration: what every GPU can run.
_PLAIN_ATTENTION = {"block_n": 64, "warps": 8, "stages": 2}
_forced = ""


def plain(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with plain kernels only."""
    _install()

    def forced(*args: Any, **named: Any) -> Any:
        global _forced
        _forced = "plain"
        try:
            return call(*args, **named)
        finally:
            _forced = ""

    return forced


def _install() -> None:
    from vdqc.kernels.gpu import runtime

    known: Any = runtime._rows
    if getattr(known, "forcible", False):
        return

    def rows(arch: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = known(arch)
        return [_plain_row(row) for row in found] if _forced == "plain" else found

    rows.forcible = True  # type: ignore[attr-defined]
    runtime._rows = rows  # type: ignore[assignment]


def _plain_row(row: dict[str, Any]) -> dict[str, Any]:
    if row["config"].get("variant", "plain") == "plain":
        return row
    config = _PLAIN_ATTENTION if "attention" in row["op"] else {}
    return {**row, "config": config}


@final
@dataclass
class Watch:
    """What was chosen while it watched."""

    variants: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def note(self) -> str:
        """``ws 128x256x128``; with the reason, if something else served in its place."""
        chosen = ", ".join(dict.fromkeys(self.variants)) or "one kernel"
        return "; ".join([chosen, *dict.fromkeys(self.fallbacks)])


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch which configurations are chosen and which kernels give way."""
    from vdqc.kernels.gpu import runtime

    watch, original = Watch(), runtime.best_config

    def recorded(*args: Any, **named: Any) -> Any:
        config = original(*args, **named)
        watch.variants.append(f"{config.variant} {config.tile}")
        return config

    holders = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith("vdqc.kernels.gpu.") and getattr(module, "best_config", 0) is original
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for module in holders:
            module.best_config = recorded  # type: ignore[attr-defined]
        try:
            yield watch
        finally:
            for module in holders:
                module.best_config = original  # type: ignore[attr-defined]
            texts = [str(warning.message) for warning in said]
            watch.fallbacks += [text for text in texts if "plain variant serves" in text]
