"""Compiling for GPUs that are not there; the table itself is checked by benchmarks/static.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vdqc.base.diagnostics import LoweringError
from vdqc.kernels.gpu.offline import Figures, compile_variant, faults, instructions, main_loop
from vdqc.kernels.gpu.variants import Variant, collect

ROOT = Path(__file__).resolve().parents[3]
SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                  /* 0x00000a00ff017b82 */
                                                                           /* 0x000fe20000000800 */
        /*0010*/                   STL [R1+0x8], R4 ;
        /*0020*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;
        /*0030*/              @!P0 IADD3 R3, R3, 0x1, RZ ;
        /*0040*/                   IMMA.16832.S8.S8.SAT R8, R4.ROW, R6.COL, R8 ;
        /*0050*/               @P1 BRA 0x20 ;
        /*0060*/                   NOP ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
"""


def test_the_main_loop_is_the_innermost_with_a_multiply() -> None:
    code = instructions(SASS)
    assert [op for _, op, _ in code][:2] == ["LDC", "STL"]
    assert [op[:4] for op in main_loop(code)] == ["IMMA", "IADD", "IMMA", "BRA"]
    assert main_loop(code[:2]) == []


def test_faults_are_spills_memory_and_opcode() -> None:
    variant = Variant("x", None, {}, {}, expects={"sm90": "IGMMA"})
    good = Figures(255, 0, 200 << 10, "IGMMA.64x128x32.S8.S8", 8, 13.0, 1)
    assert faults(variant, "sm90", good) == []
    assert "163840" not in str(faults(variant, "sm90", good))
    assert "shared memory" in faults(variant, "sm80", good)[0]
    bad = Figures(255, 3, 1, "IMMA.16832.S8", 8, 13.0, 1)
    assert len(faults(variant, "sm90", bad)) == 2


def test_names_are_unique() -> None:
    names = [variant.name for variant in collect()]
    assert len(names) == len(set(names))


def test_kernels_of_the_interpreter_do_not_compile() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here")
    with pytest.raises(LoweringError, match="unset TRITON_INTERPRET"):
        compile_variant(collect()[0], "sm90")


@pytest.mark.parametrize(("only", "arch"), [("int8_gemm-128x256x128w8s3/gated", "sm90")])
def test_figures_have_not_become_worse(only: str, arch: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "benchmarks/static.py", "--check", "--only", only, "--arch", arch],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    assert only in found.stdout


def test_regressions_are_against_what_was_recorded() -> None:
    spec = importlib.util.spec_from_file_location("static", ROOT / "benchmarks" / "static.py")
    assert spec is not None
    assert spec.loader is not None
    static = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(static)
    now = Figures(200, 0, 1000, "IMMA.16832.S8.S8", 8, 13.0, 1)
    known = {"regs": 200, "shared": 1000, "opcode": "IMMA.16832.S8.S8"}
    assert static.regressions(None, now) == []
    assert static.regressions(known, now) == []
    worse = static.regressions({"regs": 168, "shared": 999, "opcode": "IGMMA"}, now)
    assert [problem.split(",")[0] for problem in worse] == [
        "expected at most 168 registers",
        "expected at most 999 bytes of shared memory",
        "expected opcode IGMMA",
    ]
    record = {"3.9.0": {"x": {"sm90": {"regs": 1}, "sm80": {"regs": 2}}}}
    assert json.loads(static._text(record)) == record
