"""Origin: where a graph came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final


@final
@dataclass(frozen=True)
class Origin:
    """Where a graph came from, as far as a stand-in for the model needs it. All JSON.

    Attributes:
        model_class: import path of the captured class.
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
