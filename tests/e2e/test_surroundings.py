"""What surrounds a compilation: autocast, modes, rules beside a recipe, copies, files."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vdqc import Sample, compiler
from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.cli.common import require_places, write_whole
from vdqc.compiled import CompiledModel
from vdqc.loading import load


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.5), nn.Linear(32, 16))


def call() -> Sample:
    return Sample({"input": torch.randn(4, 16, generator=torch.Generator().manual_seed(1))})


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("around") / "out"
    return compiler.compile(model(), [call()], "quant", "w8a8", "cpu", out).path


def test_autocast_and_inference_mode_do_not_enter_the_program(artifact: Path, tmp_path: Path):
    mine, calls, out = model(), [call()], tmp_path / "out"
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        found = compiler.compile(mine, calls, "quant", "w8a8", "cpu", out).path
        assert torch.is_autocast_enabled("cpu")
    with torch.no_grad():
        expected = load(artifact)(**call().inputs)
        assert torch.equal(load(found)(**call().inputs), expected)
    assert expected.dtype == torch.float32


def test_modules_keep_their_modes(tmp_path: Path):
    mine = model().train()
    mine[1].eval()
    compiler.compile(mine, [call()], "quant", "w8a8", "cpu", tmp_path / "out")
    assert [module.training for module in mine] == [True, False, True]


def test_globs_add_to_the_scheme_of_a_recipe():
    rules = compiler.parse_recipe(None, "blocks.0.q=none", "gptq").rules
    own = compiler.parse_recipe(None, None, "gptq").rules
    assert [*map(str, own), "blocks.0.q=none"] == list(map(str, rules))
    (alone,) = compiler.parse_recipe(None, "w6a6", "gptq").rules
    assert str(alone) == "*=w6a6"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_copy_has_weights_of_its_own_compiled_or_not(artifact: Path, when: str):
    first = load(artifact)
    if when == "before":
        first.compile(backend="eager")
    second = copy.deepcopy(first)
    if when == "after":
        second.compile(backend="eager")
    with torch.no_grad():
        before = first(**call().inputs)
        second.load_state_dict({k: torch.zeros_like(v) for k, v in first.state_dict().items()})
        assert not second(**call().inputs).any()
        assert torch.equal(first(**call().inputs), before)
    assert type(copy.copy(first)) is type(first)
    assert isinstance(copy.copy(first), CompiledModel)


def test_pickling_says_what_to_do(artifact: Path):
    with pytest.raises(InputError, match="cannot be pickled"):
        pickle.dumps(load(artifact))


def test_files_are_whole_or_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "page.html"
    write_whole(file, "one")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", lambda path, *_, **__: path.touch() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_whole(file, "two")
    assert file.read_text() == "one"
    assert list(tmp_path.iterdir()) == [file]
    link = tmp_path / "link"
    link.symlink_to(file)
    write_whole(link, "three")
    assert link.is_symlink()
    assert file.read_text() == "three"
    require_places(str(file), None, "here.json")
    with pytest.raises(ConfigError, match="there is no folder"):
        require_places(str(tmp_path / "nowhere" / "page.html"))


@pytest.mark.parametrize("wrapper", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(artifact: Path, tmp_path: Path, wrapper: Callable[..., Any]):
    out = tmp_path / "out"
    found = compiler.compile(wrapper(model()), [call()], "quant", "w8a8", "cpu", out).path
    assert load(found).state_dict().keys() == load(artifact).state_dict().keys()
    with torch.no_grad():
        assert torch.equal(load(found)(**call().inputs), load(artifact)(**call().inputs))
