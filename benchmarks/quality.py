"""What each recipe costs in quality: recipes and baselines by scheme, on models trained here.

    python benchmarks/quality.py                                   # the whole table, resumes
    python benchmarks/quality.py --recipes rtn,quarot --schemes w4a8,w4a6 --seeds 0
    python benchmarks/quality.py --recipes 'qvdit,qvdit-*' --schemes w3a6   # part by part
    python benchmarks/quality.py --recipes sparsity --schemes w4a8 --densities 0.5,0.25
    python benchmarks/quality.py --table                           # print what is there

One row per model, recipe, scheme, density and seed, written to ``results/quality.json`` as soon as
it is measured; a row that is there is not measured again unless ``--again``. Every model is
compiled and loaded as a user would, and compared with the float model by ``vdqc.check``:
step-locked SQNR along the float trajectory, PSNR and SSIM of whole videos from the same seed, the
model's own accuracy. ``relation`` is the temporal relation distance of the generated frames.

All recipes learn from the same candidates: calls along the float model's trajectories of seeds that
are not measured; one that does not select its own gets as many as those that do, evenly drawn. A
row's seed is that of its recipe's draws and of its candidates: what is measured is always the same.
``planted`` is the same function with outlier channels planted by exact scaling: small trained
models have none, large ones do. It is an extra column, and labelled.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from quality_ablations import ABLATIONS, ablated, is_ablation
from quality_ablations import names as ablations
from quality_memo import once_captured, once_run
from quality_models import BEFORE, GENERATIONS, MOVING, SOURCES, record_calls
from quality_sparsity import VARIANTS, facts, is_sparse, passes
from torch import Tensor, nn

from vdqc.base.diagnostics import VdqcError
from vdqc.check import check
from vdqc.compiler import compile as compile_model
from vdqc.engine.named import named
from vdqc.ir.source import Source
from vdqc.loading import load
from vdqc.report.data import report_data

RESULTS = Path(__file__).resolve().parent / "results" / "quality.json"
RECIPES = "rtn,smoothquant,quarot,gptq,svdquant,quantvggt,s2q_vdit,qvdit,quantsparse"
SCHEMES = "w8a8,w6a6,w4a8,w4a6,w4a4,w3a8,w3a6,w2a8"
#: Calls that a recipe learns from, of all that were recorded.
SELECTED = 40
KEY = ("model", "recipe", "scheme", "density", "seed")


def main() -> int:
    """Measure what is missing, print the table."""
    options = parse()
    rows = read()
    if not options.table:
        for model in options.models.split(","):
            with tempfile.TemporaryDirectory() as folder:
                source = SOURCES[model]()
                with once_captured() as spared, once_run(source.model):
                    for job in jobs(options, model, rows):
                        print(" ".join(str(job[key]) for key in KEY), end=" ", flush=True)
                        spared.clear()
                        pool = Path(folder) / f"pool-{job['seed']}"
                        if not pool.exists():
                            record_calls(source, pool, job["seed"])
                        row = measure(source, job, pool, options)
                        row["seconds"] = round(row["seconds"] + sum(spared), 1)
                        rows = [old for old in rows if key_of(old) != key_of(row)] + [row]
                        write(rows)
                        print(told(row), flush=True)
    print(table(rows))
    return 0


def told(row: dict[str, Any]) -> str:
    """A row's main figures, or why there are none."""
    shown = ("error",) if "error" in row else ("sqnr_db", "psnr_db", "accuracy")
    return " ".join(f"{key}={row[key]}" for key in shown) + f" {row['seconds']:.0f} s"


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="digits,planted")
    parser.add_argument(
        "--recipes",
        default=RECIPES,
        help="names, .toml files, variants of 'sparsity', ablations, or all of them",
    )
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--densities", default="0.5,0.25", help="of the variants of 'sparsity'")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--generations", type=int, default=0, help="by default the model's own")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    return parser.parse_args()


