"""The page that compares artifacts: figures, curves, and the sites that differ."""

import dataclasses
import json
import re
import runpy
from pathlib import Path

import pytest

from vdqc.base.diagnostics import ConfigError
from vdqc.cli import main
from vdqc.report import compare

DATA = runpy.run_path(str(Path(__file__).with_name("report_data.py")))
EVIL, parse = DATA["EVIL"], DATA["parse"]
comparison, example = DATA["comparison"], DATA["example"]


def test_figures_stand_side_by_side_and_the_best_is_bold():
    smaller = dataclasses.replace(example("b", layers=2, scheme="w4a8"), bytes_compiled=40)
    page = compare.render([example("a", layers=2), smaller], [comparison(layers=2)] * 2)
    parse(page)
    rows = dict(re.findall(r"<tr><td>([^<]*)</td>(.*?)</tr>", page))
    assert "<span>68 B</span>" in rows["weights"]
    assert "<strong>40 B</strong>" in rows["weights"]
    assert "strong" not in rows["PSNR"]
    assert page.count('class="line ') == 2
    assert "# site" not in page


def test_sites_that_differ_most_come_first():
    one, other = example("a", layers=3), example("b", layers=3)
    rows = list(other.sites)
    for at, value in ((4, 12.0), (7, 31.0)):
        rows[at] = dataclasses.replace(rows[at], weight_sqnr_db=value)
    other = dataclasses.replace(other, sites=tuple(rows[:-1]))
    page = compare.render([one, other])
    last = page.partition("Differences, site by site")[2]
    names = re.findall(r'<span class="mono">(.*?)</span>', last)
    assert names[:2] == [rows[4].name, rows[7].name]
    assert "3 sites are not in all of them" in last
    same = compare.render([one, one])
    assert "Every shared site is the same" in same


def test_texts_are_escaped():
    page = compare.render([example(EVIL), example(EVIL)], [comparison(), comparison()])
    assert "<script" not in page
    parse(page)


def test_wrong_numbers_are_told():
    with pytest.raises(ConfigError, match="2 to 7 artifacts"):
        compare.render([example()] * 8)
    with pytest.raises(ConfigError, match="one --check for each"):
        compare.render([example()] * 2, [comparison()])


def test_the_command_writes_both_pages(capsys, tiny_artifact, tmp_path):
    check, out = tmp_path / "check.json", tmp_path / "page.html"
    check.write_text(json.dumps(comparison().to_json()))
    code = main(["report", str(tiny_artifact), "-o", str(out), "--check", str(check), "--json"])
    assert code == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == out.stat().st_size
    text = out.read_text()
    assert "Error along the trajectory" in text
    assert "# site blocks.0.to_q" in text
    assert main(["report", str(tiny_artifact), "-o", str(out), "--block", "blocks.1"]) == 0
    assert "The block blocks.1;" in out.read_text()
    both = [str(tiny_artifact)] * 2
    assert main(["report", *both, "-o", str(out)]) == 0
    assert "2 artifacts" in out.read_text()
    capsys.readouterr()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"steps": 3}'])
def test_a_check_that_is_none_is_one_error(capsys, tiny_artifact, tmp_path, text):
    file = tmp_path / "check.json"
    file.write_text(text)
    out = tmp_path / "page.html"
    assert main(["report", str(tiny_artifact), "-o", str(out), "--check", str(file)]) == 2
    assert "vdqc check" in capsys.readouterr().err
    assert not out.exists()
