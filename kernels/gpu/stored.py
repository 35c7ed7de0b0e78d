"""Cubins in a folder, and Triton's cache looking there first, so that a first run compiles nothing.

::

    cubins/
      index.json                      Triton's version and build, generation of the GPU, shapes of
                                      the inputs of the calls that it serves, every key
      <key>/byte_gemm.cubin .json     what a launch with that key runs, and how

``keep`` fills the folder with what ``absent`` compiled. ``offer`` puts its kernels before Triton's
cache for this process; a launch whose key is not among them goes its usual way. Triton's key covers
the source of the kernel, the specialisation of its arguments, options, GPU and the build of Triton
itself, so a cubin serves the launch that it was made for and no other.

A cubin is code for the GPU: it runs at its launch, never at loading. The ``.json`` beside it is
read as numbers and plain words; anything else in it, or a file that is not the one in the index,
takes the kernel out, with a warning.

Error: none.
Source: ours.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from vdqc.kernels.gpu.runtime import triton_version

INDEX = "index.json"
#: What a key and a name of a file look like: no path, nothing that a shell or compiler reads.
_KEY = re.compile(r"[A-Z2-7]{16,64}")
_NAME = re.compile(r"\w{1,150}")
#: Texts in the metadata of a kernel.
_WORD = re.compile(r"[\w.+-]{0,100}")


@final
@dataclass(frozen=True)
class Wheel:
    """Which Triton made a kernel: two builds of one version do not share keys."""

    version: str
    build: str

    @staticmethod
    def here() -> "Wheel":
        """The Triton that is installed."""
        from triton.runtime import cache

        return Wheel(
            str(triton_version()), hashlib.sha256(cache.triton_key().encode()).hexdigest()[:16]
        )


def keep(
    folder: Path,
    arch: str,
    kernels: Mapping[str, Mapping[str, Path]],
    sizes: Sequence[Mapping[str, Sequence[int]]] = (),
) -> int:
    """Copy the cubins that ``absent`` found into ``folder`` and write its index; how many.

    ``sizes``: shapes of the inputs, by name, of the calls that they serve.
    """
    wheel, rows = Wheel.here(), []
    for key, files in sorted(kernels.items()):
        code = next((path for name, path in files.items() if name.endswith(".cubin")), None)
        text = next((path for name, path in files.items() if name.endswith(".json")), None)
        if code is None or text is None:
            continue
        metadata = json.loads(text.read_text())
        metadata["extern_libs"] = []  # where they were on this machine; they are linked in
        contents = {code.name: code.read_bytes(), text.name: json.dumps(metadata).encode()}
        place = folder / key
        place.mkdir(parents=True)
        for name, content in contents.items():
            (place / name).write_bytes(content)
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        rows.append({"key": key, "name": code.stem, "sha256": hashes})
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"triton": wheel.version, "build": wheel.build, "arch": arch}
    index |= {"sizes": list(sizes), "kernels": rows}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return len(rows)


def offer(folder: Path, arch: str) -> int:
    """Let launches of this process find the cubins of ``folder`` on a GPU of ``arch``; how many.

    Warns, and offers none, where another Triton or another GPU made them.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
        made_by, made_for = Wheel(index["triton"], index["build"]), index["arch"]
        rows = [(str(row["key"]), str(row["name"]), row["sha256"]) for row in index["kernels"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{folder} holds no precompiled kernels ({error}): ignored", stacklevel=2)
        return 0
    if triton_version() is None:
        return 0  # no launch without it, which says so
    here = Wheel.here()
    if made_for != arch:
        _ignored(folder, f"for {made_for}, this GPU is {arch}")
        return 0
    if made_by != here:
        build = "" if made_by.version != here.version else "another build of "
        _ignored(folder, f"by {build}Triton {made_by.version}, this is {here.version}")
        return 0
    usable = dict(_usable(folder, arch, rows))
    if usable:
        _install()
    _Stored.groups.update(usable)
    return len(usable)


def _ignored(folder: Path, reason: str) -> None:
    warnings.warn(
        f"{folder}: its kernels were compiled {reason}; they are ignored, and compiled at their "
        "first launch",
        stacklevel=3,
    )


def _usable(
    folder: Path, arch: str, rows: list[tuple[str, str, Any]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Keys and files of the kernels that are whole."""
    for key, name, hashes in rows:
        if not (_KEY.fullmatch(key) and _NAME.fullmatch(name)):
            fault = "no key of Triton's"
        else:
            files = {f"{name}.{end}": folder / key / f"{name}.{end}" for end in ("cubin", "json")}
            fault = _fault(key, arch, files, hashes)
            if not fault:
                yield key, {name: str(path) for name, path in files.items()}
                continue
        warnings.warn(f"{folder}: the kernel {name} is ignored: {fault}", stacklevel=3)


def _fault(key: str, arch: str, files: Mapping[str, Path], hashes: Any) -> str:
    """What is wrong with one kernel, or nothing."""
    for name, path in files.items():
        if not path.is_file():
            return f"{name} is missing"
        if hashlib.sha256(path.read_bytes()).hexdigest() != hashes.get(name):
            return f"{name} is not the file in the index"
    text = next(path for name, path in files.items() if name.endswith(".json"))
    try:
        metadata = json.loads(text.read_text())
        made_for, made_key = metadata["target"]["arch"], _key(metadata["hash"])
    except (ValueError, KeyError, TypeError):
        return "its metadata is not that of a kernel"
    if not _is_plain(metadata):
        return "its metadata holds more than numbers and words"
    if made_key != key:
        return "it was compiled for another key"
    return "" if f"sm{made_for}" == arch else f"it was compiled for sm{made_for}"


def _key(digest: str) -> str:
    from triton.runtime import cache

    return str(cache._base32(digest))


def _is_plain(value: Any) -> bool:
    match value:
        case None | bool() | int() | float():
            return True
        case str():
            return _WORD.fullmatch(value) is not None
        case list():
            return all(map(_is_plain, value))
        case dict():
            return all(map(_is_plain, [*value, *value.values()]))
    return False


class _Stored:
    """A manager of Triton's cache that looks at what was offered first.

    Attributes:
        groups: files of every kernel on offer, by key.
        plain: the manager that was in use before, for all else.
    """

    groups: ClassVar[dict[str, dict[str, str]]] = {}
    plain: ClassVar[Any] = None

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._group = None if override or dump else self.groups.get(key)
        self._kept = self.plain(key, override=override, dump=dump)

    def get_file(self, filename: str) -> str | None:
        return self._kept.get_file(filename)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        return self._kept.put(data, filename, binary)

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self._group is not None and filename in self._group:
            return self._group
        return self._kept.get_group(filename)

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        return self._kept.put_group(filename, group)


def _install() -> None:
    import triton
    from triton.runtime.cache import CacheManager, FileCacheManager

    before = triton.knobs.cache.manager_class or FileCacheManager
    if not issubclass(before, _Stored):
        _Stored.plain = before
        triton.knobs.cache.manager_class = type("Stored", (_Stored, CacheManager), {})
