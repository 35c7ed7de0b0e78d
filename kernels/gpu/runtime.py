"""What every launch needs: checks of operands, tile sizes, a guard around bold variants.

* ``operand`` compares device, dtype and shape (InputError, expected and got); a tensor that is not
  contiguous, or does not start at a multiple of 16 bytes, is copied.
* ``best_config`` reads tile sizes from ``configs/<arch>.json``, one file per GPU generation; where
  ``refine`` measured on this very GPU and Triton version, what it kept wins. A cache written by
  another GPU or Triton is ignored, with a warning that says so.
* ``guarded`` runs a variant that only a compiler has vouched for: if it does not compile, or
  differs from the plain variant at its first use, the plain one serves from then on. Under
  ``VDQC_PLAIN=1`` the plain one always serves: a variant that hangs cannot be caught here.

Error: none of its own.
Source: configurations in files by GPU and version, as in gemlite; the guard is ours.
"""

import functools
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError, LoweringError
from vdqc.base.numerics import TOLERANCE
from vdqc.base.target import TARGETS, of_capability
from vdqc.kernels.gpu.memory import has_less, of_gpu

#: Oldest Triton that compiles the sources here.
MIN_TRITON = (3, 5)
#: GPU generations with kernels, oldest first.
ARCHS = ("sm80", "sm89", "sm90", "sm100", "sm120")

#: The oldest generation with the least shared memory: its tiles fit every GPU.
TIGHT = "sm89"

#: Generation of the GPU that launches are compiled for while there is none (``absent``).
ABSENT: ContextVar[str | None] = ContextVar("ABSENT", default=None)

_CONFIGS = Path(__file__).resolve().parent / "configs"
_Result = TypeVar("_Result")


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


def check_triton() -> None:
    """Raise LoweringError unless a Triton is there that is new enough."""
    found = triton_version()
    wanted = ".".join(map(str, MIN_TRITON))
    if found is None:
        raise LoweringError(
            f"expected Triton {wanted} or newer for a GPU, got none",
            "pip install triton, or compile with --target cpu",
            code="triton",
        )
    if _minor(found) < MIN_TRITON:
        raise LoweringError(
            f"expected Triton {wanted} or newer for a GPU, got {found}",
            "pip install --upgrade triton, or compile with --target cpu",
            code="triton",
        )


@functools.cache
def triton_version() -> str | None:
    """Version of the Triton that would be imported, or None."""
    try:
        import triton
    except ImportError:
        return None
    return str(getattr(triton, "__version__", None) or importlib.metadata.version("triton"))


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def is_interpreted() -> bool:
    """True if kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), on CPU tensors."""
    return _is_on("TRITON_INTERPRET")


def is_plain() -> bool:
    """True if no guarded variant may run (``VDQC_PLAIN=1``): see ``guarded``."""
    return _is_on("VDQC_PLAIN")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "0").lower() in ("1", "true", "on", "yes")


def arch_of(device: torch.device) -> str:
    """The generation whose kernels run on ``device``: the newest of its major version.

    The interpreter is given those of sm80, which every GPU can run.
    """
    if device.type != "cuda":
        return ABSENT.get() or ARCHS[0]
    return _arch_of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _arch_of_index(index: int) -> str:
    return arch_of_capability(*torch.cuda.get_device_capability(index))


def arch_of_capability(major: int, minor: int) -> str:
    """``(8, 6) -> sm80``, ``(12, 1) -> sm120``; LoweringError below 8.0 and for unknown majors."""
    found = of_capability(major, minor)
    if found is None:
        raise LoweringError(
            f"expected a GPU of {', '.join(ARCHS)}, got sm{major}{minor}",
            "run the program on the CPU: --target cpu",
            code="device",
        )
    return found.name


