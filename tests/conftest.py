"""One thread, one hypothesis profile, quiet third parties."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve a shared machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "vdqc",
    derandomize=True,
    deadline=None,
    max_examples=10,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("vdqc")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A model.py that compiles in a second or two, in a folder of its own."""
    return shutil.copy(Path(__file__).parent / "tiny_model.py", tmp_path / "model.py")


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, compiled once with the default recipe: for tests that only read."""
    from vdqc.compiler import compile

    folder = tmp_path_factory.mktemp("tiny")
    model = shutil.copy(Path(__file__).parent / "tiny_model.py", folder / "model.py")
    return compile(model, out=folder / "out", target="cpu").path
