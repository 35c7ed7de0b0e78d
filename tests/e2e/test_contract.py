"""What diffusers' own model tests ask of every model, asked of compiled ones, family by family.

The ideas are those of diffusers' ``tests/models/testing_utils`` (common, quantization, memory,
compile): output classes, determinism, a round trip on disk, moves, footprint. Nothing is skipped: a
family that differs is in ``EXCEPTIONS`` with the reason, and the test asserts that it still does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoModel, ModelMixin
from torch import Tensor, nn

import vdqc
from vdqc.base.diagnostics import InputError
from vdqc.base.numerics import sqnr_db
from vdqc.compiled import CompiledModel
from vdqc.ir.inputs import sample_of
from vdqc.testing.architectures import ARCHITECTURES, Architecture

FAMILIES = (
    "wan-t2v",
    "cogvideox-5b",
    "ltx",
    "latte",
    "allegro",
    "cosmos2",
    "sana-video",
    "dit",
    "pixart",
    "sd3",
    "flux",
    "qwen-image",
)
#: (family, check) -> why the family differs.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("sana-video", "footprint"): "its feed-forward is convolutions, which stay in float32",
}
#: Eight bits a weight; what is not a linear stays in float32.
FOOTPRINT = 0.75
SQNR_DB = 20.0


@dataclass(frozen=True)
class Family:
    """A float model, its artifact, and what each computes for one call."""

    architecture: Architecture
    float_model: nn.Module
    out: Path
    call: dict[str, Any]
    expected: Any
    actual: Any
    compiled: Any

    def exception(self, check: str) -> str | None:
        """Why the family differs in a check; None if it does not."""
        return EXCEPTIONS.get((self.architecture.name, check))


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Family]:
    architecture = ARCHITECTURES[request.param]
    model = architecture.build()
    out = tmp_path_factory.mktemp("contract") / request.param
    # one axis varies: three times faster to capture than five, and sizes are tested elsewhere
    samples = [sample_of(architecture.inputs(B=B, seed=B)) for B in (2, 3)]
    vdqc.compile(model, samples, "quant", "w8a8", "cpu", out, verify=False)
    call = architecture.inputs(seed=5)
    compiled = vdqc.load(out)
    with torch.no_grad():
        yield Family(architecture, model, out, call, model(**call), compiled(**call), compiled)


def test_at_least_twelve_families_and_no_stale_exception() -> None:
    assert len({ARCHITECTURES[name].class_name for name in FAMILIES}) >= 12
    for name, check in EXCEPTIONS:
        assert name in FAMILIES
        assert f"test_{check}" in globals()


def test_class(family: Family) -> None:
    """An instance of the float model's class, by its name, with its configuration."""
    cls = getattr(diffusers, family.architecture.class_name)
    for kind in (cls, ModelMixin, CompiledModel):
        assert isinstance(family.compiled, kind)
    assert type(family.compiled).__name__ == cls.__name__
    plain = {k: v for k, v in family.float_model.config.items() if not k.startswith("_")}
    for key, value in plain.items():
        found = family.compiled.config[key]
        assert found == (list(value) if isinstance(value, tuple) else value), key


def test_output(family: Family) -> None:
    """The same output class, the same fields, and the same values as a tuple."""
    assert type(family.actual) is type(family.expected)
    assert family.actual.keys() == family.expected.keys()
    with torch.no_grad():
        as_tuple = family.compiled(**family.call, return_dict=False)
    assert isinstance(as_tuple, tuple)
    for found, value in zip(as_tuple, family.actual.to_tuple(), strict=True):
        assert torch.equal(found, value)


def test_determinism(family: Family) -> None:
    with torch.no_grad():
        again = family.compiled(**family.call)
    assert all(map(torch.equal, again.to_tuple(), family.actual.to_tuple()))


def test_fidelity(family: Family) -> None:
    for actual, expected in zip(family.actual.to_tuple(), family.expected.to_tuple(), strict=True):
        good = sqnr_db(actual, expected) > SQNR_DB
        assert good == (family.exception("fidelity") is None)


def test_round_trip(family: Family, tmp_path: Path) -> None:
    """save_pretrained, then from_pretrained through AutoModel: the same bits."""
    family.compiled.save_pretrained(tmp_path / "saved")
    loaded = AutoModel.from_pretrained(str(tmp_path / "saved"))
    assert type(loaded) is type(family.compiled)
    state = loaded.state_dict()
    assert state.keys() == family.compiled.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in family.compiled.state_dict().items())
    with torch.no_grad():
        again = loaded(**family.call)
    assert all(map(torch.equal, again.to_tuple(), family.actual.to_tuple()))


def test_moves(family: Family) -> None:
    """To its own device and dtype is nothing, to another device moves all, to another dtype not."""
    model = vdqc.load(family.out, verify=False)
    assert model.to("cpu") is model
    assert model.to(torch.float32) is model
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    with pytest.raises(InputError, match="compile the model again"):
        model.to(torch.bfloat16)
    model.to("meta")
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    assert all(tensor.is_meta for tensor in tensors)


def test_footprint(family: Family) -> None:
    floats: Any = family.float_model
    share = family.compiled.get_memory_footprint() / floats.get_memory_footprint()
    assert (share < FOOTPRINT) == (family.exception("footprint") is None), share
