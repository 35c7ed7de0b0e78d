"""An AOTInductor package beside the program: compiled ahead of time, loaded without tracing.

``torch._inductor.aoti_load_package(folder / PACKAGE)`` gives a callable that takes the signature's
inputs in order. Kernels that stay opaque to the compiler are called through the dispatcher, so the
process that loads the package imports vdqc first (``vdqc.loading.register_kernels``).

A package is for the device that it was compiled on: one for a GPU target takes such a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdqc.base.diagnostics import LoweringError
from vdqc.base.target import Target
from vdqc.ir.graph import Graph
from vdqc.ir.signature import TensorInput
from vdqc.lowering.prepare import prepare
from vdqc.lowering.residual import has_residuals
from vdqc.placement import name_device, unfit_gpu

#: Where the package is, in the artifact's folder.
PACKAGE = "program.pt2"


def check_packages(target: Target) -> None:
    """Raise LoweringError unless this machine can compile a package for ``target``."""
    found = unfit_gpu(target)
    if found is not None:
        raise LoweringError(
            f"expected a GPU of {target} or later for --aot with --target {target}, found {found}",
            "compile on such a machine, or without --aot: the artifact runs under compile() too",
            code="target",
        )


@torch.no_grad()
def package(graph: Graph, target: Target, inputs: Sequence[Any], file: Path) -> None:
    """Compile a lowered graph into ``file``; sizes that vary in the signature vary in it too.

    For a GPU target the graph is moved to the current GPU, and stays there. Raises LoweringError
    without such a GPU, and where Inductor or the C++ compiler fails.
    """
    check_packages(target)
    if has_residuals(graph.module):
        raise LoweringError(
            "expected one program for --aot, got the two of 'reparameterize'",
            "compile without --aot: the artifact runs under its own compile() as well",
        )
    sizes = [
        {
            axis: torch.export.Dim.DYNAMIC
            for axis, size in enumerate(entry.sizes)
            if isinstance(size, str)
        }
        if isinstance(entry, TensorInput)
        else None
        for entry in graph.signature.inputs
    ]
    device = torch.device(target.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name_device(graph.module.to(device), device)
            program = prepare(graph.module, target)
            values = [v.to(device) if isinstance(v, Tensor) else v for v in _doubled(graph, inputs)]
            exported = torch.export.export(
                program, tuple(values), dynamic_shapes=tuple(sizes), strict=False
            )
            torch._inductor.aoti_compile_and_package(exported, package_path=str(file))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise LoweringError(
            f"AOTInductor failed: {type(error).__name__}: {lines[0]}",
            "expected a C++ compiler (g++ or clang++) on the path; without --aot none is needed",
        ) from error


def _doubled(graph: Graph, inputs: Sequence[Any]) -> Iterator[Any]:
    """``inputs`` with every axis that varies and has size 1 repeated: export would fix it at 1."""
    for entry, value in zip(graph.signature.inputs, inputs, strict=True):
        if isinstance(entry, TensorInput) and isinstance(value, Tensor):
            times = [
                2 if isinstance(size, str) and found == 1 else 1
                for size, found in zip(entry.sizes, value.shape, strict=True)
            ]
            value = value.repeat(times)
        yield value
