"""diffusers' own adapter methods on a compiled model, over its ``load_lora``.

    load_lora_adapter(file, adapter_name="style")     load_lora(file, 1.0, "style"), all others at 0
    set_adapters(["style", "motion"], [0.8, 0.5])     set_lora_weight of both, all others at 0
    disable_adapters(), enable_adapters()             all at 0, and back
    delete_adapters("style"), unload_lora()           unload_lora

As in diffusers, what was loaded last is active alone until ``set_adapters`` says otherwise, and
what is disabled stays so until it is enabled. An adapter is active while its weight is not 0. So
``pipe.load_lora_weights`` and ``pipe.set_adapters`` reach a compiled component as they reach any
other. What trains, merges or writes an adapter is refused in ``vdqc.hub.facade``.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.lora.keys import read_adapter


class _Model(Protocol):
    """What the methods need of a compiled model."""

    def load_lora(
        self,
        source: Mapping[str, Tensor],
        weight: float = ...,
        name: str = ...,
        metadata: Mapping[str, Any] | None = ...,
    ) -> None: ...
    def set_lora_weight(self, name: str, weight: float) -> None: ...
    def unload_lora(self, name: str | None = ...) -> None: ...
    @property
    def lora_weights(self) -> dict[str, float]: ...


class AdapterMethods:
    """The methods, for classes that stand in for one of diffusers."""

    def load_lora_adapter(
        self: _Model,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        *,
        adapter_name: str | None = None,
        network_alphas: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
        subfolder: str | None = None,
        weight_name: str | None = None,
        **_: Any,
    ) -> None:
        """``load_lora`` of what ``prefix`` marks as this component's; it is active alone.

        Other options of diffusers concern the Hub or memory and mean nothing here: nothing is
        fetched. Raises InputError, ConfigError or ArtifactError.
        """
        if hotswap:
            raise InputError(
                "a compiled model swaps no adapter in place",
                "load both and change their weights, which compiles nothing again; or unload_lora "
                "first",
            )
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            source = Path(source, *filter(None, (subfolder, weight_name)))
        state, written = read_adapter(source)
        own = {key: value for key, value in state.items() if key.startswith(f"{prefix}.")}
        own = own or state
        alphas = {key: torch.tensor(float(alpha)) for key, alpha in (network_alphas or {}).items()}
        name = adapter_name or _free_name(self.lora_weights)
        self.load_lora({**own, **alphas}, 1.0, name, written if metadata is None else metadata)
        _use(self, {**dict.fromkeys(self.lora_weights, 0.0), name: 1.0})

    def set_adapters(
        self: _Model,
        adapter_names: str | Sequence[str],
        weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """These are active with these weights, by default 1; all others are not.

        A name that is not loaded is left out with a warning: pipelines pass those of all their
        components. Raises ConfigError or InputError.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(given) != len(names):
            raise ConfigError(f"expected a weight for each of {len(names)} adapters, got {given}")
        for weight in given:
            if isinstance(weight, Mapping):
                raise InputError(
                    "expected one weight for an adapter, got one for each block",
                    "scale the factors in its file",
                )
        loaded = self.lora_weights
        if missing := [name for name in names if name not in loaded]:
            warnings.warn(
                f"no adapter of this model is named {', '.join(missing)}, loaded are: "
                f"{', '.join(loaded) or 'none'}",
                stacklevel=2,
            )
        wanted = {
            name: 1.0 if weight is None else float(weight)  # type: ignore[arg-type]
            for name, weight in zip(names, given, strict=True)
        }
        _use(self, {name: wanted.get(name, 0.0) for name in loaded})

    def set_adapter(self: Any, adapter_name: str | Sequence[str]) -> None:
        """These alone are active, with weight 1."""
        self.set_adapters(adapter_name)

    def active_adapters(self: _Model) -> list[str]:
        """Names of those whose weight is not 0, disabled or not."""
        return [name for name, weight in _wanted(self).items() if weight]

    def disable_adapters(self: _Model) -> None:
        """The model as it is without any, until ``enable_adapters``."""
        wanted = _wanted(self)
        _use(self, dict.fromkeys(wanted, 0.0))
        self.__dict__[_RESTING] = wanted

    def enable_adapters(self: _Model) -> None:
        """Those that are active take part again."""
        wanted = _wanted(self)
        self.__dict__.pop(_RESTING, None)
        _use(self, wanted)

    def disable_lora(self: Any) -> None:
        """As ``disable_adapters``; diffusers has both names."""
        self.disable_adapters()

    def enable_lora(self: Any) -> None:
        """As ``enable_adapters``."""
        self.enable_adapters()

    def delete_adapters(self: _Model, adapter_names: str | Sequence[str]) -> None:
        """``unload_lora`` of each."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.unload_lora(name)

    @property
    def peft_config(self: _Model) -> dict[str, Any]:
        """Weights by name: pipelines list adapters by it."""
        return dict(_wanted(self))


#: Where a model keeps the weights that its adapters had when they were disabled.
_RESTING = "_resting_adapters"


def _wanted(model: _Model) -> dict[str, float]:
    """Weights of the adapters, as if they were enabled."""
    resting = model.__dict__.get(_RESTING) or {}
    return {name: resting.get(name, weight) for name, weight in model.lora_weights.items()}


def _use(model: _Model, weights: Mapping[str, float]) -> None:
    """Give the adapters these weights, now or when they are enabled."""
    resting = model.__dict__.get(_RESTING)
    if resting is not None:
        model.__dict__[_RESTING] = dict(weights)
        weights = dict.fromkeys(weights, 0.0)
    for name, weight in weights.items():
        model.set_lora_weight(name, weight)


def _free_name(taken: Mapping[str, float]) -> str:
    return next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)
