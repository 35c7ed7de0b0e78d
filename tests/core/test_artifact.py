"""The folder: whole or absent, exactly what was written or refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from vdqc.base.diagnostics import ArtifactError
from vdqc.engine.pass_manager import PassRecord
from vdqc.ir import artifact, staging
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.manifest import seal_of
from vdqc.ir.sample import Sample
from vdqc.ir.weight_files import write_file, write_weights
from vdqc.ir.weights import StoredTensor, spill, stored_folder, stored_tensors


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)
        self.fc2.weight = self.fc1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
RECORDS = [
    PassRecord("smooth{alpha=0.6}", True, Stage.ANNOTATED, 0.5, 2, 1e-7, float("inf"), {"a": 1}),
    PassRecord("quant", False, Stage.COMPRESSED, 0.5, 2),
]


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return capture(Tiny().eval(), [Sample({"x": X}), Sample({"x": torch.randn(4, 5, 8)})])


def export(graph: Graph, out: Path, force: bool = False) -> artifact.Artifact:
    with artifact.staging(out, force) as folder:
        artifact.write(
            graph, folder, records=RECORDS, ir_texts={"00_captured": str(graph)}, target="cpu"
        )
        artifact.seal(folder)
    return artifact.read(out)


@pytest.fixture(scope="module")
def whole(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(graph, tmp_path_factory.mktemp("artifact") / "out").path


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def test_round_trip(graph: Graph, whole: Path) -> None:
    found = artifact.read(whole)
    for stored in (False, True):
        twin = found.graph(stored=stored)
        assert bool(twin.stored) is stored
        assert torch.equal(twin.run(X)[0], graph.run(X)[0])
        assert str(twin) == str(graph)
    assert found.records == tuple(RECORDS)
    assert found.origin == graph.origin
    assert found.ir == {"00_captured": str(graph) + "\n"}
    assert found.manifest["ops"] == ["aten.linear.default", "aten.relu.default"]
    assert set(found.manifest["files"]) == {
        "program.json",
        "weights.safetensors",
        "ir/00_captured.txt",
    }
    assert sorted(path.name for path in whole.parent.iterdir()) == ["out"]


def test_tied_weights_are_stored_once(graph: Graph, tmp_path: Path) -> None:
    twin = graph.clone()
    shared = torch.randn(4)
    for name in ("first", "second"):
        twin.set_param(name, shared)
    found = export(twin, tmp_path / "out")
    names = [stored.key for stored in stored_tensors(found.path / "weights.safetensors")]
    assert len({"first", "second"} & set(names)) == 1
    for name in ("first", "second"):
        assert torch.equal(found.graph().param(name), shared)


# -- weight files ---------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.uint8, torch.bool, torch.complex64]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5
    ),
    st.integers(1, 200),
)
def test_weights_survive_in_any_number_of_shards(
    tmp_path_factory: pytest.TempPathFactory, layout: list[Any], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("weights")
    weights = {
        f"w{index}": torch.randn(shape).mul(3).to(dtype)
        for index, (dtype, shape) in enumerate(layout)
    }
    files = write_weights(folder, weights, shard_bytes)
    if len(files) == 1:
        found = load_file(folder / files[0])
    else:
        found = {key: place.read() for key, place in stored_folder(folder).items()}
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_strided_weights_are_written_in_order(tmp_path: Path) -> None:
    value = torch.arange(12.0).reshape(3, 4).t()
    write_file(tmp_path / "w.safetensors", {"w": value})
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], value)


def test_large_weights_are_copied_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = torch.randn(1000, 512)
    stored = spill(value, tmp_path / "spill")
    assert isinstance(stored, StoredTensor)
    monkeypatch.setattr("vdqc.ir.weight_files._CHUNK_BYTES", 4096)
    monkeypatch.setattr(StoredTensor, "read", lambda self: pytest.fail("read as a whole"))
    write_file(tmp_path / "w.safetensors", {"w": stored, "small": torch.ones(3)})
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], value)


def test_a_graph_with_a_spill_folder_keeps_large_weights_there(
    graph: Graph, tmp_path: Path
) -> None:
    twin = graph.clone()
    twin.spill = tmp_path / "spill"
    large = torch.randn(512, 1024)
    node = twin.set_param("large", large)
    twin.set_param("small", torch.ones(4))
    assert list(twin.stored) == ["large"]
    assert twin.module.large.is_meta
    assert torch.equal(twin.evaluate(node), large)
    twin.set_param("large", large, free=True)
    assert not twin.stored


# -- damage ---------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], seal: bool = False) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if seal:
        manifest["seal"] = seal_of(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(bytes(data))


def cut(file: Path, keep: float) -> None:
    os.truncate(file, int(file.stat().st_size * keep))


def resealed(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    artifact.seal(folder)


def add_file(manifest: dict[str, Any], name: str) -> None:
    manifest["files"][name] = {"bytes": 1, "sha256": ""}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights flipped": (lambda p: flip(p / "weights.safetensors", -1), "its hash differs"),
    "weights header flipped": (lambda p: flip(p / "weights.safetensors", 20), "damaged"),
    "weights cut": (lambda p: cut(p / "weights.safetensors", 0.5), "should have"),
    "weights gone": (lambda p: (p / "weights.safetensors").unlink(), "is missing"),
    "program flipped": (lambda p: flip(p / "program.json", 100), "its hash differs"),
    "program gone": (lambda p: (p / "program.json").unlink(), "is missing"),
    "printed IR longer": (lambda p: (p / "ir/00_captured.txt").write_text("x"), "should have"),
    "manifest cut": (lambda p: cut(p / "manifest.json", 0.7), "is not JSON"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "is not JSON"),
    "manifest edited": (lambda p: rewrite(p, lambda m: m.update(recipe="x")), "not the one"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), "not a vdqc artifact"),
    "never sealed": (lambda p: rewrite(p, lambda m: m.pop("seal")), "never finished"),
    "newer format": (lambda p: rewrite(p, lambda m: m["format"].update(version=2)), "upgrade"),
    "other program's": (lambda p: rewrite(p, lambda m: m.pop("format")), "another program's"),
    "no object": (lambda p: (p / "manifest.json").write_text("[]"), "not an object"),
    "path upwards": (
        lambda p: rewrite(p, lambda m: add_file(m, "../out/x"), seal=True),
        "not a file of the folder",
    ),
    "absolute path": (
        lambda p: rewrite(p, lambda m: add_file(m, "/etc/passwd"), seal=True),
        "not a file of the folder",
    ),
    "link elsewhere": (
        lambda p: (
            (p / "x").symlink_to("/etc/hostname"),
            rewrite(p, lambda m: add_file(m, "x"), seal=True),
        ),
        "is a link",
    ),
    "weights of no format": (
        lambda p: resealed(p, "weights.safetensors", "no safetensors at all"),
        "not a readable safetensors",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused(copied: Path, what: str) -> None:
    damage, message = DAMAGE[what]
    damage(copied)
    with pytest.raises(ArtifactError) as error:
        artifact.read(copied)
    assert message in str(error.value)
    assert error.value.diagnostic.notes, "says what to do"


@given(st.data())
def test_any_flipped_byte_is_refused(whole: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(p for p in whole.rglob("*") if p.is_file())))
    position = data.draw(st.integers(0, file.stat().st_size - 1))
    flip(file, position)
    try:
        with pytest.raises(ArtifactError):
            artifact.read(whole)
    finally:
        flip(file, position)
    artifact.read(whole)


def test_edited_program_is_refused_even_if_resealed(copied: Path) -> None:
    text = (copied / "program.json").read_text()
    resealed(copied, "program.json", text.replace("aten.relu.default", "os.system.default"))
    with pytest.raises(ArtifactError, match="not allowed in a program"):
        artifact.read(copied).graph()


def test_shards_outside_the_folder_are_refused(copied: Path) -> None:
    (copied / "weights.safetensors").rename(copied.parent / "elsewhere.safetensors")
    index = {"weight_map": {"fc1.weight": "../elsewhere.safetensors"}}
    resealed(copied, "weights.safetensors.index.json", json.dumps(index))
    with pytest.raises(ArtifactError):
        artifact.read(copied)


def test_what_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="found nothing"):
        artifact.read(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"(?s)not a vdqc artifact.*vdqc compile"):
        artifact.read(tmp_path)


# -- writing --------------------------------------------------------------------------------------


def test_existing_folder_is_refused_before_any_work(graph: Graph, copied: Path) -> None:
    with pytest.raises(ArtifactError, match="--force"), artifact.staging(copied):
        pytest.fail("work began")


def test_force_replaces_an_artifact_and_nothing_else(graph: Graph, copied: Path) -> None:
    (copied / "weights.safetensors").unlink()  # damaged ones too
    export(graph, copied, force=True)
    for name in ("photos", "file"):
        place = copied.parent / name
        if name == "photos":
            place.mkdir()
            (place / "cat.jpg").write_text("cat")
        else:
            place.write_text("text")
        with pytest.raises(ArtifactError, match="did not write it"), artifact.staging(place, True):
            pytest.fail("work began")
    assert (copied.parent / "photos" / "cat.jpg").exists()
    assert sorted(p.name for p in copied.parent.iterdir()) == ["file", "out", "photos"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("force", [False, True])
def test_an_interruption_leaves_what_was_there(
    graph: Graph, copied: Path, error: type[BaseException], force: bool
) -> None:
    out = copied if force else copied.parent / "new"

    def interrupted() -> None:
        with artifact.staging(out, force) as folder:
            artifact.write(graph, folder)
            raise error

    with pytest.raises(error):
        interrupted()
    assert sorted(p.name for p in copied.parent.iterdir()) == ["out"]
    artifact.read(copied)


def test_a_kill_leaves_no_artifact_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from vdqc.ir import staging
        with staging.staging(Path(sys.argv[1])) as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path / "out"])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 1
    with staging.staging(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


def test_a_live_writer_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging.staging(out) as first:
        (first / "a").write_text("first")
        with staging.staging(out) as second:
            (second / "b").write_text("second")
            assert first.exists()
            assert second.exists()
        shutil.rmtree(out)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def overtaken() -> None:
        with staging.staging(out):
            out.mkdir()
            (out / "theirs").write_text("x")

    with pytest.raises(ArtifactError, match="exists"):
        overtaken()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


@pytest.mark.parametrize("kind", ["before", "os", "native"])
def test_a_full_disk_is_one_error_and_nothing_is_kept(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def fail(*args: object) -> None:
        if kind == "os":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    if kind == "before":
        usage = SimpleNamespace(total=10**9, used=10**9, free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    else:
        monkeypatch.setattr("vdqc.ir.weight_files._copy", fail)
    with pytest.raises(ArtifactError) as error, artifact.staging(tmp_path / "out") as folder:
        artifact.write(graph, folder)
    assert error.value.diagnostic.code == "disk-full"
    assert not list(tmp_path.iterdir())
