"""Records the calls that a model's own sampler makes: seeds × steps candidates for calibration.

::

    pool = record(model, generate, seeds=range(10), folder=Path("pool"))     # 10 prompts × steps

``generate(model, seed)`` runs as it is, with a hook on the model that keeps the arguments of every
call. A trajectory is written when it is whole; after an interruption the same call goes on with the
seeds that are missing. A folder with the calls of another model or another sampler is refused.

Error: InputError if the sampler never calls the model, or gives it NaN; ArtifactError for a folder
that holds anything else.
Source: pools of prompts × timesteps: Feng et al., S2Q-VDiT, arXiv 2508.04016, section 3.2 (10
prompts); QuantVGGT, arXiv 2509.21302, section 3.3 (400 scenes).
"""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from vdqc.base.diagnostics import ArtifactError, InputError
from vdqc.engine.pool import (
    FORMAT,
    INDEX,
    Pool,
    encode,
    file_hash,
    open_pool,
    read_index,
    tensor_hash,
    write_index,
)
from vdqc.ir.frontend import forward_parameters
from vdqc.ir.weight_files import write_file
from vdqc.ir.weights import STORED_DTYPES

#: A trajectory's tensors go to disk whenever this many bytes are held.
SHARD_BYTES = 256 << 20
#: Arguments that name the denoising timestep.
TIMESTEPS = ("timestep", "timesteps", "t")

Progress = Callable[[Any, str], Any]


def record(
    model: nn.Module,
    generate: Callable[[Any, int], Any],
    seeds: Sequence[int],
    folder: Path,
    *,
    progress: Progress = lambda items, description: items,
) -> Pool:
    """The pool of the trajectories of ``seeds``; those already in ``folder`` are not run again."""
    identity = identity_of(model, generate) if seeds else {}
    runs = [Recorded("", model, folder, identity)]
    record_all(runs, lambda seed: generate(model, seed), seeds, progress=progress)
    return open_pool(folder, list(dict.fromkeys(seeds)))


@final
@dataclass(frozen=True)
class Recorded:
    """A model whose calls are kept in ``folder``; ``identity`` says what decides them."""

    name: str
    model: nn.Module
    folder: Path
    identity: Mapping[str, str]


@torch.no_grad()
def record_all(
    models: Sequence[Recorded],
    generate: Callable[[int], Any],
    seeds: Sequence[int],
    *,
    progress: Progress = lambda items, description: items,
) -> None:
    """Record several models that one sampler calls, each into its own pool, from the same runs.

    Each model's calls are the ones that the sampler gives it. A trajectory that one of the pools
    lacks is run once more, and kept where it is missing.
    """
    if not seeds:
        raise InputError("expected at least one seed to record, got none")
    with ExitStack() as locks:
        indices = []
        for each in models:
            each.folder.mkdir(parents=True, exist_ok=True)
            locks.enter_context(_locked(each.folder))
            index = _index(each.folder, each.identity)
            index["seeds"] = sorted({*index["seeds"], *seeds})
            write_index(each.folder, index)
            _remove_unfinished(each.folder, index)
            indices.append(index)
        missing = {
            seed: [
                (each, index)
                for each, index in zip(models, indices, strict=True)
                if seed not in {entry["seed"] for entry in index["trajectories"]}
            ]
            for seed in dict.fromkeys(seeds)
        }
        todo = [seed for seed, lacking in missing.items() if lacking]
        for seed in progress(todo, "record trajectories") if todo else ():
            lacking = [each for each, _ in missing[seed]]
            entries = _trajectories(lacking, generate, seed)
            for (each, index), entry in zip(missing[seed], entries, strict=True):
                index["trajectories"].append(entry)
                write_index(each.folder, index)


def identity_of(model: nn.Module, generate: Callable[[Any, int], Any]) -> dict[str, str]:
    """What decides the calls besides the seed: class and weights of the model, file of the sampler.

    Raises InputError for a model whose weights are not in memory.
    """
    if any(value.is_meta for value in model.parameters()):
        raise InputError("expected the model's weights in memory, they are on disk (mapped)")
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}:{tensor_hash(value)}".encode())
    try:
        file = inspect.getsourcefile(generate)
    except TypeError:
        file = None
    return {
        "model": type(model).__qualname__,
        "weights": digest.hexdigest(),
        "sampler": file_hash(Path(file)) if file and Path(file).is_file() else "",
    }


