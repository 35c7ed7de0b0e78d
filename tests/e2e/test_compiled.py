"""The stand-in: called, printed, moved, compiled and saved as the original would be."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, ModelHook
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdqc.aot import PACKAGE
from vdqc.aot import package as compile_package
from vdqc.base.diagnostics import ArtifactError, Diagnostics, InputError, Severity
from vdqc.base.numerics import TOLERANCE, relative_error
from vdqc.base.target import TARGETS
from vdqc.bypassed import bypassed_hooks, refuse_bypassed_hooks
from vdqc.compiled import CompiledModel
from vdqc.ir import artifact
from vdqc.ir.frontend import capture
from vdqc.ir.sample import Sample
from vdqc.loading import load
from vdqc.packaged import PackagedProgram
from vdqc.stand_in import Leaf
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]


def write(model: nn.Module, samples: list[Sample], out: Path, package: bool = False) -> Path:
    graph = capture(model, samples)
    with artifact.staging(out) as folder:
        artifact.write(graph, folder, target=TARGETS["cpu"])
        if package:
            inputs = graph.signature.bind((), samples[0].inputs)
            compile_package(graph, TARGETS["cpu"], inputs, folder / PACKAGE)
        artifact.seal(folder)
    return out


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return WAN.build()


@pytest.fixture(scope="module")
def out(wan: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(wan, WAN.samples(), tmp_path_factory.mktemp("compiled") / "wan")


def test_called_as_the_original(wan: nn.Module, out: Path) -> None:
    model = load(out)
    call = WAN.inputs(B=3, seed=5)
    expected, actual = wan(**call), model(**call)
    assert type(actual) is type(expected)
    assert torch.equal(actual.sample, expected.sample)
    positional = [call[k] for k in ("hidden_states", "timestep", "encoder_hidden_states")]
    assert torch.equal(model(*positional).sample, expected.sample)
    as_tuple = model(**call, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], expected.sample)
    same_time = {**call, "timestep": torch.full((3,), 7)}
    for scalar in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        found = model(**{**call, "timestep": scalar}).sample
        assert torch.equal(found, model(**same_time).sample)


def test_shows_what_the_original_showed(wan: nn.Module, out: Path) -> None:
    model = load(out)
    assert isinstance(model, CompiledModel)
    assert isinstance(model, ModelMixin)
    assert model.config.patch_size == list(wan.config.patch_size)
    assert model.config.in_channels == wan.config.in_channels
    assert (model.dtype, model.device) == (wan.dtype, wan.device)
    tensors = [*wan.parameters(), *wan.buffers()]
    assert model.num_parameters() == sum(tensor.numel() for tensor in tensors)
    assert not model.training
    state = model.state_dict()
    assert state.keys() == load_file(out / "weights.safetensors").keys()
    model.load_state_dict(state)
    assert "WanTransformer3DModel" in repr(model)
    with model.cache_context("cond", step_index=1):
        pass


def test_dtype_is_what_was_captured(out: Path) -> None:
    model = load(out, dtype=torch.float32)
    assert model.to("cpu", torch.float32) is model
    for convert in (model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(InputError, match="compile the model again"):
            convert()
    with pytest.raises(ArtifactError, match="compile the model again"):
        load(out, dtype=torch.bfloat16)


def test_other_calls_are_refused(out: Path) -> None:
    model = load(out)
    call = WAN.inputs()
    for change, message in [
        ({"hidden_states": call["hidden_states"].double()}, "float32"),
        ({"encoder_hidden_states": None}, "expected a value"),
        ({"hiden_states": 1}, "unknown argument"),
        ({"attention_kwargs": {"scale": 0.5}}, "attention_kwargs"),
    ]:
        with pytest.raises(InputError, match=message):
            model(**{**call, **change})
    with pytest.raises(InputError, match="has not"):
        model.enable_group_offload()


def test_compiles_whole_once_for_all_steps_and_sizes(wan: nn.Module, out: Path) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(load(out), fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for call in [
            *(WAN.inputs(seed=seed) for seed in range(3)),
            WAN.inputs(B=3, seed=3),
            WAN.inputs(F=5, H=12, W=20, L=14, seed=4),
        ]:
            actual = model(**call).sample
            assert relative_error(actual, wan(**call).sample) <= TOLERANCE[torch.float32]
    assert counter.frame_count == 1
    with pytest.raises(Exception, match=r"hiden_states|[Uu]nknown|super"):
        model(**call, hiden_states=1)


def test_compile_method_keeps_every_check(wan: nn.Module, out: Path) -> None:
    torch._dynamo.reset()
    model = load(out)
    model.compile(backend="eager", dynamic=True)
    call = WAN.inputs(seed=9)
    with torch.no_grad():
        assert relative_error(model(**call)[0], wan(**call)[0]) <= TOLERANCE[torch.float32]
    with pytest.raises(InputError, match="unknown argument"):
        model(**call, hiden_states=1)


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("x", ()),
        ("image_rotary_emb[0]", (0,)),
        ("added['text_embeds'][2]", ("text_embeds", 2)),
    ],
)
def test_paths_are_read_as_the_signature_writes_them(path: str, keys: Any) -> None:
    leaf = Leaf.parse(path)
    assert leaf.keys == keys
    value: Any = object()
    call = value
    for key in reversed(keys):
        call = [None] * key + [call] if isinstance(key, int) else {key: call}
    assert leaf.of({leaf.name: call}) is value


class Nested(nn.Module):
    """Inputs in collections, a dictionary out; from no library."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor, extra: dict[str, Any], gain: float = 2.0) -> dict[str, Tensor]:
        return {"y": self.proj(x) * extra["scales"][1] * gain, "z": x + extra["shift"]}


