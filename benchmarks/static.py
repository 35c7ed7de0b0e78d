"""Static figures of every GPU kernel variant, compiled here for GPUs that are not.

    python benchmarks/static.py [--only TEXT] [--arch sm90]   compile and print the table
    python benchmarks/static.py --check                       and fail on a regression
    python benchmarks/static.py --update                      and keep the figures

Figures are kept per Triton version in ``results/static.json``. A regression is: a variant that does
not compile, spills, more shared memory than the GPU has, another opcode than expected; and, for a
recorded Triton version, more registers or shared memory than recorded, or another opcode.
A version that is not recorded is held to the first list only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdqc.kernels.gpu.offline import Figures
    from vdqc.kernels.gpu.variants import Variant

RECORD = Path(__file__).resolve().parent / "results" / "static.json"
COLUMNS = ("regs", "spills", "shared", "opcode", "mma", "loop", "bytes")


def main(argv: list[str]) -> int:
    """Compile, print, compare; 1 if something is worse than it was."""
    options = _options(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from vdqc.kernels.gpu.offline import faults

    known = _record().get(triton.__version__, {})
    measured: dict[str, Any] = {}
    print(f"Triton {triton.__version__}")
    print(f"{'variant':44} {'arch':6} " + " ".join(f"{name:>8}" for name in COLUMNS))
    problems = []
    for variant, arch, found in _figures(options.only, options.arch):
        if isinstance(found, str):
            problems.append(found)
            continue
        print(_row(variant.name, arch, found), flush=True)
        worse = faults(variant, arch, found)
        if not options.update:
            worse += regressions(known.get(variant.name, {}).get(arch), found)
        problems += [f"{variant.name} on {arch}: {problem}" for problem in worse]
        measured.setdefault(variant.name, {})[arch] = asdict(found)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if options.update:
        record = _record()  # read again: compiling takes minutes, another may have written
        rows = record.setdefault(triton.__version__, {})
        for name, archs in measured.items():
            rows[name] = rows.get(name, {}) | archs
        RECORD.write_text(_text(_current(record)))
    return 1 if problems and (options.check or options.update) else 0


def _record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def regressions(known: dict[str, Any] | None, found: Figures) -> list[str]:
    """What got worse than the recorded figures."""
    if known is None:
        return []
    problems = [
        f"expected at most {known[name]} {word}, got {getattr(found, name)}"
        for name, word in (("regs", "registers"), ("shared", "bytes of shared memory"))
        if getattr(found, name) > known[name]
    ]
    if found.opcode != known["opcode"]:
        problems.append(f"expected opcode {known['opcode']}, got {found.opcode}")
    return problems


def _figures(only: str, arch: str | None) -> Iterator[tuple[Variant, str, Figures | str]]:
    from vdqc.base.diagnostics import LoweringError
    from vdqc.kernels.gpu.offline import compile_variant
    from vdqc.kernels.gpu.variants import collect

    for variant in collect():
        for name in variant.archs:
            if only in variant.name and arch in (None, name):
                try:
                    yield variant, name, compile_variant(variant, name)
                except LoweringError as error:
                    yield variant, name, error.diagnostic.message


def _row(name: str, arch: str, found: Figures) -> str:
    values = asdict(found)
    return f"{name:44} {arch:6} " + " ".join(f"{values[column]!s:>8}" for column in COLUMNS)


def _text(record: dict[str, Any]) -> str:
    """JSON with one line for each variant and generation, so that a change is a line."""
    versions = []
    for version, rows in sorted(record.items()):
        variants = []
        for name, archs in sorted(rows.items()):
            lines = [f"   {json.dumps(arch)}: {json.dumps(archs[arch])}" for arch in sorted(archs)]
            variants.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        versions.append(f" {json.dumps(version)}: {{\n" + ",\n".join(variants) + "\n }")
    return "{\n" + ",\n".join(versions) + "\n}\n"


def _current(record: dict[str, Any]) -> dict[str, Any]:
    """Without variants that no longer exist."""
    from vdqc.kernels.gpu.variants import collect

    names = {variant.name: variant.archs for variant in collect()}
    return {
        version: {
            name: {arch: figures for arch, figures in archs.items() if arch in names[name]}
            for name, archs in rows.items()
            if name in names
        }
        for version, rows in record.items()
    }


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default="", help="variants whose name contains this text")
    parser.add_argument("--arch", help="one generation: sm80, sm89, sm90, sm100 or sm120")
    parser.add_argument("--check", action="store_true", help="exit code 1 on a regression")
    parser.add_argument("--update", action="store_true", help="keep the figures")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
