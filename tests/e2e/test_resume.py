"""A streamed compilation that is killed, starved of disk or split over workers: the same bits."""

import errno
import functools
import itertools
import json
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vdqc
from vdqc import compile_checks, compiler
from vdqc.base.diagnostics import ArtifactError, Diagnostics, VdqcError
from vdqc.engine.pass_manager import PassRecord
from vdqc.ir import artifact, finished, staging
from vdqc.ir.finished import Finished, Piece, shares
from vdqc.ir.folder import parameters_on_meta
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.resume import partial_folder, resumable
from vdqc.ir.sample import Sample
from vdqc.ir.source import Source
from vdqc.ir.weight_files import write_file
from vdqc.ir.weights import stored_folder

WIDTH = 32


def model() -> nn.Module:
    torch.manual_seed(0)
    sizes = (WIDTH, WIDTH, WIDTH, 2 * WIDTH, WIDTH)
    return nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(sizes))).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    save_file(dict(model().named_parameters()), path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def captured(folder: Path) -> tuple[Source, Graph]:
    """The model with its weights on disk, captured once: a compilation then takes no second."""
    with parameters_on_meta():
        meta = model()
    stored = stored_folder(folder)
    source = Source(meta, [Sample({"input": torch.randn(5, WIDTH)})], "tiny", stored=stored)
    return source, capture(meta, source.samples, stored=stored)


@pytest.fixture(autouse=True)
def streamed(captured: tuple[Source, Graph], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor counts as large, every file is small."""
    source, graph = captured

    def fresh(*_: object) -> Any:
        twin = graph.clone()
        return twin, PassRecord("capture", True, twin.stage, 0.0, 1)

    monkeypatch.setattr(compiler, "as_source", lambda *_: source)
    monkeypatch.setattr(compiler, "capture_source", fresh)
    monkeypatch.setattr(compile_checks, "CHECKED_BYTES", 8000)
    monkeypatch.setattr("vdqc.ir.weights.SPILLED_BYTES", 64)
    monkeypatch.setattr("vdqc.ir.weight_files.SHARD_BYTES", 1500)


def compiled(out: Path, **options: Any) -> dict[str, Any]:
    """Compile to ``out``; everything in it but what tells the time."""
    options = {"passes": "rotate,quant", "scheme": "w4a8", "target": "cpu", **options}
    vdqc.compile("model", out=out, **options)
    return content(out)


def content(out: Path) -> dict[str, Any]:
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop("manifest.json").read_text())
    files.pop("report.html")  # it says how long each pass took
    del manifest["seal"], manifest["files"]
    for record in manifest["passes"]:
        del record["seconds"]
    return {"manifest": manifest} | {name: path.read_bytes() for name, path in files.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What a compilation that nothing interrupts makes; filled by the first test that asks."""
    return {}


@pytest.fixture
def whole(expected: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    if not expected:
        expected.update(compiled(tmp_path / "whole"))
        assert sum(name.startswith("weights-") for name in expected) > 2
        assert not partial_folder(tmp_path / "whole").exists()
    return expected


def in_fork(work: Callable[[], object], **environment: str) -> int:
    """Process id of a child that does ``work`` and ends: 0 fine, 1 an exception."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment)
    try:
        signal.alarm(100)  # a child that hangs is a failure
        torch.set_num_threads(1)  # threads do not survive a fork
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count: int) -> None:
    """Kill this process as the ``count``-th file or folder is synced to disk."""
    sync, left = staging._sync, [count]

    def dying(path: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)

    staging._sync = dying


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Finished]:
    """The stores of finished work that are opened from here on."""
    opened: list[Finished] = []
    make = Finished.__init__

    def noted(self: Finished, *args: Any) -> None:
        make(self, *args)
        opened.append(self)

    monkeypatch.setattr(Finished, "__init__", noted)
    return opened


def test_killed_at_any_file_it_resumes_to_the_same_bits(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def work(count: int) -> None:
        die_at(count)
        compiled(out)

    kills = 0
    for count in (1, 2, 4, 9, 14, 3, 17, 23):
        kills += status(in_fork(functools.partial(work, count))) == -signal.SIGKILL
        if out.exists():  # the last sync is behind the move
            break
    assert kills >= 6
    opened = counted(monkeypatch)
    assert compiled(out, force=True) == whole
    assert opened[0].taken > 5 * opened[0].made
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]
    artifact.read(out)


def test_killed_at_random_moments_it_resumes_to_the_same_bits(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    out, moments = tmp_path / "out", random.Random(0)
    start = time.perf_counter()
    assert status(in_fork(lambda: compiled(tmp_path / "timed"))) == 0
    seconds = time.perf_counter() - start
    for _ in range(3):
        child = in_fork(lambda: compiled(out))
        time.sleep(seconds * moments.uniform(0.1, 0.6))
        os.kill(child, signal.SIGKILL)
        status(child)
    if not out.exists():
        compiled(out)
    assert content(out) == whole


@pytest.fixture
def interrupted(whole: dict[str, Any], tmp_path: Path) -> Path:
    """The place of a compilation that was killed with some work finished."""
    out = tmp_path / "out"

    def work() -> None:
        die_at(40)
        compiled(out)

    assert status(in_fork(work)) == -signal.SIGKILL
    assert len(Finished(partial_folder(out))) > 5
    return out


def test_what_is_finished_is_not_done_again(
    whole: dict[str, Any], interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = len(Finished(partial_folder(interrupted)))
    opened, diagnostics = counted(monkeypatch), Diagnostics()
    assert compiled(interrupted, diagnostics=diagnostics) == whole
    assert opened[0].taken >= done
    assert [entry.code for entry in diagnostics if entry.code == "resumed"] == ["resumed"]
    assert str(done) in next(e.message for e in diagnostics if e.code == "resumed")


@pytest.mark.parametrize("change", ["seed", "scheme", "fresh", "file"])
def test_another_run_starts_anew(
    whole: dict[str, Any],
    interrupted: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    opened, diagnostics = counted(monkeypatch), Diagnostics()
    if change == "file":
        found = (folder / "model.safetensors").stat()
        os.utime(folder / "model.safetensors", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    options: dict[str, dict[str, Any]] = {
        "seed": {"seed": 7},
        "scheme": {"scheme": "w8a8"},
        "fresh": {"fresh": True},
    }
    made = compiled(interrupted, diagnostics=diagnostics, **options.get(change, {}))
    assert opened[0].taken == 0
    assert (made == whole) == (change in ("fresh", "file"))
    said = [entry.message for entry in diagnostics if entry.code == "started-anew"]
    word = {"seed": "seed", "scheme": "rules", "file": "model", "fresh": ""}[change]
    assert len(said) == (change != "fresh")
    assert all(word in message for message in said)


def test_a_damaged_piece_is_made_again(
    whole: dict[str, Any], interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = sorted((partial_folder(interrupted) / "pieces").iterdir())
    for number, file in enumerate(pieces[:6]):
        data = bytearray(file.read_bytes())
        if number % 3 == 0:
            data[-1] ^= 1  # a value
        elif number % 3 == 1:
            data[len(data) // 2] ^= 4  # a value, or the header
        else:
            del data[-3:]
        file.write_bytes(data)
    opened, diagnostics = counted(monkeypatch), Diagnostics()
    assert compiled(interrupted, diagnostics=diagnostics) == whole
    assert len(opened[0].damaged) == 6
    assert sum(entry.code == "damaged-piece" for entry in diagnostics) == 6


def test_a_damaged_shard_is_written_again(whole: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        staging._move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # all is written
        compiled(out)

    assert status(in_fork(work)) == -signal.SIGKILL
    shards = sorted((partial_folder(out) / "files").iterdir())
    assert len(shards) > 2
    shards[0].write_bytes(shards[0].read_bytes()[:-1] + b"x")
    shards[1].unlink()
    assert compiled(out) == whole


@pytest.mark.parametrize("writes", [1, 10, 18])
def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    out, left = tmp_path / "out", [writes]

    def full(file: Path, *args: Any) -> None:
        left[0] -= 1
        if left[0] <= 0:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, *args)

    write = write_file
    with monkeypatch.context() as patch:
        for module in (finished, artifact):
            patch.setattr(module, "write_file", full)
        with pytest.raises(ArtifactError, match="the disk filled up") as error:
            compiled(out)
    assert error.value.diagnostic.code == "disk-full"
    if writes > 1:
        assert "the same command goes on" in error.value.__notes__[-1]
    assert not out.exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(staging.PART)]
    opened = counted(monkeypatch)
    assert compiled(out) == whole
    assert opened[0].taken >= 0.6 * (writes - 1)


def test_two_workers_make_what_one_makes(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def work() -> None:
        opened = counted(monkeypatch)
        compiled(out)
        (tmp_path / f"worker{os.environ['RANK']}").write_text(f"{opened[0].made}")

    children = [in_fork(work, RANK=str(rank), **common) for rank in range(2)]
    assert [status(child) for child in children] == [0, 0]
    assert content(out) == whole
    made = [int((tmp_path / f"worker{rank}").read_text()) for rank in range(2)]
    assert min(made) > 0.3 * sum(made)
    assert not partial_folder(out).exists()


def test_two_processes_do_not_write_one_place(tmp_path: Path) -> None:
    with (
        resumable(tmp_path / "out", {}, Diagnostics()),
        pytest.raises(ArtifactError, match="another process"),
        resumable(tmp_path / "out", {}, Diagnostics()),
    ):
        pass


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    place = partial_folder(tmp_path / "out")
    place.mkdir()
    (place / "thesis.txt").write_text("all of it")
    with pytest.raises(ArtifactError, match="vdqc did not write it"):
        compiled(tmp_path / "out", fresh=True)
    assert (place / "thesis.txt").read_text() == "all of it"


def test_an_error_of_the_model_keeps_what_is_finished(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        refuse = Mock(side_effect=VdqcError("no"))
        patch.setattr(compile_checks, "lower", refuse)
        with pytest.raises(VdqcError):
            compiled(out)
    opened = counted(monkeypatch)
    assert compiled(out) == whole
    assert opened[0].taken > 4


def test_pieces_keep_tensors_and_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdqc.ir.weights.SPILLED_BYTES", 100)
    tensors = {"large": torch.randn(7, 9).t(), "small": torch.tensor(3, dtype=torch.int8)}
    facts = {"z": 1, "a": float("inf"), "list": [1.5, None]}
    for _ in range(2):
        store = Finished(tmp_path)
        piece = store.piece("key", lambda: Piece(tensors, facts))
        assert isinstance(piece.tensors["small"], torch.Tensor)
        assert not isinstance(piece.tensors["large"], torch.Tensor)
        assert all(torch.equal(piece.tensor(name), value) for name, value in tensors.items())
        assert json.dumps(piece.facts) == json.dumps(facts)  # in order too
    assert (store.taken, store.made) == (1, 0)


def test_shares_are_complete_and_even() -> None:
    costs = [random.Random(0).randint(1, 9) for _ in range(50)]
    found = shares(costs, 3)
    assert sorted(index for own in found for index in own) == list(range(50))
    loads = [sum(costs[index] for index in own) for own in found]
    assert max(loads) - min(loads) <= 9
