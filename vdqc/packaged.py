"""Runs an AOTInductor package in place of the program, called in the same way.

Unlike everything else in an artifact a package is native code that loading executes: it is loaded
only when asked for.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from vdqc.aot import PACKAGE
from vdqc.base.diagnostics import ArtifactError


def open_package(folder: Path, device: torch.device) -> PackagedProgram | None:
    """The package of an artifact folder; None, with a warning, on a GPU that it is not for.

    Its kernels are machine code for GPUs of the capability that it was compiled on, while the
    program itself runs on later ones too. Raises ArtifactError as ``PackagedProgram`` does.
    """
    facts = _facts(folder / PACKAGE)
    if device.type == facts.get("AOTI_DEVICE_KEY") == "cuda":
        number = facts.get("AOTI_COMPUTE_CAPABILITY")
        made_for = f"sm{number}" if number else "a GPU that it does not name"
        found = "sm{}{}".format(*torch.cuda.get_device_capability(device))
        if made_for != found:
            warnings.warn(
                f"{folder / PACKAGE} was compiled for {made_for}, this GPU is {found}: it is "
                "ignored, and the program runs without it; compile here with --aot, or load "
                "without aot=True",
                stacklevel=3,
            )
            return None
    return PackagedProgram(folder, device)


@final
class PackagedProgram(nn.Module):
    """The package of an artifact folder, on ``device``; its custom ops must be registered before.

    Raises ArtifactError if there is none, if it does not load, or if it is for another device.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__()
        file = folder / PACKAGE
        made_for = _facts(file).get("AOTI_DEVICE_KEY", device.type)
        if made_for != device.type:
            raise ArtifactError(
                f"{file} was compiled for {made_for}: expected a package for {device}",
                f"load with device='{made_for}', or without aot=True",
                code="target",
            )
        index = -1 if device.index is None else device.index
        try:
            self.runner: Any = torch._inductor.aoti_load_package(str(file), device_index=index)
        except Exception as error:
            raise _unloadable(file, error) from error

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Outputs of the program for its inputs."""
        outputs = self.runner(*values)
        return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)


def _facts(file: Path) -> dict[str, str]:
    """What torch notes in a package of the machine that compiled it; runs nothing of it."""
    if not file.is_file():
        raise ArtifactError(
            f"{file.parent} has no {PACKAGE}", "compile with --aot, or load without aot=True"
        )
    loader: Any = torch._C._aoti.AOTIModelPackageLoader
    try:
        facts: dict[str, str] = loader.load_metadata_from_package(str(file), "model")
    except RuntimeError as error:
        raise _unloadable(file, error) from error
    return facts


def _unloadable(file: Path, error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{file} does not load on this machine: {error}",
        "compile here with --aot, or load without aot=True",
    )
