"""The artifact: a folder that holds a compiled program and everything said about it.

::

    out/
      manifest.json         what was done, with the hash of every other file (vdqc.ir.manifest)
      program.json          the program (vdqc.ir.program)
      weights.safetensors   its weights, packed as the program reads them; sharded above 2 GB
      ir/00_captured.txt    the printed IR after each pass
      report.html

``staging`` gives a folder to fill, ``write`` fills it, ``seal`` hashes it, ``read`` refuses
whatever is not exactly that. Reading never unpickles and never runs code from the folder.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from torch import Tensor

from vdqc.base.diagnostics import ArtifactError, Diagnostic, InputError
from vdqc.engine.pass_manager import PassRecord
from vdqc.engine.recipe import Recipe
from vdqc.ir import program
from vdqc.ir import staging as _staging
from vdqc.ir.finished import Finished, Job, link, weight_identity
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MANIFEST,
    check_kind,
    check_size,
    damaged,
    file_hash,
    read_manifest,
    seal_of,
    write_json,
)
from vdqc.ir.origin import Origin
from vdqc.ir.weight_files import (
    Weight,
    weight_bytes,
    weight_shards,
    write_file,
    write_weights,
)
from vdqc.ir.weights import StoredTensor, stored_folder, stored_tensors
from vdqc.version import __version__

PROGRAM = "program.json"
WEIGHTS = "weights.safetensors"

#: Wraps an iterable with a progress bar: ``(items, description) -> items``.
Progress = Callable[[Any, str], Any]


def _silent(items: Any, description: str) -> Any:
    return items


def staging(out: Path, force: bool = False) -> AbstractContextManager[Path]:
    """A folder to fill, which becomes ``out`` as a whole or not at all.

    Raises ArtifactError if ``out`` exists; with ``force`` an artifact there is replaced.
    """
    return _staging.staging(out, force, replaceable=is_artifact)


def is_artifact(folder: Path) -> bool:
    """True if ``folder`` has the manifest of an artifact, of any version; its weights may be
    damaged.
    """
    try:
        check_kind(folder, read_manifest(folder))
    except ArtifactError as error:
        return error.diagnostic.code == "artifact-version"
    return True


# -- writing --------------------------------------------------------------------------------


def write(
    graph: Graph,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    records: Sequence[PassRecord] = (),
    choices: Sequence[Any] = (),
    diagnostics: Iterable[Diagnostic] = (),
    ir_texts: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
    target: object = "",
    progress: Progress = _silent,
) -> None:
    """Write program, weights, printed IR and the manifest, which ``seal`` then completes.

    Stored weights are copied piece by piece, so memory stays bounded; a file of weights that an
    interrupted run finished is taken over. ``choices`` are dataclasses or mappings of JSON values.
    Raises ArtifactError if the disk has not enough space.
    """
    weights, tied = _distinct(graph)
    text = program.dumps(graph, tied)
    printed = ir_texts or {}
    needed = sum(map(weight_bytes, weights.values())) + len(text) + sum(map(len, printed.values()))
    if graph.finished is not None:
        needed -= graph.finished.finished_bytes()
    _staging.require_space(folder, needed)
    write_share(graph, weights, progress)
    write_weights(folder, weights, write=_writer(graph.finished), progress=progress)
    (folder / PROGRAM).write_text(text)
    (folder / "ir").mkdir(exist_ok=True)
    for name, ir in printed.items():
        (folder / "ir" / f"{name}.txt").write_text(ir + "\n")
    manifest = {
        "format": {"name": FORMAT_NAME, "version": FORMAT_VERSION},
        "versions": {"vdqc": __version__, "torch": str(torch.__version__)},
        "recipe": str(recipe) if recipe else "",
        "rules": [str(rule) for rule in recipe.rules] if recipe else [],
        "target": str(target),
        "stage": graph.stage,
        "origin": graph.origin,
        "passes": records,
        "kernels": choices,
        "ops": list(program.needed_ops(graph)),
        "weights": {
            "count": len(weights),
            "bytes": sum(map(weight_bytes, weights.values())),
        },
        "diagnostics": list(diagnostics),
        "facts": facts or {},
    }
    write_json(folder / MANIFEST, manifest)


def write_share(
    graph: Graph, weights: Mapping[str, Weight] | None = None, progress: Progress = _silent
) -> None:
    """Write this worker's share of the weight files, for the first worker to take over."""
    if graph.finished is None or graph.finished.group.size == 1:
        return
    weights = _distinct(graph)[0] if weights is None else weights
    jobs = []
    for name, keys in weight_shards(weights).items():
        shard = {key: weights[key] for key in keys}
        run = functools.partial(_finished_file, graph.finished, name, shard)
        jobs.append(Job(_shard_key(name, shard), sum(map(weight_bytes, shard.values())), run))
    graph.finished.divide(jobs, "write weights", progress)


