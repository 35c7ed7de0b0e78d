"""The parent: schedules cases within a budget, survives what a case does to its process.

The most telling cases of all ops come first (``rank``). An op is checked before its first case;
where that fails, none of its speeds is printed and the other ops go on. A process that crashes or
exceeds its limit is replaced; the case is tried again without the peer it was lost with, or without
all that compile or come as wheels. After a first hang or crash outside a peer only plain kernels
run (``VDQC_PLAIN``): each further op with a kernel that deadlocks would cost its whole limit, one
with a kernel that crashes would have no speeds. This process never imports torch: it holds no
memory of the GPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from benchmarks.gpu import results
from benchmarks.gpu.names import EVERY
from benchmarks.gpu.results import OpResults
from benchmarks.gpu.worker_process import LostError, Worker

ROOT = Path(__file__).resolve().parents[2]
#: Seconds kept back for writing results.
RESERVE = 8.0
#: Seconds for a worker to import, for the ceilings; the least time in which a case is begun.
HELLO, CEILINGS, LEAST = 120.0, 90.0, 12.0
#: Times that a case is tried again.
RETRIES = 2


@final
@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        only: names of ops; none for all.
        most: cases of an op at most.
    """

    dry: bool = False
    only: tuple[str, ...] = ()
    budget: float = 540.0
    most: int | None = None
    rank: int = 2
    seed: int = 0
    commit: str = ""
    out: Path | None = None
    bundle: Path | None = None


@final
@dataclass(frozen=True)
class Job:
    """One case to measure."""

    op: str
    case: str
    seconds: float


