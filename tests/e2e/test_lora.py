"""Adapters on compiled models: equal to the float model that they are merged into."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vdqc import compiler
from vdqc.base.diagnostics import ArtifactError, ConfigError, Diagnostics, InputError
from vdqc.base.numerics import REDRAWN_DISTANCE, REDRAWN_NOISE, TOLERANCE, relative_error
from vdqc.base.target import Target
from vdqc.compiled import CompiledModel
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir import artifact, transforms
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import note
from vdqc.ir.source import load_source
from vdqc.loading import load
from vdqc.lowering.lower import lower
from vdqc.testing.architectures import ARCHITECTURES

WAN = ARCHITECTURES["wan-t2v"]
CALL = WAN.inputs(seed=3)
RANK = 4


def adapter(model: nn.Module, seed: int = 0, prefix: str = "transformer.") -> dict[str, Tensor]:
    """Random factors for every linear, of a size that changes the output by tens of percent."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features > 1:
            down = torch.randn(RANK, module.in_features, generator=generator)
            up = torch.randn(module.out_features, RANK, generator=generator)
            state[f"{prefix}{name}.lora_A.weight"] = 0.1 * down
            state[f"{prefix}{name}.lora_B.weight"] = 0.1 * up
    return state


def merged(model: nn.Module, *adapters: tuple[dict[str, Tensor], float]) -> nn.Module:
    twin = copy.deepcopy(model)
    for state, weight in adapters:
        for name, module in twin.named_modules():
            down = state.get(f"transformer.{name}.lora_A.weight")
            if down is not None:
                up = state[f"transformer.{name}.lora_B.weight"]
                module.weight.data += weight * up @ down
    return twin


@pytest.fixture(scope="module")
def wan() -> nn.Module:
    return WAN.build()


@pytest.fixture(scope="module")
def build(wan: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., CompiledModel]:
    """Compiles tiny Wan with some passes for some target; captured once, and not probed.

    ``moved`` moves what the passes left free, as training would.
    """
    captured = capture(wan, WAN.samples())

    def run(passes: str, target: str, scheme: str = "w8a8", moved: float = 0.0) -> CompiledModel:
        graph: Graph = captured.clone()
        transforms.start(graph)
        plan, machine = compiler.parse_recipe(passes, scheme), Target.parse(target)
        ctx = Context(WAN.samples(), machine, Diagnostics(), plan.rules)
        PassManager(plan.passes, probe=False).run(graph, ctx)
        generator = torch.Generator().manual_seed(0)
        for name in sorted(graph.free):
            value = graph.param(name).detach()
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            graph.set_param(name, value + moved * noise, free=True)
        lower(graph, machine, ctx.diagnostics)
        out = tmp_path_factory.mktemp("lora") / "wan"
        with artifact.staging(out) as folder:
            artifact.write(graph, folder, target=machine)
            transforms.write(graph.transforms, folder)
            artifact.seal(folder)
        return load(out, reference=True)

    return run


@torch.no_grad()
def test_in_float_it_is_the_merged_model(wan, build):
    model = build("smooth,rotate,smooth", "cpu")
    first, second = adapter(wan, 1), adapter(wan, 2, "")
    expected = merged(wan, (first, 1.0))(**CALL).sample
    plain = model(**CALL).sample
    model.load_lora(first)
    assert relative_error(plain, expected) > 0.1
    assert relative_error(model(**CALL).sample, expected) < TOLERANCE[torch.float32]
    inputs = model.signature.bind((), CALL)
    assert relative_error(model.prepared(*inputs)[0], expected) < TOLERANCE[torch.float32]

    model.load_lora(second, 0.5, "second")
    model.set_lora_weight("default", -0.25)
    named = {f"transformer.{key}": value for key, value in second.items()}
    expected = merged(wan, (first, -0.25), (named, 0.5))(**CALL).sample
    assert model.lora_weights == {"default": -0.25, "second": 0.5}
    assert relative_error(model(**CALL).sample, expected) < TOLERANCE[torch.float32]

    model.unload_lora("default")
    expected = merged(wan, (named, 0.5))(**CALL).sample
    assert relative_error(model(**CALL).sample, expected) < TOLERANCE[torch.float32]
    model.unload_lora()
    assert torch.equal(model(**CALL).sample, plain)
    assert not [name for name, _ in model.named_buffers() if "lora" in name]


