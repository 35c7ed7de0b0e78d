"""``vdqc search``: choose schemes and transforms of every site within a budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vdqc.base.diagnostics import ConfigError
from vdqc.cli.common import (
    FAILED,
    OK,
    diagnostics_of,
    progress_of,
    require_places,
    show,
    write_whole,
)

#: Its line in ``vdqc --help``.
HELP = "choose schemes and transforms of every site within a budget"


def add(sub: Any) -> None:
    """Its options."""
    sub.add_argument("model", help="a model.py with model() and samples(), or a diffusers folder")
    sub.add_argument(
        "--budget",
        metavar="size=S,time=T",
        help="the most it may take, as shares of the float model or as 2GB, 12ms",
    )
    sub.add_argument(
        "--floor", metavar="sqnr=DB", help="the least SQNR; alone: the smallest that reaches it"
    )
    sub.add_argument(
        "--schemes",
        metavar="A,B,...",
        help="to choose from (default: w8a8,w6a8,w4a8,w4a8-g64,none)",
    )
    sub.add_argument("--pool", metavar="DIR", help="calls that vdqc record kept, to learn from")
    sub.add_argument("-o", "--out", metavar="FILE", help="write the recipe here (.toml)")
    sub.add_argument("--plot", metavar="FILE", help="write the front as an HTML page")
    sub.add_argument(
        "--target", default="auto", help="cpu, sm80 ... sm120, or auto: this machine (default)"
    )
    sub.add_argument(
        "--component", metavar="NAME", help="which model of a diffusers pipeline folder"
    )
    sub.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")
    sub.add_argument(
        "--no-verify", action="store_true", help="do not carry the choice out to measure it"
    )
    sub.add_argument(
        "--density",
        action="store_true",
        help="thin attention over frames out as far as the floor allows, within a budget",
    )
    sub.add_argument("--json", action="store_true", help="print the result as JSON")


def run(options: argparse.Namespace) -> int:
    """Carry it out; 1 if the choice, measured, misses what was asked."""
    out = None if options.out is None else Path(options.out)
    if out is not None and out.suffix != ".toml":
        raise ConfigError(f"-o: expected a file that ends in .toml, got {out}")
    require_places(options.out, options.plot)
    from vdqc.search.budget import Budget

    budget = Budget.parse(options.budget, options.floor)
    if options.density and (options.budget is None or options.floor is None or options.no_verify):
        raise ConfigError(
            "--density needs --budget, --floor and a measured choice",
            "the budget decides the bits; what they leave of the floor is spent on density",
        )
    from vdqc import compiler
    from vdqc.engine.pool import open_pool
    from vdqc.search import SCHEMES, parse_schemes, search, words

    texts = SCHEMES if options.schemes is None else _split(options.schemes)
    schemes = parse_schemes(texts)
    diagnostics = diagnostics_of(options)
    target = compiler.usable_target(options.target, diagnostics)
    calls = () if options.pool is None else open_pool(Path(options.pool))
    source = compiler.as_source(options.model, None, options.component)
    result = search(
        source,
        budget,
        schemes,
        target,
        diagnostics,
        calls=calls,
        seed=options.seed,
        apply=not options.no_verify,
        density=options.density,
        progress=progress_of(options),
    )
    if out is not None:
        write_whole(out, result.recipe.to_toml())
    if options.plot is not None:
        write_whole(options.plot, words.front_page(result))
    written = None if out is None else str(out)
    show(options, result.to_json(), words.searched(result, written, options.model))
    return FAILED if result.misses else OK


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
