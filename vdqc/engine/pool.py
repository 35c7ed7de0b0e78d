"""The calibration pool: calls of the model along sampling trajectories, on disk, read one by one.

::

    pool/
      pool.json                       what was recorded, of which model, with a hash of every shard
      seed00003-00.safetensors        the tensors of one trajectory; equal tensors once

A candidate is one call: (seed of the trajectory, step in it, timestep, inputs). Calls in a row at
one timestep are the branches of one step, as guidance makes them. Reading a candidate opens its
shard, so that memory is one call however large the pool is. Nothing is unpickled.

Error: ArtifactError for a folder that is foreign, newer, unfinished, or damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final, overload

import torch
from safetensors import safe_open
from torch import Tensor

from vdqc.base.diagnostics import ArtifactError, InputError
from vdqc.ir.sample import Sample

FORMAT = {"name": "vdqc-pool", "version": 1}
INDEX = "pool.json"
_CHUNK = 1 << 22


@final
@dataclass(frozen=True)
class Candidate:
    """One call of the model: where it stands; ``timestep`` None where the call names none.

    ``branch`` counts the calls of one step.
    """

    seed: int
    step: int
    timestep: float | None
    branch: int = 0


@final
class Pool(Sequence[Sample]):
    """Candidates of some trajectories, in the order of those and of their steps."""

    def __init__(self, folder: Path, trajectories: Sequence[Mapping[str, Any]]) -> None:
        self.folder = folder
        self.trajectories = list(trajectories)
        self.candidates: list[Candidate] = []
        self._calls: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = []
        self._checked: set[str] = set()
        for trajectory in self.trajectories:
            timesteps = [call["timestep"] for call in trajectory["calls"]]
            self.candidates += _places(trajectory["seed"], timesteps)
            self._calls += [(trajectory, call) for call in trajectory["calls"]]

    @property
    def hash(self) -> str:
        """SHA-256 of what the pool holds: equal for equal candidates, wherever it lies."""
        return hashlib.sha256(json.dumps(self.trajectories, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._calls)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        trajectory, call = self._calls[index]
        inputs = _decode(call["inputs"], lambda place: self._tensor(trajectory, place))
        here = self.candidates[index]
        return Sample(inputs, here.timestep, here.seed, here.step, here.branch)

    def one_of_each_size(self) -> list[int]:
        """The first candidate of every combination of sizes; reads the headers of shards alone."""
        shapes: dict[Path, dict[str, list[int]]] = {}
        found: dict[str, int] = {}
        for index, (trajectory, call) in enumerate(self._calls):

            def shape(place: Sequence[Any], files: Any = trajectory["files"]) -> list[int]:
                file = self.folder / files[place[0]]["name"]
                if file not in shapes:
                    shapes[file] = _shapes(file)
                return shapes[file][place[1]]

            found.setdefault(_sizes(call["inputs"], shape), index)
        return list(found.values())

    def _tensor(self, trajectory: Mapping[str, Any], place: Sequence[Any]) -> Tensor:
        entry = trajectory["files"][place[0]]
        file = self.folder / entry["name"]
        self._check(file, entry)
        with safe_open(file, framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(place[1])
            return tensor.clone()

    def _check(self, file: Path, entry: Mapping[str, Any]) -> None:
        """Refuse a shard that is not the one that was written; each is read once for it."""
        if entry["name"] in self._checked:
            return
        if file_hash(file) != entry["sha256"]:
            raise ArtifactError(
                f"{file} is damaged: its hash is not the one in {INDEX}",
                "remove the pool and record it again",
                code="pool-damaged",
            )
        self._checked.add(entry["name"])


@final
class Subset(Sequence[Sample]):
    """Some samples of a sequence, by index, still read one by one."""

    def __init__(self, whole: Sequence[Sample], indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return Subset(self.whole, self.indices[index])
        return self.whole[self.indices[index]]


def candidates(samples: Sequence[Sample]) -> list[Candidate] | None:
    """Where each sample stands, or None if they were not recorded from trajectories."""
    if isinstance(samples, Pool):
        return samples.candidates
    if isinstance(samples, Subset):
        whole = candidates(samples.whole)
        return None if whole is None else [whole[index] for index in samples.indices]
    found = [
        Candidate(sample.trajectory, sample.step, sample.timestep, sample.branch)
        for sample in samples
        if sample.trajectory is not None and sample.step is not None
    ]
    return found if len(found) == len(samples) else None


def sample_keys(samples: Sequence[Sample]) -> list[str]:
    """A name for each sample that does not depend on its place: where it stands, or content."""
    found = candidates(samples)
    if found is not None:
        return [f"{c.seed:010d}/{c.step:06d}" + f"/{c.branch}" * (c.branch > 0) for c in found]
    return [_content(sample) for sample in samples]


def _places(seed: int, timesteps: Sequence[float | None]) -> Iterator[Candidate]:
    """Where the calls of one trajectory stand; a call that names no timestep is a step."""
    step, branch, before = -1, 0, None
    for timestep in timesteps:
        again = timestep is not None and timestep == before
        step, branch = (step, branch + 1) if again else (step + 1, 0)
        before = timestep
        yield Candidate(seed, step, timestep, branch)


def open_pool(folder: Path, seeds: Sequence[int] | None = None) -> Pool:
    """The pool at ``folder``, all of it or the trajectories of ``seeds``; raises ArtifactError."""
    index = read_index(folder)
    found = {trajectory["seed"]: trajectory for trajectory in index["trajectories"]}
    wanted = list(index["seeds"] if seeds is None else seeds)
    missing = [seed for seed in wanted if seed not in found]
    if missing:
        raise ArtifactError(
            f"expected {len(wanted)} trajectories in {folder}, got {len(wanted) - len(missing)}",
            "its recording was interrupted: record again into the same folder, it goes on",
            code="pool-unfinished",
        )
    for trajectory in (found[seed] for seed in wanted):
        for entry in trajectory["files"]:
            file = folder / entry["name"]
            size = file.stat().st_size if file.is_file() else None
            if size != entry["bytes"]:
                raise ArtifactError(
                    f"expected {entry['bytes']} bytes in {file}, got {size or 'no file'}",
                    "remove the pool and record it again",
                    code="pool-damaged",
                )
    return Pool(folder, [found[seed] for seed in wanted])


def read_index(folder: Path) -> dict[str, Any]:
    """The content of ``pool.json``; raises ArtifactError unless it is one that can be read."""
    file = folder / INDEX
    try:
        index = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"expected a pool at {folder}, found no {INDEX}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} is not JSON: it is damaged", code="pool-damaged") from error
    kind = index.get("format") if isinstance(index, dict) else None
    if kind != FORMAT:
        raise ArtifactError(f"expected the format {FORMAT} in {file}, got {kind}")
    found: dict[str, Any] = index
    return found


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Replace ``pool.json`` as a whole or not at all."""
    file, fresh = folder / INDEX, folder / f".{INDEX}.new"
    with fresh.open("w") as stream:
        json.dump(index, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    fresh.replace(file)


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def tensor_hash(value: Tensor) -> str:
    """SHA-256 of a tensor: type, shape, bytes."""
    digest = hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode())
    # a single value that was expanded has stride 0 and counts as contiguous
    flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode(value: Any, path: str, keep: Any) -> dict[str, Any]:
    """A call's argument as JSON; ``keep(tensor)`` gives the place of each tensor."""
    match value:
        case Tensor():
            return {"tensor": keep(value, path)}
        case dict() if all(isinstance(key, str) for key in value):
            return {"dict": {k: encode(v, f"{path}.{k}", keep) for k, v in value.items()}}
        case list() | tuple() if type(value) in (list, tuple):
            items = [encode(item, f"{path}[{n}]", keep) for n, item in enumerate(value)]
            return {type(value).__name__: items}
        case None | bool() | int() | float() | str():
            return {"value": value}
    raise InputError(
        f"'{path}' is a {type(value).__name__}, which a pool cannot store",
        "expected tensors, numbers, texts, None, and lists, tuples or dictionaries of them",
    )


def _decode(value: Mapping[str, Any], read: Any) -> Any:
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return read(content)
        case "dict":
            return {key: _decode(item, read) for key, item in content.items()}
        case "list":
            return [_decode(item, read) for item in content]
        case "tuple":
            return tuple(_decode(item, read) for item in content)
    return content


def _sizes(value: Mapping[str, Any], shape: Any) -> str:
    """What of an encoded argument sizes depend on: shapes, whole numbers, structure."""
    ((kind, content),) = value.items()
    match kind:
        case "tensor":
            return str(shape(content))
        case "dict":
            return str({key: _sizes(item, shape) for key, item in content.items()})
        case "list" | "tuple":
            return str([_sizes(item, shape) for item in content])
    return "float" if isinstance(content, float) else repr(content)


def _shapes(file: Path) -> dict[str, list[int]]:
    with safe_open(file, framework="pt") as handle:
        names = handle.keys()
        return {name: list(handle.get_slice(name).get_shape()) for name in names}


def _content(sample: Sample) -> str:
    def parts() -> Iterator[str]:
        yield json.dumps(encode(dict(sample.inputs), "", lambda value, path: tensor_hash(value)))
        yield str(sample.timestep)

    return hashlib.sha256("|".join(parts()).encode()).hexdigest()
