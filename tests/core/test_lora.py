"""Names of adapters' tensors, and low-rank updates through recorded transforms."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from vdqc.base import hadamard
from vdqc.base.diagnostics import ArtifactError, InputError
from vdqc.engine.pass_manager import Context
from vdqc.ir import transforms
from vdqc.ir.analysis.absorb_rotation import RotateEdit
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.ops import KRONECKER, ROTATE
from vdqc.ir.peers import wrap_weight
from vdqc.ir.sample import Sample
from vdqc.ir.transforms import Step, transformed
from vdqc.lora.keys import factors, read_adapter
from vdqc.passes.fold import fold_constants, rotated_rows

aten = torch.ops.aten
NAME = "blocks.0.attn1.to_q"
DOWN = torch.arange(6.0).reshape(2, 3)
UP = torch.arange(8.0).reshape(4, 2) - 3


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"),
        (f"transformer.{NAME}.lora_A.weight", f"transformer.{NAME}.lora_B.weight"),
        (f"{NAME}.lora_A.default.weight", f"{NAME}.lora_B.default.weight"),
        (f"base_model.model.{NAME}.lora_A.weight", f"base_model.model.{NAME}.lora_B.weight"),
        (f"diffusion_model.{NAME}.lora_down.weight", f"diffusion_model.{NAME}.lora_up.weight"),
        (f"unet.{NAME}.lora.down.weight", f"unet.{NAME}.lora.up.weight"),
        (
            "lora_unet_blocks_0_attn1_to_q.lora_down.weight",
            "lora_unet_blocks_0_attn1_to_q.lora_up.weight",
        ),
    ],
)
def test_names_of_every_format(down, up):
    found, unmatched = factors({down: DOWN, up: UP}, {}, [NAME, "blocks.0.attn1.to_k"])
    assert found.keys() == {NAME}
    assert not unmatched
    assert torch.equal(found[NAME].up @ found[NAME].down.double(), (UP @ DOWN).double())


def update(extra, metadata):
    state = {f"{NAME}.lora_A.weight": DOWN, f"{NAME}.lora_B.weight": UP, **extra}
    found, unmatched = factors(state, metadata, [NAME])
    assert not unmatched
    return found[NAME].up @ found[NAME].down.double()


def test_alpha_from_a_tensor_or_from_metadata():
    whole = (UP @ DOWN).double()
    assert torch.equal(update({f"{NAME}.alpha": torch.tensor(1.0)}, {}), whole / 2)
    assert torch.equal(update({}, {"lora_alpha": 8, "r": 2}), 4 * whole)
    assert torch.equal(update({}, {"transformer.lora_alpha": 8}), 4 * whole)
    assert torch.equal(update({}, {"lora_alpha": 8, "alpha_pattern": {"to_q": 1}}), whole / 2)
    torch.testing.assert_close(update({}, {"lora_alpha": 8, "use_rslora": True}), 32**0.5 * whole)


def test_keys_without_a_layer_are_returned():
    other = {
        f"text_encoder.{NAME}.lora_A.weight": DOWN,
        f"{NAME}.lora_B.bias": UP[:, 0],
        f"{NAME}.diff_b": UP[:, 0],
        "patch_embedding.lora_A.weight": DOWN,
    }
    state = {f"{NAME}.lora_A.weight": DOWN, f"{NAME}.lora_B.weight": UP, **other}
    assert factors(state, {}, [NAME])[1] == list(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_B.weight": torch.full((4, 2), torch.inf)}, "NaN or infinity"),
        ({"lora_B.weight": torch.zeros(4, 3)}, r"got \[2, 3\] and \[4, 3\]"),
        ({"lora_B.weight": None}, "both factors"),
        ({"lora_magnitude_vector": torch.ones(4)}, "DoRA"),
        ({"lora_up.weight": UP}, "same layer"),
    ],
)
def test_damaged_adapters_are_refused(change, message):
    state = {"lora_A.weight": DOWN, "lora_B.weight": UP, **change}
    state = {f"{NAME}.{key}": value for key, value in state.items() if value is not None}
    with pytest.raises(InputError, match=message):
        factors(state, {}, [NAME])


def test_files_and_their_metadata(tmp_path: Path):
    file = tmp_path / "style.safetensors"
    save_file({"a": UP}, file, {"lora_adapter_metadata": json.dumps({"transformer.r": 2})})
    assert read_adapter(file)[1] == {"transformer.r": 2}
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 3}')
    save_file({"a": UP}, tmp_path / "adapter_model.safetensors")
    assert read_adapter(tmp_path)[1] == {"lora_alpha": 3}
    file.write_bytes(b"no tensors")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_adapter(file)


# -- transforms ---------------------------------------------------------------------------------

ROWS, COLUMNS = 8, 12


def moves(seed: int):
    """(step, the same on a dense matrix) of every kind, on a weight [8, 12]."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    long, short, left, right = draw(COLUMNS), draw(ROWS), draw(3, 3), draw(4, 4)
    order = torch.randperm(ROWS, generator=generator)
    signs = hadamard.random_signs(COLUMNS, seed).double()
    return [
        (lambda s: Step("times", (s,), (1, long)), lambda w: w * long),
        (lambda s: Step("times", (s,), (0, short)), lambda w: w * short[:, None]),
        (
            lambda s: Step("rotate", (s,), (signs, 4, False)),
            lambda w: hadamard.rotate(w, signs, 4),
        ),
        (
            lambda s: Step("kronecker", (s,), (left, right)),
            lambda w: w @ torch.kron(left, right),
        ),
        (lambda s: Step("select", (s,), (0, order)), lambda w: w[order]),
        (
            lambda s: Step(
                "cat",
                (
                    Step("slice", (s,), (0, 0, 3)),
                    Step("times", (Step("slice", (s,), (0, 3, None)),), (1, long)),
                ),
            ),
            lambda w: torch.cat([w[:3], w[3:] * long]),
        ),
        (
            lambda s: Step("transpose", (Step("times", (Step("transpose", (s,)),), (1, short)),)),
            lambda w: w * short,
        ),
    ]


