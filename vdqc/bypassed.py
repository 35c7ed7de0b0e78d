"""What hangs on a model's modules and a whole-graph program would never call again.

A program runs as one forward: hooks on submodules, step caches, offloading and adapters that were
there when the model was captured are either traced into the graph as they were, or lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from vdqc.base.diagnostics import Diagnostic, Diagnostics, InputError, Severity

_ADAPTERS = ("lora_A", "lora_B", "lora_layer", "active_adapters")
_MOST_NAMED = 5


def bypassed_hooks(model: nn.Module) -> list[Diagnostic]:
    """One diagnostic per kind of hook found: an error where a capture could not be right.

    Errors: accelerate hooks that move weights, diffusers hooks that carry state between steps.
    Warnings: plain forward hooks and adapters, which are captured as they are now.
    """
    found: dict[tuple[Severity, str, str], list[str]] = {}
    for name, module in model.named_modules():
        for kind in _hooks(module):
            found.setdefault(kind, []).append(name or "the model itself")
    return [
        Diagnostic(severity, f"{what} on {_names(names)}", "bypassed-hook", notes=(advice,))
        for (severity, what, advice), names in found.items()
    ]


def refuse_bypassed_hooks(model: nn.Module, diagnostics: Diagnostics) -> None:
    """Show the warnings of ``bypassed_hooks``; raise InputError for its first error."""
    for diagnostic in bypassed_hooks(model):
        if diagnostic.severity is Severity.ERROR:
            raise InputError(diagnostic.message, *diagnostic.notes, code=diagnostic.code)
        diagnostics.add(diagnostic)


def _hooks(module: nn.Module) -> Iterator[tuple[Severity, str, str]]:
    accelerate: Any = getattr(module, "_hf_hook", None)
    if accelerate is not None:
        yield (
            Severity.ERROR,
            f"accelerate's {type(accelerate).__name__} is",
            "capture the model before offloading is enabled: remove_hook_from_module, or load it "
            "again",
        )
    registry: Any = getattr(module, "_diffusers_hook", None)
    for hook in getattr(registry, "hooks", {}):
        yield (
            Severity.ERROR,
            f"diffusers' hook '{hook}' is",
            "capture the model before a cache or offloading is enabled: disable_cache(), or load "
            "it again",
        )
    if module._forward_hooks or module._forward_pre_hooks:
        yield (
            Severity.WARNING,
            "forward hooks that the program will not call are",
            "what they computed at capture is part of the program; remove them if it should not be",
        )
    if type(module).__module__.startswith("peft.") or any(map(module._modules.get, _ADAPTERS)):
        yield (
            Severity.WARNING,
            "an adapter that can no longer be scaled or removed is",
            "fuse it first (fuse_lora), so that its weights are compressed with the model's",
        )


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    rest = len(names) - _MOST_NAMED
    return shown if rest <= 0 else f"{shown} and {rest} more"
