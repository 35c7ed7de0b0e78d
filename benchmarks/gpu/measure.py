"""One case, start to end: build it, check it, time ours and the peers in turns, make rows."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import ceilings, timing
from benchmarks.gpu.env import Env
from benchmarks.gpu.names import AUTO, EVERY, PLAIN, WS
from benchmarks.gpu.peers import Call, Peer
from benchmarks.gpu.timing import Times
from benchmarks.gpu.trial import Case, Trial
from vdqc.kernels.gpu.runtime import is_plain

Row = dict[str, Any]


def run_case(
    env: Env, op: str, case: Case, without: Sequence[str], step: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """(rows, peers that are absent and why); ``step`` is told what is about to happen.

    ``without`` are peers with which the process was lost before; ``*`` for all that are bold.
    """
    step("build")
    trial = case.build(env)
    step("verify")
    trial.verify()
    ours = variants(trial, case)
    peers, absent = _peers(trial.peers, without, case.rank == 0, step)
    extra, missing = _peers(trial.extra, without, case.rank == 0, step)
    ours, absent = ours | extra, absent | missing
    step("time")
    functions = {**ours, **{f"peer {name}": call for name, call in peers.items()}}
    times = _times(env, functions)
    memory = {} if env.dry else _memory(trial, functions)
    for name, parts in trial.derived.items():
        mixed = _mixed(times, parts)
        if mixed is not None:
            times[name] = mixed
    step("done")
    names = [*ours, *(name for name in trial.derived if name in times)]
    rows = [row for name in names for row in _rows(env, op, case, trial, name, times, memory)]
    return rows, absent


def release() -> None:
    """Give back what a case held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def variants(trial: Trial, case: Case) -> dict[str, Call]:
    """Ours, without a second name for the same kernel; ``ws`` again by name where it is the choice
    and the case is a telling one: its distance from ``auto`` is the noise of the measurement.
    """
    ours, note = dict(trial.ours), trial.notes.get(AUTO, "")
    if note.startswith(PLAIN) and ";" not in note:
        ours.pop(PLAIN, None)
    if note.startswith(WS) and ";" not in note and case.rank == 0:
        ours[WS] = ours[AUTO]
    return ours


def _peers(
    peers: Mapping[str, Peer], without: Sequence[str], costly: bool, step: Callable[[str], None]
) -> tuple[dict[str, Call], dict[str, str]]:
    """Peers that ran once, and why the others did not."""
    found: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, peer in peers.items():
        if peer.costly and not costly:
            continue
        if name in without or (peer.bold and EVERY in without):
            absent[name] = "left out: the process was lost with it"
            continue
        step(f"peer {name}")
        try:
            call = peer.build()
            call()
            _synchronise()
            found[name] = call
        except Exception as error:  # whatever a peer raises is its own affair
            _synchronise()  # raises if the context is gone: ours come next, and would be blamed
            absent[name] = reason(error)
    return found, absent


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reason(error: BaseException) -> str:
    """Type and first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _times(env: Env, functions: Mapping[str, Call]) -> dict[str, Times]:
    if not env.dry:
        return timing.time_together(functions)
    for call in functions.values():
        call()
    return {name: Times(float("nan"), float("nan"), float("nan"), 1) for name in functions}


def _memory(trial: Trial, functions: Mapping[str, Call]) -> dict[str, int]:
    """Peak bytes of each function that has weights of its own, weights included."""
    return {
        name: timing.peak_bytes(call) + trial.resident[name]
        for name, call in functions.items()
        if name in trial.resident
    }


def _mixed(times: Mapping[str, Times], parts: Mapping[str, float]) -> Times | None:
    if not all(name in times for name in parts):
        return None
    first = times[next(iter(parts))]
    sums = {
        key: sum(share * getattr(times[name], key) for name, share in parts.items())
        for key in ("p20", "p50", "p80")
    }
    return replace(first, **sums)


def _rows(
    env: Env,
    op: str,
    case: Case,
    trial: Trial,
    variant: str,
    times: Mapping[str, Times],
    memory: Mapping[str, int],
) -> list[Row]:
    own = times[variant]
    work, cost = trial.work_of(variant), trial.cost_of(variant)
    known = None if env.dry else ceilings.of(env, work.kind)
    rate = None if env.dry or not work.amount else work.rate(own.p50)
    base: Row = {
        "op": op,
        "case": case.name,
        "variant": variant,
        "p50_ms": _ms(own.p50),
        "p20_ms": _ms(own.p20),
        "p80_ms": _ms(own.p80),
        "rate": None if rate is None else round(rate, 1),
        "unit": work.unit,
        "ceiling_fraction": None if rate is None or known is None else round(rate / known, 4),
        "predicted_ms": None if cost is None else round(env.predicted_ms(cost), 5),
    }
    notes = [trial.notes.get(variant, ""), "plain kernels only" if is_plain() else ""]
    if any(notes):
        base["note"] = "; ".join(filter(None, notes))
    if variant in memory:
        base["peak_gib"] = round(memory[variant] / 2**30, 3)
    rows = []
    for name, peer in trial.peers.items():
        beside = times.get(f"peer {name}")
        if beside is None or not _stands_beside(peer.against, variant):
            continue
        row = {**base, "peer": name, "peer_p50_ms": _ms(beside.p50), "ratio": None}
        if not env.dry:
            row["ratio"] = round(beside.p50 / own.p50, 4)
        if f"peer {name}" in memory:
            row["peer_peak_gib"] = round(memory[f"peer {name}"] / 2**30, 3)
        rows.append(row)
    return rows or [{**base, "peer": None, "peer_p50_ms": None, "ratio": None}]


def _stands_beside(against: str, variant: str) -> bool:
    """Peers of ``auto`` also stand beside the forced kinds of the same kernel."""
    return against in (EVERY, variant) or (against == AUTO and variant in (PLAIN, WS))


def _ms(value: float) -> float | None:
    return None if value != value else round(value, 5)
