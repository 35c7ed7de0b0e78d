"""Runs an AOTInductor package in place of the program, called in the same way.

Unlike everything else in an artifact a package is native code that loading executes: it is loaded
only when asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from vdqc.aot import PACKAGE
from vdqc.base.diagnostics import ArtifactError


@final
class PackagedProgram(nn.Module):
    """The package of an artifact folder, on ``device``; its custom ops must be registered before.

    Raises ArtifactError if there is none, if it does not load, or if it is for another device.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        super().__init__()
        file = folder / PACKAGE
        if not file.is_file():
            raise ArtifactError(
                f"{folder} has no {PACKAGE}", "compile with --aot, or load without aot=True"
            )
        try:
            index = -1 if device.index is None else device.index
            self.runner: Any = torch._inductor.aoti_load_package(str(file), device_index=index)
        except Exception as error:
            raise ArtifactError(
                f"{file} does not load on this machine: {error}",
                "compile here with --aot, or load without aot=True",
            ) from error
        made_for = self.runner.get_metadata().get("AOTI_DEVICE_KEY", device.type)
        if made_for != device.type:
            raise ArtifactError(
                f"{file} was compiled for {made_for}: expected a package for {device}",
                f"load with device='{made_for}', or without aot=True",
                code="target",
            )

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Outputs of the program for its inputs."""
        outputs = self.runner(*values)
        return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)
