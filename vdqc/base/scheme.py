"""How tensors are quantised, in words: ``int4/group64``, ``w4a8-g64``, ``svg{density=0.25}``.

Every class here prints as the text it parses from; that text is what recipes, the printed IR,
reports and cache keys use.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self, final

from vdqc.base.diagnostics import ConfigError


@final
@dataclass(frozen=True)
class QDtype:
    """A storage format: ``bits`` wide integers from ``qmin`` to ``qmax``, or a small float.

    Symmetric signed ranges leave out the most negative code (int8: -127 ... 127), so that negation
    is exact and products of two codes keep one sign of headroom.
    """

    name: str
    bits: int
    qmin: int
    qmax: int
    is_float: bool = False

    @staticmethod
    def parse(text: str) -> QDtype:
        """``int1`` ... ``int8`` or ``fp8_e4m3``."""
        if text not in QDTYPES:
            raise ConfigError(f"unknown quantised dtype '{text}'", f"known: {', '.join(QDTYPES)}")
        return QDTYPES[text]

    def __str__(self) -> str:
        return self.name


QDTYPES: Mapping[str, QDtype] = {
    **{f"int{b}": QDtype(f"int{b}", b, 1 - 2 ** (b - 1), 2 ** (b - 1) - 1) for b in range(1, 9)},
    "fp8_e4m3": QDtype("fp8_e4m3", 8, -448, 448, is_float=True),
}


class GranularityKind(enum.StrEnum):
    """What shares one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    TOKEN = "token"
    GROUP = "group"


