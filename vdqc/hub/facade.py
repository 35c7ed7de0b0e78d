"""The class of a stand-in: an instance of the original's class whose program is one forward.

    class WanTransformer3DModel(CompiledModel, diffusers.WanTransformer3DModel)

Pipelines check the class of a component, and a saved pipeline records it, so the stand-in is of the
original's class and bears its name. Whatever that class and its mixins do to submodules (caches,
attention processors, offloading by block) is refused by name: a program has none. Adapters are
loaded by diffusers' own methods too, which ``vdqc.hub.adapters`` writes anew.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from vdqc.base.diagnostics import InputError
from vdqc.hub.adapters import AdapterMethods
from vdqc.ir.origin import Origin

#: Refused methods, and what to do instead.
ADVICE = {
    "enable_group_offload": "use enable_model_cpu_offload on the pipeline, or exclude_modules=",
    "enable_layerwise_casting": "compile with a scheme of fewer bits",
    "set_attention_backend": "the attention kernel was chosen when the model was compiled",
    "reset_attention_backend": "the attention kernel was chosen when the model was compiled",
    "set_attn_processor": "change the attention before the model is compiled",
    "set_default_attn_processor": "change the attention before the model is compiled",
    "enable_xformers_memory_efficient_attention": "the attention kernel was chosen at compilation",
    "fuse_qkv_projections": "fuse them before the model is compiled",
    "add_adapter": "train the adapter on the float model: load_lora(file, weight) puts it on this",
    "save_lora_adapter": "keep the file that load_lora read",
    "fuse_lora": "load_lora(file, weight) adds an adapter without merging it; or merge it into the "
    "float model and compile that",
    "unfuse_lora": "unload_lora(name) takes an adapter out again",
    "enable_lora_hotswap": "set_lora_weight(name, weight) compiles nothing again: load several "
    "adapters and change their weights",
    "enable_cache": "step caches hook into blocks: compile with reparameterize, or use the float "
    "model",
    "enable_parallelism": "context and tensor parallelism split the float model's blocks: run one "
    "process per video",
    "enable_gradient_checkpointing": "a compiled model is for inference: train the float model",
    "dequantize": "load the float model again",
}
#: Methods of these are either right for a stand-in or listed above.
_PLAIN = {"ModelMixin", "PushToHubMixin", "ConfigMixin", "Module", "object"}


@functools.cache
def facade(base: type[nn.Module], model_class: str) -> type[nn.Module]:
    """``base`` as a subclass of ``model_class``, the import path of a diffusers class.

    Where the installed diffusers lacks the class, of ModelMixin under its name. Other libraries'
    classes are not imported: then ``base`` itself.
    """
    if not model_class.startswith("diffusers."):
        return base
    module, _, name = model_class.rpartition(".")
    original = _original(module, name)
    methods = {
        **{method: _refused(method, "") for method in _submodule_methods(original, base)},
        **{method: _refused(method, advice) for method, advice in ADVICE.items()},
        # the class of an object is written into the index of a saved pipeline
        "__module__": original.__module__ if original.__name__ == name else "diffusers",
        "__doc__": f"A compiled {name}.",
    }
    for method in [method for method in methods if not method.startswith("__")]:
        if hasattr(base, method) or hasattr(AdapterMethods, method):
            del methods[method]
    return type(name, (base, AdapterMethods, original), methods)


def is_facade(origin: Origin) -> bool:
    """True if the stand-in of a model from ``origin`` is of a class of diffusers."""
    return origin.model_class.startswith("diffusers.")


def _original(module: str, name: str) -> Any:
    import diffusers

    found: Any = getattr(diffusers, name, None)
    if found is None:
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError:
            found = None
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    return diffusers.ModelMixin


def _submodule_methods(original: type, base: type) -> Iterator[str]:
    """Public methods that the class brings beyond what every model of diffusers has."""
    for parent in original.__mro__:
        if parent.__name__ in _PLAIN or issubclass(base, parent):
            continue
        for name, value in vars(parent).items():
            if not name.startswith("_") and callable(value) and not isinstance(value, type):
                yield name


def _refused(name: str, advice: str) -> Callable[..., None]:
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise InputError(
            f"{name} acts on submodules, which a compiled program has not",
            advice or "call it on the float model, then compile that",
        )

    method.__name__ = name
    return method
