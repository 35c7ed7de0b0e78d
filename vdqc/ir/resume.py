"""Going on after a kill: what a compilation finished stays beside its output, under its own facts.

::

    out.partial/
      run.json      what decides the result: recipe, seed, samples, versions, files of the model
      pieces/ ...   finished work (vdqc.ir.finished)

The same command goes on there; with other facts it starts anew. The graph is built again, which
takes no weights; what is computed from weights is found under a key that spells out the expression
and the content of all that it reads. So a resumed run makes the bits of one that was not
interrupted.

Error: ArtifactError for a folder of that name that is not vdqc's, or that another process fills.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import ArtifactError, Diagnostics
from vdqc.base.scheme import QuantSpec
from vdqc.ir.finished import Alone, Finished, Group, Job, Piece, tensor_hash, weight_identity
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.staging import PART, atomic
from vdqc.ir.weight_files import Progress
from vdqc.ir.weights import StoredTensor
from vdqc.version import __version__

RUN = "run.json"

#: Codes of what is said about resuming: it is no part of the artifact.
SAID = frozenset({"resumed", "started-anew", "damaged-piece"})

_OWN = {RUN, "pieces", "files", "values"}


# -- work on weights ---------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class WeightWork:
    """``compute()``: a function of ``what`` and the constant expressions ``nodes``."""

    what: str
    nodes: Sequence[fx.Node | None]
    compute: Callable[[], Piece]

    @property
    def cost(self) -> float:
        """Values to be read and computed."""
        values = (node.meta["val"] for node in self.nodes if node is not None)
        return float(sum(math.prod(map(int, value.shape)) for value in values))


def finish(graph: Graph, work: WeightWork) -> Piece:
    """What ``work`` computes, or did before."""
    if graph.finished is None:
        return work.compute()
    return graph.finished.piece(weight_key(graph, work), work.compute)


def share(
    graph: Graph,
    works: Iterable[WeightWork],
    description: str,
    progress: Progress = lambda items, description: items,
) -> None:
    """Have all workers finish ``works``, each a part; nothing for one worker alone."""
    if graph.finished is None or graph.finished.group.size == 1:
        return
    jobs = [
        Job(weight_key(graph, work), work.cost, functools.partial(finish, graph, work))
        for work in works
    ]
    graph.finished.divide(jobs, description, progress)


def weight_key(graph: Graph, work: WeightWork) -> str:
    """``what``, and the expressions of ``work`` down to the content of their weights."""
    known: dict[fx.Node, str] = {}

    def text(node: fx.Node) -> str:
        if node not in known:
            known[node] = _leaf(graph, node) if node.op == "get_attr" else _call(node, text)
        return known[node]

    return "\n".join([work.what, *("none" if node is None else text(node) for node in work.nodes)])


def may_keep_codes(spec: QuantSpec) -> bool:
    """True for codes that ``vdqc.base.packing`` holds as they are: symmetric integers."""
    return spec.symmetric and not spec.dtype.is_float and not spec.planes


def codes_key(graph: Graph, weight: fx.Node, scale: fx.Node, spec: QuantSpec) -> str:
    """What decides the codes of ``weight``: expressions and content of all that makes them."""
    return weight_key(graph, WeightWork(f"codes {spec}", [weight, scale], Piece))


def _leaf(graph: Graph, node: fx.Node) -> str:
    name = str(node.target)
    return weight_identity(graph.stored.get(name) or graph.param(name))


def _call(node: fx.Node, text: Callable[[fx.Node], str]) -> str:
    def operand(value: Any) -> str:
        if isinstance(value, fx.Node):
            return text(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(operand, value))}]"
        return repr(value)

    options = [f"{key}={operand(value)}" for key, value in node.kwargs.items()]
    body = f"{node.target}({', '.join([*map(operand, node.args), *options])})"
    return hashlib.sha256(body.encode()).hexdigest()[:32]


# -- the folder --------------------------------------------------------------------------------


def partial_folder(out: Path) -> Path:
    """Where the finished work of an interrupted compilation to ``out`` is kept."""
    out = Path(os.path.abspath(out))
    return out.with_name(f"{out.name}.partial")


@contextmanager
def resumable(
    out: Path,
    facts: Mapping[str, Any],
    diagnostics: Diagnostics,
    *,
    fresh: bool = False,
    group: Group | None = None,
) -> Iterator[Finished]:
    """The finished work of a compilation to ``out``: gone if the block ends well, else kept.

    ``facts`` are all that decides the result. Work that was done under others, or any with
    ``fresh``, is dropped with a warning. The first worker of ``group`` keeps house.
    """
    group = group or Alone()
    folder, first = partial_folder(out), group.rank == 0
    lock = _locked(folder) if first else None
    try:
        if first:
            _prepare(folder, facts, diagnostics, fresh)
        if group.share(facts) != facts:
            raise ArtifactError(
                "expected the same command and model from every worker, got different ones",
                "give all workers the same arguments, seed and files",
            )
        finished = Finished(folder, group)
        if first and (count := len(finished)):
            diagnostics.warning(
                "",
                "resumed",
                f"an interrupted run is resumed: {count} finished pieces are in {folder}",
                "--fresh starts anew",
            )
        try:
            yield finished
            group.wait()
        except BaseException as error:
            if first and len(finished):
                error.add_note(
                    f"what is finished stays in {folder}: the same command goes on there"
                )
            raise
        finally:
            for file in finished.damaged:
                diagnostics.warning("", "damaged-piece", f"{file} was damaged: made again")
        if first:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {folder}: {error.strerror}", "write elsewhere with -o"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ArtifactError(
            f"another process fills {folder}", "wait for it, or write elsewhere with -o"
        ) from error
    return lock


def _prepare(folder: Path, facts: Mapping[str, Any], said: Diagnostics, fresh: bool) -> None:
    """Leave in ``folder`` only what was finished under ``facts``."""
    names = {path.name for path in folder.iterdir() if not path.name.endswith(PART)}
    if names - _OWN or (names and RUN not in names):
        raise ArtifactError(
            f"{folder} exists and vdqc did not write it", "write elsewhere with -o, or move it away"
        )
    if names:
        known = _read(folder / RUN)
        changed = sorted(key for key in {*known, *facts} if known.get(key) != facts.get(key))
        if changed and not fresh:
            said.warning(
                "",
                "started-anew",
                f"the work of an interrupted run in {folder} is dropped: it was done with "
                f"another {', '.join(changed)}",
            )
        if changed or fresh:
            # the facts go last: without them the rest would look like somebody else's
            for name in sorted(names - {RUN}):
                shutil.rmtree(folder / name)
            (folder / RUN).unlink()
    for part in folder.rglob(f"*{PART}"):
        part.unlink()
    shutil.rmtree(folder / "values", ignore_errors=True)
    with atomic(folder / RUN) as part:
        part.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_bytes())
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


# -- what decides the result -------------------------------------------------------------------


def run_facts(
    stored: Mapping[str, StoredTensor], samples: Sequence[Sample], files: Sequence[Path] = ()
) -> dict[str, Any]:
    """Facts of this machine, this code, the model's files and ``files``, and the samples: JSON."""
    sources = {tensor.file for tensor in stored.values()}
    configs = {path for file in sources for path in file.parent.glob("*.json")}
    return {
        "vdqc": f"{__version__} {_code_hash()}",
        "torch": str(torch.__version__),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "model": {file.name: _identity(file) for file in sorted(sources | configs)},
        "pool": {file.name: _identity(file) for file in sorted(files)},
        "samples": _samples_hash(samples),
    }


def _identity(file: Path) -> list[int]:
    """Size and time of the last change: hashing a model would take as long as reading it."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _code_hash() -> str:
    """Hash of vdqc's own text: a version in development changes without its number."""
    digest = hashlib.sha256()
    root = Path(__file__).resolve().parent.parent
    for folder in sorted({root, *(path.resolve() for path in root.iterdir() if path.is_dir())}):
        for file in sorted(folder.glob("*.py") if folder == root else folder.rglob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _samples_hash(samples: Sequence[Sample]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        leaves, spec = pytree.tree_flatten(dict(sample.inputs))
        digest.update(f"{spec} {sample.timestep}".encode())
        for leaf in leaves:
            text = tensor_hash(leaf) if isinstance(leaf, Tensor) else repr(leaf)
            digest.update(text.encode())
    return digest.hexdigest()[:16]
