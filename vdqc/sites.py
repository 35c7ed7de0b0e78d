"""One row per site: what it is, how it is quantised, what runs there; reports list them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, final

from vdqc.base.packing import stored_bytes
from vdqc.base.scheme import QuantScheme
from vdqc.engine.pass_manager import PassRecord
from vdqc.ir.blocks import block_name
from vdqc.ir.graph import Graph
from vdqc.ir.printer import print_type
from vdqc.ir.site import Site, SiteKind
from vdqc.lowering.select import KernelChoice


@final
@dataclass(frozen=True)
class SiteRow:
    """What is known of one site; None where it was not measured or does not apply.

    Attributes:
        block: the repeated block that the site is in, or "".
        shape: of its weight, or of the query for attention, as the printed IR writes it.
        kernel: what runs there, and ``why`` it was chosen; ``runner_up`` is what came second.
        predicted_us: what the cost model says for the probe, in microseconds.
        weight_sqnr_db: quantised weight against the weight that entered the quantiser.
        bits: stored bits a weight; scales, zero points and branches included.
    """

    name: str
    kind: str
    role: str
    block: str
    shape: str
    scheme: str
    kernel: str = ""
    why: str = ""
    runner_up: str = ""
    predicted_us: float | None = None
    weight_sqnr_db: float | None = None
    bits: float | None = None
    bytes: int | None = None
    bytes_float: int | None = None

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SiteRow:
        """The row that an artifact's manifest holds; infinities are texts there."""
        sqnr = data["weight_sqnr_db"]
        return SiteRow(**{**data, "weight_sqnr_db": None if sqnr is None else float(sqnr)})

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary of the fields."""
        return asdict(self)


def site_rows(graph: Graph, records: Sequence[PassRecord] = ()) -> list[SiteRow]:
    """Rows for every site of a graph that is not lowered yet, in program order."""
    quantised: dict[str, dict[str, Any]] = {}
    branches: dict[str, int] = {}
    for record in records:
        for name, facts in record.facts.get("sites", {}).items():
            quantised.setdefault(name, {}).update(facts)
        for name, facts in record.facts.get("branches", {}).items():
            branches[name] = branches.get(name, 0) + facts["bytes"]
    return [
        _with_branch(_row(site, quantised.get(site.name, {})), branches.get(site.name, 0))
        for site in graph.sites()
    ]


def with_kernels(rows: Sequence[SiteRow], choices: Sequence[KernelChoice]) -> list[SiteRow]:
    """``rows`` with what runs each site, and what it stores once it is lowered."""
    chosen = {choice.site: choice for choice in choices}
    return [_chosen(row, chosen[row.name]) if row.name in chosen else row for row in rows]


def _chosen(row: SiteRow, choice: KernelChoice) -> SiteRow:
    is_stored = choice.bytes is not None
    return replace(
        row,
        kernel=choice.kernel,
        why=choice.why,
        runner_up=choice.runner_up,
        predicted_us=choice.predicted_us,
        bytes=choice.bytes if is_stored else row.bytes,
        bits=choice.bits if is_stored else row.bits,
    )


def _row(site: Site, facts: Mapping[str, Any]) -> SiteRow:
    value = (site.input if site.kind is SiteKind.ATTENTION else site.weight).meta["val"]
    has_weight = site.kind is not SiteKind.ATTENTION
    bytes_float = int(value.numel()) * value.dtype.itemsize if has_weight else None
    predicted = predicted_bytes(tuple(value.shape), site.scheme) if has_weight else None
    return SiteRow(
        name=site.name,
        kind=str(site.kind),
        role=site.role,
        block=block_name(site.node),
        shape=print_type(value),
        scheme=str(site.scheme) if site.scheme is not None else "",
        weight_sqnr_db=facts.get("sqnr_db"),
        bits=facts.get("bits_per_weight"),
        bytes=facts.get("bytes", predicted or bytes_float),
        bytes_float=bytes_float,
    )


def _with_branch(row: SiteRow, extra: int) -> SiteRow:
    """``row`` with the bytes of a branch beside its weight, which count as bits of the weight."""
    if not extra or row.bytes is None:
        return row
    bits = None if row.bits is None else round(row.bits * (row.bytes + extra) / row.bytes, 3)
    return replace(row, bytes=row.bytes + extra, bits=bits)


def predicted_bytes(shape: tuple[int, ...], scheme: QuantScheme | None) -> int | None:
    """Packed codes, float32 scales and zero points of a weight ``[N, K]``; None if it is float."""
    if scheme is None or scheme.weight is None or len(shape) != 2:
        return None
    return stored_bytes(*shape, scheme.weight)
