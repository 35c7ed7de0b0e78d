"""Origin: where a graph came from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final


@final
@dataclass(frozen=True)
class Origin:
    """Where a graph came from, as far as a stand-in for the model needs it. All JSON.

    Attributes:
        model_class: import path of the captured class; its file's name for one of a ``model.py``.
        config: the model's configuration, or empty.
        dtype: name of the dtype the model was captured in.
        keep: name patterns that the model's own class wants in high precision
            (diffusers' ``_keep_in_fp32_modules`` and ``_skip_layerwise_casting_patterns``).
        repairs: what capture had to change in the forward, one sentence each.
    """

    model_class: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    keep: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


def source_module(path: Path) -> str:
    """Name that a user's file is imported under: one of its own, wherever the file lies."""
    digest = hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]
    return f"_vdqc_source_{path.stem}_{digest}"


def class_path(cls: type) -> str:
    """Import path of ``cls``, the same wherever a user's file lies."""
    module = re.sub(r"^_vdqc_source_(.*)_[0-9a-f]{8}$", r"\1", cls.__module__)
    return f"{module}.{cls.__qualname__}"