@dataclass
class Session:
    """One run: its worker, its results, its time.

    Attributes:
        plain: the next worker keeps to plain kernels.
        why_plain: what was lost with the others; empty if nothing was.
        no_ceilings: why no worker is asked for ceilings any more; empty if they are.
    """

    plan: Plan
    started: float = field(default_factory=time.monotonic)
    worker: Worker | None = None
    ceilings: dict[str, float] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)
    listed: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, OpResults] = field(default_factory=dict)
    plain: bool = False
    why_plain: str = ""
    no_ceilings: str = ""

    def left(self) -> float:
        """Seconds of the budget."""
        return self.plan.budget - RESERVE - (time.monotonic() - self.started)

    def environment(self) -> dict[str, str]:
        """The variables of the next worker."""
        found = {**os.environ, "PYTHONPATH": _python_path()}
        # what an earlier run refined would stand in for the configuration files
        found.setdefault("VDQC_CACHE", tempfile.mkdtemp(prefix="vdqc-bench-"))
        return found | ({"VDQC_PLAIN": "1"} if self.plain else {})

    def begin(self) -> str | None:
        """Start a worker, measure or hand over the ceilings; why it cannot work, or None."""
        reason = self._greeted()
        if reason or self.no_ceilings:
            return reason
        assert self.worker is not None
        request = {"do": "ceilings", "known": self.ceilings}
        try:
            found = self.worker.ask(request, CEILINGS)
        except LostError as error:
            found = {"error": str(error), "lost": True}
        if "ceilings" in found:
            self.ceilings = found["ceilings"]
            self.device["clocks_loaded"] = found.get("loaded", "")
            return None
        # what is slow or broken there is a peer: ours can be measured without
        self.no_ceilings = str(found.get("error"))
        print(f"no ceilings, so no fractions of them: {self.no_ceilings}", flush=True)
        if not found.get("lost"):
            return None
        self.end()
        return self._greeted()

    def _greeted(self) -> str | None:
        """Start a worker and ask what there is to do; why it cannot work, or None."""
        command = [sys.executable, "-c", _CHILD, str(int(self.plan.dry)), str(self.plan.seed)]
        self.worker = Worker(command, self.environment())
        try:
            limit = HELLO if not self.listed else min(HELLO, max(self.left(), LEAST))
            hello = self.worker.ask({"do": "hello"}, limit)
            if "fatal" in hello or "error" in hello:
                return str(hello.get("fatal") or hello["error"])
        except LostError as error:
            return str(error)
        self.device, self.listed = {**hello["device"], "clocks_loaded": ""}, hello["ops"]
        return None

    def again(self) -> bool:
        """Replace the worker; False if no other starts."""
        self.end()
        reason = self.begin()
        if reason:
            print(f"no worker: {reason}", file=sys.stderr)
        return reason is None

    def end(self) -> None:
        """Stop the worker."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None


_CHILD = (
    "import sys; from benchmarks.gpu.worker import main; "
    "sys.exit(main(sys.argv[1] == '1', int(sys.argv[2])))"
)


def _python_path() -> str:
    rest = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT)


def run(plan: Plan) -> int:
    """Measure; 1 if anything was wrong, 2 if nothing could be run."""
    session = Session(plan)
    try:
        reason = session.begin()
        if reason:
            print(f"nothing was measured: {reason}", file=sys.stderr)
            return 2
        unknown = set(plan.only) - {listed["op"] for listed in session.listed}
        if unknown:
            known = ", ".join(listed["op"] for listed in session.listed)
            print(f"unknown op {', '.join(sorted(unknown))}; known: {known}", file=sys.stderr)
            return 2
        _announce(session)
        for job in schedule(session.listed, plan):
            _do(session, job)
    finally:
        session.end()
    return _finish(session)


def schedule(listed: list[dict[str, Any]], plan: Plan) -> list[Job]:
    """Cases by rank, then by op; a dry run takes one of each kind."""
    ranked: list[tuple[int, int, int, Job]] = []
    for order, op in enumerate(listed):
        if plan.only and op["op"] not in plan.only:
            continue
        kinds, taken = set(), 0
        for index, case in enumerate(op["cases"]):
            if case["rank"] > plan.rank or (plan.dry and case["key"] in kinds):
                continue
            kinds.add(case["key"])
            taken += 1
            if plan.most is None or taken <= plan.most:
                job = Job(op["op"], case["case"], op["seconds"])
                ranked.append((case["rank"], order, index, job))
    return [job for *_, job in sorted(ranked, key=lambda entry: entry[:3])]


def _do(session: Session, job: Job) -> None:
    found = session.found.setdefault(job.op, OpResults(job.op))
    if found.check not in ("passed", "not run"):
        return
    if session.left() < LEAST or session.worker is None:
        found.not_run.append(job.case)
        return
    if found.check == "not run":
        found.check = _checked(session, job)
        if found.check != "passed":
            print(f"== {job.op}: {found.check}; no speed of it is printed", flush=True)
            return
    without: list[str] = []
    answer = _asked(session, job, without)
    for _ in range(RETRIES):
        if not answer.get("retry"):
            break
        kind, _, name = str(answer.get("step", "")).partition(" ")
        if not answer.get("plain"):  # else that alone may be enough
            without.append(name if kind == "peer" and name not in without else EVERY)
        found.absent[f"{name or 'a retry'} ({job.case})"] = str(answer["error"])
        answer = _asked(session, job, without)
    _keep(session, found, job, answer)


def _checked(session: Session, job: Job) -> str:
    request = {"do": "check", "op": job.op}
    answer = _request(session, request, job.seconds)
    if answer.get("retry"):
        answer = _request(session, request, job.seconds)
    if "skip" in answer:
        return "absent"
    return str(answer.get("check") or answer.get("wrong") or answer.get("error"))


def _asked(session: Session, job: Job, without: Sequence[str]) -> dict[str, Any]:
    request = {"do": "time", "op": job.op, "case": job.case, "without": list(without)}
    return _request(session, request, job.seconds)


def _request(session: Session, request: Mapping[str, Any], limit: float) -> dict[str, Any]:
    """The worker's answer; where it is lost, an error, and another worker for what follows.

    ``retry``: worth asking again; ``plain``: plain kernels serve from here on.
    """
    if session.worker is None:
        return {"error": "no worker"}
    allowed = min(limit, max(session.left(), LEAST))
    try:
        answer = session.worker.ask(request, allowed)
        if answer.get("lost"):  # it lives, but its context is gone
            step = str(answer.get("step", ""))
            raise LostError(f"{answer['error']}, at step '{step}'", hung=False, step=step)
        return answer
    except LostError as error:
        late = error.hung and allowed < limit
        ours = not late and not error.step.startswith("peer ")
        was_plain = session.plain or bool(session.device.get("plain"))
        if ours and not was_plain:
            session.plain, session.why_plain = True, f"{request['op']}: {error}"
            print(f"== {session.why_plain}; only plain kernels from here on", flush=True)
        has_more = session.left() > LEAST and session.again()
        # before peers are built nothing is left to leave out: it would be lost again
        hopeless = ours and was_plain and error.step != "time"
        return {
            "error": str(error),
            "step": error.step,
            "retry": has_more and not late and not hopeless,
            "late": late,
            "plain": session.plain and not was_plain,
        }


def _keep(session: Session, found: OpResults, job: Job, answer: Mapping[str, Any]) -> None:
    if answer.get("late"):
        found.not_run.append(job.case)
    elif "wrong" in answer:  # nothing of this op is to be believed
        found.check = f"{job.case}: {answer['wrong']}"
        found.rows = []
        print(f"== {job.op}: {found.check}; no speed of it is printed", flush=True)
    elif "skip" in answer:
        found.absent[job.case] = answer["skip"]
    elif "rows" not in answer:
        found.failed[job.case] = str(answer.get("error"))
        print(f"== {job.op} {job.case}: {answer.get('error')}", flush=True)
    else:
        found.rows += answer["rows"]
        found.absent |= answer["absent"]
        seconds = f"{answer['seconds']:.1f} s, {session.left():.0f} s left"
        print(f"== {job.op} {job.case} ({seconds})", flush=True)
        if not session.plan.dry:
            print(results.table(answer["rows"]), flush=True)
    _save(session, found)


def _save(session: Session, found: OpResults) -> None:
    """After every case: what is measured stays, whatever happens next."""
    plan = session.plan
    header = results.header(session.device, session.ceilings, plan.commit)
    header |= {"no_ceilings": session.no_ceilings, "why_plain": session.why_plain}
    folder = plan.out
    if folder is None and not plan.dry:
        folder = results.RESULTS / results.folder_of(session.device["gpu"])
    if folder is not None:
        results.write(found, header, folder)
    if plan.bundle is not None:
        results.bundle(session.found, header, plan.bundle)


def _announce(session: Session) -> None:
    device = session.device
    print(f"{device['gpu']}, driver {device['driver']}, torch {device['torch']}, Triton "
          f"{device['triton']}, clocks {device['clocks'] or '-'}")  # fmt: skip
    if session.plan.dry:
        print("dry run: no GPU, tiny sizes, no speeds")
    elif session.ceilings:
        words = (f"{name} {value:.0f}" for name, value in session.ceilings.items())
        print("ceilings: " + ", ".join(words), flush=True)


def _finish(session: Session) -> int:
    from benchmarks.gpu.targets import judge

    red = False
    print("\nsummary")
    for name, found in session.found.items():
        red |= found.red
        words = [f"{found.check}, {len(found.rows)} rows"]
        words += [f"{len(found.failed)} failed"] * bool(found.failed)
        words += [f"not run: {', '.join(found.not_run)}"] * bool(found.not_run)
        print(f"{name}: {'; '.join(words)}")
        for peer, reason in found.absent.items():
            print(f"    absent: {peer}: {reason}")
        for line in [] if session.plan.dry else judge(name, found.rows):
            got = "-" if line["worst"] is None else f"{line['worst']:.2f} ({line['median']:.2f})"
            print(f"    {line['verdict']:<10} {line['line']}: {got}, needs {line['need']:.2f}")
        _save(session, found)
    return int(red)
