"""Makes ``vdqc`` known to diffusers as a quantisation method, when diffusers is imported.

``import vdqc`` imports neither torch nor diffusers; it places a finder that adds the method to the
two tables of ``diffusers.quantizers.auto`` right after that module was executed. The tables are
diffusers' own and closed: a version without them is named, and nothing is changed.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, final

from vdqc.base.diagnostics import ConfigError

MODULE = "diffusers.quantizers.auto"
METHOD = "vdqc"
_TABLES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
#: What the quantiser overrides or is called by; without one of them it would not be asked.
_HOOKS = (
    "update_torch_dtype",
    "update_device_map",
    "maybe_update_loaded_keys",
    "maybe_update_state_dict",
    "_process_model_before_weight_loading",
    "_process_model_after_weight_loading",
)


def register_diffusers() -> None:
    """Import diffusers and make ``from_pretrained`` of artifacts work; again is harmless.

    ``import vdqc`` does it by itself once diffusers is imported. Raises ConfigError if the
    diffusers that is installed has no interface for it.
    """
    try:
        module = importlib.import_module(MODULE)
    except ImportError as error:
        raise ConfigError(
            f"diffusers cannot be imported, or has no {MODULE}: {error}",
            "pip install 'diffusers>=0.37'",
        ) from error
    add_to(module)


def add_to(module: ModuleType) -> None:
    """Add the method to the tables of ``diffusers.quantizers.auto``; raises ConfigError."""
    if problem := missing_interface(module):
        version = getattr(sys.modules.get("diffusers"), "__version__", "?")
        raise ConfigError(
            f"diffusers {version} {problem}: from_pretrained cannot load vdqc artifacts",
            "Pipeline.from_pretrained(..., transformer=vdqc.load(folder)) works with any version; "
            "or pip install 'diffusers>=0.37'",
        )
    from vdqc.hub.quantizer import VdqcConfig, VdqcQuantizer

    for table, entry in zip(_TABLES, (VdqcQuantizer, VdqcConfig), strict=True):
        getattr(module, table)[METHOD] = entry


def missing_interface(module: ModuleType) -> str:
    """What the interface lacks for the quantiser, as the rest of a sentence; empty if nothing."""
    for table in _TABLES:
        if not isinstance(getattr(module, table, None), dict):
            return f"has no table {MODULE}.{table}"
    base = getattr(sys.modules.get("diffusers.quantizers.base"), "DiffusersQuantizer", None)
    for hook in _HOOKS:
        if not hasattr(base, hook):
            return f"does not ask a quantiser for {hook}"
    return ""


def watch() -> None:
    """Register now if diffusers is imported already, else as soon as it is."""
    if MODULE in sys.modules:
        _add_or_warn(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add_or_warn(module: ModuleType) -> None:
    """An import must not fail for a method that the program may never ask for."""
    try:
        add_to(module)
    except ConfigError as error:
        warnings.warn(str(error), stacklevel=2)


@final
class _Finder(importlib.abc.MetaPathFinder):
    """Finds ``diffusers.quantizers.auto`` where others find it, and leaves."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The module's spec with a loader that registers after executing; None for all others."""
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


@final
class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        """As the module's own loader, then register."""
        self._loader.exec_module(module)
        _add_or_warn(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source, get_data, ...
