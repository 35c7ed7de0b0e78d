"""Adapters as they lie in files: the names of peft, diffusers and kohya, to factors by module.

::

    transformer.blocks.0.attn1.to_q.lora_A.weight     float[r, K]      diffusers, peft
    base_model.model.blocks.0.attn1.to_q.lora_B.weight  float[N, r]    peft
    blocks.0.attn1.to_q.lora_down.weight, .lora_up.weight, .alpha      kohya
    lora_unet_blocks_0_attn1_to_q.lora_down.weight                     kohya, dots as underscores

The update is ``alpha / r · up · down``; alpha stands in a tensor beside the factors, or in the
metadata that diffusers writes, else it is r.

Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1; Kalajdzievski, rsLoRA, arXiv 2312.03732.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vdqc.base.diagnostics import InputError

#: What programs put in front of a module's name: wrappers, components of a pipeline.
_PREFIXES = (
    "base_model.model.",
    "transformer.",
    "transformer_2.",
    "unet.",
    "diffusion_model.",
    "model.",
    "module.",
)
_FLAT = ("lora_unet_", "lora_transformer_")
_FACTOR = re.compile(
    r"(?P<module>.+?)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))"
    r"(?:\.(?!bias$)\w+){0,2}"
)
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_CONFIG = "adapter_config.json"
_METADATA = "lora_adapter_metadata"


@final
@dataclass(frozen=True)
class LowRank:
    """The update up · down of one weight: float[N, r] and float[r, K], scale included."""

    up: Tensor
    down: Tensor


@final
@dataclass
class _Found:
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    key: str = ""


def read_adapter(
    source: str | Path | Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of an adapter: a safetensors file, a folder with one, or tensors.

    Raises InputError.
    """
    if isinstance(source, Mapping):
        return dict(source), {}
    path = Path(source)
    config: dict[str, Any] = {}
    if path.is_dir():
        named = [path / name for name in _FILES if (path / name).is_file()]
        files = named or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise InputError(f"expected one safetensors file in {path}, found {len(files)}")
        if (path / _CONFIG).is_file():
            config = json.loads((path / _CONFIG).read_text())
        path = files[0]
    if not path.is_file():
        raise InputError(
            f"expected an adapter at {path}, found nothing", "give a .safetensors file"
        )
    try:
        with safe_open(path, framework="pt") as handle:
            state = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            written = (handle.metadata() or {}).get(_METADATA)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a safetensors file: {error}",
            "load other formats yourself and pass the dictionary of tensors",
        ) from error
    return state, config if written is None else json.loads(written)


def factors(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any], modules: Collection[str]
) -> tuple[dict[str, LowRank], list[str]]:
    """Factors by name in ``modules``, and the keys that fit none. Raises InputError.

    A key fits without its prefix; a module that has but one of two factors is an error.
    """
    flat = {name.replace(".", "_"): name for name in modules}
    found: dict[str, _Found] = {}
    unmatched = []
    for key, value in state.items():
        if "lora_magnitude_vector" in key or "dora_scale" in key:
            raise InputError(
                f"{key} makes this a DoRA adapter, which is no sum of low rank",
                "merge it into the float model and compile that",
            )
        module, part = _split(key)
        name = _module(module, modules, flat) if part else None
        if name is None:
            unmatched.append(key)
            continue
        if value.numel() and not bool(torch.isfinite(value).all()):
            raise InputError(f"{key} holds NaN or infinity", "the adapter is damaged", site=name)
        entry = found.setdefault(name, _Found())
        if part == "alpha":
            entry.alpha = float(value)
            continue
        if getattr(entry, part) is not None:
            raise InputError(
                f"{entry.key} and {key} are factors of the same layer",
                "give one adapter at a time",
                site=name,
            )
        entry.key = key
        setattr(entry, part, value)
    return {
        name: _low_rank(name, entry, metadata) for name, entry in found.items() if entry.key
    }, unmatched


def _split(key: str) -> tuple[str, str]:
    """(module with prefix, "down", "up" or "alpha"); no part for other keys."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha").removesuffix(".lora"), "alpha"
    match = _FACTOR.fullmatch(key)
    if match is None:
        return key, ""
    return match["module"], "down" if match["down"] else "up"


def _module(name: str, modules: Collection[str], flat: Mapping[str, str]) -> str | None:
    for candidate in _without_prefixes(name):
        if candidate in modules:
            return candidate
    for start in _FLAT:
        if name.startswith(start):
            return flat.get(name.removeprefix(start))
    return None


def _without_prefixes(name: str) -> Iterator[str]:
    yield name
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            yield from _without_prefixes(name.removeprefix(prefix))


def _low_rank(name: str, entry: _Found, metadata: Mapping[str, Any]) -> LowRank:
    if entry.down is None or entry.up is None:
        missing = "first factor (lora_A, lora_down)" if entry.down is None else "second factor"
        raise InputError(
            f"expected both factors of the layer, its {missing} is missing beside {entry.key}",
            "the adapter is damaged",
            site=name,
        )
    up, down = entry.up, entry.down
    if up.ndim > 2 and up.ndim == down.ndim and math.prod(up.shape[2:]) == 1:
        up, down = up.flatten(1), down.flatten(1)  # of a convolution: its second one is 1 x 1
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        raise InputError(
            f"expected factors [r, K] and [N, r], got {list(down.shape)} and {list(up.shape)}",
            site=name,
        )
    scale = _scale(name, entry.alpha, int(down.shape[0]), metadata)
    return LowRank(up.double() * scale, down)


def _scale(name: str, alpha: float | None, rank: int, metadata: Mapping[str, Any]) -> float:
    if alpha is not None:
        return alpha / rank
    given = _without_component(metadata)
    patterns: Mapping[str, float] = given.get("alpha_pattern") or {}
    fitting = [value for key, value in patterns.items() if re.search(rf"(^|\.){key}$", name)]
    alpha = fitting[0] if fitting else given.get("lora_alpha")
    if alpha is None:
        return 1.0
    return float(alpha) / (rank**0.5 if given.get("use_rslora") else rank)


def _without_component(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of ``adapter_config.json``; diffusers puts the component's name before each."""
    plain = dict(metadata)
    for key, value in metadata.items():
        for prefix in _PREFIXES:
            if key.startswith(prefix):
                plain[key.removeprefix(prefix)] = value
    return plain