def timestep_of(inputs: Mapping[str, Any]) -> float | None:
    """The timestep that a call names (of its first sample), or None."""
    for name in TIMESTEPS:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.numel():
            return float(value.flatten()[0])
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _trajectories(
    models: Sequence[Recorded], generate: Callable[[int], Any], seed: int
) -> list[dict[str, Any]]:
    """Run one trajectory and write the shards of every model; their entries for the indices."""
    takers = [_Taker(each.model, each.folder, seed) for each in models]
    handles = [
        taker.model.register_forward_pre_hook(taker.keep, with_kwargs=True) for taker in takers
    ]
    try:
        generate(seed)
    finally:
        for handle in handles:
            handle.remove()
    for each, taker in zip(models, takers, strict=True):
        if not taker.calls and each.name:
            raise InputError(
                f"expected the pipeline to call '{each.name}', it never did",
                "more steps, or another boundary between the experts, give each of them calls",
            )
        if not taker.calls:
            raise InputError(
                "expected generate(model, seed) to call the model it was given, it never did"
            )
    return [
        {"seed": seed, "files": taker.shards.finish(), "calls": taker.calls} for taker in takers
    ]


class _Taker:
    """Keeps the arguments of every call of one model."""

    def __init__(self, model: nn.Module, folder: Path, seed: int) -> None:
        self.model, self.seed = model, seed
        self.shards = _Shards(folder, seed)
        self.parameters = list(forward_parameters(model))
        self.calls: list[dict[str, Any]] = []

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook."""
        if len(args) > len(self.parameters):
            raise InputError(f"expected at most {len(self.parameters)} arguments, got {len(args)}")
        inputs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        where = f"seed {self.seed}, call {len(self.calls)}"
        encoded = encode(inputs, "", lambda value, path: self.shards.add(value, path, where))
        self.calls.append({"timestep": timestep_of(inputs), "inputs": encoded})


class _Shards:
    """The tensors of one trajectory on their way to disk; equal ones are kept once."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._seed = folder, seed
        self._places: dict[str, list[Any]] = {}
        self._held: dict[str, Tensor] = {}
        self._bytes = 0
        self._files: list[dict[str, Any]] = []

    def add(self, value: Tensor, path: str, where: str) -> list[Any]:
        """Keep a copy (samplers write in place); its place, ``[shard, key]``."""
        if value.dtype not in STORED_DTYPES.values():
            raise InputError(f"'{path.lstrip('.')}' is {value.dtype}, which a pool cannot store")
        if value.is_floating_point() and bool(value.isnan().any()):
            raise InputError(
                f"{where}: '{path.lstrip('.')}' holds NaN",
                "the float model's own sampling fails: check it first",
                code="not-finite",
            )
        key = tensor_hash(value)
        if key not in self._places:
            self._places[key] = [len(self._files), key]
            self._held[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            self._bytes += value.nbytes
            if self._bytes >= SHARD_BYTES:
                self._write()
        return self._places[key]

    def finish(self) -> list[dict[str, Any]]:
        """Write what is held; name, size and hash of every shard."""
        if self._held:
            self._write()
        return self._files

    def _write(self) -> None:
        name = f"seed{self._seed:05d}-{len(self._files):02d}.safetensors"
        file = self._folder / name
        write_file(file, self._held)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        entry = {"name": name, "bytes": file.stat().st_size, "sha256": file_hash(file)}
        self._files.append(entry)
        self._held, self._bytes = {}, 0


def _index(folder: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """The index to go on with; a new one in an empty folder."""
    if not (folder / INDEX).exists():
        others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        if others:
            raise ArtifactError(
                f"{folder} holds {others[0]} and no {INDEX}: it is no pool",
                "record into a folder of its own",
            )
        return {"format": FORMAT, "identity": dict(identity), "seeds": [], "trajectories": []}
    index = read_index(folder)
    for part, wanted in identity.items():
        if index["identity"].get(part) != wanted:
            what = {"model": "class", "weights": "weights", "sampler": "generate()"}[part]
            raise ArtifactError(
                f"the pool at {folder} was recorded with another {part} than this one",
                f"the model's {what} differs: remove the pool, or record into another folder",
                code="pool-foreign",
            )
    return index


def _remove_unfinished(folder: Path, index: Mapping[str, Any]) -> None:
    """Remove the shards of a trajectory that was interrupted."""
    known = {entry["name"] for item in index["trajectories"] for entry in item["files"]}
    for file in folder.glob("seed*-*.safetensors"):
        if file.name not in known:
            file.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ArtifactError(
            f"another process records into {folder}", "wait for it, or record elsewhere"
        ) from error
    finally:
        os.close(descriptor)
