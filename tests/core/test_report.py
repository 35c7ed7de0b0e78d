"""The report is one well-formed page that holds what it was given, escaped, and fetches nothing."""

import math
import re
import zlib
from html.parser import HTMLParser

import pytest
import torch

from vdqc import report
from vdqc.base.diagnostics import InputError
from vdqc.check import CheckResult, StepError, Timing, VideoQuality
from vdqc.engine.pass_manager import PassRecord
from vdqc.ir.graph import Stage
from vdqc.report import charts, png
from vdqc.report.data import ReportData
from vdqc.report.page import Html, tag
from vdqc.sites import SiteRow
from vdqc.text import columns, count, decibel, duration, size

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


def example(word: str = "plain") -> ReportData:
    records = (
        PassRecord(f"rotate{{note={word}}}", True, Stage.ANNOTATED, 0.5, 4, 1e-7, 120.0),
        PassRecord("quant", False, Stage.COMPRESSED, 1.0, 4, 8e-3, 41.5, {word: {"k": [1.5]}}),
    )
    row = SiteRow(
        name=word,
        kind="linear",
        role=word,
        block="blocks.0",
        shape="f32[8, 8]",
        scheme="w8a8",
        kernel="int8_linear",
        why=word,
        predicted_us=4.0,
        weight_sqnr_db=40.0,
        bits=8.5,
        bytes=68,
        bytes_float=256,
    )
    diagnostic = {
        "severity": "warning",
        "site": word,
        "message": word,
        "code": "c",
        "notes": [word],
    }
    return ReportData(
        name=word,
        model_class=word,
        dtype="float32",
        target="cpu",
        recipe=word,
        rules=(f"*={word}",),
        records=records,
        sites=(row,),
        diagnostics=(diagnostic,),
        ir={"00_captured": f"graph {word}", "02_quant": f"graph {word}\n  %0"},
        versions={"vdqc": word},
        bytes_float=256,
        bytes_compiled=68,
    )


def comparison() -> CheckResult:
    video = torch.rand(1, 1, 4, 8, 8)
    return CheckResult(
        steps=(StepError(0, 1000.0, 0.01, 40.0), StepError(1, 500.0, 0.02, 34.0)),
        videos=(VideoQuality(0, 30.0, 0.9, 0.1, 0.1, 0.5, 1.0),),
        timings=(Timing(2.0, 1.0, 5, "eager"),),
        bytes_float=256,
        bytes_compiled=68,
        frames=(video, (video + 0.1).clamp(0, 1)),
    )


@pytest.mark.parametrize("check", [None, comparison()], ids=["compiled", "checked"])
def test_page_is_well_formed_and_self_contained(check):
    structure = parse(report.render(example(), check))
    names = {name for name, _ in structure.tags}
    assert {"html", "table", "svg", "details"} <= names
    assert not names & {"script", "link", "iframe", "object"}
    for _, attributes in structure.tags:
        for value in (attributes.get("src"), attributes.get("href")):
            assert value is None or value.startswith("data:")
    assert "41.5 dB" in structure.text
    assert "0.27×" in structure.text


def test_every_text_is_escaped():
    page = report.render(example(EVIL), comparison())
    assert EVIL not in page
    assert "<script" not in page
    assert parse(page).text.count(EVIL) >= 10


def test_comparison_shows_frames_and_each_step():
    structure = parse(report.render(example(), comparison()))
    pictures = [attributes["src"] for name, attributes in structure.tags if name == "img"]
    assert len(pictures) == 3
    assert "Worst at timestep 500: 34.0 dB, 2.00%" in structure.text
    assert "2.00×" in structure.text


def test_exact_and_lossy_are_marked():
    page = report.render(example())
    assert page.count('<span class="exact">exact</span>') == 1
    assert page.count('<span class="lossy">lossy</span>') == 1


def test_tag_escapes_attributes_and_keeps_html():
    assert tag("b", Html("<i>x</i>"), "<", title='"') == '<b title="&quot;"><i>x</i>&lt;</b>'


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (37.2, 45.9), (-3, 1000), (5, 5), (0.001, 0.0013)]
)
def test_ticks_cover_the_range_with_few_round_numbers(low, high):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 1 <= len(ticks) <= 8
    assert ticks == sorted(ticks)


def test_chart_draws_one_mark_per_finite_value():
    marks = [charts.Mark(0, 1, "a"), charts.Mark(1, 2, "<b>"), charts.Mark(2, math.inf, "c")]
    drawn = charts.chart(marks, x_label="x", y_label="y", title="t", joined=True)
    parse(drawn)
    assert drawn.count("<circle") == 2
    assert "&lt;b&gt;" in drawn
    assert "exact" in charts.chart(marks[2:], x_label="x", y_label="y", title="t")


def test_png_decodes_to_the_pixels():
    image = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])
    data = png.encode(image)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    body = re.search(rb"IDAT(.*)\x00\x00\x00\x00IEND", data, re.S)
    assert zlib.decompress(body[1][:-4]) == bytes([0, 0, 255, 0, 128, 255])
    with pytest.raises(InputError, match="expected an image"):
        png.encode(torch.zeros(2, 4, 4))


def test_strip_puts_frames_side_by_side():
    video = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 3)
    strip = png.strip(video, 2)
    assert strip.shape == (1, 2, 7)
    assert strip[0, 0].tolist() == [0, 0, 0, 0, 3, 3, 3]


def test_numbers_read_well():
    assert [size(n) for n in (12, 18_900_000, 5e12)] == ["12 B", "18.9 MB", "5e+03 GB"]
    times = [duration(s) for s in (4.1e-4, 0.0125, 3.2, 245)]
    assert times == ["410 µs", "12.5 ms", "3.2 s", "4 min 05 s"]
    assert [decibel(x) for x in (41.27, math.inf, None)] == ["41.3 dB", "exact", ""]
    assert [count(1, "site"), count(2, "site")] == ["1 site", "2 sites"]
    assert columns([["a", "10"], ["bb", "9"]], ["x", "n"], right="1") == "x    n\na   10\nbb   9"