@torch.no_grad()
def test_of_a_convolution_that_is_a_linear(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1))
    samples = [Sample({"input": torch.randn(n, 4, 8, 8)}) for n in (1, 2)]
    passes, out = "im2col,rotate,smooth", tmp_path / "out"
    compiled = load(compiler.compile(model, samples, passes, target="cpu", out=out).path)
    down, up = torch.randn(RANK, 4, 3, 3), torch.randn(6, RANK, 1, 1)
    compiled.load_lora({"0.lora_A.weight": down, "0.lora_B.weight": up})
    merged = copy.deepcopy(model)
    merged[0].weight += (up.flatten(1) @ down.flatten(1)).reshape(6, 4, 3, 3)
    x = torch.randn(3, 4, 8, 8)
    assert relative_error(model(x), merged(x)) > 0.1
    assert relative_error(compiled(x), merged(x)) < TOLERANCE[torch.float32]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*was compiled for sm90")
@pytest.mark.parametrize("target", ["cpu", "sm90"])
def test_quantised_it_is_as_close_to_the_merged_model_as_without(wan, build, target):
    """Reordered rows and integer kernels; on sm90 also fused quantisers, gates and activations."""
    model, state = build("rotate,smooth,quant", target), adapter(wan, 1)
    noise = relative_error(model(**CALL).sample, wan(**CALL).sample)
    expected = merged(wan, (state, 1.0))(**CALL).sample
    model.load_lora(state)
    error = relative_error(model(**CALL).sample, expected)
    assert error < REDRAWN_NOISE * noise
    assert relative_error(wan(**CALL).sample, expected) > 5 * error


@torch.no_grad()
@pytest.mark.parametrize(
    ("passes", "scheme"),
    [("rotate{learn=true},smooth", "w8a8"), ("rotate{learn=true},quant", "w8a8")],
)
def test_through_a_learned_kronecker_rotation(wan, build, passes, scheme):
    model, state = build(passes, "cpu", scheme, 0.05), adapter(wan, 1)
    steps = transforms.read(model._folder).values()
    assert any("kronecker" in operations(step) for step in steps)
    noise = relative_error(model(**CALL).sample, wan(**CALL).sample)
    expected = merged(wan, (state, 1.0))(**CALL).sample
    model.load_lora(state)
    error = relative_error(model(**CALL).sample, expected)
    assert error < (REDRAWN_NOISE * noise if "quant" in passes else TOLERANCE[torch.float32])
    assert relative_error(wan(**CALL).sample, expected) > 5 * error


def operations(step: transforms.Step | str) -> set[str]:
    """Names of all that was done to a weight."""
    if isinstance(step, str):
        return set()
    return {step.op}.union(*map(operations, step.sources))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*was compiled for sm90")
@pytest.mark.parametrize(
    ("passes", "scheme", "target"),
    [
        ("allocate{search=error},quant", "w4a8", "cpu"),
        ("allocate{method=planes,choice=row,search=error},rotate,quant", "w3a8", "cpu"),
        ("allocate{method=planes,choice=row},quant", "w3a8", "sm90"),
        ("allocate{search=error},quant", "w3a16-g16", "cpu"),
    ],
)
def test_on_rows_of_several_widths(wan, build, passes, scheme, target):
    """A layer that was split by rows is several sites: each gets its rows of the update."""
    model, state = build(passes, target, scheme), adapter(wan, 1)
    names = {note(node).get("site", "") for node in model.program.graph.nodes}
    parts = {name for name in names if name.startswith("blocks.0.attn1.to_k.w")}
    assert len(parts) > 1
    assert any("w2p1" in part for part in parts) is ("planes" in passes)
    noise = relative_error(model(**CALL).sample, wan(**CALL).sample)
    expected = merged(wan, (state, 1.0))(**CALL).sample
    model.load_lora(state)
    error = relative_error(model(**CALL).sample, expected)
    assert error < REDRAWN_NOISE * noise
    assert relative_error(wan(**CALL).sample, expected) > 2 * error


SPARSE = "sparsify{policy=spatial,density=0.6,block=16},reparameterize{interval=3}"


@torch.no_grad()
def test_beside_a_residual_cache(wan, build):
    """Dense steps are those of the merged model; in between it is the merged model, compiled."""
    model, state = build(SPARSE, "cpu", "none"), adapter(wan, 1)
    both = merged(wan, (state, 1.0))
    plain, floats = video(model), video(both)
    model.load_lora(state)
    found, cache = video(model), model.residual_cache
    assert (cache.refreshes, cache.reuses) == (2, 3)
    errors = [relative_error(own, wanted) for own, wanted in zip(found, floats, strict=True)]
    assert max(errors[0], errors[3]) < TOLERANCE[torch.float32]
    assert min(errors[1:3]) > 1e-3
    model.unload_lora()
    assert all(map(torch.equal, video(model), plain))
    model.compile(backend="eager")
    model.load_lora(state)
    for own, wanted in zip(video(model), found, strict=True):
        assert relative_error(own, wanted) < TOLERANCE[torch.float32]


