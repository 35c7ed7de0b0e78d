"""Predicted against measured: time, weights and memory of compiled models on this CPU.

    python benchmarks/predict.py [--threads 1] [--rounds 3] [--cases wan-w8a8,digits]

Each case is explained, compiled and loaded in a process of its own; then one call like its first
sample is timed under ``torch.compile``. With one thread the time is CPU time of the process, else
wall time. Weights are what the loaded model holds; memory is by how much a call raises the resident
size, and the weights. Results go to
``benchmarks/results/cpu/predicted.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "cpu" / "predicted.json"

#: Case to (model, passes, scheme); ``wan`` is three layers of width 1536 in bfloat16, 4096 tokens.
CASES = {
    "wan-w8a8": ("wan", "quant", "w8a8"),
    "wan-w4a8-g64": ("wan", "quant", "w4a8-g64"),
    "wan-rotated-w4a8": ("wan", "rotate,smooth,quant", "w4a8"),
    "wan-sparse-w8a8": ("wan", "quant,sparsify{density=0.25}", "w8a8"),
    "digits-w8a8": ("digits", "rotate,smooth,quant", "w8a8"),
    "digits-w4a8": ("digits", "rotate,smooth,quant", "w4a8"),
    "views-w8a8": ("views", "rotate,smooth,quant", "w8a8"),
    "unet-w8a8": ("digits_unet", "rotate,smooth,quant", "w8a8"),
}


def child(name: str, threads: int, rounds: int) -> dict[str, Any]:
    """One case in this process."""
    import vdqc
    from vdqc.base.diagnostics import Diagnostics
    from vdqc.base.target import TARGETS
    from vdqc.compiler import as_source, parse_recipe
    from vdqc.explain import explain
    from vdqc.lowering.machine import rates

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    model, passes, scheme = CASES[name]
    source = as_source(*source_of(model), None)
    recipe = parse_recipe(passes, [scheme], None)
    plan = explain(source, recipe, TARGETS["cpu"], Diagnostics())
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        out = vdqc.compile(
            source.model, source.samples, passes, scheme, "cpu", Path(folder) / "out", verify=False
        )
        compiling = time.perf_counter() - start
        compiled = vdqc.load(out.path)
    inputs = dict(source.samples[0].inputs)
    compiled.compile()
    compiled(**inputs)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident()
    compiled(**inputs)
    grown = peak() - before
    clock = time.process_time if threads == 1 else time.perf_counter
    seconds = []
    for _ in range(rounds + 1):
        start = clock()
        compiled(**inputs)
        seconds.append(clock() - start)
    measured = statistics.median(seconds[1:])
    tensors = {t.data_ptr(): t.nbytes for t in (*compiled.parameters(), *compiled.buffers())}
    weights = sum(tensors.values())
    return {
        "predicted_seconds": plan.predicted_us * 1e-6,
        "in_sites": plan.forecast.sites_us * 1e-6,
        "measured_seconds": measured,
        "ratio": plan.predicted_us * 1e-6 / measured,
        "predicted_weights": plan.forecast.weight_bytes,
        "measured_weights": weights,
        "predicted_memory": plan.forecast.memory_bytes,
        "measured_memory": weights + max(0, grown),
        "predicted_compile_seconds": plan.forecast.compile_seconds,
        "measured_compile_seconds": compiling,
        "machine": rates(plan.machine),
    }


def source_of(model: str) -> tuple[Any, Any]:
    """(model or its file, samples or None)."""
    if model != "wan":
        return ROOT / "examples" / model / "model.py", None
    from benchmarks import cases
    from vdqc.ir.sample import Sample

    samples = [Sample(cases.wan_call(4096, 512, torch.bfloat16), timestep=500.0)]
    samples += cases.wan_samples(torch.bfloat16)
    return cases.wan(3, torch.bfloat16), samples


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Most bytes of this process in memory since the mark was set back."""
    status = Path("/proc/self/status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")
    )


def main() -> None:
    """Run the cases one by one, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options.child, options.threads, options.rounds)))
        return
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.cases.split(","):
        command = [sys.executable, __file__, "--child", name]
        command += ["--threads", str(options.threads), "--rounds", str(options.rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
        found = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=environment
        )
        row = json.loads(found.stdout.splitlines()[-1])
        known[f"{name}, {options.threads} threads"] = row
        print(
            f"{name:18} predicted {row['predicted_seconds']:.4f} s, measured "
            f"{row['measured_seconds']:.4f} s, ratio {row['ratio']:.2f}; weights "
            f"{row['predicted_weights']} and {row['measured_weights']}; memory "
            f"{row['predicted_memory'] / 1e6:.0f} and {row['measured_memory'] / 1e6:.0f} MB",
            flush=True,
        )
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
