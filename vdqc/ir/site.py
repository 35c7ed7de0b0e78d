"""Sites: the named places of a graph that recipes address, reports list and diagnostics point at.

A site is one linear, one attention or one convolution, named by its module path
(``blocks.3.attn1.to_q``, ``blocks.3.attn1:attention``); ``#2`` marks the second call of one module.
What passes know about a node lives in ``node.meta["custom"]["vdqc"]``, the only metadata that
``torch.export`` carries through.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.base.scheme import QuantScheme


class SiteKind(enum.StrEnum):
    """What a site computes."""

    LINEAR = "linear"
    ATTENTION = "attention"
    CONV = "conv"


_aten = torch.ops.aten
SITE_KINDS: dict[Any, SiteKind] = {
    _aten.linear.default: SiteKind.LINEAR,
    _aten.scaled_dot_product_attention.default: SiteKind.ATTENTION,
    _aten.conv1d.default: SiteKind.CONV,
    _aten.conv2d.default: SiteKind.CONV,
    _aten.conv3d.default: SiteKind.CONV,
    _aten.conv1d.padding: SiteKind.CONV,  # padding by name
    _aten.conv2d.padding: SiteKind.CONV,
    _aten.conv3d.padding: SiteKind.CONV,
}


def note(node: fx.Node) -> Mapping[str, Any]:
    """What vdqc knows about ``node``; written by ``set_note`` only.

    Keys in use: ``site`` (name), ``kind``, ``scheme`` (text), ``role`` (what annotate found),
    ``origin`` (text of the pass that made the node); ``partial`` (the site's node computes only a
    part of its value), ``whole`` (name of the site whose value this node puts together), ``rows``
    (it is some rows of a linear), ``branch`` and ``inside`` (it has a branch beside it, or inside
    the quantiser of its weight), and ``basis`` (the site's output is ``rotated``, ``scaled`` or
    both for its readers, or its channels are in another order: ``halves{64}``, pairs of each 64
    taken apart).
    """
    entries: Mapping[str, Any] = node.meta.get("custom", {}).get("vdqc", {})
    return entries


def set_note(node: fx.Node, **entries: Any) -> None:
    """Add entries to ``node``'s note without touching nodes that its metadata was copied from."""
    merged = {**node.meta.get("custom", {}).get("vdqc", {}), **entries}
    node.meta["custom"] = {**node.meta.get("custom", {}), "vdqc": merged}


@final
@dataclass(frozen=True)
class Site:
    """One place; ``node`` computes it in the present graph."""

    name: str
    kind: SiteKind
    node: fx.Node
    scheme: QuantScheme | None
    role: str = ""

    @property
    def input(self) -> fx.Node:
        """The activation that enters (the query, for attention)."""
        return self._operand(0)

    @property
    def weight(self) -> fx.Node:
        """The weight operand: a ``get_attr``, or the expression passes built on one."""
        if self.kind is SiteKind.ATTENTION:
            raise ValueError(f"{self.name} is attention and has no weight")
        return self._operand(1)

    @property
    def bias(self) -> fx.Node | None:
        """The bias operand, if there is one."""
        bias = self.node.args[2] if len(self.node.args) > 2 else self.node.kwargs.get("bias")
        return bias if isinstance(bias, fx.Node) else None

    def _operand(self, index: int) -> fx.Node:
        operand = self.node.args[index]
        assert isinstance(operand, fx.Node), f"{self.name}: operand {index} is {operand!r}"
        return operand

    def __str__(self) -> str:
        return self.name
