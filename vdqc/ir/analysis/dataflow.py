"""What values mean: residual adds, norm + modulation, and the operands of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import fx

from vdqc.ir.graph import Graph
from vdqc.ir.site import Site


@final
@dataclass(frozen=True)
class NormModulation:
    """``norm(x)`` or ``norm(x) * (1 + scale) + shift``: what linears of a block read.

    Attributes:
        norm: the layer_norm, rms_norm or group_norm node.
        scale: the factor as it enters the multiply (usually ``1 + s``), or None.
        shift: the value added, or None.
        result: the last node of the chain (``norm`` itself if it is bare).
    """

    norm: fx.Node
    scale: fx.Node | None
    shift: fx.Node | None
    result: fx.Node


@final
@dataclass(frozen=True)
class AttentionOperands:
    """What one attention site reads and who reads it.

    Attributes:
        query, key, value: names of the linear sites that produce each operand (several where
            streams are concatenated: video first or text first, in cat order).
        out: names of the linear sites that read the result through reshapes, slices and cats.
        qk_norm: the norm nodes between the linears and the attention.
        rope: True where query and key are multiplied by position tables on the way.
        cross: True if key and value come from other tokens than the query.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    out: tuple[str, ...]
    qk_norm: tuple[fx.Node, ...]
    rope: bool
    cross: bool


def residual_adds(graph: Graph) -> list[fx.Node]:
    """Adds whose two operands both have the full extent of the result on a path of blocks."""
    return []


def norm_modulations(graph: Graph) -> list[NormModulation]:
    """Every normalisation with what modulates it, in program order."""
    return []


def attention_operands(graph: Graph, site: Site) -> AttentionOperands:
    """Producers and readers of an attention site, found by walking the values."""
    return AttentionOperands((), (), (), (), (), False, False)
