"""Cubins in a folder: what is kept, what is offered, and what is refused with a warning."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.runtime.cache import FileCacheManager, get_cache_manager

from vdqc.kernels.gpu import stored

DIGEST = hashlib.sha256(b"a launch").hexdigest()
KEY = stored._key(DIGEST)
METADATA = {
    "hash": DIGEST,
    "target": {"backend": "cuda", "arch": 90, "warp_size": 32},
    "extern_libs": [["libdevice", "/home/someone/libdevice.10.bc"]],
    "name": "byte_gemm",
    "shared": 1024,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(stored._Stored, "groups", {})
    with triton.knobs.cache.scope():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one kernel for sm90."""
    made = tmp_path / "made"
    made.mkdir()
    files = {name: made / name for name in ("byte_gemm.cubin", "byte_gemm.json", "byte_gemm.ptx")}
    files["byte_gemm.cubin"].write_bytes(b"\x7fELF")
    files["byte_gemm.json"].write_text(json.dumps(METADATA))
    files["byte_gemm.ptx"].write_text(".version 8.7")
    assert stored.keep(tmp_path / "cubins", "sm90", {KEY: files, "OTHER": {}}) == 1
    return tmp_path / "cubins"


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads((folder / stored.INDEX).read_text())
    (folder / stored.INDEX).write_text(json.dumps(index | changes))


def edit_metadata(folder: Path, **changes: Any) -> None:
    """Change it together with its hash, as whoever made the folder could."""
    place = folder / KEY / "byte_gemm.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    index = json.loads((folder / stored.INDEX).read_text())
    hashes = index["kernels"][0]["sha256"]
    hashes[place.name] = hashlib.sha256(place.read_bytes()).hexdigest()
    (folder / stored.INDEX).write_text(json.dumps(index))


def test_a_folder_holds_cubin_metadata_and_an_index(folder: Path) -> None:
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    assert files == [f"{KEY}/byte_gemm.cubin", f"{KEY}/byte_gemm.json", "index.json"]
    index = json.loads((folder / "index.json").read_text())
    assert index["triton"] == triton.__version__
    assert index["arch"] == "sm90"
    assert (
        index["kernels"][0]["sha256"]["byte_gemm.cubin"] == hashlib.sha256(b"\x7fELF").hexdigest()
    )
    assert "someone" not in (folder / KEY / "byte_gemm.json").read_text()


def test_a_launch_finds_its_kernel_and_others_go_their_way(folder: Path) -> None:
    assert stored.offer(folder, "sm90") == 1
    assert stored.offer(folder, "sm90") == 1  # a second model of the same artifact
    found = get_cache_manager(DIGEST).get_group("byte_gemm.json")
    assert found == {
        name: str(folder / KEY / name) for name in ("byte_gemm.cubin", "byte_gemm.json")
    }
    other = get_cache_manager("00" * 32)
    assert other.get_group("byte_gemm.json") is None
    path = other.put(b"x", "byte_gemm.cubin")
    other.put_group("byte_gemm.json", {"byte_gemm.cubin": path})
    plain = FileCacheManager(stored._key("00" * 32))
    assert plain.get_group("byte_gemm.json") == {"byte_gemm.cubin": path}


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("sm100", {}, "for sm90, this GPU is sm100"),
        ("sm90", {"triton": "3.1.4"}, "by Triton 3.1.4, this is"),
        ("sm90", {"build": "0123456789abcdef"}, "by another build of Triton"),
        ("sm90", {"kernels": 3}, "holds no precompiled kernels"),
        ("sm90", {"kernels": [{"key": "../..", "name": "x", "sha256": {}}]}, "no key of Triton's"),
    ],
)
def test_another_gpu_or_triton_is_said(
    folder: Path, arch: str, changes: dict[str, Any], message: str
) -> None:
    edit_index(folder, **changes)
    with pytest.warns(UserWarning, match=message):
        assert stored.offer(folder, arch) == 0
    assert get_cache_manager(DIGEST).get_group("byte_gemm.json") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hash": "00" * 32}, "another key"),
        ({"target": {"backend": "cuda", "arch": 80, "warp_size": 32}}, "compiled for sm80"),
        ({"target": None}, "not that of a kernel"),
        ({"tensordesc_meta": [{"elem_type": "i8); system("}]}, "more than numbers and words"),
    ],
)
def test_metadata_is_numbers_and_words_of_that_key(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    edit_metadata(folder, **changes)
    with pytest.warns(UserWarning, match=message):
        assert stored.offer(folder, "sm90") == 0


def test_a_file_that_is_not_the_one_kept_is_not_used(folder: Path) -> None:
    (folder / KEY / "byte_gemm.cubin").write_bytes(b"other")
    with pytest.warns(UserWarning, match="byte_gemm.cubin is not the file in the index"):
        assert stored.offer(folder, "sm90") == 0
    (folder / KEY / "byte_gemm.cubin").unlink()
    with pytest.warns(UserWarning, match="byte_gemm.cubin is missing"):
        assert stored.offer(folder, "sm90") == 0
