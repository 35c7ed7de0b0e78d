"""Writes a folder as a whole or not at all.

Everything goes into a hidden folder beside the final place, which is synced to disk and renamed at
the end. Whatever interrupts the work leaves the final place as it was; a hidden folder that a
killed process left is removed by the next one that writes there.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vdqc.base.diagnostics import ArtifactError

_FULL = {errno.ENOSPC, errno.EDQUOT}

#: How names of files end that a killed process was writing.
PART = ".part"


@contextmanager
def staging(
    out: Path, force: bool = False, *, replaceable: Callable[[Path], bool] = lambda path: False
) -> Iterator[Path]:
    """A folder to fill; it becomes ``out`` if the block ends without an exception.

    An existing ``out`` is refused before any work, and again at the end if one has appeared. With
    ``force`` it is replaced, but only if ``replaceable(out)``: nothing that vdqc did not write is
    ever deleted. Raises ArtifactError, also for a full disk.
    """
    out = Path(os.path.abspath(out))
    _check_free(out, force, replaceable)
    folder = _hidden_folder(out)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _full_disk_is_named(out):
            yield folder
            folder.chmod(0o777 & ~_umask())
            sync(folder)
            _check_free(out, force, replaceable)
            _move(folder, out)
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Raise ArtifactError if the disk under ``folder`` has fewer than ``needed`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"the artifact needs {_megabytes(needed)}, {folder.parent} has {_megabytes(free)} left",
            "free some space, or write elsewhere with -o",
            code="disk-full",
        )


def sync(folder: Path) -> None:
    """Force every file and folder under ``folder`` to disk: a rename must not precede them."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A path beside ``file`` to write; it becomes ``file``, synced to disk, if the block ends well.

    However the process ends, ``file`` is whole, or as it was before.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}{PART}")
    try:
        yield part
        _sync(part)
        part.replace(file)
        _sync(file.parent)
    finally:
        part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_free(out: Path, force: bool, replaceable: Callable[[Path], bool]) -> None:
    if not os.path.lexists(out):
        return
    if not force:
        raise ArtifactError(
            f"{out} exists", "choose another place with -o, or replace it with --force"
        )
    if out.is_symlink() or not out.is_dir() or (any(out.iterdir()) and not replaceable(out)):
        raise ArtifactError(
            f"{out} exists and vdqc did not write it: --force replaces only an artifact",
            "choose another place with -o, or remove it yourself",
        )


def _move(folder: Path, out: Path) -> None:
    old: Path | None = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=_prefix(out), suffix=".old", dir=out.parent))
        out.rename(old / out.name)
    try:
        folder.rename(out)
    except BaseException:
        if old is not None:
            (old / out.name).rename(out)
            old.rmdir()
        raise
    _sync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _prefix(out: Path) -> str:
    return f".{out.name}."


def _hidden_folder(out: Path) -> Path:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        return Path(tempfile.mkdtemp(prefix=_prefix(out), suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ArtifactError(
            f"cannot write {out}: {error.strerror}", "write elsewhere with -o"
        ) from error


def _remove_stale(out: Path) -> None:
    """Remove what killed processes left; a live one holds a lock on its folder."""
    for folder in out.parent.glob(f"{glob.escape(_prefix(out))}*.partial"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


@contextmanager
def _full_disk_is_named(out: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # native writers (safetensors, torch) report the same condition as text
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if not is_full and "No space left on device" not in str(error):
            raise
        raise ArtifactError(
            f"the disk filled up while {out} was written, which is as it was before",
            "free some space, or write elsewhere with -o",
            code="disk-full",
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
