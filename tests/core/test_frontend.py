"""Every architecture captures, and its graph is eager's equal on calls that it has not seen."""

import functools

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import CaptureError, Diagnostics, InputError
from vdqc.base.target import TARGETS
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.lowering.between import between_sites, live_bytes
from vdqc.lowering.rules import sized_like
from vdqc.testing.architectures import ARCHITECTURES, cast_model
from vdqc.testing.harness import assert_close

REPAIRED = {
    "hunyuan-video15-t2v",
    "hunyuan-video15-i2v",
    "cogvideox-2b",
    "cogvideox-5b",
    "mochi",
    "easyanimate",
    "cosmos",
    "qwen-image",
    "lumina2",
    "depth-anything",
}


@functools.cache
def captured(name: str) -> tuple[nn.Module, Graph, Diagnostics]:
    model, diagnostics = ARCHITECTURES[name].build(), Diagnostics()
    return model, capture(model, ARCHITECTURES[name].samples(), diagnostics), diagnostics


def eager(model: nn.Module, call: dict[str, object]) -> list[torch.Tensor]:
    with torch.no_grad():
        output = model(**call)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_graph_equals_eager_on_fresh_calls(name: str) -> None:
    model, graph, diagnostics = captured(name)
    assert [str(entry) for entry in diagnostics if entry.severity != "remark"] == []
    for call in ARCHITECTURES[name].variants().values():
        for actual, expected in zip(graph.run(**call), eager(model, call), strict=True):
            assert_close(actual, expected)
    assert bool(graph.origin.repairs) is (name in REPAIRED)
    with sized_like(graph, ARCHITECTURES[name].inputs()):
        assert between_sites(graph).us(TARGETS["cpu"]) > 0
        assert live_bytes(graph) > 0


@pytest.mark.parametrize("name", ["wan-t2v", "hunyuan-video", "vggt"])
def test_graph_is_functional_and_shares_the_models_weights(name: str) -> None:
    model, graph, _ = captured(name)
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.target
            assert node.target is not torch.ops.aten.copy.default
        if node.op == "call_function":
            assert "val" in node.meta
    tensors = dict(model.state_dict(keep_vars=True))
    shared = [graph_name for graph_name in graph.param_names() if graph_name in tensors]
    assert len(shared) >= len(list(model.parameters()))
    for name in shared:
        assert graph.param(name).data_ptr() == tensors[name].data_ptr()


def test_signature_names_what_a_stand_in_needs() -> None:
    model, graph, _ = captured("hunyuan-video")
    signature, origin = graph.signature, graph.origin
    assert [entry.path for entry in signature.inputs][:2] == ["hidden_states", "timestep"]
    assert signature.inputs[0].sizes == ("s0", 4, "s1", "s2", "s3")
    assert signature.promoted == ("timestep", "guidance")
    assert signature.statics == {"attention_kwargs": None}
    assert signature.output_class.endswith("Transformer2DModelOutput")
    assert signature.output_fields == ("sample",)
    assert origin.model_class.endswith("HunyuanVideoTransformer3DModel")
    assert origin.config["text_embed_dim"] == 24
    assert "norm" in origin.keep
    assert (
        type(model(**ARCHITECTURES["hunyuan-video"].inputs())).__name__
        == type(
            signature.rebuild(graph.run(**ARCHITECTURES["hunyuan-video"].inputs()), True)
        ).__name__
    )


def test_timestep_may_come_in_any_number_form() -> None:
    _, graph, _ = captured("wan-t2v")
    call = ARCHITECTURES["wan-t2v"].inputs(seed=3)
    forms = [500, 500.0, torch.tensor(500), torch.tensor([500.0]), torch.full((2,), 500)]
    outputs = [graph.run(**{**call, "timestep": form})[0] for form in forms]
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_size_outside_the_captured_relations_is_refused() -> None:
    _, graph, _ = captured("wan-t2v")
    call = ARCHITECTURES["wan-t2v"].inputs(F=65)  # the rotary table holds 64 frames
    with pytest.raises(InputError, match="64"):
        graph.run(**call)


