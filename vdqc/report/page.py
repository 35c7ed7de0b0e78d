"""HTML building blocks and the style of the report: one page, no script, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import final


@final
class Html(str):
    """Text that is HTML already; every other string is escaped where it enters the page."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """``<name ...>children</name>``; attributes are escaped, ``class_`` is ``class``."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{words}>{''.join(map(html, children))}</{name}>")


def html(value: str) -> Html:
    """``value``, escaped unless it is HTML."""
    return value if isinstance(value, Html) else Html(escape(str(value)))


def section(title: str, lead: str, *children: str) -> Html:
    """A titled section with one leading sentence."""
    head = tag("h2", title)
    intro = tag("p", lead, class_="lead") if lead else Html("")
    return tag("section", head, intro, *children)


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()
) -> Html:
    """A table; columns in ``numbers`` are aligned right."""

    def cells(name: str, values: Sequence[str]) -> Html:
        made = [
            tag(name, value, class_="number") if index in numbers else tag(name, value)
            for index, value in enumerate(values)
        ]
        return tag("tr", *made)

    head = tag("thead", cells("th", headers))
    body = tag("tbody", *(cells("td", row) for row in rows))
    return tag("div", tag("table", head, body), class_="scroll")


def details(summary: str, *children: str, is_open: bool = False) -> Html:
    """A part that folds away."""
    made = tag("details", tag("summary", summary), *children)
    return Html(made.replace("<details", '<details open=""', 1)) if is_open else made


def figure(value: str, label: str, note: str = "") -> Html:
    """One key figure."""
    parts = [tag("div", value, class_="value"), tag("div", label, class_="label")]
    return tag("div", *parts, *([tag("div", note, class_="note")] if note else []), class_="figure")


def page(title: str, *children: str) -> str:
    """The whole document."""
    body = "\n".join(map(html, children))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        '<meta name="color-scheme" content="light dark"/>\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root {
  --ink: #1c1e21; --soft: #5c636d; --faint: #8b929c; --rule: #e3e5e8; --paper: #fdfdfc;
  --panel: #f5f5f3; --a: #2458c7; --b: #c2571a; --c: #1d7f5c; --d: #7d3fb5;
  --f: #b0308a; --g: #8a7400; --warn: #a35b00;
  --h0: #2a0b54; --h1: #571a6e; --h2: #8a2672; --h3: #b93a66; --h4: #dd5b55; --h5: #f2884c;
  --h6: #f9b862; --h7: #fae3a0;
  --m0: #e8eefb; --m1: #c6d5f6; --m2: #9db6ee; --m3: #6f93e2; --m4: #4470d3; --m5: #2458c7;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e8e8e6; --soft: #a8adb5; --faint: #7c828b; --rule: #33363b; --paper: #17181a;
    --panel: #1f2124; --a: #7aa5ff; --b: #f0955a; --c: #5fc79d; --d: #c194ee;
    --f: #f08ac8; --g: #d6c04a; --warn: #e8a94b;
    --h0: #fbe6a6; --h1: #f9b862; --h2: #f0834b; --h3: #d95a57; --h4: #b33a67; --h5: #842a70;
    --h6: #55246c; --h7: #35214f;
    --m0: #1c2536; --m1: #22345a; --m2: #2b4884; --m3: #3a62b4; --m4: #5682dc; --m5: #7aa5ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.02em; }
h2 { font-size: 20px; margin: 56px 0 4px; letter-spacing: -0.01em; }
h3 { font-size: 15px; margin: 28px 0 8px; }
p { margin: 8px 0; max-width: 74ch; }
.lead, .quiet, .sub { color: var(--soft); }
code, pre, .mono { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.recipe { display: inline-block; background: var(--panel); padding: 6px 12px; border-radius: 6px;
  margin: 12px 0 0; overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr));
  gap: 28px 24px; margin: 36px 0 8px; padding: 24px 0; border-top: 1px solid var(--rule);
  border-bottom: 1px solid var(--rule); }
.figure .value { font-size: 28px; line-height: 1.15; letter-spacing: -0.02em; font-weight: 600; }
.figure .label { color: var(--soft); font-size: 14px; margin-top: 4px; }
.figure .note { color: var(--faint); font-size: 13px; }
.scroll { overflow-x: auto; margin: 16px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: 13px;
  white-space: nowrap; vertical-align: bottom; }
