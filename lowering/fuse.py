"""Exact rewrites on the way to kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from vdqc.ir.graph import Graph


@final
@dataclass(frozen=True)
class RowOrder:
    """Order in which a site's output channels are wanted: new channel i is old ``rows[i]``."""

    rows: Tensor


def reorder_rope(graph: Graph) -> dict[str, RowOrder]:
    """Row orders by site."""
    return {}
