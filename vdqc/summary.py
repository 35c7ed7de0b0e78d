"""What the commands print: short text for people, numbers first, the next step last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdqc.base.diagnostics import ConfigError, nearest
from vdqc.check_result import CheckResult
from vdqc.engine.named import NamedRecipe
from vdqc.explain import Plan
from vdqc.report.data import ReportData
from vdqc.runner import RunResult
from vdqc.site_errors import worst_sites
from vdqc.sites import SiteRow
from vdqc.text import columns, count, decibel, duration, shortened, size

#: Longest text of a pass in a table; a recipe that search wrote names every site.
PASS_WIDTH = 80


def compiled(data: ReportData, folder: Path, model: str) -> str:
    """The end of ``vdqc compile``."""
    lines = [f"{data.name} -> {folder}/", "", _passes(data), "", _totals(data)]
    warnings = sum(entry["severity"] == "warning" for entry in data.diagnostics)
    if warnings:
        lines.append(f"warnings    {warnings}, in the report")
    lines += [
        f"report      {folder / 'report.html'}",
        "",
        f"next: vdqc check {folder} --model {model}",
    ]
    return "\n".join(lines)


def _passes(data: ReportData) -> str:
    rows = [
        [
            shortened(record.text, PASS_WIDTH),
            "exact" if record.exact else "lossy",
            count(record.rewrites, "rewrite"),
            decibel(record.sqnr_db),
            duration(record.seconds),
        ]
        for record in data.records
    ]
    return columns(rows, ["pass", "", "", "SQNR", "time"], right="234")


def _totals(data: ReportData) -> str:
    share = data.bytes_compiled / max(data.bytes_float, 1)
    sizes = f"{size(data.bytes_float)} -> {size(data.bytes_compiled)} ({share:.2f}x)"
    kernels = Counter(row.kernel for row in data.sites if row.kernel)
    lines = [f"weights     {sizes}"]
    if data.effective_bits is not None:
        sites = f"{len(data.quantised)} of {count(len(data.sites), 'site')} quantised"
        lines.append(f"bits        {data.effective_bits:.2f} a weight, {sites}")
    if data.sqnr_db is not None:
        lines.append(f"fidelity    {decibel(data.sqnr_db)} SQNR on the first sample")
    if kernels:
        lines.append("kernels     " + ", ".join(f"{n} x {k}" for k, n in kernels.most_common()))
    return "\n".join(lines)


def inspected(data: ReportData, folder: Path) -> str:
    """``vdqc inspect`` without options."""
    steps = ", ".join(data.ir)
    rules = " ".join(data.rules)
    return "\n".join(
        [
            f"{data.name}: {data.model_class}, {data.dtype}, target {data.target}",
            f"recipe      {data.recipe}   {rules}",
            "",
            _passes(data),
            "",
            _totals(data),
            f"report      {folder / 'report.html'}",
            f"printed IR  --ir with one of: {steps}",
            f"made with   {', '.join(f'{k} {v}' for k, v in data.versions.items())}",
        ]
    )


def ir_text(ir: Mapping[str, str], name: str) -> str:
    """The printed IR after one pass: its number, its name, or both; the last without a name."""
    if not name:
        return ir[list(ir)[-1]]
    found = [key for key in ir if name in (key, key.partition("_")[0], key.partition("_")[2])]
    if not found:
        names = [key.partition("_")[2] for key in ir]
        raise ConfigError(f"no printed IR after '{name}'", nearest(name, names))
    return ir[found[-1]]


def site_table(rows: Sequence[SiteRow]) -> str:
    """One line per site."""
    cells = [
        [
            row.name,
            row.role,
            row.shape,
            row.scheme,
            row.kernel,
            decibel(row.weight_sqnr_db),
            "" if row.bits is None else f"{row.bits:.2f}",
            "" if row.bytes is None else size(row.bytes),
            "" if row.predicted_us is None else duration(row.predicted_us / 1e6),
        ]
        for row in rows
    ]
    headers = ["site", "role", "shape", "scheme", "kernel", "SQNR", "bits", "bytes", "predicted"]
    return columns(cells, headers, right="5678")


def planned(plan: Plan) -> str:
    """``vdqc explain``."""
    passes = [
        [shortened(text, PASS_WIDTH), "exact" if exact else "lossy", f"-> {to}"]
        for text, exact, to in plan.passes
    ]
    reasons: dict[str, list[SiteRow]] = {}
    for row in plan.sites:
        if row.why:
            reasons.setdefault(f"{row.kernel}: {row.why}", []).append(row)
    forecast = plan.forecast
    float_bytes = sum(row.bytes_float or 0 for row in plan.sites)
    compiled_bytes = sum(row.bytes or 0 for row in plan.sites)
    return "\n".join(
        [
            f"{plan.name}, target {plan.target}, scheme {' '.join(plan.rules)}",
            "",
            columns(passes),
            "",
            site_table(plan.sites),
            "",
            *(f"{why}  ({count(len(rows), 'site')})" for why, rows in reasons.items()),
            "",
            *([_masks(plan), ""] if plan.masks else []),
            *(
                f"decided at compile time: {what} ({shortened(text, PASS_WIDTH)}); planned as the "
                "schemes say"
                for text, what in plan.undecided
            ),
            f"predicted time    {duration(plan.predicted_us / 1e6)} for the first sample under "
            f"torch.compile ({duration(forecast.sites_us / 1e6)} in sites)",
            f"predicted memory  {size(forecast.memory_bytes)}, of which weights "
            f"{size(forecast.weight_bytes)}",
            f"sites' weights    {size(float_bytes)} -> {size(compiled_bytes)}",
            f"compiling takes   about {duration(forecast.compile_seconds)}",
            "nothing was compiled: run vdqc compile with the same options",
        ]
    )


def _masks(plan: Plan) -> str:
    rows = [
        [mask.site, mask.policy, f"{mask.density:.1%}", str(mask.heads), mask.how]
        for mask in plan.masks
    ]
    return columns(rows, ["sparse attention", "policy", "density", "heads", "masks"], right="23")


def checked(result: CheckResult, misses: Sequence[str], report: str | None) -> str:
    """``vdqc check``."""
    worst = result.worst
    where = f"timestep {worst.timestep:g}" if worst.timestep is not None else f"call {worst.call}"
    lines = [
        f"step-locked {decibel(result.sqnr_db)} SQNR over {count(len(result.steps), 'call')}, "
        f"worst {decibel(worst.sqnr_db)} at {where}"
    ]
    for error, call, value in worst_sites(result.sites, 1):
        time = result.steps[call].timestep
        when = f"timestep {time:g}" if time is not None else f"call {call}"
        lines.append(f"worst site  {error.name}: {decibel(value)} SQNR at {when}")
    for video in result.videos:
        line = f"seed {video.seed}      PSNR {decibel(video.psnr_db)}, SSIM {video.ssim:.4f}"
        line += f", flicker {video.flicker:.4f} (float {video.flicker_float:.4f})"
        if video.accuracy is not None and video.accuracy_float is not None:
            line += f", accuracy {video.accuracy:.1%} (float {video.accuracy_float:.1%})"
        lines.append(line)
    share = result.bytes_compiled / max(result.bytes_float, 1)
    sizes = f"{size(result.bytes_float)} -> {size(result.bytes_compiled)} ({share:.2f}x)"
    lines.append(f"weights     {sizes}")
    for timing in result.timings:
        lines.append(
            f"forward     {duration(timing.float_seconds)} -> {duration(timing.compiled_seconds)}, "
            f"{timing.speedup:.2f}x ({timing.how}, median of {timing.runs} in turns)"
        )
    if result.predicted:
        total, between = sum(result.predicted.values()), result.predicted.get("", 0.0)
        lines.append(
            f"predicted   {duration(total)} under torch.compile ({duration(between)} outside sites)"
        )
    if report:
        lines.append(f"report      {report}")
    lines += [f"FAILED      {miss}" for miss in misses]
    return "\n".join(lines)


def ran(result: RunResult, where: str | None) -> str:
    """``vdqc run``."""
    lines = [f"{result.what}: {duration(result.seconds)}"]
    for name, tensor in result.tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        span = f", {float(tensor.min()):.4g} to {float(tensor.max()):.4g}" if tensor.numel() else ""
        lines.append(f"{name}  {dtype}{list(tensor.shape)}{span}")
    if where:
        lines.append(f"written to {where}")
    return "\n".join(lines)


def pass_list(entries: Sequence[Mapping[str, Any]]) -> str:
    """``vdqc passes``."""
    rows = [
        [
            entry["name"],
            "exact" if entry["exact"] else "lossy",
            _stages(entry),
            entry["summary"],
        ]
        for entry in entries
    ]
    return columns(rows, ["pass", "", "stage", "what it does"])


def recipe_list(recipes: Sequence[NamedRecipe]) -> str:
    """``vdqc recipes``."""
    rows = [[recipe.name, ",".join(recipe.scheme), recipe.about] for recipe in recipes]
    return columns(rows, ["recipe", "scheme", "what it does"])


def one_recipe(recipe: NamedRecipe) -> str:
    """``vdqc recipes NAME``: the list of its passes, and what to know of it."""
    lines = [f"{recipe.name}  ({', '.join(recipe.scheme)})", "", recipe.about]
    if recipe.source:
        lines.append(f"Source: {recipe.source}")
    if recipe.claims:
        lines.append(f"The paper reports: {recipe.claims}")
    lines += ["", "passes", *(f"  {item}" for item in recipe.passes)]
    if recipe.departures:
        lines += ["", "departures", *(f"  {item}" for item in recipe.departures)]
    return "\n".join(lines)


def one_pass(entry: Mapping[str, Any]) -> str:
    """``vdqc passes NAME``."""
    kind = "exact" if entry["exact"] else "lossy"
    options = [
        [f"{o['name']}={_default(o['default'])}", o["type"], o["text"]] for o in entry["options"]
    ]
    lines = [
        f"{entry['name']}  ({kind}, {_stages(entry)})",
        "",
        entry["doc"].rstrip(),
        "",
        "options",
    ]
    return "\n".join([*lines, _indent(columns(options)) if options else "  none"])


def _stages(entry: Mapping[str, Any]) -> str:
    at = "|".join(entry["at"])
    return f"{at} -> {entry['to']}" if entry["to"] else at


def _default(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
