"""Data that the tests of the report render: small, hostile, or as large as a real model's."""

import math
from html.parser import HTMLParser

import torch

from vdqc.check_result import CheckResult, StepError, Timing, VideoQuality
from vdqc.engine.pass_manager import PassRecord
from vdqc.ir.graph import Stage
from vdqc.observe import SiteTime
from vdqc.report.data import ReportData
from vdqc.report.mask_data import MaskRow
from vdqc.site_errors import SeenMask, SiteError
from vdqc.sites import SiteRow

EVIL = "<script>alert('&')</script>"
VOID = {"meta", "img", "br"}


class Structure(HTMLParser):
    """Raises where a tag is closed that is not open; keeps tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parse(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure


PLACES = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k",
          "attn2.to_v", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2")  # fmt: skip


def example(word: str = "plain", layers: int = 1, scheme: str = "w8a8") -> ReportData:
    """One artifact; ``word`` stands wherever a text can."""
    records = (
        PassRecord(f"rotate{{note={word}}}", True, Stage.ANNOTATED, 0.5, 4, 1e-7, 120.0),
        PassRecord("quant", False, Stage.COMPRESSED, 1.0, 4, 8e-3, 41.5, {word: {"k": [1.5]}}),
    )
    diagnostic = {
        "severity": "warning",
        "site": word,
        "message": word,
        "code": "c",
        "notes": [word],
    }
    remark = {**diagnostic, "severity": "remark", "site": "", "notes": []}
    return ReportData(
        name=word,
        model_class=word,
        dtype="float32",
        target="cpu",
        recipe=word,
        rules=(f"*={scheme}",),
        records=records,
        sites=(_row(word, word, word, scheme), *_sites(layers, scheme)),
        diagnostics=(diagnostic, *[remark] * (12 * layers)),
        ir={"00_captured": _ir(word, layers), "02_quant": _ir(f"{word} %q", layers)},
        versions={"vdqc": word},
        bytes_float=256,
        bytes_compiled=68,
    )


def _row(name: str, role: str, why: str, scheme: str) -> SiteRow:
    return SiteRow(
        name=name,
        kind="linear",
        role=role,
        block="",
        shape="f32[8, 8]",
        scheme=scheme,
        kernel="int8_linear",
        why=why,
        predicted_us=4.0,
        weight_sqnr_db=40.0 if scheme == "w8a8" else 18.0,
        bits=8.5 if scheme == "w8a8" else 4.2,
        bytes=68,
        bytes_float=256,
    )


def _sites(layers: int, scheme: str) -> list[SiteRow]:
    return [
        _row(f"blocks.{layer}.{place}", place.rpartition(".")[2], "fits", scheme)
        for layer in range(layers)
        for place in PLACES
    ]


def _ir(word: str, layers: int) -> str:
    lines = [f"graph (%x: {word}) @captured {{", "  %0 = aten.sym_size(%x, 0) : s0"]
    for row in _sites(layers, "w8a8"):
        lines += [f"  %1 = aten.add(%0, %0) : {word}", f"  %2 = aten.linear(%1)  # site {row.name}"]
    return "\n".join([*lines, "}"])


def sparse(data: ReportData, layers: int, heads: int, *, online: bool = False) -> ReportData:
    """``data`` with sparse attention in every layer."""
    policy = "topk{density=0.25,block=16}" if online else "svg{density=0.25/0.5,block=16}"
    names = ("spatial_band@0.25", "temporal_band@0.25", "spatial_band@0.5", "temporal_band@0.5")
    rows = tuple(
        MaskRow(
            f"blocks.{layer}.attn1:attention",
            policy,
            0.3,
            (8, 64, 0, 0, 8),
            None if online else tuple(names[(layer + 3 * h) % 4] for h in range(heads)),
        )
        for layer in range(layers)
    )
    fields = {key: getattr(data, key) for key in data.__dataclass_fields__}
    return ReportData(**{**fields, "masks": rows})


def comparison(
    steps: int = 2,
    layers: int = 1,
    frames: tuple[int, ...] = (1, 1, 4, 8, 8),
    heads: int = 0,
) -> CheckResult:
    """A check of ``steps`` calls, whose error grows with layers and steps."""
    video = torch.rand(frames, generator=torch.Generator().manual_seed(0))
    times = [1000.0 - 500.0 * i * 2 / steps for i in range(steps)]
    return CheckResult(
        steps=tuple(
            StepError(i, t, 0.01 * (i + 1), -20 * math.log10(0.01 * (i + 1)), 0.015 * (i + 1))
            for i, t in enumerate(times)
        ),
        videos=(VideoQuality(0, 30.0, 0.9, 0.1, 0.1, 0.5, 1.0),),
        timings=(Timing(2.0, 1.0, 5, "eager"),),
        bytes_float=256,
        bytes_compiled=68,
        frames=(video, (video + 0.1).clamp(0, 1)),
        sites=(*_errors(steps, layers), SiteError("proj_out", "", "linear", (math.inf,) * steps)),
        times=tuple(
            SiteTime(f"blocks.{layer}.{place}", f"blocks.{layer}", 1e-3)
            for layer in range(layers)
            for place in PLACES
        ),
        masks={
            f"blocks.{layer}.attn1:attention": _mask(layer, heads)
            for layer in range(layers if heads else 0)
        },
    )


def _errors(steps: int, layers: int) -> list[SiteError]:
    found = []
    for layer in range(layers):
        for at, place in enumerate(PLACES):
            name, block = f"blocks.{layer}.{place}", f"blocks.{layer}"
            if place.endswith("to_v"):
                found.append(SiteError(name, block, "linear", (), "it is in another basis"))
                continue
            values = tuple(40 - layer / 2 - at - 10 * i / steps for i in range(steps))
            found.append(SiteError(name, block, "linear", values))
    return found


def _mask(layer: int, heads: int) -> SeenMask:
    random = torch.Generator().manual_seed(layer)
    kept = torch.rand(heads, 32, 32, generator=random) < 0.3
    return SeenMask(0, kept, torch.arange(512).expand(heads, -1), 16)