th, td { padding: 7px 16px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.number { text-align: right; white-space: nowrap; }
.exact, .lossy { font-size: 12px; font-weight: 600; padding: 2px 8px; border-radius: 9px;
  white-space: nowrap; border: 1px solid currentColor; }
.exact { color: var(--c); }
.lossy { color: var(--b); }
.chart { width: 100%; height: auto; display: block; margin: 16px 0; overflow: visible; }
.chart text { font: 12px system-ui, sans-serif; fill: var(--soft); }
.chart text.label { fill: var(--faint); }
.grid { stroke: var(--rule); stroke-width: 1; }
.mark { fill: var(--a); stroke: var(--paper); stroke-width: 1; }
.line { fill: none; stroke: var(--a); stroke-width: 2; }
.mark.b { fill: var(--b); }
.mark.c { fill: var(--c); }
.mark.d { fill: var(--d); }
.mark.e { fill: var(--faint); } .mark.f { fill: var(--f); } .mark.g { fill: var(--g); }
.legend { font-size: 13px; color: var(--soft); margin: 0 0 8px; }
.legend i { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin: 0 6px 0 0;
  background: var(--a); } .legend span { margin-right: 20px; white-space: nowrap; }
.legend i.b { background: var(--b); } .legend i.c { background: var(--c); }
.legend i.d { background: var(--d); } .legend i.e { background: var(--faint); }
.legend i.f { background: var(--f); } .legend i.g { background: var(--g); }
.line.b { stroke: var(--b); } .line.c { stroke: var(--c); } .line.d { stroke: var(--d); }
.line.f { stroke: var(--f); } .line.g { stroke: var(--g); } .line.e { stroke: var(--faint); }
.chart text.name { font-weight: 600; fill: var(--a); }
.chart text.name.b { fill: var(--b); } .chart text.name.c { fill: var(--c); }
.chart text.name.d { fill: var(--d); } .chart text.name.f { fill: var(--f); }
.chart text.name.g { fill: var(--g); } .chart text.name.e { fill: var(--faint); }
.heats { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr));
  gap: 14px 28px; margin: 16px 0; align-items: start; }
.heat { width: 100%; height: auto; display: block; }
.heat text { font: 10px system-ui, sans-serif; fill: var(--soft); }
.heat text.title { font-weight: 600; fill: var(--ink); font-size: 11px; }
.heat .none { fill: var(--panel); }
.h0 { fill: var(--h0); } .h1 { fill: var(--h1); } .h2 { fill: var(--h2); } .h3 { fill: var(--h3); }
.h4 { fill: var(--h4); } .h5 { fill: var(--h5); } .h6 { fill: var(--h6); } .h7 { fill: var(--h7); }
.swatches i { width: 22px; height: 12px; border-radius: 0; vertical-align: -1px; }
.swatches .h0 { background: var(--h0); } .swatches .h1 { background: var(--h1); }
.swatches .h2 { background: var(--h2); } .swatches .h3 { background: var(--h3); }
.swatches .h4 { background: var(--h4); } .swatches .h5 { background: var(--h5); }
.swatches .h6 { background: var(--h6); } .swatches .h7 { background: var(--h7); }
.small { font-size: 13px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, 128px); gap: 14px 20px;
  margin: 16px 0; }
.pictures.small { grid-template-columns: repeat(12, minmax(0, 80px)); gap: 10px 8px;
  margin: 8px 0 18px; }
.pictures.small figcaption { font-size: 11px; }
.letter { font-weight: 700; } .letter.a { color: var(--a); } .letter.b { color: var(--b); }
.letter.c { color: var(--c); } .letter.d { color: var(--d); } .letter.f { color: var(--f); }
.letter.g { color: var(--g); } .letter.e { color: var(--faint); }
.barred b { display: inline-block; min-width: 66px; font-weight: 400; }
.narrow { max-width: 640px; }
.barred .bar { width: 56px; margin-right: 6px; }
.pictures figure { margin: 0; }
.pictures img { width: 100%; display: block; image-rendering: pixelated; background: #000;
  outline: 1px solid var(--rule); }
.pictures figcaption { font-size: 12px; line-height: 1.35; color: var(--soft); margin-top: 4px; }
.heads { width: auto; }
.heads th { font: 12px ui-monospace, Menlo, Consolas, monospace; padding: 0 12px 0 0;
  vertical-align: middle; border: 0; }
.heads td { width: 20px; height: 20px; padding: 0; font-size: 10px; text-align: center;
  vertical-align: middle; border: 1px solid var(--paper); color: var(--ink); }
.m0 { background: var(--m0); } .m1 { background: var(--m1); } .m2 { background: var(--m2); }
.m3 { background: var(--m3); } .m4 { background: var(--m4); } .m5 { background: var(--m5); }
.heads .m4, .heads .m5 { color: var(--paper); }
.ir { max-height: 440px; overflow: auto; font-size: 12px; }
.films img.soft { image-rendering: auto; }
.loop { max-width: 100%; min-width: min(100%, 480px); image-rendering: pixelated; margin: 10px 0; }
.pictures.stills { grid-template-columns: repeat(3, minmax(0, 320px)); }
.bar { width: 96px; height: 8px; display: inline-block; vertical-align: middle; }
.bar-back { fill: var(--rule); } .bar-fill { fill: var(--a); }
details { border-bottom: 1px solid var(--rule); padding: 8px 0; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
pre { background: var(--panel); padding: 14px 16px; border-radius: 8px; overflow-x: auto;
  margin: 12px 0; }
.films { display: grid; grid-template-columns: 104px 1fr; gap: 6px 14px; align-items: center;
  margin: 20px 0; font-size: 13px; color: var(--soft); }
.films img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
.message { margin: 10px 0; padding-left: 14px; border-left: 3px solid var(--rule);
  font-size: 14px; }
.message.warning { border-color: var(--warn); }
.message .mono { color: var(--soft); }
footer { margin-top: 64px; color: var(--faint); font-size: 13px; }
@media print { main { padding: 0; } details { break-inside: avoid; } }
"""