def video(model: nn.Module) -> list[Tensor]:
    """Outputs at five steps that follow each other."""
    times = (torch.full_like(CALL["timestep"], 900 - 30 * step) for step in range(5))
    return [model(**{**CALL, "timestep": time}).sample for time in times]


@pytest.fixture
def tiny(tiny_artifact: Path) -> CompiledModel:
    return load(tiny_artifact)


@pytest.fixture(scope="module")
def source():
    return load_source(Path(__file__).parents[1] / "tiny_model.py")


@torch.no_grad()
def test_under_torch_compile_a_weight_changes_without_compiling_again(tiny, source):
    torch._dynamo.reset()
    state, call = adapter(source.model), source.samples[1].inputs
    counter = CompileCounterWithBackend("eager")
    tiny.compile(backend=counter, dynamic=True)
    tiny(**call)
    tiny.load_lora(state)
    tiny(**call)
    count = counter.frame_count
    assert tiny.to("cpu") is tiny  # it stays compiled where it is
    for weight in (0.5, -1.0, 0.0):
        tiny.set_lora_weight("default", weight)
        expected = merged(source.model, (state, weight))(**call)
        assert relative_error(tiny(**call), expected) < 0.05
    assert counter.frame_count == count


def test_is_saved_without_adapters(tiny, source, tmp_path):
    before = tiny.state_dict().keys()
    tiny.load_lora(adapter(source.model))
    assert tiny.state_dict().keys() == before
    tiny.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.lora_weights == {}
    again.load_lora(adapter(source.model))


def test_keys_that_fit_no_layer_are_named(tiny, source):
    state = adapter(source.model)
    rest = {f"text_encoder.layers.{i}.lora_A.weight": torch.zeros(4, 8) for i in range(12)}
    with pytest.warns(UserWarning, match=r"12 of 34 keys .*layers\.9\.lora_A.* and 2 more"):
        tiny.load_lora({**state, **rest})


def test_what_does_not_fit_is_refused_and_nothing_changes(tiny, source, tmp_path):
    state, call = adapter(source.model), source.samples[0].inputs
    plain = tiny(**call)
    up = "transformer.blocks.0.up"
    wide = {**state, f"{up}.lora_A.weight": torch.zeros(4, 48)}
    nan = {**state, f"{up}.lora_B.weight": torch.full((64, 4), torch.nan)}
    other = {f"down_blocks.0.{i}.lora_A.weight": torch.zeros(4, 4) for i in range(3)}
    for wrong, message in [
        (other, r"no key of the adapter.*down_blocks\.0\.0"),
        (wide, r"blocks\.0\.up: expected an update of a weight \[64, 32\], got one of \[64, 48\]"),
        (nan, r"blocks\.0\.up.*NaN"),
        (tmp_path / "nothing.safetensors", "found nothing"),
        (tmp_path, "expected one safetensors file"),
    ]:
        with pytest.raises(InputError, match=message):
            tiny.load_lora(wrong)
    with pytest.raises(ConfigError, match="no adapter is loaded"):
        tiny.unload_lora()
    with pytest.raises(ConfigError, match="finite"):
        tiny.load_lora(state, float("nan"))
    with pytest.raises(ConfigError, match="letters"):
        tiny.load_lora(state, name="a.b")
    assert torch.equal(tiny(**call), plain)
    tiny.load_lora(state, name="style")
    with pytest.raises(ConfigError, match="loaded already"):
        tiny.load_lora(state, name="style")
    with pytest.raises(ConfigError, match="did you mean 'style'"):
        tiny.set_lora_weight("stlye", 1.0)


def test_an_artifact_without_a_record_says_to_compile_again(wan, source, tmp_path):
    graph = capture(source.model, source.samples)
    with artifact.staging(tmp_path / "old") as folder:
        artifact.write(graph, folder)
        artifact.seal(folder)
    with pytest.raises(ArtifactError, match="compile the model again"):
        load(tmp_path / "old").load_lora(adapter(source.model))


@torch.no_grad()
def test_compiled_merged_and_merged_compiled_are_equally_close(tiny, source, tmp_path):
    state, call = adapter(source.model), source.samples[1].inputs
    both = merged(source.model, (state, 1.0))
    made = compiler.compile(both, source.samples, target="cpu", out=tmp_path / "out")
    expected, other = both(**call), load(made.path)(**call)
    noise = relative_error(other, expected)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, file)
    for place in (file, tmp_path):
        tiny.load_lora(place)
        actual = tiny(**call)
        assert relative_error(actual, other) < REDRAWN_NOISE * noise
        assert relative_error(actual, expected) < REDRAWN_DISTANCE * noise
        tiny.unload_lora()
