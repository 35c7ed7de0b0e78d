"""Programs for a GPU, as far as a machine without one can tell."""

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import vdqc
from vdqc.aot import PACKAGE
from vdqc.base.diagnostics import ArtifactError, InputError, LoweringError
from vdqc.base.numerics import relative_error
from vdqc.base.target import TARGETS
from vdqc.ir import artifact
from vdqc.lowering.precompile import CUBINS
from vdqc.packaged import open_package
from vdqc.placement import check_machine
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


@no_gpu
def test_a_program_for_a_gpu_runs_on_its_references(tmp_path: Path) -> None:
    model, samples = WAN.build(), WAN.samples()
    for target in ("cpu", "sm90"):
        vdqc.compile(model, samples, "smooth,rotate,quant", target=target, out=tmp_path / target)
    with pytest.warns(UserWarning, match="compiled for sm90 and runs here through the references"):
        program = vdqc.load(tmp_path / "sm90", reference=True)
    call = WAN.inputs(B=3, seed=5)
    expected = vdqc.load(tmp_path / "cpu")(**call).sample
    original = model(**call).sample
    noise = relative_error(expected, original)
    assert relative_error(program(**call).sample, expected) < 0.5 * noise
    assert artifact.read(tmp_path / "sm90").manifest["target"] == "sm90"
    needed = "compiled for sm90: expected a GPU of sm90 or later, found none"
    for load in (vdqc.load, type(model).from_pretrained):
        with pytest.raises(ArtifactError, match=needed):
            load(tmp_path / "sm90")
    with pytest.raises(InputError, match=r"expected a device that torch finds.* got cuda"):
        program.to("cuda")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch, capability: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    check_machine("wan.vdqc", TARGETS["sm80"], False)
    with pytest.raises(ArtifactError, match=r"sm90 or later, found sm8[09]"):
        check_machine("wan.vdqc", TARGETS["sm90"], False)


@no_gpu
def test_a_program_for_the_cpu_stays_there(tiny_artifact: Path) -> None:
    program = vdqc.load(tiny_artifact)
    for move in (
        program.cuda,
        lambda: program.to("cuda:1"),
        lambda: program.to_empty(device="cuda"),
    ):
        with pytest.raises(InputError, match=r"(?s)for cpu, it cannot move to cuda.*--target"):
            move()
    assert program.device.type == "cpu"
    program.to("cpu").to(torch.float32).share_memory()


def test_precompiled_kernels_are_part_of_the_artifact(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        *("compile", str(model_file), "--passes", "quant", "--scheme", "blocks.1.down=w8a8"),
        *("--target", "sm80", "--precompile", "-o", str(tmp_path / "out")),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "triton")
    subprocess.run(
        [sys.executable, "-m", "vdqc", *words], env=environment, check=True, capture_output=True
    )
    found = artifact.read(tmp_path / "out")
    index = json.loads((found.path / CUBINS / "index.json").read_text())
    assert index["arch"] == "sm80"
    # two of the three samples have one size; 72 rows, no multiple of 16, take kernels of their own
    assert index["sizes"] == [
        {"x": [2, 16, 32], "timestep": [2]},
        {"x": [3, 24, 32], "timestep": [3]},
    ]
    assert Counter(row["name"] for row in index["kernels"]) == {"_line": 6, "byte_gemm": 4}
    files = [name for name in found.manifest["files"] if name.startswith(CUBINS)]
    assert len(files) == 1 + 2 * len(index["kernels"])

    # on a GPU of another generation they are left alone, with one sentence
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.warns(UserWarning, match="compiled for sm80, this GPU is sm90; they are ignored"):
        vdqc.load(found.path)
    monkeypatch.undo()

    cubin = next((found.path / CUBINS).glob("*/byte_gemm.cubin"))
    cubin.write_bytes(bytes(len(cubin.read_bytes())))
    with pytest.raises(ArtifactError, match=r"byte_gemm\.cubin is not the file that was written"):
        vdqc.load(found.path)


def test_precompile_asks_for_a_gpu_target(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="expected a GPU target for --precompile, got cpu"):
        vdqc.compile(model_file, target="cpu", precompile=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("capability", "found"), [(None, "none"), ((8, 0), "sm80")])
def test_a_package_for_a_gpu_is_compiled_on_one(
    model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: Any, found: str
) -> None:
    """Said before the model is loaded; what was made here before ran on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("vdqc.compiler.as_source", lambda *_: pytest.fail("the model was loaded"))
    expected = f"expected a GPU of sm90 or later for --aot with --target sm90, found {found}"
    with pytest.raises(LoweringError, match=expected):
        vdqc.compile(model_file, target="sm90", aot=True, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("made_for", "capability", "told"),
    [
        ("90", (9, 0), None),
        ("90", (12, 0), "program.pt2 was compiled for sm90, this GPU is sm120: it is ignored"),
        ("80", (9, 0), "program.pt2 was compiled for sm80, this GPU is sm90: it is ignored"),
        (None, (9, 0), "compiled for a GPU that it does not name, this GPU is sm90"),
    ],
)
def test_a_package_runs_on_gpus_of_its_capability_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made_for: str | None,
    capability: Any,
    told: Any,
) -> None:
    facts = {"AOTI_DEVICE_KEY": "cuda"}
    if made_for is not None:
        facts["AOTI_COMPUTE_CAPABILITY"] = made_for
    with zipfile.ZipFile(tmp_path / PACKAGE, "w") as package:
        package.writestr("p/byteorder", "little")
        package.writestr("p/data/aotinductor/model/c.wrapper_metadata.json", json.dumps(facts))
    loaded: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda p, **_: loaded.append(p))
    if told is None:
        assert open_package(tmp_path, torch.device("cuda")) is not None
    else:
        with pytest.warns(UserWarning, match=told):
            assert open_package(tmp_path, torch.device("cuda")) is None
    assert bool(loaded) == (told is None)  # native code of another GPU is not even opened
    with pytest.raises(ArtifactError, match="compiled for cuda: expected a package for cpu"):
        open_package(tmp_path, torch.device("cpu"))