@final
@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale, for a tensor whose last axis is the one a GEMM reduces.

    ========== ================= ===========================
    granularity tensor            scale
    ========== ================= ===========================
    tensor      ``[..., K]``      ``[]``
    channel     ``[N, K]``        ``[N, 1]`` (rows of a weight)
    token       ``[..., T, K]``   ``[..., T, 1]``
    group64     ``[N, K]``        ``[N, K / 64]``
    ========== ================= ===========================
    """

    kind: GranularityKind
    size: int = 0

    @staticmethod
    def parse(text: str) -> Granularity:
        """``tensor``, ``channel``, ``token`` or ``group<size>``."""
        if match := re.fullmatch(r"group([1-9]\d*)", text):
            return PerGroup(int(match[1]))
        if text in ("tensor", "channel", "token"):
            return Granularity(GranularityKind(text))
        raise ConfigError(f"unknown granularity '{text}'", "known: tensor, channel, token, group64")

    def __str__(self) -> str:
        return f"{self.kind}{self.size or ''}"


PerTensor = Granularity(GranularityKind.TENSOR)
PerChannel = Granularity(GranularityKind.CHANNEL)
PerToken = Granularity(GranularityKind.TOKEN)


def PerGroup(size: int) -> Granularity:
    """Runs of ``size`` neighbours along the reduced axis share a scale."""
    return Granularity(GranularityKind.GROUP, size)


#: How many binary planes a weight can have, as text.
PLANES = ("1", "2")


@final
@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantised: ``int8/token/dynamic``, ``int4/group64/asym``.

    ``planes`` are binary: +a or -a for each element, a for each scale, that stand for what the
    integers before them leave (``int2+1/channel``; see ``vdqc.base.planes``). Weights only.
    """

    dtype: QDtype
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    planes: int = 0

    def __post_init__(self) -> None:
        if self.dtype.bits == 1 and self.symmetric:
            raise ConfigError("one bit is two levels, and 0 is one of them: expected asymmetric")
        if self.planes and (self.dtype.is_float or self.dynamic):
            raise ConfigError("binary planes go with integer weights")
        if self.dtype.is_float and not self.symmetric:
            raise ConfigError(f"{self.dtype} has no zero point: expected symmetric")
        if self.granularity.kind is GranularityKind.TOKEN and not self.dynamic:
            raise ConfigError("a scale per token is computed at run time: expected dynamic")

    @property
    def qmin(self) -> int:
        """Lowest code; an asymmetric range is unsigned, so that it starts at 0."""
        return self.dtype.qmin if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Highest code; 15 for asymmetric int4, 7 for symmetric."""
        return self.dtype.qmax if self.symmetric else 2**self.dtype.bits - 1

    @property
    def bits(self) -> int:
        """Stored bits an element: of the integer and one for each plane."""
        return self.dtype.bits + self.planes

    @staticmethod
    def parse(text: str) -> QuantSpec:
        """``<dtype>[+<planes>]/<granularity>[/asym][/dynamic]``."""
        dtype, granularity, *flags = text.split("/")
        dtype, plus, planes = dtype.partition("+")
        if plus and planes not in PLANES:
            raise ConfigError(f"expected {' or '.join(PLANES)} planes in '{text}', got '{planes}'")
        if unknown := set(flags) - {"asym", "dynamic"}:
            raise ConfigError(f"unknown flag '{min(unknown)}' in '{text}'", "known: asym, dynamic")
        return QuantSpec(
            QDtype.parse(dtype),
            Granularity.parse(granularity),
            "asym" not in flags,
            "dynamic" in flags,
            int(planes or 0),
        )

    def __str__(self) -> str:
        flags = ("" if self.symmetric else "/asym") + ("/dynamic" if self.dynamic else "")
        planes = f"+{self.planes}" if self.planes else ""
        return f"{self.dtype}{planes}/{self.granularity}{flags}"


_SCHEME = re.compile(
    r"w(?P<w>[1-8])(\+(?P<planes>[12]))?a(?P<a>[4-8]|16)(?P<flags>(-(g[1-9]\d*|asym|wasym|aasym|static|tensor))*)"
)
_GRAMMAR = (
    "w<2..8>[+<1..2>]a<4..8|16>[-g<size>][-asym|-wasym|-aasym][-tensor][-static] "
    "(w1 with -asym or -wasym), w8a8, fp8, none"
)


@final
@dataclass(frozen=True)
class QuantScheme:
    """How one site is quantised: ``w8a8``, ``w4a8-g64``, ``w3a6-asym``, ``w8a8-static``, ``none``.

    ``weight`` is per output channel unless ``-g<size>`` asks for groups along its input channels;
    ``input`` is per token and dynamic unless ``-tensor`` (one scale, dynamic) or ``-static`` (one
    scale, from calibration); ``a16`` leaves it in float. ``-asym`` gives both a zero point,
    ``-wasym`` and ``-aasym`` one of them. ``w2+1`` is a weight of two bits and a binary plane.
    """

    weight: QuantSpec | None
    input: QuantSpec | None
    text: str = field(compare=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The scheme that ``text`` spells; raises ConfigError with the grammar."""
        if text == "none":
            return cls(None, None, text)
        if text == "fp8":
            e4m3 = QDTYPES["fp8_e4m3"]
            return cls(QuantSpec(e4m3, PerChannel), QuantSpec(e4m3, PerToken, dynamic=True), text)
        match = _SCHEME.fullmatch(text)
        if match is None:
            raise ConfigError(f"unknown scheme '{text}'", f"expected {_GRAMMAR}")
        flags = match["flags"].split("-")[1:]
        groups = [int(flag[1:]) for flag in flags if flag.startswith("g")]
        if len(groups) > 1:
            raise ConfigError(f"scheme '{text}' names two group sizes", f"expected {_GRAMMAR}")
        symmetric = not {"asym", "wasym"} & set(flags)
        if symmetric and match["w"] == "1":
            message = f"scheme '{text}': one bit needs a zero point (-asym or -wasym)"
            raise ConfigError(message, f"expected {_GRAMMAR}")
        weight = QuantSpec(
            QDTYPES[f"int{match['w']}"],
            PerGroup(groups[0]) if groups else PerChannel,
            symmetric,
            planes=int(match["planes"] or 0),
        )
        if match["a"] == "16":
            return cls(weight, None, text)
        per_tensor = {"tensor", "static"} & set(flags)
        activation = QuantSpec(
            QDTYPES[f"int{match['a']}"],
            PerTensor if per_tensor else PerToken,
            symmetric=not {"asym", "aasym"} & set(flags),
            dynamic="static" not in flags,
        )
        return cls(weight, activation, text)

    @property
    def is_none(self) -> bool:
        """True where the site stays in float."""
        return self.weight is None and self.input is None

    def __str__(self) -> str:
        return self.text


@final
@dataclass(frozen=True)
class SparsitySpec:
    """How one attention site is thinned out: a mask policy and the share of blocks it keeps."""

    policy: str
    density: float

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"density must be in (0, 1], got {self.density}")

    def __str__(self) -> str:
        return f"{self.policy}{{density={self.density:g}}}"
