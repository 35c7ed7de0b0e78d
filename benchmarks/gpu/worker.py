"""The process that holds the GPU: answers one request a line, so that its loss loses one case.

Requests are JSON on standard input, answers JSON after a mark on a line of standard output:
``hello`` (what there is to do), ``ceilings``, ``check`` of an op, ``time`` of one case of an op.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

MARK = "@@"


def say(message: Mapping[str, Any]) -> None:
    """One line to the parent, whatever a library left before it on an unfinished one."""
    print("\n" + MARK + json.dumps(message), flush=True)


def main(dry: bool, seed: int) -> int:
    """Serve until the input ends."""
    import torch

    from benchmarks.gpu import ceilings, env, measure, ops
    from benchmarks.gpu.checks import WrongError

    try:
        here = env.make(dry)
    except env.SkipError as error:
        say({"fatal": str(error)})
        return 1
    torch.manual_seed(seed)
    torch.set_grad_enabled(False)
    torch._dynamo.config.recompile_limit = 256  # many shapes in one process
    table = ops.table()
    known: dict[str, float] = {}

    def answer(request: Mapping[str, Any]) -> dict[str, Any]:
        what = request["do"]
        if what == "hello":
            return {"device": describe(), "ops": _listed(table)}
        if what == "ceilings":
            known.update(request.get("known") or ceilings.measure(here))
            return {"ceilings": known, "loaded": _from_driver().get("clocks", "")}
        op = table[request["op"]]
        if what == "check":
            op.check(here)
            return {"check": "passed"}
        case = next(case for case in op.cases if case.name == request["case"])
        rows, absent = measure.run_case(
            env.Env(here.device, dry, here.target, known), op.name, case, request["without"], step
        )
        return {"rows": rows, "absent": absent}

    def step(name: str) -> None:
        say({"step": name})

    for line in sys.stdin:
        began = time.monotonic()
        try:
            found = answer(json.loads(line))
        except env.SkipError as error:
            found = {"skip": str(error)}
        except WrongError as error:
            found = {"wrong": str(error)}
        except Exception as error:  # reported, with the case that it belongs to
            found = {"error": measure.reason(error), "lost": _is_lost(error)}
            _print_trace()
        with contextlib.suppress(Exception):  # in a lost context; the answer says that it is lost
            measure.release()
        say({**found, "seconds": round(time.monotonic() - began, 2)})
    return 0


def _print_trace() -> None:
    import traceback

    traceback.print_exc(file=sys.stderr)


def _is_lost(error: BaseException) -> bool:
    """True if the CUDA context is gone: nothing works in this process any more."""
    text = str(error)
    if "Triton Error [CUDA]" in text:  # all but what a single launch asked too much of
        return "out of memory" not in text and "invalid argument" not in text
    return any(
        word in text
        for word in ("illegal memory access", "CUDA error", "unspecified launch", "misaligned")
    )


def _listed(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "op": op.name,
            "seconds": op.seconds,
            "cases": [{"case": c.name, "rank": c.rank, "key": c.key} for c in op.cases],
        }
        for op in table.values()
    ]


def describe() -> dict[str, Any]:
    """The machine."""
    import platform

    import torch

    from vdqc.kernels.gpu.runtime import is_plain, triton_version

    found: dict[str, Any] = {
        "gpu": "none",
        "driver": "none",
        "torch": torch.__version__,
        "triton": triton_version(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "python": platform.python_version(),
        "clocks": "",
        "plain": is_plain(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found |= _from_driver()
    return found


def _from_driver() -> dict[str, Any]:
    import subprocess

    query: Callable[[str], str] = lambda names: subprocess.run(  # noqa: E731
        ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"],
        capture_output=True, text=True, check=True,
    ).stdout.strip().splitlines()[0]  # fmt: skip
    try:
        return {
            "driver": query("driver_version"),
            "clocks": query("clocks.sm,clocks.mem,clocks.max.sm,power.limit"),
        }
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"driver": "unknown"}
