"""Time and memory of compiling, by model size: capture and every pass, peak resident memory.

    python benchmarks/compile_time.py --model wan-1.3b --layers 12 --passes rotate,smooth,quant
    python benchmarks/compile_time.py --model wan-14b --layers 5 10 20 40 --passes rotate,quant \\
        --scheme w4a8 --mapped --work /path/with/70GB
    python benchmarks/compile_time.py --model wan-14b --layers 40 --passes rotate,quant \\
        --scheme w4a8 --mapped --kill 10 --work /path/with/70GB
    python benchmarks/compile_time.py --model hunyuan-13b --layers 60 --passes rotate,quant \\
        --scheme w4a8 --mapped --work /path/with/70GB

Weights are random and written as safetensors shards, one per block, so that a model larger than
memory is really read from disk. Each size is compiled in a process of its own; results go to
``benchmarks/results/cpu/compile_time.json``. ``--kill N`` then compiles each size once more, kills
that N times with SIGKILL at random moments, resumes, and compares every file with the first one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the vdqc command does

import torch

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "compile_time.json"

#: Wan2.1 transformer configurations, from the published model configs.
WAN: dict[str, dict[str, Any]] = {
    "wan-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960},
    "wan-14b": {"num_attention_heads": 40, "ffn_dim": 13824},
    "narrow": {"num_attention_heads": 4, "ffn_dim": 2048, "text_dim": 512},  # to try this out
}
HUNYUAN = "hunyuan-13b"


def configuration(model: str, layers: int) -> dict[str, Any]:
    """A configuration as diffusers stores it; of HunyuanVideo's layers two in three are single."""
    if model == HUNYUAN:
        return {
            "_class_name": "HunyuanVideoTransformer3DModel",
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": layers // 3,
            "num_single_layers": layers - layers // 3,
            "num_refiner_layers": 2,
            "mlp_ratio": 4.0,
            "patch_size": 2,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "guidance_embeds": True,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "rope_theta": 256.0,
            "rope_axes_dim": [16, 56, 56],
        }
    return {
        "_class_name": "WanTransformer3DModel",
        "patch_size": [1, 2, 2],
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
        **WAN[model],
    }


