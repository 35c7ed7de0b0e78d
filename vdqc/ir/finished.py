"""Results of finished pieces of work, kept in a folder: a run that was killed does not repeat them.

::

    folder/
      pieces/<key>.safetensors   tensors and facts of one piece, with the hash of all of it
      files/<name>               a finished output file; the piece of its key holds its hash
      values/                    weights that passes made; never taken over by another run

A piece is named by everything that decides its result, so one that is found is right wherever it
came from. Files appear whole and synced to disk or not at all; every one is hashed before it is
used, and one that is damaged is made again.

Several workers may share a folder: ``divide`` gives each its part of a list of pieces.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, final

import torch
from safetensors import safe_open
from torch import Tensor

from vdqc.ir import weights as _weights
from vdqc.ir.staging import atomic
from vdqc.ir.weight_files import Progress, Weight, write_file
from vdqc.ir.weights import StoredTensor


@final
@dataclass(frozen=True)
class Piece:
    """What one piece of work made: tensors by name, large ones on disk, and facts of JSON."""

    tensors: Mapping[str, Weight] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` in memory."""
        value = self.tensors[name]
        return value if isinstance(value, Tensor) else value.read()


@final
@dataclass(frozen=True)
class Job:
    """One piece to be done by some worker: its key, its size in any unit, and what makes it."""

    key: str
    cost: float
    run: Callable[[], object]


class Group(Protocol):
    """The workers that share a folder (``vdqc.engine.distributed.Workers``)."""

    @property
    def rank(self) -> int:
        """This worker's number."""

    @property
    def size(self) -> int:
        """How many there are."""

    def share(self, value: Any) -> Any:
        """What the first worker holds."""

    def wait(self) -> None:
        """Until every worker is here."""


@final
@dataclass(frozen=True)
class Alone:
    """The group of one."""

    rank: int = 0
    size: int = 1

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def wait(self) -> None:
        """Nobody to wait for."""


@final
class Finished:
    """See the module's text. ``taken`` and ``made`` count pieces found and pieces computed.

    ``codes`` are packed weights that a pass met on its way, by ``vdqc.ir.resume.codes_key``.
    """

    def __init__(self, folder: Path, group: Group | None = None) -> None:
        self.folder = folder
        self.group: Group = group or Alone()
        self.taken = self.made = 0
        self.codes: dict[str, Weight] = {}
        self.damaged: list[Path] = []
        for name in ("pieces", "files"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def values(self) -> Path:
        """Where weights that passes make are spilled."""
        return self.folder / "values"

    def __len__(self) -> int:
        return sum(1 for _ in (self.folder / "pieces").glob("[!.]*.safetensors"))

    def has(self, key: str) -> bool:
        """True if there is a file for ``key``; whether it is whole is seen when it is read."""
        return self._place(key).is_file()

    def piece(self, key: str, compute: Callable[[], Piece]) -> Piece:
        """The result of ``compute``, from disk if it was finished before."""
        found = self._load(key)
        if found is not None:
            self.taken += 1
            return found
        made = compute()
        facts = self._save(key, made)
        self.made += 1
        return self._settled(self._place(key), Piece(made.tensors, json.loads(facts)))

    def file(self, key: str, name: str, write: Callable[[Path], None]) -> Path:
        """The finished file ``name``, which ``write`` fills unless it is there, whole."""
        place = self.folder / "files" / name

        def compute() -> Piece:
            with atomic(place) as part:
                write(part)
            return Piece({}, {"bytes": place.stat().st_size, "sha256": _file_hash(place)})

        taken = self.taken
        known = self.piece(key, compute)
        if self.taken > taken and not _is_whole(place, known.facts):
            self.taken -= 1
            if place.exists():
                self.damaged.append(place)
            self._place(key).unlink()
            self.piece(key, compute)
        return place

    def finished_bytes(self) -> int:
        """Bytes of the output files that are finished."""
        return sum(file.stat().st_size for file in (self.folder / "files").glob("[!.]*"))

    def divide(
        self,
        jobs: Sequence[Job],
        description: str,
        progress: Progress = lambda items, description: items,
    ) -> None:
        """Have the workers finish ``jobs`` together, each those that it is given; alone: nothing.

        Whoever needs a result asks for it as if it were alone, and finds it.
        """
        group = self.group
        if group.size == 1:
            return
        unfinished = group.share([i for i, job in enumerate(jobs) if not self.has(job.key)])
        own = shares([jobs[i].cost for i in unfinished], group.size)[group.rank]
        for index in progress(own, f"{description}, worker {group.rank + 1} of {group.size}"):
            jobs[unfinished[index]].run()
        group.wait()

    def _place(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.folder / "pieces" / f"{digest}.safetensors"

    def _save(self, key: str, piece: Piece) -> str:
        facts = json.dumps(dict(piece.facts))
        tensors = {name: _dense(value) for name, value in piece.tensors.items()}
        about = {"facts": facts, "hash": _hash(key, facts, tensors)}
        with atomic(self._place(key)) as part:
            write_file(part, tensors, about)
        return facts

    def _load(self, key: str) -> Piece | None:
        place = self._place(key)
        if not place.is_file():
            return None
        try:
            with safe_open(place, framework="pt") as handle:
                about = handle.metadata()
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                if about["hash"] == _hash(key, about["facts"], tensors):
                    return self._settled(place, Piece(tensors, json.loads(about["facts"])))
        except Exception:  # safetensors raises its own type, JSON and dtypes theirs: all damage
            pass
        self.damaged.append(place)
        return None

    @staticmethod
    def _settled(place: Path, piece: Piece) -> Piece:
        """``piece`` with its large tensors left in their file."""
        tensors: dict[str, Weight] = {}
        for name, value in piece.tensors.items():
            if isinstance(value, Tensor) and value.nbytes >= _weights.SPILLED_BYTES:
                tensors[name] = StoredTensor(place, name, tuple(value.shape), value.dtype)
            else:
                tensors[name] = value.clone() if isinstance(value, Tensor) else value
        return Piece(tensors, piece.facts)


def shares(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Indices of ``costs`` for each worker, in order: each goes to the one with least so far."""
    loads = [0.0] * workers
    found: list[list[int]] = [[] for _ in loads]
    for index, cost in enumerate(costs):
        least = loads.index(min(loads))
        loads[least] += cost
        found[least].append(index)
    return found


def tensor_hash(value: Tensor) -> str:
    """Hash of dtype, shape and content."""
    digest = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
    _update(digest, _dense(value))
    return digest.hexdigest()[:32]


def link(file: Path, place: Path) -> None:
    """``file`` also at ``place`` on the same disk; moved there where the disk has no hard links."""
    try:
        place.hardlink_to(file)
    except OSError:
        shutil.move(file, place)


def weight_identity(value: Weight) -> str:
    """What decides the content of a weight, as text.

    Names of files that vdqc writes are hashes of what is in them; other files are known to the run
    by name, size and time.
    """
    if isinstance(value, Tensor):
        return tensor_hash(value)
    return f"{value.file.name}:{value.key}:{value.dtype}{list(value.shape)}"


def _hash(key: str, facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{key}\n{facts}\n".encode())
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Tensor) -> None:
    if value.numel():
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)


def _dense(value: Weight) -> Tensor:
    tensor = value if isinstance(value, Tensor) else value.read()
    return tensor.detach().cpu().contiguous()


def _is_whole(file: Path, facts: Mapping[str, Any]) -> bool:
    return (
        file.is_file()
        and file.stat().st_size == facts["bytes"]
        and _file_hash(file) == facts["sha256"]
    )


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
