"""Which scheme each row of a weight gets, and the schemes of other widths that there are for it.

::

    w4a8  ->  w3a8, w4a8, w5a8            a bit fewer, as it is, one more
    w4a8  ->  w3a8, w3+1a8, w3+2a8        a bit fewer, with 0, 1 or 2 binary planes

Error: InputError for a width that no scheme has.
Source: Feng et al., MPQ-DM, arXiv 2412.11549 (widths); Feng et al., MPQ-DMv2, arXiv 2507.04290,
figure 2 (planes).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.base.packing import stored_bytes
from vdqc.base.scheme import QuantScheme, QuantSpec
from vdqc.ir.site import Site


@final
@dataclass(frozen=True)
class Plan:
    """What the rows of one weight get: ``parts`` are (scheme, rows), all rows once."""

    parts: tuple[tuple[str, Tensor], ...]
    error_to_uniform: float
    moved: int

    @staticmethod
    def of(
        forms: Sequence[Sequence[str]],
        form: Tensor,
        order: Tensor,
        error: float,
        plain: float,
        moved: int,
    ) -> Plan:
        """Rows that have one scheme together, schemes by bits."""
        rows: dict[str, list[int]] = {}
        for row, (f, o) in enumerate(zip(form.tolist(), order.tolist(), strict=True)):
            rows.setdefault(forms[f][o], []).append(row)
        ordered = sorted(rows, key=lambda text: (_weight_bits(text), "+" in text))
        parts = tuple((text, torch.tensor(rows[text])) for text in ordered)
        return Plan(parts, error / plain if plain > 0 else 1.0, moved)

    @property
    def is_mixed(self) -> bool:
        """True if rows differ."""
        return len(self.parts) > 1

    def facts(self, site: Site) -> dict[str, Any]:
        """What reports tell: bits before and with scales, and how the output error changes."""
        rows, width = site.weight.meta["val"].shape
        nominal = sum(_weight_bits(text) * len(r) for text, r in self.parts) / rows
        stored = 0
        for text, r in self.parts:
            spec = QuantScheme.parse(text).weight
            assert spec is not None
            stored += stored_bytes(len(r), width, spec)
        return {
            "rows": {text: len(r) for text, r in self.parts},
            "tenths_moved": self.moved,
            "mean_bits": round(nominal, 4),
            "effective_bits": round(8 * stored / (rows * width), 3),
            "error_to_uniform": round(self.error_to_uniform, 4),
        }


def spec_of(site: Site) -> QuantSpec:
    """How the weight of ``site`` is quantised."""
    assert site.scheme is not None
    assert site.scheme.weight is not None
    return site.scheme.weight


def narrowed(site: Site, bits: int) -> str:
    """The scheme of ``site`` with weights of ``bits``; raises InputError if there is none."""
    if not 1 <= bits <= 8:
        raise InputError(
            f"rows of {site.scheme} would get {bits} bits, expected 1 ... 8",
            "give it a scheme with weights of 2 to 7 bits, or leave it out with select",
            site=site.name,
        )
    text = re.sub(r"^w\d", f"w{bits}", str(site.scheme))
    if bits == 1 and spec_of(site).symmetric:
        raise InputError(
            f"rows of {site.scheme} would get one bit, which needs a zero point",
            f"say {site.scheme}-wasym (or -asym)",
            site=site.name,
        )
    return text


def with_planes(scheme: str, planes: int) -> str:
    """``scheme`` with binary planes beside its weights."""
    return re.sub(r"^(w\d)", rf"\1+{planes}", scheme)


def _weight_bits(scheme: str) -> int:
    spec = QuantScheme.parse(scheme).weight
    assert spec is not None
    return spec.bits