def _writer(finished: Finished | None) -> Callable[[Path, Mapping[str, Weight]], None]:
    """What writes one file of weights; kept until the artifact is whole if work can be resumed."""
    if finished is None:
        return write_file
    return lambda file, weights: link(_finished_file(finished, file.name, weights), file)


def _finished_file(finished: Finished, name: str, weights: Mapping[str, Weight]) -> Path:
    key = _shard_key(name, weights)
    return finished.file(key, name, lambda part: write_file(part, weights))


def _shard_key(name: str, weights: Mapping[str, Weight]) -> str:
    return "\n".join([name, *(f"{key} {weight_identity(w)}" for key, w in weights.items())])


def seal(folder: Path, progress: Progress = _silent) -> None:
    """Add size and hash of every file to the manifest: the last step, also of adding a file."""
    manifest = read_manifest(folder)
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST
    )
    manifest["files"] = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_hash(path),
        }
        for path in progress(files, "hash")
    }
    manifest["seal"] = seal_of(manifest)
    write_json(folder / MANIFEST, manifest)


def _distinct(graph: Graph) -> tuple[dict[str, Weight], dict[str, str]]:
    """Weights to store by name; stored name of every weight that shares another's memory."""
    weights: dict[str, Weight] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name in graph.param_names():
        weight = graph.stored.get(name) or graph.param(name)
        key: Any = weight
        if isinstance(weight, Tensor):
            place = (weight.data_ptr(), weight.device) if weight.numel() else name
            key = (place, tuple(weight.shape), weight.stride(), weight.dtype)
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            weights[name] = weight
    return weights, tied


# -- reading --------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Artifact:
    """A folder that was found whole."""

    path: Path
    manifest: Mapping[str, Any]

    def graph(self, *, stored: bool = False) -> Graph:
        """The program with its weights mapped from their files, or left there with ``stored``."""
        places = _places(self.path)
        weights: Mapping[str, Weight] = places if stored else dict(_mapped(places))
        text = (self.path / PROGRAM).read_text()
        return program.from_json(json.loads(text), weights, self.origin)

    @property
    def origin(self) -> Origin:
        """Where the program came from."""
        data = self.manifest["origin"]
        return Origin(
            model_class=data["model_class"],
            config=data["config"],
            dtype=data["dtype"],
            keep=tuple(data["keep"]),
            repairs=tuple(data["repairs"]),
        )

    @property
    def records(self) -> tuple[PassRecord, ...]:
        """What each pass did."""
        return tuple(_record(entry) for entry in self.manifest["passes"])

    @property
    def ir(self) -> dict[str, str]:
        """The printed IR after each pass, by its numbered name, in order."""
        files = sorted((self.path / "ir").glob("*.txt"))
        return {file.stem: file.read_text() for file in files}

    @property
    def nbytes(self) -> int:
        """Size of the whole folder, without the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())


def read(path: Path | str, *, verify: bool = True, progress: Progress = _silent) -> Artifact:
    """The artifact at ``path``, after every file was found to be the one that was sealed.

    ``verify=False`` skips the hashes (sizes are still compared). Raises ArtifactError saying what
    is wrong and what to do, before anything is computed or any weight is read.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_kind(folder, manifest)
    if "files" not in manifest or "seal" not in manifest:
        raise ArtifactError(f"{folder} was never finished", "compile the model again")
    if manifest["seal"] != seal_of(manifest):
        raise damaged(f"{folder / MANIFEST} is not the one that was written")
    for name, entry in manifest["files"].items():
        check_size(folder, name, entry)
    if PROGRAM not in manifest["files"]:
        raise damaged(f"{folder} has no {PROGRAM}")
    for place in _places(folder).values():
        if place.file.relative_to(folder).as_posix() not in manifest["files"]:
            raise damaged(f"{place.file} holds weights and is not in the manifest")
    if verify:
        for name, entry in progress(list(manifest["files"].items()), "verify"):
            if file_hash(folder / name) != entry["sha256"]:
                raise damaged(f"{folder / name} is not the file that was written: its hash differs")
    return Artifact(folder, manifest)


def _places(folder: Path) -> dict[str, StoredTensor]:
    """Where each weight is, from the headers of the weight files alone."""
    try:
        if (folder / f"{WEIGHTS}.index.json").is_file():
            return stored_folder(folder)
        return {stored.key: stored for stored in stored_tensors(folder / WEIGHTS)}
    except InputError as error:
        raise damaged(error.diagnostic.message) from error


def _mapped(places: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors over private mappings of their files: read from disk when first touched."""
    for file in dict.fromkeys(place.file for place in places.values()):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (a handle, not a dictionary)
                yield key, handle.get_tensor(key)


def _record(entry: Mapping[str, Any]) -> PassRecord:
    stages = {str(stage): stage for stage in Stage}
    numbers = {
        key: None if entry[key] is None else float(entry[key]) for key in ("error", "sqnr_db")
    }
    return PassRecord(**{**entry, **numbers, "stage": stages[entry["stage"]]})
