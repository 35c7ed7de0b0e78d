"""An artifact in diffusers: saved and uploaded as a diffusers model is."""

import json
import runpy
import shutil
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import vdqc
from vdqc.base.diagnostics import ArtifactError, InputError

HELP = runpy.run_path(str(Path(__file__).with_name("wan.py")))
same = HELP["same"]


@pytest.mark.parametrize("size", ["2GB", "100KB", 50_000])
def test_saved_and_loaded_again(
    wan_artifact: Path, wan_output: Tensor, tmp_path: Path, size: Any
) -> None:
    model = vdqc.load(wan_artifact)
    model.save_pretrained(tmp_path / "saved", max_shard_size=size)
    names = {path.name for path in (tmp_path / "saved").glob("diffusion_pytorch_model*")}
    assert ("diffusion_pytorch_model.safetensors" in names) == (size == "2GB")
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert same(loaded, wan_output)
    assert same(vdqc.load(tmp_path / "saved"), wan_output)
    loaded.save_pretrained(tmp_path / "saved")  # over itself
    assert same(vdqc.load(tmp_path / "saved"), wan_output)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["_class_name"] == "WanTransformer3DModel"
    assert config["quantization_config"]["quant_method"] == "vdqc"
    assert not [key for key in config if key in ("_name_or_path", "_use_default_values")]


def test_weights_are_saved_as_they_are_now(wan_artifact: Path, tmp_path: Path) -> None:
    model = vdqc.load(wan_artifact)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    name = next(key for key, value in state.items() if value.is_floating_point())
    model.load_state_dict({**state, name: state[name] + 1})
    model.save_pretrained(tmp_path / "changed")
    assert torch.equal(vdqc.load(tmp_path / "changed").state_dict()[name], state[name] + 1)


def test_saving_over_what_is_no_artifact_or_without_one(wan_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep me")
    with pytest.raises(ArtifactError, match="did not write it"):
        vdqc.load(wan_artifact).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="max_shard_size"):
        vdqc.load(wan_artifact).save_pretrained(tmp_path / "new", max_shard_size="large")
    model = vdqc.load(wan_artifact)
    model._folder = None
    with pytest.raises(InputError, match="made in memory"):
        model.save_pretrained(tmp_path / "new")


class FakeHub:
    """The network edge of huggingface_hub: repositories are folders."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, []
        for name in ("create_repo", "file_exists", "upload_folder", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, name, getattr(self, name))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id: str, name: str, **options: Any) -> bool:
        return (self.root / repo_id / name).exists()

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, path_in_repo: str | None, **options: Any
    ) -> str:
        self.calls.append(options)
        place = self.root / repo_id / (path_in_repo or "")
        shutil.copytree(folder_path, place, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/0"

    def hf_hub_download(self, repo_id: str, name: str, *, revision: str, cache_dir: Path) -> str:
        folder = cache_dir / f"models--{repo_id.replace('/', '--')}" / "snapshots" / revision
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / repo_id / name, folder / name)
        return str(folder / name)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "hub", monkeypatch)


def test_pushed_and_loaded_from_the_upload(
    hub: FakeHub, wan_artifact: Path, wan_output: Tensor, tmp_path: Path
) -> None:
    model = vdqc.load(wan_artifact)
    address = model.push_to_hub("org/tiny-wan", commit_message="first", private=True, token="t")
    assert address == "https://hub/org/tiny-wan/commit/0"
    assert hub.calls == [{"commit_message": "first", "token": "t", "create_pr": False}]
    assert same(WanTransformer3DModel.from_pretrained(hub.root / "org/tiny-wan"), wan_output)
    card = hub.root / "org/tiny-wan/README.md"
    assert "WanTransformer3DModel.from_pretrained" in card.read_text()
    card.write_text("my own words")
    model.push_to_hub("org/tiny-wan")
    assert card.read_text() == "my own words"
    model.push_to_hub("org/pipeline", subfolder="transformer")
    assert same(vdqc.load(hub.root / "org/pipeline/transformer"), wan_output)
    model.save_pretrained(tmp_path / "named", push_to_hub=True, repo_id="org/other")
    assert same(vdqc.load(hub.root / "org/other"), wan_output)
    with pytest.raises(InputError, match="did you mean 'private'"):
        model.push_to_hub("org/x", privat=True)
    with pytest.raises(InputError, match="one form"):
        model.push_to_hub("org/x", safe_serialization=False)


def test_a_snapshot_of_the_cache_is_completed(
    hub: FakeHub, wan_artifact: Path, wan_output: Tensor, tmp_path: Path
) -> None:
    """diffusers fetches config and weights into a cache of links; the rest comes on loading."""
    vdqc.load(wan_artifact).push_to_hub("org/wan", subfolder="transformer")
    repo = tmp_path / "cache" / "models--org--wan"
    snapshot = repo / "snapshots" / "abc" / "transformer"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copyfile(hub.root / "org/wan/transformer" / name, repo / "blobs" / name)
        (snapshot / name).symlink_to(repo / "blobs" / name)
    assert same(WanTransformer3DModel.from_pretrained(snapshot), wan_output)
    (hub.root / "org/wan/transformer/program.json").unlink()
    (snapshot / "program.json").unlink()
    with pytest.raises(ArtifactError, match="cannot be fetched"):
        WanTransformer3DModel.from_pretrained(snapshot)
