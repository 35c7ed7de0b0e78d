"""Which mask an attention gets, as text: ``svg{density=0.25}``, ``tile{density=0.3,block=64}``.

======== ================================ =====================================================
policy   masks that a head may get         chosen
======== ================================ =====================================================
svg      spatial band, temporal band       per head: calibrated, or online from 64 queries
spatial  spatial band                      always
temporal temporal band                     always
tile     sliding 3-D tile                  always
radial   windows that shrink with frames   always
topk     the best blocks by their means    per call, head and query block
mass     blocks up to a probability        per call, head and query block; density: at least
dense    everything                        always
======== ================================ =====================================================

Several densities, ``svg{density=0.1/0.25/1}``, are levels: the masks of a head are then every mask
at every level, level by level, and calibration gives each head one of them.

Source: see ``vdqc.base.mask_policies`` and ``vdqc.base.video_mask``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from vdqc.base.diagnostics import ConfigError, nearest

#: Policy to the static masks that a head may get; none for those that look at queries and keys.
MASKS: dict[str, tuple[str, ...]] = {
    "svg": ("spatial_band", "temporal_band"),
    "spatial": ("spatial_band",),
    "temporal": ("temporal_band",),
    "tile": ("sliding_tile",),
    "radial": ("radial",),
    "topk": (),
    "mass": (),
    "dense": (),
}

_TEXT = re.compile(r"(?P<name>\w+)\{(?P<options>[^{}]*)\}")
_EXAMPLE = "expected e.g. svg{density=0.25} or mass{density=0.1,mass=0.6,block=64}"


@final
@dataclass(frozen=True)
class MaskPolicy:
    """One policy with its numbers; ``str`` is the text that ``parse`` reads.

    Attributes:
        densities: share of block pairs that are computed, one per level, ascending.
        block: tokens of a query block and of a key block.
        sinks: leading frames that every query attends to.
        mass: probability that ``mass`` reaches.
    """

    name: str
    densities: tuple[float, ...]
    block: int = 128
    sinks: int = 0
    mass: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in MASKS:
            raise ConfigError(f"unknown mask policy '{self.name}'", nearest(self.name, MASKS))
        if not self.densities or not all(0 < d <= 1 for d in self.densities):
            raise ConfigError(f"expected densities in (0, 1], got {list(self.densities)}")
        if len(self.densities) > 1 and not MASKS[self.name]:
            raise ConfigError(f"policy '{self.name}' has one density, got {list(self.densities)}")
        if self.block < 1 or self.sinks < 0:
            raise ConfigError(f"expected block >= 1 and sinks >= 0, got {self.block}, {self.sinks}")
        if (self.name == "mass") != (self.mass != 0) or not 0 <= self.mass <= 1:
            raise ConfigError(f"policy 'mass' alone has a mass in (0, 1], got {self.mass:g}")

    @staticmethod
    def parse(text: str) -> MaskPolicy:
        """The policy that ``text`` spells; raises ConfigError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ConfigError(f"cannot read the mask policy '{text}'", _EXAMPLE)
        pairs = dict(item.split("=", 1) for item in match["options"].split(",") if "=" in item)
        try:
            return MaskPolicy(
                match["name"],
                tuple(float(part) for part in pairs.pop("density", "1").split("/")),
                int(pairs.pop("block", "128")),
                int(pairs.pop("sinks", "0")),
                float(pairs.pop("mass", "0")),
                **pairs,  # whatever is left is refused
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"cannot read the mask policy '{text}'", _EXAMPLE) from error

    @property
    def looks(self) -> bool:
        """True if the mask depends on what is in queries and keys, whatever the heads are."""
        return self.name in ("topk", "mass")

    @property
    def masks(self) -> list[tuple[str, float]]:
        """Static masks that a head may get, with their density, level by level."""
        return [(mask, density) for density in self.densities for mask in MASKS[self.name]]

    @property
    def reorders(self) -> bool:
        """True if some head's tokens must change places for its mask to be made of blocks."""
        return bool({"temporal_band", "sliding_tile"} & set(MASKS[self.name]))

    def __str__(self) -> str:
        density = "/".join(f"{d:g}" for d in self.densities)
        extra = "".join(
            f",{name}={text}"
            for name, text, default in (
                ("block", f"{self.block}", "128"),
                ("sinks", f"{self.sinks}", "0"),
                ("mass", f"{self.mass:g}", "0"),
            )
            if text != default
        )
        return f"{self.name}{{density={density}{extra}}}"
