"""A diffusers or transformers folder (config.json and safetensors) to a model and samples.

Weights may stay on disk: then the model is built with parameters on the meta device, and every
parameter is a reference into a file. Nothing is unpickled and nothing is fetched.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from vdqc.base.diagnostics import ConfigError, InputError, nearest
from vdqc.ir.inputs import INPUTS, samples_for
from vdqc.ir.sample import Sample
from vdqc.ir.weights import StoredTensor, stored_folder

INDEX = "model_index.json"
#: Components of a pipeline that are the denoiser, first match wins.
DENOISERS = ("transformer", "unet")


def load_folder(
    folder: Path, component: str | None = None, mapped: bool | None = None
) -> tuple[nn.Module, list[Sample], dict[str, StoredTensor]]:
    """Model in eval mode, synthesised samples, and the weights that stay on disk."""
    folder = _component_folder(folder, component)
    config = read_json(folder / "config.json")
    check_float(config, folder)
    library, class_name = _class_of(config, folder)
    if class_name not in INPUTS:
        raise InputError(
            f"{folder}: no inputs are known for the class {class_name}",
            "write a model.py with model() and samples() for it",
            nearest(class_name, INPUTS),
        )
    weights = stored_folder(folder)
    if not weights:
        raise InputError(
            f"expected safetensors files in {folder}, found none",
            "save the model with save_pretrained(folder, safe_serialization=True)",
        )
    dtype = common_dtype(weights)
    if mapped is None:
        mapped = sum(tensor.nbytes for tensor in weights.values()) > free_memory() / 2
    model: nn.Module
    stored: dict[str, StoredTensor] = {}
    if mapped:
        model, stored = _mapped_model(folder, library, class_name, weights, dtype)
    else:
        model = _loaded_model(folder, library, class_name, dtype)
    return model.eval(), samples_for(class_name, _configuration(model), dtype), stored


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> tuple[str, ...]:
    """Name parts of what ``from_pretrained`` leaves in float32 for a model in ``dtype``.

    Transformers applies its ordinary list to float16 alone, diffusers to bfloat16 as well.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return ()
    kept = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    strict = tuple(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    is_transformers = type(model).__module__.startswith("transformers.")
    return strict if is_transformers and dtype == torch.bfloat16 else kept + strict


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters without memory; buffers keep their values.

    Buffers that are not in a checkpoint (rotary tables) are computed by the constructor alone.
    """
    register = nn.Module.register_parameter

    def register_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with mock.patch.object(nn.Module, "register_parameter", register_meta):
        yield


def check_float(config: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError for a model that is quantised, by vdqc or otherwise."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method == "vdqc":
        raise InputError(
            f"{folder} is compiled already: it is an artifact of vdqc",
            "give the float model that it was made from",
        )
    if method is not None:
        raise InputError(
            f"expected float weights in {folder}, they are quantised with {method}",
            "give the float model: codes of another method cannot be compressed again",
        )


def check_weights(folder: Path, names: Sequence[str]) -> int:
    """Bytes of the weights of a pipeline's components, each found whole and float.

    Raises InputError, naming the file, for what is missing, cut short or quantised.
    """
    total = 0
    for name in names:
        check_float(read_json(folder / name / "config.json"), folder / name)
        weights = stored_folder(folder / name)
        if not weights:
            raise InputError(
                f"expected safetensors files in {folder / name}, found none",
                "fetch the whole pipeline; a gated one needs 'hf auth login' and its licence "
                "accepted on its page",
            )
        total += sum(weight.nbytes for weight in weights.values())
    return total


def components_of(folder: Path) -> list[str]:
    """Names of a pipeline's components that are models in folders of their own.

    Raises ConfigError for a folder without ``model_index.json``.
    """
    if not (folder / INDEX).is_file():
        raise ConfigError(
            f"expected a pipeline, {folder} has no {INDEX}",
            "leave the component out for a folder with one model",
        )
    entries = read_json(folder / INDEX)
    return [name for name in entries if (folder / name / "config.json").is_file()]


def pipeline_class(folder: Path) -> Any:
    """The class of diffusers that a pipeline is of; raises InputError for any other.

    ``DiffusionPipeline.from_pretrained`` would not do: a component passed to it is ignored where
    the class calls that component optional (Wan's experts, diffusers 0.42).
    """
    import diffusers

    name = read_json(folder / INDEX).get("_class_name")
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if found is None:
        raise InputError(
            f"the pipeline class {name} of {folder} is not one of diffusers "
            f"{diffusers.__version__}",
            "code of the folder is not run: write a model.py with model(), samples(), generate()",
        )
    return found


def saved_without(folder: Path) -> list[str]:
    """Names of the components that a pipeline was saved without, as it may be loaded again."""
    entries = read_json(folder / INDEX)
    return [name for name, entry in entries.items() if entry == [None, None]]


def denoisers_of(folder: Path) -> list[str]:
    """The components that denoise: one, or both experts of a pipeline that has two.

    Raises ConfigError if there is none.
    """
    names = components_of(folder)
    kind = next((name for name in DENOISERS if name in names), None)
    if kind is None:
        raise ConfigError(
            f"expected {' or '.join(DENOISERS)} in the pipeline {folder}",
            f"choose a component: {', '.join(names)}",
        )
    return [kind, *sorted(name for name in names if re.fullmatch(rf"{kind}_\d+", name))]


def _component_folder(folder: Path, component: str | None) -> Path:
    if component is None and not (folder / INDEX).is_file():
        return folder
    names = components_of(folder)
    if component is None:
        component = denoisers_of(folder)[0]
    if component not in names:
        raise ConfigError(
            f"the pipeline {folder} has no component '{component}'", nearest(component, names)
        )
    return folder / component


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises InputError for anything else."""
    if not path.is_file():
        raise InputError(
            f"expected {path.name} in {path.parent}, found none",
            "give a folder that save_pretrained wrote, or a model.py",
        )
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", "fetch or export it again") from error
    if not isinstance(data, dict):
        raise InputError(f"expected a JSON object in {path}, got {type(data).__name__}")
    return data


def _class_of(config: Mapping[str, Any], folder: Path) -> tuple[str, str]:
    if "_class_name" in config:
        return "diffusers", str(config["_class_name"])
    if config.get("architectures"):
        return "transformers", str(config["architectures"][0])
    raise InputError(
        f"expected '_class_name' or 'architectures' in {folder / 'config.json'}, found neither",
        "give a folder that diffusers or transformers wrote",
    )


def _class(library: str, class_name: str) -> Any:
    module = importlib.import_module(library)
    if not hasattr(module, class_name):
        version = getattr(module, "__version__", "?")
        raise InputError(f"{library} {version} has no class {class_name}", f"update {library}")
    return getattr(module, class_name)


def _configuration(model: Any) -> dict[str, Any]:
    config = model.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def common_dtype(weights: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most bytes; a model keeps a few tensors in another."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in weights.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else torch.float32


def _loaded_model(folder: Path, library: str, class_name: str, dtype: torch.dtype) -> nn.Module:
    """The model as its library loads it; what that would leave at random values is refused."""
    cls = _class(library, class_name)
    options: dict[str, Any] = {"torch_dtype" if library == "diffusers" else "dtype": dtype}
    options |= {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        model, info = cls.from_pretrained(str(folder), **options)
    except Exception as error:
        raise InputError(
            f"{library} cannot load {class_name} from {folder}: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}",
            "the configuration and the weights are of different models, or a file is damaged",
        ) from error
    if missing := sorted(info["missing_keys"]):
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{folder} lacks the weight '{missing[0]}' of {class_name}{more}",
            "the configuration and the weights are of different models, or a file is missing",
        )
    loaded: nn.Module = model
    return loaded


def _mapped_model(
    folder: Path,
    library: str,
    class_name: str,
    weights: Mapping[str, StoredTensor],
    dtype: torch.dtype,
) -> tuple[nn.Module, dict[str, StoredTensor]]:
    """The model with meta parameters and what each one is on disk.

    A parameter whose dtype on disk is not the one it computes in (the class keeps it in float32)
    is read at once; such parameters are small.
    """
    cls = _class(library, class_name)
    with parameters_on_meta():
        if library == "diffusers":
            model = cls.from_config(cls.load_config(str(folder), local_files_only=True))
        else:
            model = cls(cls.config_class.from_pretrained(str(folder), local_files_only=True))
    kept = kept_in_float32(model, dtype)
    aliases: dict[int, str] = {
        id(parameter): name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in weights
    }
    stored = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        source = weights.get(name) or weights.get(aliases.get(id(parameter), ""))
        if source is None:
            raise InputError(
                f"{folder} lacks the weight '{name}' of {class_name}",
                "if the class renames weights when it loads them, they cannot stay on disk: "
                "load with mapped=False",
            )
        if source.shape != tuple(parameter.shape):
            raise InputError(
                f"expected {list(parameter.shape)} for '{name}' in {folder}, "
                f"got {list(source.shape)}",
                "the configuration and the weights are of different models",
            )
        is_kept = any(part in kept for part in name.split("."))
        wanted = torch.float32 if is_kept else dtype
        if not parameter.is_floating_point():
            wanted = parameter.dtype
        if source.dtype == wanted:
            value = torch.empty(source.shape, dtype=wanted, device="meta")
            stored[name] = source
        else:
            value = source.read().to(wanted)
        _set(model, name, nn.Parameter(value, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        value = weights[name].read() if name in weights else buffer
        is_kept = any(part in kept for part in name.split("."))
        if value.is_floating_point() and not is_kept and name in weights:
            value = value.to(dtype)
        _set(model, name, value)
    return model, stored


def _set(model: nn.Module, name: str, value: Any) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    table = owner._parameters if isinstance(value, nn.Parameter) else owner._buffers
    table[leaf] = value
