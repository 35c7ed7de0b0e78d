#!/usr/bin/env python3
"""Set up an environment of its own and run vdqc in it; needs nothing but Python 3.11 to 3.13.

    python3 dev.py example        compile the default example and compare it with the float model
    python3 dev.py test [ARGS]    format, lint, types, GPU kernels compiled offline, tests; ARGS go
                                  to pytest instead
    python3 dev.py setup          only make the environment

The environment is ``.venv`` (or $VDQC_VENV). On a machine without an NVIDIA GPU torch is installed
as its CPU build, which brings no CUDA packages; with one, as the normal build.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("VDQC_VENV", ROOT / ".venv")).resolve()
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
INPUTS = ("constraints.txt", "setup.cfg", "dev.py")


def main(argv: list[str]) -> int:
    """Run the verb; the exit code is that of the first command that fails."""
    verb, *rest = argv or ["help"]
    if verb not in ("example", "test", "setup"):
        print(__doc__)
        return 0 if verb == "help" else 2
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        print(f"expected Python 3.11 to 3.13, got {sys.version.split()[0]}", file=sys.stderr)
        return 2
    setup()
    if verb == "example":
        return example(rest)
    return test(rest) if verb == "test" else 0


def setup() -> None:
    """Make the environment, unless it is there and its inputs have not changed."""
    stamp = VENV / "vdqc-stamp"
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in INPUTS)).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    if not (BIN / "python").exists():
        venv.create(VENV, with_pip=True, symlinks=os.name != "nt")
    if not has_torch():
        install_torch()
    pip("--editable", f"{ROOT}[test]", "--constraint", str(ROOT / "constraints.txt"))
    stamp.write_text(wanted)


def has_torch() -> bool:
    """True if the environment holds a torch already."""
    found = subprocess.run(
        [BIN / "python", "-c", "import torch"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return found.returncode == 0


def install_torch() -> None:
    """The normal build if there is a GPU, else the CPU build, from pip's sources or PyTorch's."""
    version = next(
        line
        for line in (ROOT / "constraints.txt").read_text().split()
        if line.startswith("torch==")
    )
    if shutil.which("nvidia-smi") or sys.platform != "linux":
        pip(version)
        return
    try:
        pip(f"{version}+cpu", quiet_failure=True)
    except subprocess.CalledProcessError:
        pip(f"{version}+cpu", "--extra-index-url", CPU_BUILDS)


def pip(*arguments: str, quiet_failure: bool = False) -> None:
    """pip install in the environment."""
    command = [str(BIN / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    errors = subprocess.DEVNULL if quiet_failure else None
    subprocess.run([*command, *arguments], check=True, stderr=errors)


def example(arguments: list[str]) -> int:
    """Compile examples/digits, then compare the result with the float model."""
    vdqc = str(BIN / "vdqc")
    model, out = str(ROOT / "examples" / "digits" / "model.py"), str(ROOT / "digits.vdqc")
    return run(
        [
            vdqc,
            "compile",
            model,
            "--passes",
            "rotate,smooth,quant",
            "-o",
            out,
            "--force",
            *arguments,
        ],
        [vdqc, "check", out, "--model", model, "--report", str(ROOT / "digits.html")],
    )


def test(arguments: list[str]) -> int:
    """The whole gate, or pytest alone with arguments of the caller's."""
    python = str(BIN / "python")
    if arguments:
        return run([python, "-m", "pytest", *arguments])
    return run(
        [python, "-m", "ruff", "format", "--check", "."],
        [python, "-m", "ruff", "check", "."],
        [python, "-m", "mypy"],
        # GPU kernels, compiled without a GPU: spills, registers, shared memory, opcodes
        [python, "benchmarks/static.py", "--check", "--arch", "sm90"],
        [python, "-m", "pytest", "-n", "2"],
    )


def run(*commands: list[str]) -> int:
    """Run commands in order until one fails."""
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    for command in commands:
        print("$", " ".join(command), flush=True)
        code = subprocess.run(command, cwd=ROOT, env=environment).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
