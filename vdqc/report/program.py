"""The report's sections on passes, diagnostics and the printed program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from vdqc.base.diagnostics import ConfigError, nearest
from vdqc.ir.blocks import block_of
from vdqc.report import charts
from vdqc.report.data import ReportData
from vdqc.report.page import Html, details, section, table, tag
from vdqc.text import count, decibel, duration

#: Lines of a block's text that the page holds, and messages of one code.
LINES, MESSAGES = 160, 40
_SITE = re.compile(r"# site (\S+)")
#: Lines that are shown around the first and the last site of a block.
_AROUND = 14


def passes(data: ReportData) -> Html:
    """What ran, in order, with what it cost."""
    top = max((record.seconds for record in data.records), default=1.0) or 1.0
    rows = []
    for number, record in enumerate(data.records, 1):
        kind = "exact" if record.exact else "lossy"
        moved = "0" if record.error == 0 else f"{record.error or 0:.1e}"
        rows.append(
            [
                str(number),
                tag("code", record.text),
                tag("span", kind, class_=kind),
                str(record.rewrites),
                "" if record.error is None else moved,
                "" if record.sqnr_db is None else decibel(record.sqnr_db),
                Html(charts.bar(record.seconds / top, duration(record.seconds))),
                duration(record.seconds),
            ]
        )
    headers = ["", "pass", "", "rewrites", "moved the output by", "SQNR after it", "time", ""]
    return section(
        "Passes",
        "What ran, in order. Exact passes keep the function and were held to it on the probe; "
        "lossy ones spend fidelity. SQNR is of the whole graph so far against the float model. "
        "Behind a quantiser an exact step may still move the output, by another draw of the noise.",
        table(headers, rows, numbers=(0, 3, 4, 5, 7)),
        _facts(data),
    )


def _facts(data: ReportData) -> Html:
    # what passes say of each site is in the table of sites
    rows = [
        [tag("code", record.text) if first else "", key, _short(value)]
        for record in data.records
        for first, (key, value) in _marked((k, v) for k, v in record.facts.items() if k != "sites")
    ]
    return details("what the passes report", table(["", "", ""], rows)) if rows else Html("")


def _marked(items: Iterable[Any]) -> Iterator[tuple[bool, Any]]:
    """Each item, and whether it is the first."""
    for index, item in enumerate(items):
        yield index == 0, item


def _short(value: Any, limit: int = 400) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        text = ", ".join(f"{key}: {_short(item)}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        text = ", ".join(_short(item) for item in value)
    else:
        text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} …"


def diagnostics(data: ReportData) -> Html:
    """Warnings in the open, remarks folded; equal codes together."""
    groups: dict[tuple[bool, str], list[Mapping[str, Any]]] = {}
    for entry in data.diagnostics:
        remark = entry["severity"] == "remark"
        groups.setdefault((remark, entry["code"]), []).append(entry)
    if not groups:
        return section("Diagnostics", "Nothing to say: no pass and no kernel had a remark.")
    warnings, remarks = [], []
    for (remark, code), entries in groups.items():
        made = [_message(entry, "remark" if remark else "warning") for entry in entries[:MESSAGES]]
        if len(entries) > MESSAGES:
            made.append(tag("p", f"and {len(entries) - MESSAGES} more", class_="quiet"))
        if remark:
            remarks.append(details(f"{count(len(entries), 'remark')} [{code}]", *made))
        elif len(entries) > 3:
            warnings.append(
                details(f"{count(len(entries), 'warning')} [{code}]", *made, is_open=True)
            )
        else:
            warnings += made
    lead = "" if warnings else "No warnings."
    return section("Diagnostics", lead, *warnings, *remarks)


def _message(entry: Mapping[str, Any], severity: str) -> Html:
    where = tag("span", f"{entry['site']}: ", class_="mono") if entry.get("site") else ""
    code = tag("span", f"  [{entry['code']}]", class_="mono")
    notes = [tag("div", note, class_="mono") for note in entry.get("notes", ())]
    return tag("div", where, entry["message"], code, *notes, class_=f"message {severity}")


def ir(data: ReportData, block: str = "") -> Html:
    """One block's text before all passes and as it runs; raises ConfigError for another name."""
    if len(data.ir) < 2:
        return Html("")
    names = list(data.ir)
    chosen = chosen_block(data, block)
    last_float = next((n for n in reversed(names) if "lower" not in n), names[-1])
    shown = [("before", names[0], True)]
    if last_float not in (names[0], names[-1]):
        shown.append(("after the passes", last_float, False))
    shown.append(("as it runs", names[-1], True))
    parts = []
    for title, name, is_open in shown:
        rows = block_lines(data.ir[name], chosen)
        cut = rows[:LINES]
        if len(rows) > LINES:
            cut.append(f"… {len(rows) - LINES} lines more")
        text = f"{title}: {name}, {count(len(rows), 'line')}"
        parts.append(details(text, tag("pre", "\n".join(cut), class_="ir"), is_open=is_open))
    what = f"The block {chosen}" if chosen else "The first lines"
    others = " vdqc report ARTIFACT --block NAME shows another block." if chosen else ""
    return section(
        "The program, before and after",
        f"{what}; the whole text after every pass is in the folder ir/ of the artifact." + others,
        *parts,
    )


def chosen_block(data: ReportData, block: str = "") -> str:
    """``block``, or the first repeated one; raises ConfigError for a name that is none."""
    names = list(dict.fromkeys(filter(None, (block_of(row.name) for row in data.sites))))
    if block and block not in names:
        raise ConfigError(f"no block is named '{block}'", nearest(block, names))
    return block or next(iter(names), "")


def block_lines(text: str, block: str) -> list[str]:
    """Lines of ``block``: first site to last, and what is near and no other block's."""
    rows = [row.strip() for row in text.splitlines()][1:]
    owners = [block_of(m[1]) if (m := _SITE.search(row)) else None for row in rows]
    own = [i for i, owner in enumerate(owners) if owner == block and block]
    if not own:
        return rows[: 2 * _AROUND]
    start, end = own[0], own[-1] + 1
    while start > max(0, own[0] - _AROUND) and owners[start - 1] is None:
        start -= 1
    while end < min(len(rows), own[-1] + 1 + _AROUND) and owners[end] is None:
        end += 1
    if end < len(rows) and owners[end] is not None:  # half of the lines between two blocks
        end = own[-1] + 1 + (end - own[-1] - 1) // 2
    return rows[start:end]


def messages_of(data: ReportData, severity: str) -> Sequence[Mapping[str, Any]]:
    """Diagnostics of one severity."""
    return [entry for entry in data.diagnostics if entry["severity"] == severity]
