"""The manifest of an artifact: what was done, and size and hash of every other file.

::

    {"format": {"name": "vdqc-artifact", "version": 1}, ...
     "files": {"program.json": {"bytes": 1234, "sha256": "..."}, ...},
     "seal": hash of all of the above}

Without ``files`` and ``seal`` the artifact was never finished. A manifest is read, written and
hashed here, and a folder told that is another program's, of a newer format, or damaged.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vdqc.base.diagnostics import ArtifactError
from vdqc.version import __version__

FORMAT_NAME = "vdqc-artifact"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest as it is; raises ArtifactError for a folder without one, of any version."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ArtifactError(
            f"expected an artifact folder at {folder}, found {found}",
            "give the folder that vdqc compile wrote",
        )
    if not (folder / MANIFEST).is_file():
        raise _foreign(folder, "it has no manifest.json")
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (ValueError, RecursionError) as error:
        raise damaged(f"{folder / MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise _foreign(folder, "its manifest.json is not an object")
    return manifest


def check_kind(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ArtifactError for another program's manifest, or one of a newer format."""
    form = manifest.get("format")
    if not isinstance(form, dict) or form.get("name") != FORMAT_NAME:
        raise _foreign(folder, "its manifest.json is another program's")
    version = form.get("version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ArtifactError(
            f"{folder} has format version {version}; this vdqc {__version__} reads up to "
            f"{FORMAT_VERSION}",
            "upgrade vdqc, or compile the model again with this version",
            code="artifact-version",
        )


def check_size(folder: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Raise ArtifactError unless ``name`` is a file in the folder, as large as ``entry`` says."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ".." in parts:
        raise damaged(f"the manifest names {name!r}, which is not a file of the folder")
    file = folder / name
    if not file.is_file():
        raise damaged(f"{file} is missing")
    if not _is_inside(file.resolve(), folder):
        raise damaged(f"{file} is a link to another place")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise damaged(f"{file} should have {entry['bytes']} bytes, it has {size}")


def _is_inside(file: Path, folder: Path) -> bool:
    """Also true in the Hub's cache, whose snapshots are links to ``blobs`` of the same model."""
    if file.is_relative_to(folder.resolve()):
        return True
    above = [parent for parent in folder.absolute().parents if parent.name == "snapshots"]
    return bool(above) and file.is_relative_to(above[0].parent.resolve() / "blobs")


def _foreign(folder: Path, reason: str) -> ArtifactError:
    model = (folder / "config.json").is_file() or (folder / "model_index.json").is_file()
    advice = f"vdqc compile {folder}" if model else "give the folder that vdqc compile wrote"
    return ArtifactError(f"{folder} is not a vdqc artifact: {reason}", advice)


def damaged(reason: str) -> ArtifactError:
    """What to raise where a file is not the one that was written."""
    return ArtifactError(
        f"the artifact is damaged: {reason}", "copy it again, or compile the model again"
    )


def write_json(file: Path, manifest: Mapping[str, Any]) -> None:
    """Replace ``file`` in one step."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(plain(manifest), indent=1, allow_nan=False) + "\n")
    os.replace(part, file)


def seal_of(manifest: Mapping[str, Any]) -> str:
    """Hash of everything in the manifest but the seal itself."""
    content = {key: value for key, value in plain(manifest).items() if key != "seal"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """``value`` as JSON: dataclasses as objects, enums and what else has a text as that text.

    A float that is not finite becomes "inf", "-inf" or "nan", which ``float`` reads back.
    """
    match value:
        case enum.Enum():
            return str(value)
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    return str(value)