def write_random_model(folder: Path, config: dict[str, Any]) -> int:
    """A diffusers folder with random bfloat16 weights, a shard per block; returns its bytes."""
    import diffusers
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    shards: dict[str, list[str]] = {}
    state = model.state_dict()
    for name in state:
        parts = name.split(".")
        in_block = parts[0].endswith("blocks") and parts[1].isdigit()
        shards.setdefault("-".join(parts[:2]) if in_block else "rest", []).append(name)
    weight_map, total = {}, 0
    pool = torch.randn(2**24 - 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    for shard, names in shards.items():
        file = f"diffusion_pytorch_model-{shard}.safetensors"
        tensors = {name: random_weight(name, state[name].shape, pool) for name in names}
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(names, file))
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_weight(name: str, shape: torch.Size, pool: torch.Tensor) -> torch.Tensor:
    """Ones for norms, zeros for biases, Gaussian rows of unit gain for matrices.

    The Gaussians are cut from ``pool`` at a place that depends on the name: drawing every one anew
    would take longer than compiling.
    """
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if len(shape) < 2:
        return torch.zeros(shape, dtype=torch.bfloat16)
    count = shape.numel()
    start = zlib.crc32(name.encode()) % (pool.numel() - 1)
    tiled = pool.roll(-start).repeat(-(-count // pool.numel()))[:count]
    return tiled.reshape(shape) * (count / shape[0]) ** -0.5


def compile_once(folder: Path, out: Path, passes: str, scheme: str, mapped: bool) -> dict[str, Any]:
    """Compile in this process: seconds by the clock and of the processor, peak memory, passes."""
    import vdqc

    start, cpu_start = time.perf_counter(), time.process_time()
    artifact = vdqc.compile(
        folder, passes=passes, scheme=scheme, target="cpu", out=out, mapped=mapped, force=True
    )
    seconds = time.perf_counter() - start
    manifest = json.loads((Path(artifact.path) / "manifest.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "artifact_bytes": sum(file.stat().st_size for file in Path(artifact.path).rglob("*")),
        "passes": {record["text"]: round(record["seconds"], 1) for record in manifest["passes"]},
    }


def measure(arguments: argparse.Namespace, layers: int, work: Path) -> dict[str, Any]:
    """Write the model, compile it in a fresh process, perhaps again under kills, delete all."""
    folder, out = work / "model", work / "out"
    size = write_random_model(folder, configuration(arguments.model, layers))
    command = [sys.executable, __file__, "--child", str(folder), str(out)]
    command += ["--passes", arguments.passes, "--scheme", arguments.scheme]
    command += ["--mapped"] if arguments.mapped else []
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row = {"layers": layers, "weight_bytes": size, **json.loads(result.stdout.splitlines()[-1])}
    row["mb_per_second"] = round(size / 1e6 / row["seconds"], 1)
    if arguments.kill:
        expected = files_of(out)
        shutil.rmtree(out)
        row["killed"] = killed(command, out, arguments.kill, row, expected)
    shutil.rmtree(folder)
    shutil.rmtree(out)
    return row


def files_of(out: Path) -> dict[str, Any]:
    """Size and hash of every file but the report, which tells how long each pass took."""
    files: dict[str, Any] = json.loads((out / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name != "report.html"}


def killed(
    command: list[str], out: Path, times: int, whole: dict[str, Any], expected: dict[str, Any]
) -> dict[str, Any]:
    """Run ``command``, kill it ``times`` at random moments, and run it to the end.

    A run that is killed builds the graph again first; the moments are drawn so that about 0.8 of
    the work behind that is done when the last kill comes. If it ends before, it starts over.
    """
    moments = random.Random(0)
    start = whole["passes"]["capture"] + 10
    mean = start + 0.8 * max(0.0, whole["seconds"] - start) / times
    latest = min(2 * mean, 0.95 * whole["seconds"])
    begin, kills, peak = time.perf_counter(), 0, 0
    different: set[str] = set()
    while True:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kills < times:
            kills += not _waits(process, moments.uniform(0, latest))
            os.kill(process.pid, signal.SIGKILL)  # Popen.kill would reap one that has ended
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode > 0:
            raise RuntimeError(f"the resumed compilation failed: {' '.join(command)}")
        peak = max(peak, used.ru_maxrss)
        if process.returncode == 0:
            found = files_of(out)
            different |= {n for n in {*found, *expected} if found.get(n) != expected.get(n)}
            if kills == times:
                break
            shutil.rmtree(out)
    seconds = time.perf_counter() - begin
    print(f"killed {kills} times, {seconds:.1f} s in all", flush=True)
    return {
        "kills": kills,
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(peak / 2**20, 2),
        "identical": not different,
        "different": sorted(different),
    }


def _waits(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """True if ``process`` ends within ``seconds``; it is not reaped."""
    limit = time.perf_counter() + seconds
    while time.perf_counter() < limit:
        if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.05)
    return False


def main() -> None:
    """Parse, measure each size, print a table, merge the results into the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=[*sorted(WAN), HUNYUAN], default="wan-1.3b")
    parser.add_argument("--layers", type=int, nargs="+", default=[12])
    parser.add_argument("--passes", default="rotate,smooth,quant")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--mapped", action="store_true", help="stream the weights from disk")
    parser.add_argument("--kill", type=int, default=0, metavar="N", help="kill and resume N times")
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kill and not arguments.mapped:
        parser.error("--kill needs --mapped: only a streamed compilation is resumed")
    if arguments.child:
        folder, out = arguments.child
        result = compile_once(folder, out, arguments.passes, arguments.scheme, arguments.mapped)
        print(json.dumps(result))
        return
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            row = measure(arguments, layers, Path(work))
        rows.append(row)
        print(
            f"{arguments.model} {layers:3d} layers  {row['weight_bytes'] / 2**30:6.1f} GiB"
            f"  {row['seconds']:7.1f} s, processor {row['cpu_seconds']:7.1f} s"
            f"  peak {row['peak_rss_gib']:5.2f} GiB  {row['mb_per_second']:6.1f} MB/s of weights",
            flush=True,
        )
        if "killed" in row:
            print(f"killed: {row['killed']}", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = f"{arguments.model} {arguments.passes} {arguments.scheme}"
    key += " mapped" if arguments.mapped else ""
    measured = {row["layers"] for row in rows}
    kept = [row for row in known.get(key, {}).get("rows", []) if row["layers"] not in measured]
    known[key] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "rows": sorted([*kept, *rows], key=lambda row: row["layers"]),
    }
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if not all(row.get("killed", {}).get("identical", True) for row in rows):
        sys.exit("a resumed artifact differs from one that was not interrupted")


if __name__ == "__main__":
    main()