def jobs(
    options: argparse.Namespace, model: str, rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """What is to be measured of ``model``."""
    there = {key_of(row) for row in rows if "error" not in row}
    recipes = list(spelled(options.recipes.split(",")))
    densities = [float(text) for text in options.densities.split(",")]
    for seed in map(int, options.seeds.split(",")):
        for scheme in options.schemes.split(","):
            for recipe in recipes:
                quantised = not recipe.startswith("sparse")  # the others are measured once
                if not quantised and scheme != options.schemes.split(",")[0]:
                    continue
                for density in densities if is_sparse(recipe) else [1.0]:
                    name = Path(recipe).name.removesuffix(".toml")  # a part may hold a dot
                    job = {"model": model, "recipe": name, "density": density}
                    job |= {"scheme": scheme if quantised else "none", "seed": seed, "file": recipe}
                    if options.again or key_of(job) not in there:
                        yield job


def spelled(recipes: Sequence[str]) -> Iterator[str]:
    """``recipes`` with ``sparsity`` and ``<recipe>-*`` as what they stand for."""
    for name in recipes:
        if name == "sparsity":
            yield from VARIANTS
        elif name.endswith("-*") and name[:-2] in ABLATIONS:
            yield from ablations(name[:-2])
        else:
            yield name


def measure(
    source: Source, job: dict[str, Any], pool: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """One row; a recipe that refuses the job leaves a row that says why."""
    row = {key: job[key] for key in KEY}
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            pass_list, rules = plan(job, pool)
            artifact = compile_model(
                source.model,
                source.samples,
                pass_list,
                rules,
                pool=pool,
                target="cpu",
                out=Path(folder) / "out",
                seed=job["seed"],
                verify=False,
            )
        except VdqcError as error:
            return {**row, "error": str(error).splitlines()[0], "seconds": elapsed(begin)}
        seconds = elapsed(begin)
        data = report_data(artifact)
        compiled = load(artifact.path)
        seeds = tuple(range(options.generations or GENERATIONS[job["model"]]))
        found = check(compiled, source, seeds=seeds, timing_runs=0, sites=False)
        assert found.frames is not None
        return {
            **row,
            "sqnr_db": round(found.sqnr_db, 2),
            "worst_sqnr_db": round(found.worst.sqnr_db, 2),
            "psnr_db": mean(video.psnr_db for video in found.videos),
            "ssim": mean(video.ssim for video in found.videos),
            "accuracy": mean(video.accuracy or 0.0 for video in found.videos),
            "accuracy_float": mean(video.accuracy_float or 0.0 for video in found.videos),
            "relation": relation(*found.frames) if source.name in MOVING else None,
            "effective_bits": round(data.effective_bits or 0.0, 3),
            "bytes": found.bytes_compiled,
            "seconds": seconds,
            "generations": len(seeds),
            **facts(artifact),
            "steps": [round(step.sqnr_db, 2) for step in found.steps],
        }


def plan(job: dict[str, Any], pool: Path) -> tuple[str, list[str]]:
    """Passes and rules of a job."""
    if job["file"] in VARIANTS:
        checkpoints = pool.parent / "checkpoints"
        text = passes(
            job["file"], job["model"], job["density"], checkpoints, job["scheme"], job["seed"]
        )
        return text, [job["scheme"]]
    if is_ablation(job["file"]):
        text, scheme = ablated(job["file"])
    else:
        recipe = named(job["file"])
        text, scheme = recipe.pass_list, recipe.scheme
    # im2col runs before samples are chosen: a recipe that begins with it gets them behind it
    before = BEFORE.get(job["model"], "")
    drawn = "" if "select" in text else f"select{{method=uniform,count={SELECTED}}},"
    return before + drawn + text.removeprefix("im2col,"), fitting(scheme, job["scheme"])


def fitting(own: tuple[str, ...], scheme: str) -> list[str]:
    """``scheme`` with the form of the recipe's own (``-asym``, groups) and its rules for sites."""
    suffix = own[0].partition("-")[2]
    return [f"{scheme}-{suffix}" if suffix else scheme, *own[1:]]


def relation(expected: Tensor, actual: Tensor) -> float:
    """Sum over frames of KL(softmax of cosine similarities to all frames): float || compiled.

    Videos [N, C, F, H, W].
    Source: Q-VDiT, arXiv 2505.22167, section 3.3, on pixels.
    """
    logs = []
    for video in (expected, actual):
        frames = video.double().transpose(1, 2).flatten(2)
        frames = nn.functional.normalize(frames, dim=-1)
        logs.append((frames @ frames.transpose(1, 2)).log_softmax(-1))
    return round(float((logs[0].exp() * (logs[0] - logs[1])).sum((1, 2)).mean()), 6)


# results ------------------------------------------------------------------------------------------


def read() -> list[dict[str, Any]]:
    """Rows measured so far."""
    if not RESULTS.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]
    return rows


def write(rows: list[dict[str, Any]]) -> None:
    """All rows, one a line, replaced as a whole."""
    header = {"torch": torch.__version__, "python": platform.python_version()}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(rows, key=key_of))
    text = f'{{\n "header": {json.dumps(header)},\n "rows": [\n{lines}\n ]\n}}\n'
    RESULTS.parent.mkdir(exist_ok=True)
    temporary = RESULTS.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(RESULTS)


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells rows apart."""
    return tuple(row[key] for key in KEY)


def table(rows: list[dict[str, Any]]) -> str:
    """Step-locked SQNR: recipes down, schemes across, mean and half the spread over seeds."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        if "sqnr_db" in row:
            share = "" if row["density"] == 1 else f" {row['density']:g}"
            by_scheme = found.setdefault((row["model"], row["recipe"] + share), {})
            by_scheme.setdefault(row["scheme"], []).append(row["sqnr_db"])
    schemes = [
        s for s in ["none", *SCHEMES.split(",")] if any(s in cells for cells in found.values())
    ]
    lines = [f"{'step-locked SQNR, dB':34}" + "".join(f"{scheme:>14}" for scheme in schemes)]
    for (model, recipe), cells in found.items():
        line = f"{model + ' ' + recipe:34}"
        for scheme in schemes:
            values = cells.get(scheme, [])
            half = (max(values) - min(values)) / 2 if values else 0.0
            line += f"{statistics.mean(values):8.2f} ±{half:4.2f}" if values else f"{'':>14}"
        lines.append(line)
    return "\n".join(lines)


def mean(values: Iterator[float]) -> float:
    """Rounded."""
    return round(statistics.mean(values), 4)


def elapsed(begin: float) -> float:
    """Processor seconds since ``begin``."""
    return round(time.process_time() - begin, 1)


if __name__ == "__main__":
    sys.exit(main())
