"""A kernel variant compiled for a GPU that is not there, and what its machine code says.

``compile_variant`` runs Triton's whole compiler and reads the cubin back with the ``cuobjdump``
that Triton ships: registers, spills, shared memory, the opcode of the matrix multiply, and
instructions per matrix multiply in the main loop (the innermost loop that holds one).

Error: warp-specialised kernels differ a little from compilation to compilation; their figures are
metrics, not hashes.
Source: ours.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from vdqc.base.diagnostics import LoweringError
from vdqc.base.target import TARGETS
from vdqc.kernels.gpu.variants import Variant


@final
@dataclass(frozen=True)
class Figures:
    """What is read from one cubin.

    Attributes:
        regs: registers per thread at entry.
        spills: local loads and stores; 0 wanted.
        shared: bytes of shared memory, static and dynamic.
        opcode: of the matrix multiply, "" if there is none.
        mma: matrix multiplies in the main loop.
        loop: instructions of the main loop per matrix multiply.
        bytes: of the cubin.
    """

    regs: int
    spills: int
    shared: int
    opcode: str
    mma: int
    loop: float
    bytes: int


def compile_variant(variant: Variant, arch: str) -> Figures:
    """Compile ``variant`` for ``arch`` (``sm90``) and read the cubin; needs no GPU.

    Raises LoweringError if it does not compile, or under ``TRITON_INTERPRET``.
    """
    found = compiled(variant, arch)
    return read_cubin(found.asm["cubin"], int(found.metadata.shared))


def compiled(variant: Variant, arch: str) -> Any:
    """Triton's compiled kernel of ``variant``; raises as ``compile_variant``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(variant.fn, "cache_key"):
        raise LoweringError(
            f"{variant.name}: the kernel was decorated for the interpreter",
            "unset TRITON_INTERPRET",
        )
    source = ASTSource(variant.fn, *_arguments(variant))
    target = GPUTarget("cuda", int(arch[2:]), 32)
    try:
        return triton.compile(
            source, target=target, options={"enable_fp_fusion": True} | dict(variant.options)
        )
    except Exception as error:
        raise LoweringError(
            f"{variant.name} does not compile for {arch}: {_in_one_line(error)}"
        ) from error


def _arguments(variant: Variant) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any]]:
    """Types, constants and alignments as ``ASTSource`` wants them, members of tuples included."""
    names = list(variant.fn.arg_names)
    unknown = {*variant.signature, *variant.constexprs} ^ set(names)
    if unknown:
        raise LoweringError(f"{variant.name}: no such argument, or no type for: {sorted(unknown)}")
    types: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    aligned: dict[Any, Any] = {}
    for index, name in enumerate(names):
        kind = variant.signature.get(name, "constexpr")
        types[name] = kind
        if name in variant.constexprs:
            constants[(index,)] = variant.constexprs[name]
        elif isinstance(kind, tuple):
            members = [member if isinstance(member, str) else "constexpr" for member in kind]
            types[name] = type(kind)(*members)
            constants |= {(index, i): v for i, v in enumerate(kind) if not isinstance(v, str)}
            places = [(index, i) for i, member in enumerate(members) if member.startswith("*")]
            aligned |= {place: [["tt.divisibility", 16]] for place in places}
        elif kind.startswith("*") or name in variant.aligned:
            aligned[(index,)] = [["tt.divisibility", 16]]
    return types, constants, aligned


def _in_one_line(error: BaseException) -> str:
    """The innermost cause, its last line: Triton wraps it in source text for every call."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def read_cubin(cubin: bytes, shared: int) -> Figures:
    """Figures of a cubin; ``shared`` is the dynamic shared memory of its launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = instructions(_cuobjdump("-sass", file.name))
    registers = re.search(r"REG:(\d+)", usage)
    loop = main_loop(code)
    multiplies = [op for op in loop or [op for _, op, _ in code] if _is_mma(op)]
    return Figures(
        regs=int(registers.group(1)) if registers else 0,
        spills=sum(op.startswith(("LDL", "STL")) for _, op, _ in code),
        shared=shared,
        opcode=max(sorted(set(multiplies)), key=multiplies.count, default=""),  # ties by name
        mma=len(multiplies) if loop else 0,
        loop=round(len(loop) / len(multiplies), 1) if loop else 0.0,
        bytes=len(cubin),
    )


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [str(tool), *arguments], capture_output=True, text=True, check=True
    ).stdout


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """``(address, opcode, operands)`` of every instruction but NOP, in order."""
    found = [(int(a, 16), op, rest.strip()) for a, op, rest in _LINE.findall(sass)]
    return [(address, op, rest) for address, op, rest in found if op != "NOP"]


def main_loop(code: Iterable[tuple[int, str, str]]) -> list[str]:
    """Opcodes of the shortest loop that has a matrix multiply; empty if there is none."""
    code = list(code)
    best: list[str] = []
    for address, op, rest in code:
        goal = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if goal is None or int(goal.group(1), 16) >= address:
            continue
        body = [op for place, op, _ in code if int(goal.group(1), 16) <= place <= address]
        if any(map(_is_mma, body)) and (not best or len(body) < len(best)):
            best = body
    return best


def _is_mma(opcode: str) -> bool:
    return re.match(r"(I|H|Q|O)G?MMA|UTC(I|H|Q|O)?\w*MMA|DMMA", opcode) is not None


def faults(variant: Variant, arch: str, found: Figures) -> list[str]:
    """What is wrong with ``found`` on its own: spills, too much shared memory, another multiply."""
    problems = []
    if found.spills:
        problems.append(f"expected no spills, got {found.spills}")
    limit = TARGETS[arch].shared_memory
    if found.shared > limit:
        problems.append(f"expected at most {limit} bytes of shared memory, got {found.shared}")
    wanted = variant.expects.get(arch)
    if wanted is not None and not re.match(wanted, found.opcode):
        problems.append(f"expected opcode {wanted}, got {found.opcode or 'none'}")
    return problems
