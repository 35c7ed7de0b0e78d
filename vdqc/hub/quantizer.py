"""The quantisation method ``vdqc`` of diffusers: ``from_pretrained`` of an artifact folder.

diffusers builds the class's float skeleton on the meta device and asks the quantiser what to do
with it. Its modules are dropped, no checkpoint is copied into it, and at the end the object
*becomes* the stand-in: of the same class by name and by inheritance, a program in place of modules.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from vdqc.base.diagnostics import ArtifactError, InputError
from vdqc.hub.layout import METHOD


class Method(str, enum.Enum):  # noqa: UP042 (diffusers looks the value up in a dict of str)
    """The name that ``config.json`` gives."""

    VDQC = METHOD


@dataclass
class VdqcConfig(QuantizationConfigMixin):
    """What ``config.json`` says of an artifact; the rest is in its manifest."""

    quant_method: Method = Method.VDQC  # type: ignore[assignment]  # a closed enum there
    dtype: str = "float32"
    target: str = ""
    format_version: int = 1

    def __post_init__(self) -> None:
        self.quant_method = Method(self.quant_method)
        if not isinstance(getattr(torch, str(self.dtype), None), torch.dtype):
            raise ArtifactError(
                f"quantization_config: expected a dtype of torch, got {self.dtype!r}",
                "config.json was edited: copy it again",
            )

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From ``config.json``; what a later version adds is left alone."""
        known = {key: value for key, value in config_dict.items() if key in cls.__annotations__}
        config = cls(**known)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """As in ``config.json``."""
        return {**asdict(self), "quant_method": self.quant_method.value}


@final
class VdqcQuantizer(DiffusersQuantizer):
    """Puts the artifact in the place of the model that diffusers is loading."""

    requires_calibration = True

    quantization_config: Any

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise InputError(
                "expected an artifact, got a float model: from_pretrained does not compile",
                "vdqc compile FOLDER --component transformer, then load the result",
            )
        super().__init__(quantization_config, **kwargs)
        self._folder: Path | None = None
        self._device: torch.device | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing here: dtype and devices are checked where they are given."""

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The program's own dtype; raises ArtifactError if another was asked for."""
        own: torch.dtype = getattr(torch, self.quantization_config.dtype)
        if torch_dtype not in (None, own):
            raise ArtifactError(
                f"the program computes in {own}, {torch_dtype} was asked for",
                f"load with torch_dtype={own}, or compile the model again in {torch_dtype}",
            )
        return own

    def update_device_map(self, device_map: Any) -> None:
        """Takes note of the one device; raises InputError for a map over several.

        diffusers gets no map: its dispatch hooks submodules, of which a program has none.
        """
        places = list(device_map.values()) if isinstance(device_map, Mapping) else []
        if len(set(map(str, places))) > 1 or "disk" in places:
            raise InputError(
                f"expected one device for a compiled model, got the map {dict(device_map)}",
                "load it on the CPU and use enable_model_cpu_offload on the pipeline",
            )
        if places:
            self._device = torch.device(places[0])
        elif device_map is not None:
            self._device = torch.accelerator.current_accelerator() or torch.device("cpu")

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        """No key: the program's weights are read from the folder that the checkpoint is in."""
        self._folder = complete(Path(str(checkpoint_files[0])).parent)
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Nothing to copy."""
        return {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        for table in (model._modules, model._parameters, model._buffers):
            table.clear()

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from vdqc.loading import load

        assert self._folder is not None
        compiled = load(self._folder)
        expected, got = compiled.origin.model_class.rpartition(".")[2], type(model).__name__
        if expected != got:
            raise ArtifactError(
                f"{self._folder} is a compiled {expected}, config.json says {got}",
                "config.json was edited: copy it again",
            )
        if self._device is not None:
            compiled = compiled.to(self._device)
        become(model, compiled)
        model.quantization_method = Method.VDQC  # type: ignore[assignment]
        register: Any = model.register_to_config
        register(quantization_config=self.quantization_config)
        return model

    @property
    def is_serializable(self) -> bool:
        """Always: the folder is copied."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Never: weights are packed integers."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` sees one graph without breaks."""
        return True


def become(model: nn.Module, other: nn.Module) -> None:
    """Make the object ``model`` be ``other``: class and content. The caller's reference stays."""
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)
    model.__class__ = type(other)


def complete(folder: Path) -> Path:
    """``folder`` with all files of its artifact.

    diffusers fetches ``config.json`` and weights from the Hub; the manifest and what it names are
    fetched into the same snapshot of the cache here. Raises ArtifactError for a local folder.
    """
    from vdqc.ir.manifest import MANIFEST, read_manifest

    if not (folder / MANIFEST).is_file():
        fetch(folder, MANIFEST)
    manifest = read_manifest(folder)
    for name in manifest.get("files", ()):
        if not (folder / name).exists():
            fetch(folder, name)
    return folder


def fetch(folder: Path, name: str) -> None:
    """Fetch a file of the repository whose snapshot ``folder`` is in, as the Hub's cache lays it:
    ``models--ORG--NAME/snapshots/COMMIT/...``."""
    parts = folder.parts
    if "snapshots" not in parts:
        raise ArtifactError(
            f"the artifact is damaged: {folder / name} is missing",
            "copy it again, or compile the model again",
        )
    at = len(parts) - 1 - parts[::-1].index("snapshots")
    kind, *rest = parts[at - 1].split("--")
    if kind != "models" or at + 1 >= len(parts):
        raise ArtifactError(f"expected a snapshot of the Hub's cache at {folder}")
    import huggingface_hub

    try:
        huggingface_hub.hf_hub_download(
            "/".join(rest),
            "/".join([*parts[at + 2 :], *Path(name).parts]),
            revision=parts[at + 1],
            cache_dir=Path(*parts[: at - 1]),
        )
    except Exception as error:
        raise ArtifactError(
            f"{name} of {'/'.join(rest)} cannot be fetched: {error}",
            "is it an artifact that vdqc saved? are you online and logged in?",
        ) from error
