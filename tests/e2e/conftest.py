"""A compiled diffusers model that tests share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import vdqc
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]


@pytest.fixture(scope="session")
def wan_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan, compiled to eight bits once: for tests that only read."""
    folder = tmp_path_factory.mktemp("hub") / "wan"
    vdqc.compile(WAN.build(), WAN.samples(), "quant", "w8a8", "cpu", folder, verify=False)
    return folder


@pytest.fixture(scope="session")
def wan_output(wan_artifact: Path) -> Tensor:
    """What it returns for the inputs of seed 5."""
    with torch.no_grad():
        value: Tensor = vdqc.load(wan_artifact)(**WAN.inputs(seed=5)).sample
    return value
