"""The report's section on sparse attention: the mask of each head, as words and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from vdqc.base.sparsity import MASKS, MaskPolicy
from vdqc.check_result import CheckResult
from vdqc.report import png
from vdqc.report.data import ReportData
from vdqc.report.mask_data import MaskRow, policy_pictures, seen_pictures
from vdqc.report.page import Html, details, section, table, tag
from vdqc.site_errors import SeenMask
from vdqc.text import count

#: Layers and heads whose own masks are drawn, where each call makes its own.
LAYERS, HEADS = 8, 12


def masks(data: ReportData, check: CheckResult | None) -> Html:
    """A row per layer and a cell per head; every mask as a picture."""
    if not data.masks:
        return Html("")
    seen = check.masks if check is not None else {}
    first = data.masks[0]
    frames, size, text = first.layout[:3]
    tokens = f"{frames} frames of {size} tokens" + (f" and {text} of text" if text else "")
    return section(
        "Attention masks",
        f"Self-attention computes {_mean(data.masks):.0%} of its block pairs on the probe: "
        f"{tokens}, in blocks of {MaskPolicy.parse(first.policy).block}. Pictures show queries "
        "downwards and keys to the right, in the order of the video's tokens; light is computed.",
        _policies(data.masks),
        _static(data.masks),
        _heads(data.masks),
        _seen(data.masks, seen, check),
    )


def _mean(rows: Sequence[MaskRow]) -> float:
    return sum(row.density for row in rows) / len(rows)


def _policies(rows: Sequence[MaskRow]) -> Html:
    cells = []
    for row in rows:
        if row.heads is not None:
            kinds = sorted({(_share(head), _kind(head)) for head in row.heads})
            how = ", ".join(
                f"{sum(h == f'{kind}@{share:g}' for h in row.heads)} × {_words(kind)} {share:.0%}"
                for share, kind in kinds
            )
        elif not MASKS[MaskPolicy.parse(row.policy).name]:
            how = "every head, call and query block chooses from the data"
        else:
            how = "every call chooses one per head"
        name = tag("span", row.site, class_="mono")
        cells.append([name, tag("code", row.policy), f"{row.density:.1%}", how])
    made = table(["attention", "policy", "density", "heads"], cells, numbers=(2,))
    return made if len(rows) <= 12 else details(count(len(rows), "sparse attention"), made)


def _static(rows: Sequence[MaskRow]) -> Html:
    """One picture per mask that some head has, or may get."""
    found: dict[str, Tensor] = {}
    used = {head for row in rows for head in row.heads or ()}
    for row in {row.policy: row for row in rows}.values():
        found.update(policy_pictures(row))
    shown = [
        _figure(image, f"{_words(_kind(name))}, {_share(name):.0%}")
        for name, image in sorted(found.items(), key=lambda item: (_kind(item[0]), _share(item[0])))
        if not used or name in used
    ]
    return tag("div", *shown, class_="pictures") if shown else Html("")


def _heads(rows: Sequence[MaskRow]) -> Html:
    """Layers downwards, heads to the right: kind by letter, density by shade."""
    decided = [row for row in rows if row.heads is not None]
    if not decided:
        return Html("")
    width = max(len(row.heads or ()) for row in decided)
    body = []
    for row in decided:
        cells = [
            tag(
                "td", _kind(head)[:1].upper(), class_=f"m{_shade(head)}", title=_title(row, h, head)
            )
            for h, head in enumerate(row.heads or ())
        ]
        body.append(tag("tr", tag("th", row.site.partition(":")[0]), *cells))
    kinds = sorted({_kind(head) for row in decided for head in row.heads or ()})
    letters = ", ".join(f"{kind[:1].upper()} {_words(kind)}" for kind in kinds)
    lead = tag(
        "p",
        f"Masks by layer and head, 0 to {width - 1}: {letters}; a stronger colour is denser.",
        class_="lead",
    )
    grid = tag("div", tag("table", tag("tbody", *body), class_="heads"), class_="scroll")
    return Html(lead + grid)


def _seen(rows: Sequence[MaskRow], seen: Mapping[str, SeenMask], check: CheckResult | None) -> Html:
    """What a check saw of masks that calls decide."""
    open_ = [row for row in rows if row.heads is None]
    if not open_:
        return Html("")
    there = [row for row in open_ if row.site in seen]
    if not there or check is None:
        return tag(
            "p",
            "These masks are made in every call: vdqc check --report draws those that it sees.",
            class_="lead",
        )
    step = -(-len(there) // LAYERS)
    parts = []
    for row in there[::step]:
        mask = seen[row.site]
        pictures = [
            _figure(image, f"head {h}, {float(kept.float().mean()):.0%}")
            for h, (image, kept) in enumerate(zip(seen_pictures(mask), mask.kept, strict=True))
            if h < HEADS
        ]
        at = check.steps[mask.call].timestep
        when = f"timestep {at:g}" if at is not None else f"call {mask.call}"
        head = tag("div", tag("span", row.site, class_="mono"), f", {when}", class_="small")
        parts.append(tag("div", head, tag("div", *pictures, class_="pictures small")))
    left = len(there) - len(parts)
    note = f" of {len(there)} layers, every {step}th" if left else ""
    lead = f"Masks as a call made them{note}; the first {HEADS} heads." if left else (
        "Masks as a call made them."
    )  # fmt: skip
    return Html(tag("p", lead, class_="lead") + "".join(parts))


def _figure(image: Tensor, text: str) -> Html:
    picture = Html(f'<img alt="mask: {text}" src="{png.data_uri(image)}"/>')
    return tag("figure", picture, tag("figcaption", text))


def _kind(head: str) -> str:
    return head.partition("@")[0]


def _share(head: str) -> float:
    return float(head.partition("@")[2] or 1)


def _shade(head: str) -> int:
    share = _share(head)
    return sum(share > edge for edge in (0.1, 0.2, 0.35, 0.5, 0.75))


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _title(row: MaskRow, head: int, text: str) -> str:
    return f"{row.site}, head {head}: {_words(_kind(text))}, density {_share(text):g}"
