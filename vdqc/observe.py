"""Looks into a compiled model while it runs: every value it makes, and how long each took.

Calls go through the model's own forward, with its checks and its residuals; only the program is run
node by node instead of as one function, so results are bit for bit the same and times are those of
eager ops. What ``torch.compile`` or a package would run cannot be looked into: the eager program is
shown in their place.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx, nn

from vdqc.ir.blocks import block_name
from vdqc.ir.site import note

#: ``(node, value, seconds)``.
Look = Callable[[fx.Node, Any, float], None]


@final
@dataclass(frozen=True)
class SiteTime:
    """Seconds of one site's own kernel; of all else in a block where ``name`` is empty."""

    name: str
    block: str
    seconds: float


def programs_of(compiled: nn.Module) -> list[fx.GraphModule]:
    """The programs that an eager call may run: one, or two with residuals; none if not compiled."""
    pair = compiled.__dict__.get("_eager")
    if pair is not None:
        return list(pair)
    program = getattr(compiled, "program", None)
    return [program] if isinstance(program, fx.GraphModule) else []


def is_observable(compiled: nn.Module) -> bool:
    """True if calls of ``compiled`` run a program that ``observed`` can show."""
    faster = compiled.__dict__.get("_package") is not None or getattr(compiled, "_compiled", False)
    return bool(programs_of(compiled)) and not faster


@contextmanager
def observed(compiled: nn.Module, look: Look) -> Iterator[None]:
    """Inside, every call of ``compiled`` shows what each node of its program made."""
    with ExitStack() as stack:
        for program in programs_of(compiled):
            # an attribute of the instance wins over the class's forward, and is gone afterwards
            program.__dict__["forward"] = _Observed(program, look).run
            stack.callback(program.__dict__.pop, "forward")
        yield


@torch.no_grad()
def site_times(
    compiled: nn.Module, inputs: Mapping[str, Any], runs: int, progress: Any
) -> tuple[SiteTime, ...]:
    """Median seconds of every site's kernel over ``runs`` calls, after one that is not counted."""
    if runs < 1 or not is_observable(compiled):
        return ()
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in progress(range(runs + 1), "time, site by site"):
        found: dict[tuple[str, str], float] = {}

        def look(node: fx.Node, value: Any, took: float, found: Any = found) -> None:
            key = (site_name(node), block_name(node))
            found[key] = found.get(key, 0.0) + took

        with observed(compiled, look):
            compiled(**inputs)
        for key, total in found.items() if run else ():
            seconds.setdefault(key, []).append(total)
    return tuple(SiteTime(*key, statistics.median(each)) for key, each in seconds.items())


def site_name(node: fx.Node) -> str:
    """The site that ``node`` computes a part or the whole of, or ""."""
    entries = note(node)
    return str(entries.get("whole") or entries.get("site") or "")


def produced_sites(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """The node that holds each site's output, where the program makes it at all.

    A kernel that goes on to an activation, a gate or a residual never does.
    """
    whole = {str(note(n)["whole"]) for n in nodes if "whole" in note(n)}
    found = {}
    for node in nodes:
        entries = note(node)
        name = entries.get("whole") or entries.get("site")
        if not name or ("whole" not in entries and (entries.get("partial") or name in whole)):
            continue
        if not {"activation", "gate"} & set(node.kwargs):
            found[node] = str(name)
    return found


@final
class _Observed(fx.Interpreter):
    def __init__(self, program: fx.GraphModule, look: Look) -> None:
        super().__init__(program, garbage_collect_values=True)
        self._look = look

    def run_node(self, n: fx.Node) -> Any:
        start = time.perf_counter()
        value = super().run_node(n)
        if n.op == "call_function":
            self._look(n, value, time.perf_counter() - start)
        return value
