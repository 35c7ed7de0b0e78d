"""Speed, size and error of one forward of a Wan-architecture DiT on a CPU, beside its peers.

Every variant lives in a process of its own; the processes stay up and take turns, so that drift of
the machine falls on all alike. With one thread the time is CPU time of the process, else wall time.
No speed is printed before the outputs agree with float32 and the kernels' tests pass.
The variants themselves: ``benchmarks/cpu_variants.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_variants import build, split_density

ROOT = Path(__file__).resolve().parent.parent
COMMAND = Path(__file__).resolve().parent / "run.py"
RESULTS = Path(__file__).resolve().parent / "results"
MARK = "@@"
#: Largest relative error against float32 that a variant may show and still be timed.
ALLOWED = {"fp32": 1e-4, "bf16": 0.03, "torchao": 0.03, "w8a8": 0.05, "w4a8": 0.35}
ALLOWED_SPARSE = 0.5
VARIANTS = (
    "fp32-onednn",
    "bf16-eager",
    "bf16-compile",
    "bf16-strong-eager",
    "bf16-strong",
    "torchao-int8",
    "w8a8",
    "w4a8-g64",
)


@dataclass
class Row:
    """What was measured of one variant; times in seconds, memory in bytes."""

    variant: str
    median: float
    spread: float
    times: list[float]
    weight_bytes: int
    peak_rss: int
    error: float
    build_seconds: float


def run(options: argparse.Namespace) -> int:
    """Run the benchmark, or one worker of it."""
    if options.worker:
        return work(options)
    if not options.skip_tests and not tests_pass():
        print("refusing to print a speed: the kernels' tests fail", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        workers, skipped = start(options, Path(folder))
        try:
            rows = measure(options, workers, Path(folder))
        finally:
            for worker in workers.values():
                worker.stop()
    if rows is None:
        return 1
    report(options, rows, skipped)
    return 0


def add_options(parser: Any) -> None:
    """What only the CPU benchmark knows."""
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=4096, help="four times a square")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--passes", default="quant")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--torchao-python", default=sys.executable)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--output", default="", help=argparse.SUPPRESS)


def tests_pass() -> bool:
    """True if the tests of kernels and lowering pass."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "tests/lowering"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


# the parent: start workers, let them take turns ---------------------------------------------------


