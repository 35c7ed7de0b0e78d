"""vdqc compiles diffusion transformers into low-bit, sparse programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vdqc.hub.register import register_diffusers, watch
from vdqc.version import __version__

if TYPE_CHECKING:
    from vdqc.compiler import compile
    from vdqc.hub.pipeline import load_pipeline
    from vdqc.ir.sample import Sample
    from vdqc.loading import load

__all__ = ["Sample", "__version__", "compile", "load", "load_pipeline", "register_diffusers"]

_HOMES = {
    "Sample": "vdqc.ir.sample",
    "compile": "vdqc.compiler",
    "load": "vdqc.loading",
    "load_pipeline": "vdqc.hub.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import vdqc`` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'vdqc' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


watch()  # diffusers learns of the method when it is imported
