"""A compiled model from the folder of its artifact, checked against the machine it is to run on."""

from __future__ import annotations

from pathlib import Path

import torch

from vdqc.base.diagnostics import ArtifactError
from vdqc.base.target import TARGETS, Target
from vdqc.compiled import CompiledModel, stand_in
from vdqc.ir import artifact, ops  # noqa: F401 (registers the vdqc:: ops)
from vdqc.kernels.table import KERNELS
from vdqc.lowering.precompile import offer_precompiled
from vdqc.packaged import open_package
from vdqc.placement import check_machine


def load(
    path: Path | str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
    aot: bool = False,
    reference: bool = False,
) -> CompiledModel:
    """The model in the artifact folder ``path``, on ``device``.

    Weights are mapped from their files, so that they are read when first used. ``dtype`` only
    asserts: a program computes in the dtype that it was captured in. ``verify=False`` skips the
    hashes of the files. ``aot`` runs the AOTInductor package of the folder: that is native code,
    so ask for it only if you trust where the folder came from. On a GPU of another capability than
    the package's the program runs without it, with a warning. With ``reference`` a program for a
    GPU also runs on a machine without one, slowly: its kernels' references are the same function.
    Precompiled kernels of the folder serve this process where GPU and Triton are those that they
    were made for. Raises ArtifactError for a folder that is damaged, foreign, newer, or for another
    machine.
    """
    register_kernels()
    found = artifact.read(path, verify=verify)
    check_machine(path, _target(found), reference)
    graph = found.graph()
    model = stand_in(graph, _target(found))
    model.__dict__["_folder"] = found.path.absolute()
    if dtype is not None and dtype != model.dtype:
        raise ArtifactError(
            f"the program computes in {model.dtype}, {dtype} was asked for",
            "compile the model again, loaded in that dtype",
        )
    model = model.to(device)
    offer_precompiled(found.path, torch.device(device))
    if aot:
        model.__dict__["_package"] = open_package(found.path, model.device)
    return model


def _target(found: artifact.Artifact) -> Target:
    name = found.manifest["target"] or "cpu"
    if name not in TARGETS:
        raise ArtifactError(
            f"{found.path} was compiled for {name}: expected one of {', '.join(TARGETS)}",
            "upgrade vdqc, or compile the model again with this version",
            code="target",
        )
    return TARGETS[name]


def register_kernels() -> None:
    """Import every kernel, so that a program may call it."""
    import importlib

    for place in KERNELS.values():
        importlib.import_module(place.partition(":")[0])