def operand(
    name: str,
    tensor: Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    shape: Sequence[int | None] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``tensor``, contiguous and aligned to 16 bytes (copied if it was not); None in ``shape`` is
    any size.

    Raises InputError for another dtype, shape or device.
    """
    allowed = (dtypes,) if isinstance(dtypes, torch.dtype) else tuple(dtypes)
    if tensor.dtype not in allowed:
        words = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputError(f"{name}: expected {words}, got {str(tensor.dtype)[6:]}", code="operand")
    if shape is not None and not _fits(tensor.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InputError(
            f"{name}: expected shape [{wanted}], got {list(tensor.shape)}", code="operand"
        )
    if device is not None and tensor.device != device:
        raise InputError(f"{name}: expected it on {device}, got {tensor.device}", code="operand")
    if tensor.device.type != "cuda" and not (is_interpreted() or ABSENT.get()):
        raise InputError(
            f"{name}: expected a tensor on a GPU, got {tensor.device}",
            "TRITON_INTERPRET=1, set before triton is imported, runs kernels on the CPU",
            code="operand",
        )
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _fits(found: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(found) == len(wanted) and all(
        size is None or size == have for size, have in zip(wanted, found, strict=True)
    )


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have on ``device``; of the target, for a GPU that is not there."""
    if device.type != "cuda":
        return TARGETS[arch_of(device)].shared_memory
    return of_gpu(torch.cuda.current_device() if device.index is None else device.index)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, not where the data is."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


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
                version is None or version == ".".join(map(str, _minor(triton_version() or "0.0")))
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


@functools.cache
def compile_errors() -> tuple[type[BaseException], ...]:
    """What Triton raises when a kernel does not compile or does not fit the GPU."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return (CompilationError, OutOfResources, PTXASError, RuntimeError)


def first_line(error: BaseException) -> str:
    """The error's first line, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


#: Values that ``agrees`` compares at a time.
_PIECE = 2**22

#: True: agreed with its fallback at first use; False: the fallback serves. By variant.
_VERDICTS: dict[str, bool] = {}


def compile_or_fallback(
    key: str, primary: Callable[[], _Result], fallback: Callable[[], _Result]
) -> _Result:
    """``primary()``; once it did not compile, ``fallback()``, with one warning."""
    if not _VERDICTS.get(key, True):
        return fallback()
    try:
        return primary()
    except compile_errors() as error:
        if _is_fatal(error):
            raise
        _VERDICTS[key] = False
        warnings.warn(
            f"{key} does not compile ({first_line(error)}): the plain variant serves", stacklevel=2
        )
        return fallback()


def guarded(
    key: str,
    primary: Callable[[], Tensor],
    fallback: Callable[[], Tensor],
    agree: Callable[[Tensor, Tensor], bool] = torch.equal,
) -> Tensor:
    """``primary()`` once it has agreed with ``fallback()``; see the module's text.

    While a CUDA graph is being captured nothing can be compared: an unproven variant waits. For a
    GPU that is not there both are compiled, ``is_plain`` or not: where the program will run, it
    may be otherwise.
    """
    if ABSENT.get() is not None:
        expected = fallback()
        try:
            return primary()
        except compile_errors():
            return expected
    if is_plain():
        return fallback()
    if _VERDICTS.get(key):
        return primary()
    if key in _VERDICTS or _capturing():
        return fallback()
    expected = fallback()
    found = compile_or_fallback(key, primary, lambda: expected)
    if key not in _VERDICTS:
        _VERDICTS[key] = agree(found, expected)
        if not _VERDICTS[key]:
            warnings.warn(
                f"{key} differs from the plain variant: the plain variant serves", stacklevel=2
            )
    return found if _VERDICTS[key] else expected


def agrees(found: Tensor, expected: Tensor) -> bool:
    """True if both are equal integers, or floats that differ by roundings: within the tolerance of
    their dtype by norm, piece by piece, NaN and infinity in the same places.

    By pieces: of HunyuanVideo's feed-forward both results take 3 GB each, and copies of them in
    float32, whole, 12 more; and one bad tile of a large result must not drown in the norm of all.
    """
    if not found.is_floating_point():
        return torch.equal(found, expected)
    allowed, verdicts = TOLERANCE[expected.dtype], []
    for one, other in zip(
        found.flatten().split(_PIECE), expected.flatten().split(_PIECE), strict=True
    ):
        left, right = one.float(), other.float()
        same = (left == right) | (left.isnan() & right.isnan())
        error = (left - right).masked_fill(same, 0.0).norm()
        verdicts.append(error <= allowed * right.masked_fill(~right.isfinite(), 0.0).norm())
    return not verdicts or bool(torch.stack(verdicts).all())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _is_fatal(error: BaseException) -> bool:
    """True for errors that another kernel would meet too: out of memory, a broken context."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    # what Triton's driver raises bears the first words; only a launch refused is the kernel's own
    if text.startswith("Triton Error [CUDA]"):
        return "invalid argument" not in text
    return "CUDA error" in text or "illegal memory access" in text
