"""Tile sizes of launches, from files or measured here.

``best_config`` reads tile sizes from ``configs/<arch>.json``, one file per GPU generation; where
``refine`` measured on this very GPU and Triton version, what it kept wins. A cache written by
another GPU or Triton is ignored, with a warning that says so.

Error: none.
Source: configurations in files by GPU and version, as in gemlite.
"""

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.kernels.gpu.memory import has_less
from vdqc.kernels.gpu.runtime import (
    arch_of,
    compile_errors,
    first_line,
    minor_version,
    triton_version,
)

#: The oldest generation with the least shared memory: its tiles fit every GPU.
TIGHT = "sm89"

_CONFIGS = Path(__file__).resolve().parent / "configs"


@final
@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch; what a kernel has no use for stays at its default.

    Attributes:
        variant: which of the op's kernels (``plain``, ``ws``, ``swap`` ...).
        group_m: rows of tiles that share their weight tiles in L2.
        slices: runs of columns (1, 2 or 4) in which a tile is finished and written.
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    warps: int = 4
    stages: int = 3
    group_m: int = 8
    slices: int = 1
    variant: str = "plain"

    @property
    def tile(self) -> str:
        """``128x256x64w8s3``: rows, columns, depth, warps, stages."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}w{self.warps}s{self.stages}"


def best_config(
    op: str, arch: str, problem: Mapping[str, int], device: int | None = None
) -> Config:
    """Tiles of ``op`` on ``arch`` for sizes ``problem`` (``m``, ``n``, ``k`` ...).

    What was refined on this GPU wins (``device`` names it), then the first row of the file that
    fits the sizes and the Triton version, then ``Config()``, which every GPU can run. A GPU with
    less shared memory than ``arch``, as sm86 has, gets the tiles of ``TIGHT``.
    """
    if device is not None:
        found = _refined(device).get(_problem_key(op, problem))
        if found is not None:
            return found
        if has_less(device, arch):
            arch = TIGHT
    for row in _rows(arch):
        limits = row.get("at_most", {})
        version = row.get("triton")
        if (
            row["op"] == op
            and (
                version is None
                or version == ".".join(map(str, minor_version(triton_version() or "0.0")))
            )
            and all(problem.get(name, 0) <= limit for name, limit in limits.items())
        ):
            return Config(**row["config"])
    return Config()


def configuration(op: str, rows: Tensor, n: int, k: int) -> Config:
    """``best_config`` of a GEMM of ``rows[M, ...]`` with ``n`` columns and depth ``k``."""
    device = None
    if rows.is_cuda:
        device = torch.cuda.current_device() if rows.device.index is None else rows.device.index
    sizes = {"m": rows.shape[0], "n": n, "k": k}
    return best_config(op, arch_of(rows.device), sizes, device)


@functools.cache
def _rows(arch: str) -> list[dict[str, Any]]:
    file = _CONFIGS / f"{arch}.json"
    return json.loads(file.read_text())["rows"] if file.exists() else []


def _problem_key(op: str, problem: Mapping[str, int]) -> str:
    return f"{op}({', '.join(f'{name}={size}' for name, size in sorted(problem.items()))})"


def cache_file() -> Path:
    """Where refined configurations are kept: ``$VDQC_CACHE`` or ``~/.cache/vdqc``."""
    folder = os.environ.get("VDQC_CACHE") or Path.home() / ".cache" / "vdqc"
    return Path(folder) / "refined.json"


@functools.cache
def _refined(device: int) -> dict[str, Config]:
    return read_refined(cache_file(), torch.cuda.get_device_name(device), str(triton_version()))


def read_refined(file: Path, gpu: str, triton: str) -> dict[str, Config]:
    """Refined configurations by problem; empty, with a warning, if another GPU or Triton made them
    or the file cannot be read.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text())
        made_by = (content["gpu"], content["triton"])
        rows = {key: Config(**config) for key, config in content["configs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{file} is not a cache of configurations ({error}): ignored", stacklevel=2)
        return {}
    if made_by != (gpu, triton):
        warnings.warn(
            f"{file} was tuned on {made_by[0]} with Triton {made_by[1]}, this is {gpu} with "
            f"{triton}: ignored",
            stacklevel=2,
        )
        return {}
    return rows


def refine(
    op: str,
    problem: Mapping[str, int],
    candidates: Iterable[Config],
    milliseconds: Callable[[Config], float],
    device: int = 0,
) -> Config:
    """Measure ``candidates``, keep the fastest for this problem in the cache file and return it.

    A candidate that does not compile or does not fit is passed over; InputError if none is left.
    """
    times: dict[Config, float] = {}
    for config in candidates:
        try:
            times[config] = milliseconds(config)
        except compile_errors() as error:
            warnings.warn(f"{op}: {config} does not compile ({first_line(error)})", stacklevel=2)
    if not times:
        raise InputError(f"{op}: no candidate configuration compiles for {dict(problem)}")
    best = min(times, key=lambda config: times[config])
    gpu, version, file = torch.cuda.get_device_name(device), str(triton_version()), cache_file()
    kept = read_refined(file, gpu, version) | {_problem_key(op, problem): best}
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "gpu": gpu,
        "triton": version,
        "configs": {key: asdict(config) for key, config in sorted(kept.items())},
    }
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(file)
    _refined.cache_clear()
    return best