@pytest.mark.parametrize("name", ["wan-t2v", "sd3", "ltx"])
def test_bfloat16_equals_eager(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(dtype=torch.bfloat16)
    graph = capture(model, architecture.samples(torch.bfloat16))
    assert graph.origin.dtype == "bfloat16"
    call = architecture.inputs(B=3, H=12, seed=5, dtype=torch.bfloat16)
    for actual, expected in zip(graph.run(**call), eager(model, call), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_models_keep_in_float32_what_their_class_says() -> None:
    model = cast_model(ARCHITECTURES["wan-t2v"].build(), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["blocks.0.attn1.to_q.weight"] == torch.bfloat16
    assert dtypes["blocks.0.scale_shift_table"] == torch.float32


class Scaled(nn.Module):
    """A linear layer, a python factor, several ways to return."""

    def __init__(self, returns: str = "tuple") -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.returns = returns

    def forward(self, x, factor=2, flag=None):
        y = self.linear(x) * factor
        match self.returns:
            case "tuple":
                return (y,)
            case "dict":
                return {"y": y, "mean": y.mean()}
            case "nested":
                return {"all": [y, y]}
        return y


def sample(*sizes: int, **others: object) -> Sample:
    return Sample({"x": torch.randn(*sizes, 8), **others})


def test_one_sample_finds_what_can_vary_and_doubles_the_batch() -> None:
    diagnostics = Diagnostics()
    graph = capture(Scaled(), [sample(1, 5)], diagnostics)
    assert graph.signature.inputs[0].sizes == ("s0", "s1", 8)
    assert [entry.code for entry in diagnostics] == ["found-axes"]
    assert graph.run(torch.randn(1, 7, 8))[0].shape == (1, 7, 8)


def test_a_size_of_one_in_every_sample_is_said() -> None:
    diagnostics = Diagnostics()
    capture(Scaled(), [sample(2, 1), sample(2, 1, 1)], diagnostics)
    assert "sample-structure" in [entry.code for entry in diagnostics]


def test_an_integer_that_varies_is_an_input() -> None:
    graph = capture(Scaled(), [sample(2, 5, factor=3), sample(3, 5, factor=4)])
    assert [entry.path for entry in graph.signature.inputs] == ["x", "factor"]
    x = torch.randn(2, 5, 8)
    assert_close(graph.run(x, 7)[0], Scaled.forward(_module(graph), x, 7)[0])


def _module(graph: Graph) -> Scaled:
    module = Scaled()
    module.linear.weight.data = graph.param("linear.weight")
    module.linear.bias.data = graph.param("linear.bias")
    return module


@pytest.mark.parametrize("returns", ["tuple", "dict", "tensor"])
def test_outputs_are_rebuilt(returns: str) -> None:
    model = Scaled(returns)
    graph = capture(model, [sample(2), sample(3)])
    x = torch.randn(4, 8)
    rebuilt, expected = graph.signature.rebuild(graph.run(x), True), model(x)
    assert type(rebuilt) is type(expected)
    assert pytree.tree_structure(rebuilt) == pytree.tree_structure(expected)


def test_an_output_of_collections_is_refused() -> None:
    with pytest.raises(CaptureError, match="flat output"):
        capture(Scaled("nested"), [sample(2), sample(3)])


class Square(nn.Module):
    """Takes tokens for a square image, as DiT does."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x.flatten(1, 2))
        side = int(y.shape[1] ** 0.5)
        return y.reshape(-1, side, side, y.shape[-1])


def test_a_size_that_the_forward_takes_a_root_of() -> None:
    model = Square().eval()
    graph = capture(model, [Sample({"x": torch.randn(2, 4, 4, 8)}) for _ in range(2)])
    x = torch.randn(3, 4, 4, 8)
    assert_close(graph.run(x=x)[0], model(x))
    with pytest.raises(InputError, match="the graph holds for"):
        graph.run(x=torch.randn(3, 5, 5, 8))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        if y.sum() > 0:
            return y
        return -y


def test_control_flow_on_values_names_file_line_and_operation() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Branching(), [sample(2), sample(3)])
    text = str(caught.value)
    assert "test_frontend.py:" in text
    assert "if y.sum() > 0:" in text
    assert "torch.where" in text


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            y = x * 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(y)


def test_autocast_regions_become_casts() -> None:
    model = Autocast()
    graph = capture(model, [sample(2), sample(3)])
    assert all("wrap_with" not in str(node.target) for node in graph.nodes)
    x = torch.randn(4, 8)
    assert torch.equal(graph.run(x)[0], model(x))


def test_training_mode_comes_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    graph = capture(model, [Sample({"input": torch.randn(2, 8)})])
    assert all(module.training for module in model.modules())
    x = torch.randn(5, 8)
    assert torch.equal(graph.run(x)[0], model[0](x))


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [({"x": torch.zeros(2, 8), "y": 1}, "'y'"), ({}, "'x'")],
)
def test_samples_that_do_not_fit_forward(inputs: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        capture(Scaled(), [Sample(inputs)])


def test_no_samples() -> None:
    with pytest.raises(InputError, match="at least one sample"):
        capture(Scaled(), [])
