"""Tiny random instances of the real architectures, with calls of every shape that they allow.

Configurations are in ``vdqc.testing.configs``, by family. Weights are drawn again after
construction, zero-initialised gates and outputs included, so that no branch is invisible in the
result. Libraries are imported when a model is built.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import nn

from vdqc.ir.folder import kept_in_float32
from vdqc.ir.inputs import INPUTS, axes_for, cast, sample_of
from vdqc.ir.inputs.draw import Config, Draw, Extent, Factory
from vdqc.ir.sample import Sample
from vdqc.testing.configs.encoders import ENCODERS
from vdqc.testing.configs.image import IMAGE
from vdqc.testing.configs.unet import UNET
from vdqc.testing.configs.video import VIDEO


@final
@dataclass(frozen=True)
class Architecture:
    """One architecture at a tiny size.

    Attributes:
        name: the key in ``ARCHITECTURES``.
        library: where the class is: ``diffusers``, ``transformers`` or a module of vdqc.testing.
        class_name: the class.
        config: arguments of the class; for transformers, of its configuration.
        axes: letters of ``Extent`` that may vary.
        extent: sizes of the example call.
        factory: what makes a call; None for the class's own.
    """

    name: str
    library: str
    class_name: str
    config: Config
    axes: str = "BFHWL"
    extent: Extent = field(default_factory=Extent)
    factory: Factory | None = None

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A model with random weights, in eval mode."""
        torch.manual_seed(seed)
        module = importlib.import_module(self.library)
        model: nn.Module = _BUILDERS[self.library](module, self.class_name, self.config)
        return cast_model(randomize(model, seed), dtype).eval()

    def inputs(
        self,
        B: int | None = None,
        F: int | None = None,
        H: int | None = None,
        W: int | None = None,
        L: int | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        """Keyword arguments of one call; sizes not given are the example's."""
        sizes = {"B": B, "F": F, "H": H, "W": W, "L": L}
        extent = replace(self.extent, **{k: v for k, v in sizes.items() if v is not None})
        return self._call(extent, seed, dtype)

    def samples(self, dtype: torch.dtype = torch.float32) -> list[Sample]:
        """Two samples that differ in every axis that may vary."""
        extents = (self.extent, self.extent.grown(self.axes))
        return [sample_of(self._call(extent, i, dtype)) for i, extent in enumerate(extents)]

    def variants(self, dtype: torch.dtype = torch.float32) -> dict[str, dict[str, Any]]:
        """Fresh calls by what changes in them: values, batch, one, text, frames, size."""
        changes = {"batch": "B", "text": "L", "frames": "F", "size": "HW"}
        extents = {"values": self.extent}
        for name, axes in changes.items():
            if set(axes) <= set(self.axes):
                extents[name] = self.extent.grown(axes)
        if "B" in self.axes:
            extents["one"] = replace(self.extent, B=1)
        if "F" in self.axes:
            extents["one frame"] = replace(self.extent, F=1)
        if "H" in self.axes:
            extents["other size"] = replace(self.extent, H=self.extent.H + 8, W=self.extent.W)
        return {
            name: self._call(extent, 11 + i, dtype)
            for i, (name, extent) in enumerate(extents.items())
        }

    def _call(self, extent: Extent, seed: int, dtype: torch.dtype) -> dict[str, Any]:
        factory = self.factory or INPUTS[self.class_name]
        call: dict[str, Any] = cast(factory(self.config, extent, Draw(seed)), dtype)
        return call


def randomize(model: nn.Module, seed: int = 0, std: float = 0.08) -> nn.Module:
    """Draw every parameter from N(0, std²), gains of norms from N(1, 0.1²); returns ``model``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim <= 1 and "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.1 * value if is_gain else std * value)
            if name == "head.conv3.bias":  # depth ends in a ReLU, which must not be all zero
                parameter.fill_(1.0)
    return model


def cast_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """``model`` in ``dtype`` but for what its class keeps in float32 (as ``from_pretrained``)."""
    if dtype == torch.float32:
        return model
    kept = set(kept_in_float32(model, dtype))
    for prefix, module in model.named_modules():
        for tensors in (module._parameters, module._buffers):
            for leaf, tensor in tensors.items():
                name = f"{prefix}.{leaf}".split(".")
                if tensor is None or not tensor.is_floating_point() or kept & set(name):
                    continue
                value = tensor.detach().to(dtype)
                tensors[leaf] = nn.Parameter(value) if tensors is module._parameters else value
    return model


def _diffusers(module: Any, class_name: str, config: Config) -> nn.Module:
    model: nn.Module = getattr(module, class_name)(**config)
    return model


def _transformers(module: Any, class_name: str, config: Config) -> nn.Module:
    arguments = dict(config)
    if backbone := arguments.pop("backbone_config", None):
        arguments["backbone_config"] = module.Dinov2Config(**backbone)
    configuration = getattr(module, class_name).config_class(**arguments)
    model: nn.Module = getattr(module, class_name)(configuration)
    return model


_BUILDERS: Mapping[str, Callable[[Any, str, Config], nn.Module]] = {
    "diffusers": _diffusers,
    "transformers": _transformers,
    "vdqc.testing.vggt": _diffusers,
}


def _views(config: Config, extent: Extent, draw: Draw) -> dict[str, Any]:
    return {"images": draw.normal(extent.B, extent.F, 3, 4 * extent.H, 4 * extent.W)}


_OFF_TABLE = Extent(H=12, W=16)


def _table() -> dict[str, Architecture]:
    found = [
        _entry(library, *row)
        for library, rows in (
            ("diffusers", [*VIDEO, *IMAGE, *UNET]),
            ("transformers", ENCODERS),
        )
        for row in rows
    ]
    found.append(Architecture("vggt", "vdqc.testing.vggt", "VGGT", {}, axes="BFHW", factory=_views))
    return {architecture.name: architecture for architecture in found}


def _entry(
    library: str, name: str, class_name: str, config: Config, factory: Factory | None = None
) -> Architecture:
    off_table = name in ("latte", "pixart", "dinov2", "depth-anything", "cogvideox-2b")
    return Architecture(
        name,
        library,
        class_name,
        config,
        axes=axes_for(class_name, config),
        extent=_OFF_TABLE if off_table else Extent(),
        factory=factory,
    )


#: Every architecture that vdqc promises to capture, by name.
ARCHITECTURES: Mapping[str, Architecture] = _table()
