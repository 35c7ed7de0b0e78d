"""Samples from a pipeline itself: prompts through its own text encoder, scheduler and guidance.

::

    sampler = Sampler(pipeline, read_prompts(file), {"num_inference_steps": 20, "height": 480})
    pools = sampler.record(["transformer", "transformer_2"], folder)

Trajectory ``i`` is prompt ``i`` with seed ``first + i``. Each expert of a pipeline that has two is
given the calls that the pipeline's schedule and boundary give it, all of them from the same runs.
Latents are not decoded. Prompt embeddings may take the place of prompts and text encoder: a
safetensors file whose tensors are named as arguments of the pipeline (``prompt_embeds``,
``negative_prompt_embeds``, ...), one row for each trajectory, or one row for all.

Error: ConfigError for words, InputError for a pipeline or a file that cannot be used.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vdqc.base.diagnostics import ConfigError, InputError, nearest
from vdqc.engine.pool import Pool, open_pool, tensor_hash
from vdqc.engine.trajectory import Recorded, identity_of, record_all
from vdqc.ir.folder import (
    INDEX,
    check_weights,
    common_dtype,
    components_of,
    denoisers_of,
    free_memory,
    pipeline_class,
    read_json,
    saved_without,
)
from vdqc.ir.weights import stored_folder, stored_tensors

Progress = Callable[[Any, str], Any]
#: Where components come from whose code is installed; any other is a file of the folder.
LIBRARIES = ("diffusers", "transformers", "schedulers")
_TEXT = ("text_encoder", "tokenizer")


@final
@dataclass(frozen=True)
class Conditions:
    """What the trajectories are conditioned on.

    Attributes:
        count: how many trajectories there are.
        prompts: one for each, or none where there are embeddings.
        embeddings: arguments of the pipeline, one row for each trajectory or one for all.
    """

    count: int
    prompts: tuple[str, ...] = ()
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)

    def call(self, index: int) -> dict[str, Any]:
        """Arguments of the pipeline for one trajectory."""
        if self.prompts:
            return {"prompt": self.prompts[index]}
        return {
            name: value[index : index + 1] if len(value) > 1 else value
            for name, value in self.embeddings.items()
        }

    @property
    def hash(self) -> str:
        """Tells what was given apart."""
        parts = [*self.prompts, *(f"{k}:{tensor_hash(v)}" for k, v in self.embeddings.items())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_prompts(file: Path) -> Conditions:
    """One prompt a line; empty lines are left out."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the prompts in {file}: {error}", "expected a text, one prompt a line"
        ) from error
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise InputError(f"expected one prompt a line in {file}, found none")
    return Conditions(len(prompts), prompts=prompts)


def read_embeddings(file: Path) -> Conditions:
    """Arguments of the pipeline from a safetensors file."""
    if not file.is_file():
        raise InputError(f"expected prompt embeddings at {file}, found nothing", "check the path")
    list(stored_tensors(file))  # raises InputError, naming the file, if it is damaged
    tensors = load_file(file)
    if not tensors:
        raise InputError(f"expected tensors in {file}, found none")
    counts = {name: len(value) if value.ndim else 0 for name, value in tensors.items()}
    count = max(counts.values())
    for name, rows in counts.items():
        if rows not in (1, count) or not rows:
            raise InputError(
                f"expected 1 or {count} rows in '{name}' of {file}, got {rows}",
                "one row for each trajectory, or one for all",
            )
    return Conditions(count, embeddings=tensors)


