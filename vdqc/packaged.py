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
    """The package of an artifact folder; its custom ops must be registered before."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        file = folder / PACKAGE
        if not file.is_file():
            raise ArtifactError(
                f"{folder} has no {PACKAGE}", "compile with --aot, or load without aot=True"
            )
        try:
            self.runner: Any = torch._inductor.aoti_load_package(str(file))
        except Exception as error:
            raise ArtifactError(
                f"{file} does not load on this machine: {error}",
                "compile here with --aot, or load without aot=True",
            ) from error

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """Outputs of the program for its inputs."""
        outputs = self.runner(*values)
        return tuple(outputs) if isinstance(outputs, (list, tuple)) else (outputs,)
