"""How an artifact lies in a folder that diffusers loads and the Hub shows.

::

    folder/
      config.json                             the model's, and how it is quantised: vdqc
      diffusion_pytorch_model.safetensors     packed weights (sharded: -00001-of-0000N and an index)
      weights.safetensors.index.json          the same files under the artifact's name for them
      manifest.json  program.json  ir/ ...    as in every artifact

What ``vdqc compile`` writes keeps its weights in ``weights.safetensors``; there the index of
diffusers names that file, so that ``from_pretrained`` reads both forms.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vdqc.base.diagnostics import InputError, nearest
from vdqc.ir import artifact
from vdqc.ir.manifest import FORMAT_VERSION, MANIFEST
from vdqc.ir.origin import Origin
from vdqc.ir.weight_files import Weight, weight_bytes, write_file
from vdqc.ir.weights import stored_folder

METHOD = "vdqc"
CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
DIFFUSERS_INDEX = f"{STEM}.safetensors.index.json"
ARTIFACT_INDEX = f"{artifact.WEIGHTS}.index.json"
#: Not part of a configuration file: where a model came from, and how it was built.
_PRIVATE = {"_use_default_values", "_name_or_path", "_pre_quantization_dtype", "_ignore_files"}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UPLOAD = ("repo_id", "commit_message", "private", "token", "create_pr", "subfolder")
#: Options of diffusers that mean nothing here, with the values that ask for nothing.
_IDLE: Mapping[str, Any] = {"safe_serialization": True, "variant": None, "use_flashpack": False}

CARD = """---
library_name: diffusers
tags: [vdqc, quantized]
---

# {name}

A `{model}` compiled with [vdqc](https://pypi.org/project/vdqc) for target `{target}`.

```python
import vdqc
from diffusers import {model}

model = {model}.from_pretrained("{repo}")
```
"""


class Saved(Protocol):
    """A model whose weights can be asked for by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name."""


def describe(folder: Path, origin: Origin, target: object) -> None:
    """Add what makes an unsealed artifact of a diffusers model one that diffusers loads."""
    if not origin.model_class.startswith("diffusers."):
        return
    _write(folder / CONFIG, configuration(origin, target))
    if (folder / ARTIFACT_INDEX).is_file():
        shutil.copyfile(folder / ARTIFACT_INDEX, folder / DIFFUSERS_INDEX)
    elif (folder / artifact.WEIGHTS).is_file():
        weights = stored_folder(folder)
        size = sum(weight.nbytes for weight in weights.values())
        _write(folder / DIFFUSERS_INDEX, _index({name: artifact.WEIGHTS for name in weights}, size))


def configuration(origin: Origin, target: object) -> dict[str, Any]:
    """The content of ``config.json``: the model's own, and how it is quantised."""
    own = {key: value for key, value in origin.config.items() if key not in _PRIVATE}
    return {
        "_class_name": origin.model_class.rpartition(".")[2],
        "_diffusers_version": importlib.metadata.version("diffusers"),
        **own,
        "quantization_config": {
            "quant_method": METHOD,
            "dtype": origin.dtype,
            "target": str(target),
            "format_version": FORMAT_VERSION,
        },
    }


def save(
    model: Saved, found: artifact.Artifact, folder: Path, max_shard_size: int | str = "2GB"
) -> None:
    """Write ``found`` with the weights that ``model`` has now into ``folder``, as a whole or not.

    An artifact that is there is replaced; nothing else is. Raises ArtifactError.
    """
    limit = _bytes(max_shard_size)
    state = model.state_dict()
    weights: dict[str, Weight] = {}
    for name, stored in stored_folder(found.path).items():
        kept = state.get(name)
        weights[name] = stored if kept is None or kept.is_meta else kept
    files = [name for name in found.manifest["files"] if not _is_layout(name)]
    with artifact.staging(folder, force=True) as place:
        for name in files:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.path / name, place / name)
        shutil.copyfile(found.path / MANIFEST, place / MANIFEST)
        _write(place / CONFIG, configuration(found.origin, found.manifest["target"]))
        _write_weights(place, weights, limit)
        artifact.seal(place)


def upload_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an upload; raises InputError for one that is not known or cannot be kept."""
    for name, value in options.items():
        if name in _IDLE:
            if value != _IDLE[name]:
                raise InputError(
                    f"expected {name}={_IDLE[name]}, got {value!r}",
                    "an artifact has one form: packed weights in safetensors files",
                )
        elif name not in _UPLOAD:
            raise InputError(f"unknown option '{name}'", nearest(name, _UPLOAD))
    return {name: value for name, value in options.items() if name in _UPLOAD}


def push(model: Saved, found: artifact.Artifact, repo_id: str, options: Mapping[str, Any]) -> str:
    """Save into a temporary folder and upload that; the address of the commit."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(model, found, folder)
        return upload(folder, repo_id, **options)


def upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Upload a saved artifact, with a model card where the repository has none."""
    import huggingface_hub

    created = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
    repo = created.repo_id
    if not subfolder and not huggingface_hub.file_exists(repo, "README.md", token=token):
        found = artifact.read(folder, verify=False)
        name = found.origin.model_class.rpartition(".")[2]
        facts = {"name": repo, "model": name, "target": found.manifest["target"], "repo": repo}
        (folder / "README.md").write_text(CARD.format(**facts))
    commit = huggingface_hub.upload_folder(
        repo_id=repo,
        folder_path=folder,
        path_in_repo=subfolder,
        commit_message=commit_message or "Upload compiled model",
        token=token,
        create_pr=create_pr,
    )
    return str(commit)


def _write_weights(folder: Path, weights: Mapping[str, Weight], limit: int) -> None:
    shards = list(_shards(weights, limit))
    total = len(shards)
    names = [f"{STEM}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    names = names if total > 1 else [f"{STEM}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, {key: weights[key] for key in shard})
    places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = _index(places, sum(map(weight_bytes, weights.values())))
    _write(folder / ARTIFACT_INDEX, index)
    if total > 1:
        _write(folder / DIFFUSERS_INDEX, index)


def _shards(weights: Mapping[str, Weight], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name, weight in weights.items():
        if shard and filled + weight_bytes(weight) > limit:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += weight_bytes(weight)
    yield shard


def _index(places: Mapping[str, str], size: int) -> dict[str, Any]:
    return {"metadata": {"total_size": size}, "weight_map": dict(places)}


def _is_layout(name: str) -> bool:
    """True for a file that ``save`` writes itself."""
    root = "/" not in name
    return root and (name == CONFIG or ".safetensors" in name)


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        return size
    parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B)?\s*", size.upper())
    if parts is None:
        raise InputError(f"expected a size such as '2GB' for max_shard_size, got {size!r}")
    return int(float(parts[1]) * _UNITS[parts[2] or ""])


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