@final
@dataclass(frozen=True)
class Sampler:
    """Runs a pipeline's own sampling loop under given conditions.

    Attributes:
        pipeline: a diffusers pipeline with float components.
        conditions: what its trajectories are conditioned on.
        options: further arguments of every call: sizes, steps, guidance.
        seed: of the first trajectory.
    """

    pipeline: Any
    conditions: Conditions
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        takes = list(inspect.signature(type(self.pipeline).__call__).parameters)[1:]
        given = {**self.options, **self.conditions.embeddings}
        for name in given:
            if name not in takes:
                raise ConfigError(
                    f"{type(self.pipeline).__name__} takes no argument '{name}'",
                    nearest(name, takes) or f"takes: {', '.join(takes)}",
                )
        if self.conditions.prompts:
            for name in _TEXT:
                if getattr(self.pipeline, name, None) is None:
                    raise InputError(
                        f"expected a {name} in the pipeline to encode the prompts, it has none",
                        "give prompt embeddings instead: --embeddings FILE.safetensors",
                    )

    def generate(self, seed: int) -> None:
        """One trajectory, up to the latents."""
        takes = inspect.signature(type(self.pipeline).__call__).parameters
        call = {**self.conditions.call(seed - self.seed), **self.options}
        if "output_type" in takes:
            call.setdefault("output_type", "latent")
        call["generator"] = torch.Generator().manual_seed(seed)
        self.pipeline(**call)

    def record(
        self,
        components: Sequence[str],
        folder: Path,
        progress: Progress = lambda items, description: items,
    ) -> dict[str, Pool]:
        """The calls of each component, kept in ``folder/<component>``; goes on where it stopped."""
        self.pipeline.set_progress_bar_config(disable=True)
        seeds = range(self.seed, self.seed + self.conditions.count)
        models = [
            Recorded(name, model, folder / name, self._identity(model))
            for name, model in ((name, getattr(self.pipeline, name)) for name in components)
        ]
        record_all(models, self.generate, seeds, progress=progress)
        return {each.name: open_pool(each.folder, list(seeds)) for each in models}

    def _identity(self, model: nn.Module) -> dict[str, str]:
        """As of every pool; the sampler is the pipeline, its scheduler, and what it is given."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        facts = [
            type(self.pipeline).__name__,
            type(scheduler).__name__,
            sorted((k, str(v)) for k, v in getattr(scheduler, "config", {}).items() if k[0] != "_"),
            sorted((k, str(v)) for k, v in self.options.items()),
            self.conditions.hash,
            self.seed,
        ]
        sampler = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return {**identity_of(model, lambda _, seed: self.generate(seed)), "sampler": sampler}


def load_float(folder: Path, conditions: Conditions) -> Any:
    """The float pipeline of a folder, in the dtype that most bytes of its denoiser have.

    Nothing is fetched and no code of the folder is run. Without prompts its text encoders are left
    out. Raises InputError for components of custom code, missing weights, and what exceeds memory.
    """
    pipeline_class(folder)
    entries = _entries(folder)
    _check_installed(folder, entries)
    left_out = set(saved_without(folder))
    if not conditions.prompts:
        left_out |= {name for name in entries if name.startswith(_TEXT)}
    models = [name for name in components_of(folder) if name not in left_out]
    _check_memory(folder, models)
    dtype = common_dtype(stored_folder(folder / denoisers_of(folder)[0]))
    return pipeline_class(folder).from_pretrained(
        str(folder),
        torch_dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        **dict.fromkeys(left_out),
    )


def _entries(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of every component that the index names."""
    return {
        name: (entry[0], entry[1])
        for name, entry in read_json(folder / INDEX).items()
        if isinstance(entry, list) and len(entry) == 2 and entry[0] is not None
    }


def _check_installed(folder: Path, entries: Mapping[str, tuple[str, str]]) -> None:
    diffusers = importlib.import_module("diffusers")
    for name, (library, class_name) in entries.items():
        if library not in LIBRARIES and not hasattr(diffusers.pipelines, library):
            raise InputError(
                f"the component '{name}' of {folder} is custom code: {class_name} of {library}",
                "code of the folder is not run: write a model.py with model(), samples(), "
                "generate()",
            )


def _check_memory(folder: Path, names: Sequence[str]) -> None:
    total = check_weights(folder, names)
    if total > free_memory():
        raise InputError(
            f"the pipeline's weights take {total / 2**30:.1f} GiB, {free_memory() / 2**30:.1f} GiB "
            "of memory are free: it cannot be run here to record samples",
            "record on a larger machine and compile with --pool DIR, or compile without prompts",
        )
