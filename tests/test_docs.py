"""The pages under docs/: tutorials run as they are written, generated pages are current."""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from vdqc.cli import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
TUTORIALS = ("compile_my_model.md", "ship_my_model.md")
_BLOCK = re.compile(r"^```(python|sh|text)(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_tutorials_run_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    compared = 0
    for page in TUTORIALS:
        printed, names = "", {"__name__": "tutorial"}
        for kind, file, text in _BLOCK.findall((DOCS / page).read_text()):
            if kind == "text":
                assert printed.strip() == text.strip(), page
                compared += 1
            elif file:
                Path(file).write_text(text)
            elif kind == "sh":
                for line in text.splitlines():
                    command, *arguments = shlex.split(line)
                    assert command == "vdqc", line
                    assert main(arguments) == 0, line
            else:
                stream = io.StringIO()
                with contextlib.redirect_stdout(stream):
                    exec(compile(text, page, "exec"), names)
                printed = stream.getvalue()
    sys.modules.pop("model", None)
    assert compared == 3


def maker() -> Any:
    spec = importlib.util.spec_from_file_location("make", DOCS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current() -> None:
    make = maker()
    stale = [path.name for path, text in make.pages().items() if make.read(path) != text]
    assert not stale, "run: python docs/make.py"
    kept = {path for path in (DOCS / "recipes").glob("*.md")}
    assert kept <= set(make.pages()), "a page of a recipe that is no more"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md"), *DOCS.parent.glob("*/README.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
