"""Which of an op's kernels runs: the automatic choice, the plain one by force, and what was chosen.

The configuration files decide between ``plain``, ``tma`` and ``ws`` kernels, and a ``ws`` kernel
that does not compile or disagrees with the plain one is replaced by it with a warning. ``plain``
takes the other rows out of the files' answer; ``Watch`` reads the choice and the verdict, so that
a row of results never carries the name of a kernel that did not run.
"""

from __future__ import annotations

import sys
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
    from vdqc.kernels.gpu import launch_config

    known: Any = launch_config._rows
    if getattr(known, "forcible", False):
        return

    def rows(arch: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = known(arch)
        return [_plain_row(row) for row in found] if _forced == "plain" else found

    rows.forcible = True  # type: ignore[attr-defined]
    launch_config._rows = rows  # type: ignore[assignment]


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
    from vdqc.kernels.gpu import guard, launch_config

    watch = Watch()
    choose, run_guarded = launch_config.best_config, guard.guarded

    def chosen(*args: Any, **named: Any) -> Any:
        config = choose(*args, **named)
        watch.variants.append(f"{config.variant} {config.tile}")
        return config

    def guarded(key: str, *args: Any, **named: Any) -> Any:
        result = run_guarded(key, *args, **named)
        if not guard._VERDICTS.get(key):  # said once by a warning, true from then on
            watch.fallbacks.append(f"{key}: the plain variant serves")
        return result

    with _replaced("best_config", choose, chosen), _replaced("guarded", run_guarded, guarded):
        yield watch


@contextmanager
def _replaced(name: str, original: Any, value: Any) -> Iterator[None]:
    """``original``, in every module of kernels that has it by ``name``."""
    holders = [
        module
        for path, module in list(sys.modules.items())
        if path.startswith("vdqc.kernels.gpu.") and getattr(module, name, None) is original
    ]
    try:
        for module in holders:
            setattr(module, name, value)
        yield
    finally:
        for module in holders:
            setattr(module, name, original)
