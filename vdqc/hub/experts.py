"""Compiles components of a diffusers pipeline, several of them alike.

::

    out/
      transformer/      the expert of the early, noisy steps: an artifact
      transformer_2/    the expert of the late ones

Both experts of a pipeline that has two (Wan 2.2) get the same recipe and the same seeds, and learn
from the same sampling runs, each from the calls that the pipeline's boundary gives it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdqc import compiler
from vdqc.base.diagnostics import ArtifactError, ConfigError, nearest
from vdqc.engine.pool import INDEX as POOL
from vdqc.hub.sampler import Conditions, Sampler, load_float
from vdqc.ir.artifact import Artifact
from vdqc.ir.folder import check_weights, components_of, denoisers_of
from vdqc.ir.frontend import origin_of
from vdqc.ir.inputs import INPUTS, samples_for
from vdqc.ir.sample import Sample

#: What ``--component`` says for every denoiser.
ALL = "all"
Progress = Callable[[Any, str], Any]


def components(folder: Path, text: str | None) -> list[str]:
    """Components that ``text`` names: ``all`` denoisers, a list with commas, None for the first.

    Raises ConfigError for one that the pipeline has not.
    """
    if text is None:
        return denoisers_of(folder)[:1]
    if text == ALL:
        return denoisers_of(folder)
    known = components_of(folder)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"the pipeline {folder} has no component '{name}'", nearest(name, [*known, ALL])
            )
    return list(dict.fromkeys(names))


def compile_pipeline(
    folder: str | Path,
    component: str | None = ALL,
    out: str | Path | None = None,
    *,
    conditions: Conditions | None = None,
    sampling: Mapping[str, Any] | None = None,
    pool: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
    progress: Progress = lambda items, description: items,
    **options: Any,
) -> dict[str, Artifact]:
    """Compile components of the pipeline at ``folder``; artifacts by name.

    One component goes to ``out`` itself, several to ``out/<component>``. With ``conditions``
    (``read_prompts``, ``read_embeddings``) the passes learn from calls that the pipeline's own
    sampler makes under the arguments ``sampling``; they are kept in ``pool/<component>``, if that
    is given. Without, from ``pool/<component>`` or from synthesised calls. ``options`` as for
    ``vdqc.compile``. If a later component fails, the artifacts of the earlier ones stay. Raises
    VdqcError.
    """
    folder = Path(folder)
    names = components(folder, component)
    check_weights(folder, names)
    place = compiler.out_folder(folder, out)
    places = {name: place / name if len(names) > 1 else place for name in names}
    compiler.parse_recipe(options.get("passes"), options.get("scheme"), options.get("recipe"))
    if not force:
        for path in places.values():
            if path.exists():
                raise ArtifactError(
                    f"{path} exists", "choose another place with -o, or replace it with --force"
                )
    with ExitStack() as stack:
        if conditions is None:
            if sampling:
                raise ConfigError("expected prompts or embeddings with sampling options, got none")
            sources: dict[str, Any] = dict.fromkeys(names, folder)
            pools = {name: _pool(pool, name) for name in names}
            samples: dict[str, Any] = dict.fromkeys(names)
        else:
            sampler = Sampler(load_float(folder, conditions), conditions, sampling or {}, seed)
            kept = pool or stack.enter_context(tempfile.TemporaryDirectory())
            recorded = sampler.record(names, Path(kept), progress)
            sources = {name: getattr(sampler.pipeline, name) for name in names}
            pools = {name: Path(kept) / name for name in names}
            samples = {name: examples(sources[name], recorded[name][0]) for name in names}
        made = {}
        for name in names:
            source = sources.pop(name)
            made[name] = compiler.compile(
                source,
                samples[name],
                out=places[name],
                pool=pools[name],
                component=name if source is folder else None,
                seed=seed,
                force=force,
                progress=progress,
                **options,
            )
        return made


def examples(model: nn.Module, call: Sample) -> list[Sample]:
    """Calls to capture a component from: small ones of its class, of the kind of ``call``.

    Python values that the pipeline gives and the class's own calls lack are part of the graph, so
    they are taken over. A call whose tensors differ in kind, or of an unknown class, is itself the
    example: what can vary is then found out.
    """
    origin, class_name = origin_of(model), type(model).__name__
    given = {name: value for name, value in call.inputs.items() if name != "return_dict"}
    if class_name not in INPUTS:
        return [Sample(given, call.timestep)]
    known = samples_for(class_name, origin.config, getattr(torch, origin.dtype))
    example = known[0].inputs
    tensors = {name: kind for name, value in given.items() if (kind := _kind(value))}
    if tensors != {name: kind for name, value in example.items() if (kind := _kind(value))}:
        return [Sample(given, call.timestep)]
    plain = {k: v for k, v in given.items() if k not in example and v is not None}
    return [Sample({**sample.inputs, **plain}, sample.timestep) for sample in known]


def _kind(value: Any) -> Any:
    """Axes of every tensor in a value; None if there is none."""
    if isinstance(value, Tensor):
        return value.ndim
    items: Sequence[Any] = ()
    if isinstance(value, Mapping):
        items = [(key, _kind(item)) for key, item in value.items() if _kind(item)]
    elif isinstance(value, (list, tuple)):
        items = [kind for item in value if (kind := _kind(item))]
    return tuple(items) or None


def _pool(pool: str | Path | None, name: str) -> Path | None:
    """The pool of one component: of its name, or the folder itself if that is a pool."""
    if pool is None:
        return None
    own = Path(pool)
    return own if (own / POOL).is_file() else own / name
