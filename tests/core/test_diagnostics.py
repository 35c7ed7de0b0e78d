import io

from vdqc.base.diagnostics import ConfigError, Diagnostics, Severity, nearest


def test_reads_as_documented() -> None:
    stream = io.StringIO()
    diagnostics = Diagnostics(stream=stream)
    diagnostics.warning("blocks.0.fc", "input-outlier", "input maximum 413", "wan.py:312  x = f(x)")
    diagnostics.remark("blocks.0.fc", "kernel-choice", "int8_linear")
    assert stream.getvalue() == (
        "warning: blocks.0.fc: input maximum 413  [input-outlier]\n  note: wan.py:312  x = f(x)\n"
    )
    assert [entry.severity for entry in diagnostics] == [Severity.WARNING, Severity.REMARK]


def test_remarks_are_shown_when_verbose() -> None:
    stream = io.StringIO()
    Diagnostics(stream=stream, verbose=True).remark("", "code", "text")
    assert stream.getvalue() == "remark: text  [code]\n"


def test_an_error_carries_its_diagnostic() -> None:
    error = ConfigError("unknown pass 'rotat'", "did you mean 'rotate'?", code="unknown-pass")
    assert str(error) == (
        "error: unknown pass 'rotat'  [unknown-pass]\n  note: did you mean 'rotate'?"
    )


def test_nearest() -> None:
    assert nearest("smoth", ["smooth", "rotate"]) == "did you mean 'smooth'?"
    assert nearest("xyz", ["b", "a"]) == "known: a, b"
