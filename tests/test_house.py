"""The architecture, asserted: who imports whom, what each file must have, what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vdqc.passes.table import PASSES

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(
    file
    for folder in ("vdqc", "passes", "lowering", "kernels")
    for file in (ROOT / folder).rglob("*.py")
    if not any(part.is_symlink() for part in [file, *file.parents] if part != ROOT)
)

# A module may import only modules of a lower layer, or of its own layer where that is marked open.
LAYERS = [
    (0, ["vdqc.version", "vdqc.base", "vdqc.base.diagnostics", "vdqc.base.target"]),
    (1, ["vdqc.base.scheme"]),
    (2, ["vdqc.base.*"]),
    (3, ["vdqc.ir.ops", "vdqc.kernels.prologue", "vdqc.kernels.sparse_operands"]),
    (3, ["vdqc.kernels.exp2_attention"]),
    (4, ["vdqc.kernels.gpu.*", "vdqc.kernels.gpu"]),
    (5, ["vdqc.kernels.base", "vdqc.kernels.integer", "vdqc.kernels.quantize_rows"]),
    (5, ["vdqc.kernels.sparse_attention_cpu"]),
    (5, ["vdqc.ir.program", "vdqc.ir.artifact", "vdqc.engine.*", "vdqc.engine"]),
    (4, ["vdqc.ir.*", "vdqc.ir"]),
    (6, ["vdqc.passes.*", "vdqc.kernels.*"]),
    (7, ["vdqc.lowering.*"]),
    (9, ["vdqc", "vdqc.cli", "vdqc.cli.*", "vdqc.__main__"]),
    (8, ["vdqc.*"]),
]
OPEN_WITHIN = {0, 2, 4, 5, 7, 8, 9}  # files of these layers may import each other, without cycles
FORBIDDEN = [
    ("vdqc.passes.", "vdqc.kernels"),
    ("vdqc.passes.", "vdqc.lowering"),
    ("vdqc.kernels.", "vdqc.ir.graph"),
    ("vdqc.kernels.gpu", "vdqc.ir"),
    ("vdqc.ir.", "vdqc.kernels.gpu"),
    ("vdqc.lowering.", "vdqc.passes"),
]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "vdqc" else ("vdqc", *parts)
    return ".".join(parts).removesuffix(".__init__")


def layer(name: str) -> int:
    for number, patterns in LAYERS:
        for pattern in patterns:
            if name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1])):
                return number
    raise AssertionError(f"{name} is in no layer")


def imports(file: Path) -> set[str]:
    known = {module_name(other) for other in FILES}
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vdqc"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in known else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("vdqc"))
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_only_lower_layers(file: Path) -> None:
    name = module_name(file)
    for imported in sorted(imports(file)):
        here, there = layer(name), layer(imported)
        inside = here == there and here in OPEN_WITHIN
        assert there < here or inside, f"{name} (layer {here}) imports {imported} (layer {there})"
        for importer, banned in FORBIDDEN:
            assert not (name.startswith(importer) and imported.startswith(banned)), (
                f"{name} must not import {imported}"
            )


def test_no_import_cycles() -> None:
    import networkx as nx

    graph = nx.DiGraph((module_name(file), other) for file in FILES for other in imports(file))
    lazy = {("vdqc.ir.graph", "vdqc.ir.printer")}  # Graph.__str__ prints; imported inside it
    graph.remove_edges_from(lazy)
    assert not list(nx.simple_cycles(graph))


def test_top_folders_are_not_packages() -> None:
    for folder in ("passes", "lowering", "kernels"):
        assert not (ROOT / folder / "__init__.py").exists(), (
            f"{folder}/__init__.py would shadow third-party packages of that name"
        )
        assert (ROOT / "vdqc" / folder).is_symlink()


@pytest.mark.parametrize("name", PASSES)
def test_pass_file(name: str) -> None:
    module, _, attribute = PASSES[name].partition(":")
    assert module == f"vdqc.passes.{name}"
    docstring = ast.get_docstring(ast.parse((ROOT / "passes" / f"{name}.py").read_text()))
    assert docstring is not None
    for word in ("Source:", "Invariant:"):
        assert word in docstring, f"passes/{name}.py: its docstring lacks '{word}'"
    loaded = getattr(__import__(module, fromlist=[attribute]), attribute)
    assert loaded.name == name
    assert (ROOT / "tests" / "passes" / f"test_{name}.py").exists()


KERNEL_FILES = sorted((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("file", KERNEL_FILES, ids=lambda file: file.stem)
def test_kernel_file(file: Path) -> None:
    if file.stem in ("base", "table"):
        return
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    for word in ("Source:", "Error:"):
        assert word in docstring, f"kernels/{file.name}: its docstring lacks '{word}'"


def in_fresh_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_is_light() -> None:
    heavy = ["triton", "diffusers", "transformers", "sympy", "numpy", "torch"]
    code = f"import sys, vdqc; print([m for m in {heavy!r} if m in sys.modules])"
    assert in_fresh_python(code) == "[]"


def test_public_names() -> None:
    code = "import vdqc; print(sorted(vdqc.__all__)); [getattr(vdqc, n) for n in vdqc.__all__]"
    public = ["Sample", "__version__", "compile", "load", "load_pipeline", "register_diffusers"]
    assert in_fresh_python(code) == str(public)


def test_folders_are_imported_under_one_name() -> None:
    code = (
        "import sys; from vdqc.passes.table import PASSES; import vdqc.compiler;"
        "print([m for m in ('passes', 'kernels', 'lowering') if m in sys.modules])"
    )
    assert in_fresh_python(code) == "[]"
