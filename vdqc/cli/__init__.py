"""The command line: one module per command, with its options (``add``) and what it does (``run``).

Exit codes: 0 fine, 1 a check failed, 2 bad usage or input. Results go to stdout, everything else
(progress, warnings, errors) to stderr; with ``--json`` stdout holds one JSON value, nothing else.
Of the workers of ``torchrun`` the first one alone warns; each says its own errors.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from vdqc.base.diagnostics import ConfigError, VdqcError, nearest
from vdqc.cli.common import BAD_INPUT, OK, worker
from vdqc.version import __version__

#: In the order of ``vdqc --help``.
COMMANDS = (
    "compile",
    "record",
    "run",
    "check",
    "report",
    "bisect",
    "explain",
    "search",
    "inspect",
    "passes",
    "recipes",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors that a user can cause are printed, not raised."""
    # large tensors in huge pages; streaming 10 layers of a 14B model: 80 s instead of 102. torch
    # looks at its first allocation
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        options = build_parser().parse_args(argv)
    except VdqcError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    if worker() > 0:
        warnings.simplefilter("ignore")  # the first worker gives the same ones
    try:
        code: int = options.command(options)
        return code
    except VdqcError as error:
        if options.debug:
            raise
        print(_whose() + _with_notes(error), file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `vdqc inspect out/ --ir | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        if options.debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{_whose()}error: {where}{error.strerror or error}  [file]", file=sys.stderr)
        print("  note: check the path, its permissions and the space on its disk", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt as stop:
        print("interrupted; no output was written", *_notes(stop), sep="\n", file=sys.stderr)
        return 130


def _whose() -> str:
    """Names the worker whose error follows; nothing for the first or the only one."""
    return f"worker {worker()}: " if worker() else ""


def _with_notes(error: VdqcError) -> str:
    return "\n".join([str(error), *_notes(error)])


def _notes(error: BaseException) -> list[str]:
    return [f"  note: {note}" for note in getattr(error, "__notes__", ())]


class _Parser(argparse.ArgumentParser):
    """Argparse that offers the nearest option or command, in the words of every other error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, f"see '{self.prog} --help'", code="usage")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, extra = self.parse_known_args(args, namespace)
        if extra:
            words = [word for word in getattr(options, "words", ()) if word.startswith("--")]
            raise ConfigError(
                f"unknown argument '{extra[0]}'", nearest(extra[0], words), code="usage"
            )
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = action.metavar or action.dest
            raise ConfigError(
                f"unknown {what} '{value}'",
                nearest(str(value), map(str, action.choices)),
                code="usage",
            )


def build_parser() -> argparse.ArgumentParser:
    """Every command and option."""
    parser = _Parser(
        prog="vdqc", description="Compile a diffusion transformer into a low-bit program."
    )
    parser.add_argument("--version", action="version", version=f"vdqc {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"vdqc.cli.{name}")
        text = module.HELP
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.add_argument("--quiet", "-q", action="store_true", help="no progress, no remarks")
        sub.add_argument("--verbose", "-v", action="store_true", help="show remarks too")
        sub.set_defaults(command=module.run)
        module.add(sub)
        sub.set_defaults(words=list(sub._option_string_actions))
    return parser