class Worker:
    """One variant in its own process, spoken to by lines of JSON."""

    def __init__(self, variant: str, options: argparse.Namespace, folder: Path) -> None:
        python = options.torchao_python if variant == "torchao-int8" else sys.executable
        command = [
            python,
            str(COMMAND),
            "--worker",
            variant,
            "--output",
            str(folder / f"{variant}.pt"),
        ]
        for name in ("layers", "tokens", "text", "threads", "passes"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(options.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._read()

    def run(self) -> float:
        """Seconds of one forward."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return float(self._read()["seconds"])

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(MARK):
                return dict(json.loads(line[len(MARK) :]))
        return {"skip": f"the worker ended with code {self.process.wait()}"}


def start(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Worker], dict[str, str]]:
    """Workers that are ready, and why the others are not."""
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for variant in ["fp32-onednn", *options.variants.split(",")]:
        if variant in workers:
            continue
        worker = Worker(variant, options, folder)
        if "skip" in worker.facts:
            worker.stop()
            skipped[variant] = worker.facts["skip"]
            print(f"{variant}: skipped: {worker.facts['skip']}", flush=True)
        else:
            workers[variant] = worker
            print(f"{variant}: ready after {worker.facts['build_seconds']:.0f} s", flush=True)
    return workers, skipped


def measure(
    options: argparse.Namespace, workers: dict[str, Worker], folder: Path
) -> list[Row] | None:
    """One row per worker; None if an output is wrong."""
    import torch

    outputs = {variant: torch.load(folder / f"{variant}.pt") for variant in workers}
    expected = outputs["fp32-onednn"].double()
    errors = {
        variant: float((value.double() - expected).norm() / expected.norm())
        for variant, value in outputs.items()
    }
    for variant, error in errors.items():
        allowed = next(limit for name, limit in ALLOWED.items() if variant.startswith(name))
        if split_density(variant)[1] < 1:  # a mask changes the function: only nonsense is refused
            allowed = ALLOWED_SPARSE
        if not error <= allowed:
            print(f"refusing to print a speed: {variant} is off by {error:.3f} (allowed {allowed})")
            return None
    times: dict[str, list[float]] = {variant: [] for variant in workers}
    for index in range(options.rounds):
        for variant, worker in workers.items():
            times[variant].append(worker.run())
        print(f"round {index + 1} of {options.rounds} done", flush=True)
    return [
        Row(
            variant,
            statistics.median(times[variant]),
            (max(times[variant]) - min(times[variant])) / statistics.median(times[variant]),
            times[variant],
            worker.facts["weight_bytes"],
            worker.facts["peak_rss"],
            errors[variant],
            worker.facts["build_seconds"],
        )
        for variant, worker in workers.items()
    ]


def report(options: argparse.Namespace, rows: list[Row], skipped: dict[str, str]) -> None:
    """Print the table and write the JSON."""
    by_name = {row.variant: row for row in rows}
    references = [
        name for name in ("bf16-compile", "bf16-strong", "torchao-int8") if name in by_name
    ]
    bf16 = by_name.get("bf16-eager")
    heads = ["variant", "s", "spread", *(f"x {name}" for name in references)]
    print("  ".join(f"{head:>18}" for head in [*heads, "weights MB", "x bf16", "rel. error"]))
    for row in rows:
        cells = [row.variant, f"{row.median:.3f}", f"{row.spread:.0%}"]
        cells += [f"{by_name[name].median / row.median:.2f}" for name in references]
        cells += [f"{row.weight_bytes / 1e6:.1f}"]
        cells += [f"{row.weight_bytes / bf16.weight_bytes:.3f}" if bf16 else "-"]
        cells += [f"{row.error:.4f}"]
        print("  ".join(f"{cell:>18}" for cell in cells))
    for variant, reason in skipped.items():
        print(f"{variant:>18}  skipped: {reason}")
    out = options.out or RESULTS / options.device / f"wan_{options.layers}x{options.tokens}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "layers": options.layers,
        "tokens": options.tokens,
        "text": options.text,
        "threads": options.threads,
        "passes": options.passes,
        "clock": "cpu" if options.threads == 1 else "wall",
        "machine": machine(),
        "rows": [asdict(row) for row in rows],
        "skipped": skipped,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"written: {out}")


def machine() -> dict[str, str]:
    """What the numbers belong to."""
    import torch

    facts: dict[str, str] = {}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    return {
        "cpu": facts.get("model name") or platform.processor(),
        "family": facts.get("cpu family", ""),  # AMD: 25, 17 is Zen 4; 26 is Zen 5
        "model": facts.get("model", ""),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# a worker: build one variant, run it when told ----------------------------------------------------


def work(options: argparse.Namespace) -> int:
    """Build ``options.worker``, save its output, then time one forward per line of input."""
    keep_heap()
    import torch

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    begin = time.perf_counter()
    try:
        forward, weight_bytes = build(options.worker, options)
        output = forward()
        forward()
    except ImportError as error:
        say({"skip": str(error)})
        return 0
    torch.save(output.float(), options.output)
    facts = {
        "build_seconds": time.perf_counter() - begin,
        "weight_bytes": weight_bytes,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    say(facts)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    for _ in sys.stdin:
        begin = clock()
        forward()
        say({"seconds": clock() - begin})
    return 0


def say(message: dict[str, Any]) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(message), flush=True)


def keep_heap() -> None:
    """Do not give freed memory back: page faults would cost every variant up to a tenth."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
