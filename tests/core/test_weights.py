"""Weights on disk: found by header, read when asked for, damage refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vdqc.base.diagnostics import InputError
from vdqc.ir.weights import stored_folder, stored_tensors

WEIGHTS = {
    "a.weight": torch.randn(6, 4),
    "a.bias": torch.randn(6).bfloat16(),
    "count": torch.arange(3),
}


def test_headers_tell_shape_and_dtype_and_reading_gives_the_values(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    stored = {tensor.key: tensor for tensor in stored_tensors(tmp_path / "model.safetensors")}
    assert set(stored) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        tensor = stored[name]
        assert (tensor.shape, tensor.dtype) == (tuple(value.shape), value.dtype)
        assert tensor.nbytes == value.nbytes
        assert torch.equal(tensor.read(), value)
        assert torch.equal(tensor.read_rows(1, 3), value[1:3])


def test_a_read_tensor_outlives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    value = next(t for t in stored_tensors(file) if t.key == "a.weight").read()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(value, WEIGHTS["a.weight"])


def test_shards_are_found_through_their_index(tmp_path: Path) -> None:
    names = {"a.weight": "one.safetensors", "a.bias": "two.safetensors"}
    for name, file in names.items():
        save_file({name: WEIGHTS[name]}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert set(stored_folder(tmp_path)) == set(names)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks two\.safetensors"):
        stored_folder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -5])
def test_a_damaged_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    save_file(WEIGHTS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="not a readable safetensors file"):
        list(stored_tensors(file))