def test_nested_calls_of_a_plain_module(tmp_path: Path) -> None:
    model = Nested().eval()

    def call(B: int) -> dict[str, Any]:
        scales = (torch.randn(B, 1), torch.randn(B, 1))
        return {"x": torch.randn(B, 8), "extra": {"scales": scales, "shift": torch.ones(8)}}

    loaded = load(write(model, [Sample(call(2)), Sample(call(4))], tmp_path / "out"))
    torch._dynamo.reset()
    traced = torch.compile(loaded, fullgraph=True, backend="eager")
    values = call(3)
    expected = model(**values)
    for found in (loaded(**values), traced(**values)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(InputError, match="gain"):
        loaded(**values, gain=3.0)


@pytest.mark.slow
def test_native_package_runs_every_size(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    samples = [Sample({"input": torch.randn(shape, 8)}) for shape in (2, 4)]
    out = write(model, samples, tmp_path / "out", package=True)
    packaged = load(out, aot=True)
    for rows in (1, 2, 7):
        x = torch.randn(rows, 8)
        assert relative_error(packaged(x), model(x)) <= TOLERANCE[torch.float32]
    with pytest.raises(ArtifactError, match="compiled for cpu: expected a package for meta"):
        PackagedProgram(out, torch.device("meta"))
    (out / "program.pt2").write_bytes(b"no archive")
    with pytest.raises(ArtifactError, match=r"program\.pt2 does not load on this machine"):
        PackagedProgram(out, torch.device("cpu"))
    (out / "program.pt2").unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        load(out)


def test_package_is_asked_for(out: Path) -> None:
    with pytest.raises(ArtifactError, match="--aot"):
        load(out, aot=True)


class CountCalls(ModelHook):
    """A hook as diffusers' caches install them."""


def test_hooks_that_a_program_would_bypass_are_named(wan: nn.Module) -> None:
    assert bypassed_hooks(wan) == []
    model = WAN.build()
    model.blocks[0].register_forward_hook(lambda *args: None)
    model.blocks[0].attn1.lora_A = nn.Linear(2, 2)
    found = bypassed_hooks(model)
    assert [entry.severity for entry in found] == [Severity.WARNING, Severity.WARNING]
    assert all("blocks.0" in entry.message for entry in found)
    diagnostics = Diagnostics()
    refuse_bypassed_hooks(model, diagnostics)
    assert diagnostics.entries == found

    HookRegistry.check_if_exists_or_initialize(model.blocks[0]).register_hook(CountCalls(), "count")
    with pytest.raises(InputError, match=r"'count' is on blocks\.0"):
        refuse_bypassed_hooks(model, diagnostics)
