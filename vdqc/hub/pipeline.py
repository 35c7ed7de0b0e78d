"""Whole diffusers pipelines: loaded with compiled components in the place of float ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vdqc.base.diagnostics import ArtifactError, ConfigError, nearest
from vdqc.compiled import CompiledModel
from vdqc.ir import artifact
from vdqc.ir.folder import components_of, denoisers_of, pipeline_class, saved_without
from vdqc.loading import load


def load_pipeline(
    pipeline: str | Path,
    artifacts: str | Path,
    *,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Any:
    """The diffusers pipeline at ``pipeline`` with compiled components.

    ``artifacts`` is one artifact, which takes the denoiser's place, or a folder that holds one for
    each component, under its name (``vdqc compile --component all``). The float weights of those
    components are not read. ``options`` as for ``DiffusionPipeline.from_pretrained``. Raises
    ArtifactError if nothing fits.
    """
    compiled = load_components(Path(pipeline), Path(artifacts))
    parts = {**dict.fromkeys(saved_without(Path(pipeline))), **compiled, **options}
    loaded: Any = pipeline_class(Path(pipeline)).from_pretrained(str(pipeline), **parts)
    return loaded.to(device)


def load_components(pipeline: Path, artifacts: Path) -> dict[str, CompiledModel]:
    """Compiled components by name; raises ArtifactError for one that the pipeline has not."""
    names = components_of(pipeline)
    if artifact.is_artifact(artifacts):
        experts = denoisers_of(pipeline)
        if len(experts) > 1:
            raise ConfigError(
                f"the pipeline has {len(experts)} denoisers ({', '.join(experts)}), {artifacts} "
                "is one of them",
                "give the folder that holds both, or load each and pass it to from_pretrained",
            )
        return {experts[0]: load(artifacts)}
    if not artifacts.is_dir():
        raise ArtifactError(f"expected artifacts at {artifacts}, found nothing")
    found = sorted(path for path in artifacts.iterdir() if artifact.is_artifact(path))
    if not found:
        raise ArtifactError(
            f"expected artifacts in {artifacts}, named as components of the pipeline; found none",
            f"components: {', '.join(names)}",
        )
    for path in found:
        if path.name not in names:
            raise ArtifactError(
                f"the pipeline {pipeline} has no component '{path.name}'",
                nearest(path.name, names),
            )
    return {path.name: load(path) for path in found}
