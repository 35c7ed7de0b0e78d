"""The report is one well-formed page that holds what it was given, escaped, and fetches nothing."""

import json
import math
import re
import runpy
import struct
import zlib
from pathlib import Path

import pytest
import torch

from vdqc import report
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.check_result import CheckResult
from vdqc.ir.blocks import block_of
from vdqc.report import charts, heat, png
from vdqc.report.mask_data import picture, policy_pictures
from vdqc.report.page import Html, tag
from vdqc.report.program import block_lines
from vdqc.text import columns, count, decibel, duration, shortened, size

DATA = runpy.run_path(str(Path(__file__).with_name("report_data.py")))
EVIL, parse = DATA["EVIL"], DATA["parse"]
comparison, example, sparse = DATA["comparison"], DATA["example"], DATA["sparse"]


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
    assert len(pictures) == 4  # three strips and their loop
    assert "Worst at timestep 500: 34.0 dB, 2.00%" in structure.text
    assert "2.00×" in structure.text
    assert "free-running" in structure.text


SECTIONS = (
    "The same seed, float and compiled",
    "Error along the trajectory",
    "Error by site and timestep",
    "Passes",
    "Bits, size and time by layer",
    "Attention masks",
    "Sites",
    "Kernels",
    "Diagnostics",
    "The program, before and after",
)


def test_every_section_is_there_and_a_large_model_gives_a_small_page():
    data = sparse(example(layers=40), layers=40, heads=40)
    check = comparison(steps=100, layers=40, frames=(2, 3, 21, 120, 208))
    page = report.render(data, check)
    structure = parse(page)
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert tuple(headings) == SECTIONS
    assert len(page) < 8_000_000
    assert "Not measured: attn1.to_v (40×)" in " ".join(structure.text.split())
    # beyond one row per layer, nothing grows: without pictures
    without = CheckResult(check.steps, (), (), 1, 1, sites=check.sites)
    assert len(report.render(data, without)) < 1_500_000


def test_a_block_is_chosen_by_name():
    data = example(layers=3)
    assert "The block blocks.0;" in report.render(data)
    page = report.render(data, block="blocks.2")
    assert "# site blocks.2.ffn.net.2" in page
    assert "# site blocks.1.ffn.net.2" not in page.partition("before and after")[2]
    with pytest.raises(ConfigError, match=r"did you mean 'blocks\.1'"):
        report.render(data, block="block.1")


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("blocks.3.attn1.to_q", "blocks.3"),
        ("blocks.3:attention", "blocks.3"),
        ("unet.down.0.attn.1:attention#2", "unet.down.0"),
        ("proj_out", ""),
        ("embedder.linear_1", ""),
    ],
)
def test_the_block_of_a_site_is_in_its_name(name, block):
    assert block_of(name) == block


def test_lines_of_a_block_hold_all_of_its_sites_and_no_other():
    lines = block_lines(example(layers=3).ir["00_captured"], "blocks.1")
    sites = [line.partition("# site ")[2] for line in lines if "# site" in line]
    assert len(sites) == 10
    assert all(site.startswith("blocks.1.") for site in sites)


@pytest.mark.parametrize(
    ("shape", "pictures"),
    [
        ((2, 3, 16, 16), 6),  # images: no loop
        ((1, 4, 3, 16, 16), 4),  # latents: the first channel
        ((3, 7), 0),
        ((2, 5, 11), 0),
        ((0, 3, 4, 8, 8), 0),
    ],
)
def test_outputs_that_are_no_videos_leave_the_page_whole(shape, pictures):
    structure = parse(report.render(example(), comparison(frames=shape)))
    assert sum(name == "img" for name, _ in structure.tags) == pictures


def test_masks_are_drawn_for_every_head_and_layer():
    structure = parse(report.render(sparse(example(layers=3), layers=3, heads=4)))
    masks = [a["alt"] for name, a in structure.tags if name == "img"]
    assert masks == [
        "mask: spatial band, 25%",
        "mask: spatial band, 50%",
        "mask: temporal band, 25%",
        "mask: temporal band, 50%",
    ]
    titles = [a["title"] for name, a in structure.tags if name == "td" and "title" in a]
    assert len(titles) == 3 * 4
    assert "blocks.1.attn1:attention, head 0: temporal band, density 0.25" in titles


def test_masks_of_calls_are_drawn_from_the_check():
    data = sparse(example(layers=20), layers=20, heads=16, online=True)
    assert "vdqc check --report draws" in report.render(data)
    page = report.render(data, comparison(layers=20, heads=16))
    shown = [a for name, a in parse(page).tags if name == "img" and "mask" in a["alt"]]
    assert len(shown) == 7 * 12  # every third layer, twelve heads


def test_a_picture_of_a_mask_is_in_the_order_of_the_video():
    rows = sparse(example(layers=1), layers=1, heads=4).masks
    pictures = policy_pictures(rows[0])
    spatial, temporal = pictures["spatial_band@0.25"][0], pictures["temporal_band@0.25"][0]
    assert spatial.shape == (96, 96)
    for image in (spatial, temporal):
        assert float(image.mean()) == pytest.approx(0.25, abs=0.02)
        assert float(image.diagonal().mean()) > 0.95
    # 8 frames: one frame away the temporal band is on, the spatial band is not
    assert float(temporal.diagonal(36).mean()) > 0.9
    assert float(spatial.diagonal(36).mean()) == 0
    kept = torch.tensor([[True, False], [False, True]])
    assert picture(kept, torch.tensor([3, 1, 0, 2]), 2)[0].tolist() == [
        [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1],
    ]  # fmt: skip


def test_the_levels_of_a_heat_map_cover_all_values():
    values = [10.1, 12.0, 18.7, 24.9, math.inf]
    scale = heat.Scale.over(values)
    levels = [scale.level(value) for value in values]
    assert levels == sorted(levels)
    assert (levels[0], levels[-1]) == (0, heat.LEVELS - 1)
    assert heat.Scale.over([math.inf]).level(math.inf) == heat.LEVELS - 1
    drawn = heat.panel(heat.Panel("p", ("0", "1"), ((10.0, 10.0, None), (25.0, 30.0, None))),
                       scale, "a", "b")  # fmt: skip
    parse(drawn)
    assert len(re.findall(r"M[\d.]+ ", drawn)) == 2 + (scale.level(25.0) != scale.level(30.0))


def test_a_check_reads_back_from_its_json():
    check = comparison(steps=3, layers=2)
    found = CheckResult.from_json(json.loads(json.dumps(check.to_json())))
    assert found.steps == check.steps
    assert found.sites[-1] == check.sites[-1]  # infinities
    assert [error.why for error in found.sites] == [error.why for error in check.sites]
    assert found.times == check.times
    with pytest.raises(InputError, match="vdqc check writes"):
        CheckResult.from_json({"steps": [{"call": 0}]})
    with pytest.raises(InputError, match="vdqc check writes"):
        CheckResult.from_json([])


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


def test_a_loop_holds_every_frame():
    video = torch.rand(3, 4, 5, 6)
    data = png.encode_loop(video, 8)
    assert data.count(b"fcTL") == 4
    assert data.count(b"fdAT") == 3
    frames, plays = struct.unpack(">II", re.search(rb"acTL(.{8})", data, re.S)[1])
    assert (frames, plays) == (4, 0)


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


def test_a_long_text_loses_its_middle() -> None:
    assert shortened("quant", 8) == "quant"
    assert shortened("smooth{select=a|b|c}", 12) == "smoot...b|c}"
    assert all(len(shortened("x" * length, 10)) <= 10 for length in range(30))