@given(st.integers(0, 99), st.lists(st.integers(0, 5), max_size=5))
def test_factors_take_the_way_of_the_whole_update(seed, chosen):
    table = moves(seed)
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(ROWS, 2, generator=generator, dtype=torch.float64)
    down = torch.randn(2, COLUMNS, generator=generator, dtype=torch.float64)
    step, dense = Step("weight", args=("w", ROWS, COLUMNS)), up @ down
    for index in chosen:
        make, apply = table[index]
        step, dense = make(step), apply(dense)
    got = transformed(step, up, down)
    torch.testing.assert_close(got[0] @ got[1], dense)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(COLUMNS, ROWS, dtype=torch.float64)

    def forward(self, x):
        return self.first(x)


@pytest.fixture
def graph() -> Graph:
    x = torch.randn(2, 3, COLUMNS, dtype=torch.float64)
    graph = capture(Two(), [Sample({"x": x})])
    transforms.start(graph)
    return graph


def test_what_passes_build_and_fold_is_recorded(graph, tmp_path):
    """Steps found in the graph do to an update what the graph's expressions do to the weight."""
    site = graph.sites()[0]
    site_weight = graph.evaluate(site.weight)
    signs = graph.set_param("signs", hadamard.random_signs(COLUMNS, 1).double())
    scale = graph.set_param("scale", torch.rand(COLUMNS, dtype=torch.float64) + 0.5)
    part = graph.set_param("part", torch.randn(3, 3, dtype=torch.float64))
    other = graph.set_param("other", torch.randn(4, 4, dtype=torch.float64))
    rows = graph.set_param("row_signs", hadamard.random_signs(4, 2).double())
    tall = graph.set_param("tall", torch.rand(ROWS, 1, dtype=torch.float64))
    wrap_weight(graph, site, ROTATE, signs, 4)
    wrap_weight(graph, site, aten.mul.Tensor, scale)
    fold_constants(graph, Context())
    site = graph.sites()[0]
    wrap_weight(graph, site, KRONECKER, part, other)
    edit = RotateEdit(site.node, 1, 2, 0, 4, ROWS)
    rotated = rotated_rows(graph, graph.sites()[0].weight, rows, 4, edit)
    graph.set_operand(site.node, 1, rotated)
    wrap_weight(graph, graph.sites()[0], aten.mul.Tensor, tall)
    order = torch.arange(ROWS).flip(0)
    site = graph.sites()[0]
    transforms.place(graph, site, order)
    transforms.write(graph.transforms, tmp_path)
    step = transforms.read(tmp_path)[site.name]
    assert isinstance(step, Step)
    assert step.origin.args == ("first.weight", ROWS, COLUMNS)
    up, down = transformed(step, site_weight, torch.eye(COLUMNS, dtype=torch.float64))
    torch.testing.assert_close(up @ down, graph.evaluate(site.weight)[order])


def test_what_is_not_linear_says_so(graph):
    site = graph.sites()[0]
    wrap_weight(graph, site, aten.abs.default)
    transforms.place(graph, graph.sites()[0])
    assert "aten.abs" in graph.transforms.sites["first"]


def test_a_record_that_is_missing_or_damaged(tmp_path):
    with pytest.raises(ArtifactError, match="compile the model again"):
        transforms.read(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / transforms.FILE).write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="damaged"):
        transforms.read(tmp_path)
