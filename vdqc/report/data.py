"""What the report shows, read from an artifact's manifest and printed IR."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from vdqc.engine.pass_manager import PassRecord
from vdqc.ir.artifact import Artifact
from vdqc.report.mask_data import MaskRow, mask_rows
from vdqc.sites import SiteRow


@final
@dataclass(frozen=True)
class ReportData:
    """One compilation. ``ir`` maps the name of each step to the printed graph, in order."""

    name: str
    model_class: str
    dtype: str
    target: str
    recipe: str
    rules: tuple[str, ...]
    records: tuple[PassRecord, ...]
    sites: tuple[SiteRow, ...]
    diagnostics: tuple[Mapping[str, Any], ...]
    ir: Mapping[str, str]
    versions: Mapping[str, str]
    bytes_float: int
    bytes_compiled: int
    seed: int = 0
    masks: tuple[MaskRow, ...] = ()

    @property
    def sqnr_db(self) -> float | None:
        """Fidelity of the finished program on the probe; None if nothing was probed."""
        return self.records[-1].sqnr_db if self.records else None

    @property
    def seconds(self) -> float:
        """Time of all passes and of lowering."""
        return sum(record.seconds for record in self.records)

    @property
    def quantised(self) -> list[SiteRow]:
        """Sites whose weight is stored in fewer bits."""
        return [row for row in self.sites if row.bits is not None]

    @property
    def effective_bits(self) -> float | None:
        """Stored bits a weight over all quantised sites, scales included."""
        return weighted_bits(self.quantised)


def weighted_bits(rows: Iterable[SiteRow]) -> float | None:
    """Stored bits a weight over those of ``rows`` that are quantised; None if none is."""
    stored = [(row.bytes or 0, row.bits) for row in rows if row.bits]
    weights = sum(8 * size / bits for size, bits in stored)
    return 8 * sum(size for size, _ in stored) / weights if weights else None


def report_data(artifact: Artifact) -> ReportData:
    """What ``compile`` left in an artifact."""
    manifest, facts = artifact.manifest, artifact.manifest["facts"]
    return ReportData(
        name=facts["name"],
        model_class=artifact.origin.model_class,
        dtype=artifact.origin.dtype,
        target=manifest["target"],
        recipe=manifest["recipe"],
        rules=tuple(manifest["rules"]),
        records=artifact.records,
        sites=tuple(SiteRow.from_json(entry) for entry in facts["sites"]),
        diagnostics=tuple(manifest["diagnostics"]),
        ir=artifact.ir,
        versions=manifest["versions"],
        bytes_float=facts["bytes_float"],
        bytes_compiled=manifest["weights"]["bytes"],
        seed=facts["seed"],
        masks=mask_rows(artifact),
    )
