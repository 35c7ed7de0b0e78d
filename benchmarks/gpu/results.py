"""Results as files: ``benchmarks/results/<gpu>/<op>.json``, a header, rows, verdicts.

::

    {"header": {"gpu", "driver", "torch", "triton", "cuda", "cudnn", "python", "commit",
                "clocks", "clocks_loaded", "plain", "ceilings", "no_ceilings", "time"},
     "check": "passed",
     "rows": [{"op", "case", "variant", "p50_ms", "p20_ms", "p80_ms", "rate", "unit",
               "ceiling_fraction", "predicted_ms", "peer", "peer_p50_ms", "ratio", "note"}],
     "absent": {peer: reason}, "failed": {case: reason}, "not_run": [case],
     "targets": [{"line", "need", "moonshot", "worst", "median", "verdict"}]}

``ratio`` is the peer's time over ours. ``plain``: at the end only plain kernels ran, see
``runner``; the ``note`` of a row that was measured so says it. ``no_ceilings``: why rows
lack their fractions. Rows of an older run are kept only under an equal header.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

RESULTS = Path(__file__).resolve().parents[1] / "results"
KEYS = (
    "op", "case", "variant", "p50_ms", "p20_ms", "p80_ms", "rate", "unit", "ceiling_fraction",
    "predicted_ms", "peer", "peer_p50_ms", "ratio",
)  # fmt: skip
#: Two runs of the same things: their rows may stand in one file.
_SAME = ("gpu", "driver", "torch", "triton", "commit")


@final
@dataclass
class OpResults:
    """What is known of one op in this run."""

    op: str
    check: str = "not run"
    rows: list[dict[str, Any]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)

    @property
    def red(self) -> bool:
        """True if the op is wrong, or a case of it broke."""
        return bool(self.failed) or self.check not in ("passed", "not run", "absent")

    def content(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """What is written."""
        from benchmarks.gpu.targets import judge

        return {
            "header": dict(header),
            "check": self.check,
            "rows": self.rows,
            "absent": self.absent,
            "failed": self.failed,
            "not_run": self.not_run,
            "targets": judge(self.op, self.rows),
        }


def header(device: Mapping[str, Any], ceilings: Mapping[str, float], commit: str) -> dict[str, Any]:
    """What the numbers belong to; ``device`` is what the worker said of itself."""
    return {
        **device,
        "commit": commit or _git_commit(),
        "ceilings": {name: round(value, 1) for name, value in ceilings.items()},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git_commit() -> str:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def folder_of(gpu: str) -> str:
    """``NVIDIA H100 80GB HBM3 -> h100``."""
    words = [word for word in gpu.lower().split() if word not in ("nvidia", "geforce", "graphics")]
    return words[0] if words else "gpu"


def write(found: OpResults, header: Mapping[str, Any], folder: Path) -> Path:
    """Write the op's file; rows of an earlier run stay where header and case allow."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{found.op}.json"
    content = found.content(header)
    if file.exists():
        content = merged(json.loads(file.read_text()), content)
    _put(file, dumps(content))
    return file


def _put(file: Path, text: str) -> None:
    """Write all of it or nothing: half a file, left by a kill, would stop the next run."""
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(text)
    partial.replace(file)


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``new`` with the rows of ``old`` for cases that it did not measure."""
    from benchmarks.gpu.targets import judge

    if any(old["header"].get(name) != new["header"].get(name) for name in _SAME):
        return new
    measured = {row["case"] for row in new["rows"]} | set(new["failed"])
    kept = [row for row in old["rows"] if row["case"] not in measured]
    rows = kept + new["rows"]
    not_run = [case for case in new["not_run"] if case not in {row["case"] for row in kept}]
    op = rows[0]["op"] if rows else ""
    return {**new, "rows": rows, "not_run": not_run, "targets": judge(op, rows)}


def dumps(content: dict[str, Any]) -> str:
    """JSON with one row a line: what a diff can show."""
    lists = {key: content[key] for key in ("rows", "targets")}
    text = json.dumps({**content, **{key: [] for key in lists}}, indent=1)
    for key, rows in lists.items():
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        text = text.replace(f'"{key}": []', f'"{key}": [\n{lines}\n ]' if rows else f'"{key}": []')
    return text + "\n"


def bundle(found: Mapping[str, OpResults], header: Mapping[str, Any], file: Path) -> None:
    """Everything in one file: from a machine that gives back few of them."""
    content = {name: results.content(header) for name, results in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    _put(file, json.dumps(content) + "\n")


def unpack(file: Path, folder: Path | None = None) -> list[Path]:
    """A bundle's files, written where results are kept."""
    written = []
    for op, content in json.loads(file.read_text()).items():
        target = (folder or RESULTS) / folder_of(content["header"]["gpu"]) / f"{op}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            content = merged(json.loads(target.read_text()), content)
        _put(target, dumps(content))
        written.append(target)
    return written


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text, one line each."""
    if not rows:
        return ""
    heads = ("case", "variant", "p20", "p50", "p80", "rate", "ceiling", "pred.", "peer", "ratio")
    lines = [_line(heads)]
    for row in rows:
        rate = "" if row["rate"] is None else f"{row['rate']:.0f} {row['unit']}"
        share = "" if row["ceiling_fraction"] is None else f"{row['ceiling_fraction']:.0%}"
        peer = "" if row["peer"] is None else f"{row['peer']} {row['peer_p50_ms']:.3f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        times = [f"{row[name]:.3f}" for name in ("p20_ms", "p50_ms", "p80_ms")]
        predicted = "" if row["predicted_ms"] is None else f"{row['predicted_ms']:.3f}"
        lines.append(
            _line((row["case"], row["variant"], *times, rate, share, predicted, peer, ratio))
        )
    return "\n".join(lines)


def _line(cells: tuple[str, ...]) -> str:
    widths = (38, 28, 8, 8, 8, 10, 7, 8, 36, 6)
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
