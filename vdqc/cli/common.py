"""What several commands share: exit codes, the options of a recipe, progress, output."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdqc.base.diagnostics import ConfigError, Diagnostics

OK, FAILED, BAD_INPUT = 0, 1, 2


def add_recipe(sub: Any) -> None:
    """A model and what is to be done with it."""
    sub.add_argument("model", help="a model.py with model() and samples(), or a diffusers folder")
    sub.add_argument(
        "--passes",
        help="passes in order, as 'rotate,smooth{alpha=0.6},quant' (default: rotate,smooth,quant)",
    )
    sub.add_argument(
        "--recipe", metavar="NAME", help="a named recipe (vdqc recipes) or a .toml file of one"
    )
    sub.add_argument(
        "--scheme",
        action="append",
        metavar="[GLOB=]SCHEME",
        help="w8a8, w4a8-g64, none, ...; repeat with globs of site names, the last match wins "
        "(default: the recipe's, to which globs alone add, else w8a8)",
    )
    sub.add_argument(
        "--target", default="auto", help="cpu, sm80 ... sm120, or auto: this machine (default)"
    )
    sub.add_argument(
        "--component",
        metavar="NAME",
        help="which model of a diffusers pipeline folder; compile also takes a list with commas, "
        "or 'all' of its denoisers",
    )
    sub.add_argument("--seed", type=int, default=0, help="of every random choice (default: 0)")


def show(options: argparse.Namespace, data: Any, text: str) -> None:
    """``data`` as JSON if that was asked for, else ``text``."""
    print(json.dumps(data, indent=2) if options.json else text)


def require_places(*files: str | None) -> None:
    """Raise ConfigError for a file that could not be written, before hours of work."""
    for file in files:
        folder = Path(file or ".").absolute().parent
        if not folder.is_dir():
            raise ConfigError(f"cannot write {file}: there is no folder {folder}")


def write_whole(file: str | Path, text: str) -> None:
    """``text`` into ``file``, which is as it was if that fails; pipes and links are written to."""
    from vdqc.ir.staging import atomic

    place = Path(file)
    if place.is_symlink() or (place.exists() and not place.is_file()):
        place.write_text(text, encoding="utf-8")
        return
    with atomic(place) as part:
        part.write_text(text, encoding="utf-8")


def diagnostics_of(options: argparse.Namespace) -> Diagnostics:
    """Diagnostics that print as they come; of the workers of ``torchrun`` the first one's alone."""
    return Diagnostics(stream=sys.stderr if worker() == 0 else None, verbose=options.verbose)


def worker() -> int:
    """The number of this process among those of ``torchrun``; 0 without it."""
    number = os.environ.get("RANK", "0")
    return int(number) if number.isdecimal() else 0


def progress_of(options: argparse.Namespace) -> Callable[[Any, str], Any]:
    """Bars with time left on stderr, for work that takes more than a second."""
    from tqdm import tqdm

    hidden = options.quiet or not sys.stderr.isatty() or worker() > 0

    def bar(items: Any, description: str) -> Any:
        return tqdm(items, desc=description, disable=hidden, leave=False, delay=1)

    return bar
