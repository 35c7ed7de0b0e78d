"""passes/README.md is run as it is written: every block in order, every printed text compared."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "passes" / "README.md"
_BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs() -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    printed, compared = "", 0
    for kind, text in _BLOCK.findall(README.read_text()):
        if kind == "text":
            assert printed.strip() == text.strip()
            compared += 1
            continue
        stream = io.StringIO()
        with contextlib.redirect_stdout(stream):
            exec(compile(text, str(README), "exec"), names)
        printed = stream.getvalue()
    tests = [value for name, value in names.items() if name.startswith("test_")]
    for test in tests:
        test()
    assert (compared, len(tests)) == (3, 4)
