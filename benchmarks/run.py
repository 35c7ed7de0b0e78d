"""Speed of what vdqc compiles to, beside its peers, on this machine's CPU or GPU.

    python benchmarks/run.py                              # CPU: 12 Wan layers, 4096 tokens
    python benchmarks/run.py --layers 2 --tokens 1024 --rounds 3
    python benchmarks/run.py --device cuda                # GPU: every kernel, blocks, models
    python benchmarks/run.py --device cuda --only w8a8,attention --budget 200
    python benchmarks/run.py --device cuda --tests        # first the kernels' tests, on the device
    python benchmarks/run.py --device cuda --dry          # no GPU: everything but the speeds
    python benchmarks/run.py --unpack FILE                # a bundle, into benchmarks/results

No speed is printed of what does not agree with its reference. See ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cpu  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    """Dispatch to the machine that is asked for."""
    options = parse(argv)
    if options.unpack:
        from benchmarks.gpu.results import unpack

        for file in unpack(options.unpack, options.out):
            print(f"written: {file}")
        return 0
    return cpu.run(options) if options.device == "cpu" else gpu(options)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="file (cpu) or folder (cuda) of the results")
    cpu.add_options(parser.add_argument_group("cpu"))
    group = parser.add_argument_group("cuda")
    group.add_argument("--only", default="", help="ops, separated by commas; all if not given")
    group.add_argument("--budget", type=float, default=540.0, help="seconds; stops cleanly")
    group.add_argument("--rank", type=int, default=2, help="0: the most telling cases only")
    group.add_argument("--most", type=int, help="cases of an op at most")
    group.add_argument("--seed", type=int, help="of the random data; drawn if not given")
    group.add_argument("--commit", default="", help="where there is no git to ask")
    group.add_argument("--bundle", type=Path, help="also write everything into this one file")
    group.add_argument("--unpack", type=Path, help="write a bundle's files, do nothing else")
    group.add_argument("--tests", action="store_true", help="run the kernels' tests first")
    group.add_argument("--dry", action="store_true", help="tiny sizes, no GPU, no speeds")
    return parser.parse_args(argv)


def gpu(options: argparse.Namespace) -> int:
    """The tests, if asked for, then the benchmark in what is left of the budget."""
    from benchmarks.gpu.runner import Plan, run

    # the groups of the tests and of the worker end with this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin = time.monotonic()
    failed = options.tests and not device_tests(options.budget / 2)
    plan = Plan(
        dry=options.dry,
        only=tuple(filter(None, options.only.split(","))),
        budget=options.budget - (time.monotonic() - begin),
        most=options.most,
        rank=options.rank,
        seed=time.time_ns() % 2**31 if options.seed is None else options.seed,
        commit=options.commit,
        out=options.out,
        bundle=options.bundle,
    )
    return run(plan) or int(failed)


def device_tests(limit: float) -> bool:
    """True if the tests of the GPU kernels pass here; what fails is named, the benchmark goes on
    and checks each op by itself.
    """
    folder = "tests/kernels/gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", folder]
    command += [f"--ignore={folder}/test_offline.py"]  # needs no device
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "8"]  # what takes time is compiling
    return passes(command, limit)


def passes(command: list[str], limit: float) -> bool:
    """True if the tests that ``command`` runs pass within ``limit`` seconds; past them everything
    that it started is killed, or it would compute on beside what is timed next.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        print(f"the tests took longer than {limit:.0f} s and were stopped", file=sys.stderr)
        return False
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # the workers of xdist with it
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
