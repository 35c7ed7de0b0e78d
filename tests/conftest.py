"""One thread, one hypothesis profile, quiet third parties."""

import os

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
