"""The report in a real browser: nothing overlaps, overflows or is fetched, in light and in dark.

Runs where a Chromium is found (Debian: ``apt-get install chromium``); its structure is tested
without one in ``test_report.py``.
"""

import json
import re
import runpy
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from vdqc import report
from vdqc.report import compare

DATA = runpy.run_path(str(Path(__file__).with_name("report_data.py")))
comparison, example, sparse = DATA["comparison"], DATA["example"], DATA["sparse"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is found")

#: Only the test's copy of a page holds a script: it says what the browser made of the page.
MEASURE = """<script>
addEventListener('load', () => {
  const box = e => e.getBoundingClientRect(), apart = 1;
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const overlaps = [], clipped = [];
  for (const svg of document.querySelectorAll('svg')) {
    const texts = [...svg.querySelectorAll('text')], frame = box(svg);
    texts.forEach((a, i) => {
      const p = box(a);
      if (p.left < frame.left - 2 || p.right > frame.right + 2) clipped.push(a.textContent);
      for (const b of texts.slice(i + 1)) {
        const q = box(b);
        if (p.left + apart < q.right && q.left + apart < p.right &&
            p.top + apart < q.bottom && q.top + apart < p.bottom)
          overlaps.push([a.textContent, b.textContent]);
      }
    });
  }
  const images = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  const tables = [...document.querySelectorAll('.scroll')]
    .filter(t => t.scrollWidth > t.clientWidth + 1)
    .map(t => t.textContent.slice(0, 60));
  const style = getComputedStyle(document.body);
  const pre = document.createElement('pre');
  pre.id = 'measured';
  pre.textContent = JSON.stringify({
    overlaps, clipped, images, tables,
    wider: document.documentElement.scrollWidth - innerWidth,
    fetched: performance.getEntriesByType('resource').map(r => r.name)
      .filter(n => !n.startsWith('data:')),
    paper: style.backgroundColor, ink: style.color,
    height: document.documentElement.scrollHeight,
  });
  document.body.append(pre);
});
</script>"""


def browse(page, folder, *options):
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1180,900", *options,
        "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="measured">(.*?)</pre>', run.stdout, re.S)
    assert found is not None, run.stderr[-2000:]
    return json.loads(unescape(found[1]))


def sound(found):
    assert found["overlaps"] == []
    assert found["clipped"] == []
    assert found["images"] == 0
    assert found["tables"] == []
    assert found["wider"] <= 0
    assert found["fetched"] == []
    assert found["height"] > 1500


PAGES = {
    "compiled": lambda: report.render(example(layers=2)),
    "checked": lambda: report.render(
        sparse(example(layers=12), layers=12, heads=12),
        comparison(steps=16, layers=12, frames=(2, 1, 16, 32, 32)),
    ),
    "compared": lambda: compare.render(
        [example("a", layers=12), example("b", layers=12, scheme="w4a8")],
        [comparison(steps=16, layers=12)] * 2,
    ),
}


@pytest.mark.parametrize("name", PAGES)
def test_pages_render_whole(name, tmp_path):
    sound(browse(PAGES[name](), tmp_path))


def test_dark_pages_are_dark(tmp_path):
    page = PAGES["compiled"]()
    light = browse(page, tmp_path)
    dark = browse(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    sound(dark)

    def grey(colour):
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    assert grey(light["paper"]) > 200 > 100 > grey(light["ink"])
    assert grey(dark["paper"]) < 60 < 180 < grey(dark["ink"])
