"""What users' own models do that the zoo's do not: names, buffers, outputs, samples."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vdqc import Sample, compiler
from vdqc.base.diagnostics import CaptureError, Diagnostics, InputError, VdqcError
from vdqc.base.numerics import relative_error
from vdqc.cli import main
from vdqc.loading import load
from vdqc.runner import run, write_frames, write_tensors


class Named(nn.Module):
    """A linear under a name of the user's choice."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({name: nn.Linear(16, 16)})
        self.key = name

    def forward(self, x):
        return self.inner[self.key](x)


class Attribute(nn.Module):
    """The same as an attribute."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.key = name
        setattr(self, name, nn.Linear(16, 16))

    def forward(self, x):
        return getattr(self, self.key)(x)


class Masked(nn.Module):
    """A causal mask among the buffers."""

    def __init__(self, never: float = float("-inf")) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(16, 16)
        self.register_buffer("causal", torch.full((8, 8), never).triu(1))

    def forward(self, x):
        q = self.proj(x)
        scores = q @ q.transpose(-1, -2) / 4 + self.causal
        return scores.softmax(-1) @ x


class Returns(nn.Module):
    """A linear whose output is wrapped."""

    def __init__(self, wrap) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.wrap = nn.Linear(16, 16), wrap

    def forward(self, x):
        return self.wrap(self.proj(x))


class Twice(nn.Module):
    """Self-attention as some write it: the context is an argument, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, context):
        return self.q(x) + self.k(context)


class Tied(nn.Module):
    """One block that runs in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 16), nn.GELU())

    def forward(self, x):
        for _ in range(3):
            x = x + self.block(x)
        return x


class Writes(nn.Module):
    """A forward that changes what it is given."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.proj, self.what = nn.Linear(16, 16), what
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if self.what == "x":
            x *= 0.5
        else:
            self.calls += 1
        return self.proj(x)


class Rotary(nn.Module):
    """Complex tables in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        angles = torch.arange(8, dtype=torch.float64)
        self.register_buffer("table", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x):
        turned = torch.view_as_complex(self.proj(x).double().unflatten(-1, (8, 2))) * self.table
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def calls(*names: str) -> list[Sample]:
    torch.manual_seed(1)
    tensors = [torch.randn(2, 8, 16), torch.randn(3, 8, 16)]
    return [Sample(dict.fromkeys(names or ("x",), x)) for x in tensors]


def compiled(model: nn.Module, out, samples=None, **options):
    samples = calls() if samples is None else samples
    return compiler.compile(model, samples, "quant", target="cpu", out=out, **options)


@torch.no_grad()
@pytest.mark.parametrize("name", ["code", "graph", "rgb-out", "t5/xxl", "a b", "für"])
def test_modules_may_have_any_name(tmp_path, name):
    model, (sample, _) = Named(name), calls()
    program = load(compiled(model, tmp_path / "out").path)
    assert relative_error(program(**sample.inputs), model(**sample.inputs)) < 0.02


def test_a_name_that_torch_cannot_export_is_said(tmp_path):
    with pytest.raises(CaptureError, match="cannot be decomposed") as caught:
        compiled(Attribute("code"), tmp_path / "out")
    assert "rename it" in str(caught.value.diagnostic)


@torch.no_grad()
def test_a_mask_among_the_buffers_says_never_with_infinity(tmp_path):
    model, (sample, _) = Masked(), calls()
    program = load(compiled(model, tmp_path / "out").path)
    assert relative_error(program(**sample.inputs), model(**sample.inputs)) < 0.05
    with pytest.raises(InputError, match="NaN or infinity"):
        compiled(Masked(float("nan")), tmp_path / "nan")


def test_one_tensor_under_two_names(tmp_path):
    artifact = compiled(Twice(), tmp_path / "out", calls("x", "context"))
    result = run(artifact.path)
    assert list(result.tensors) == ["output_0"]


def test_outputs_that_are_none_or_twice_the_same(tmp_path, capsys):
    artifact = compiled(Returns(lambda y: {"a": y, "none": None, "b": y}), tmp_path / "out")
    assert load(artifact.path)(**calls()[0].inputs)["none"] is None
    result = run(artifact.path)
    assert list(result.tensors) == ["output_0", "output_2"]
    write_tensors(result, tmp_path / "tensors.safetensors")
    assert main(["run", str(artifact.path)]) == 0
    assert "output_2" in capsys.readouterr().out


@dataclass
class Own:
    """An output class of the user's own."""

    sample: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda y: namedtuple("Pair", "a b")(y, y), "names as keys, got namedtuple"),
        (lambda y: {0: y}, "names as keys, got dict"),
    ],
)
def test_outputs_that_cannot_be_made_again(tmp_path, wrap, message):
    with pytest.raises(CaptureError, match=message):
        compiled(Returns(wrap), tmp_path / "out")


def test_an_ordered_dictionary_is_a_dictionary(tmp_path):
    artifact = compiled(Returns(lambda y: OrderedDict(b=y, a=-y)), tmp_path / "out")
    assert list(load(artifact.path)(**calls()[0].inputs)) == ["b", "a"]


def test_an_own_output_class_is_told_of(tmp_path):
    torch.export.register_dataclass(Own)
    diagnostics = Diagnostics()
    artifact = compiled(Returns(Own), tmp_path / "out", diagnostics=diagnostics)
    assert [e.code for e in diagnostics if e.severity == "warning"] == ["output-class"]
    program = load(artifact.path)
    assert isinstance(program(**calls()[0].inputs, return_dict=False), tuple)


@pytest.mark.parametrize("what", ["x", "calls"])
def test_a_forward_that_writes_is_named(tmp_path, what):
    with pytest.raises(CaptureError, match=f"the forward writes into '{what}'"):
        compiled(Writes(what), tmp_path / "out")


def test_a_dtype_that_no_file_holds_is_refused_before_any_pass(tmp_path):
    with pytest.raises(InputError, match="table: expected a weight that a safetensors file") as e:
        compiled(Rotary(), tmp_path / "out")
    assert "complex64" in str(e.value.diagnostic)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "expected at least one sample"),
        ([{"x": torch.zeros(2, 8, 16)}], "sample 0 is a dict"),
        ([Sample({"y": torch.zeros(2, 8, 16)})], "gives 'y', which forward does not take"),
    ],
)
def test_samples_that_are_none(tmp_path, samples, message):
    with pytest.raises(VdqcError, match=message):
        compiled(Attribute("proj"), tmp_path / "out", samples)


def test_one_sample_may_come_alone(tmp_path):
    assert compiled(Attribute("proj"), tmp_path / "out", calls()[0]).path.is_dir()


def test_shared_weights_and_rules_that_match_nothing_are_told_of(tmp_path):
    diagnostics = Diagnostics()
    rules = ["w8a8", "blok.*=w4a8"]
    compiled(Tied(), tmp_path / "out", scheme=rules, diagnostics=diagnostics)
    told = {entry.code: str(entry) for entry in diagnostics if entry.severity == "warning"}
    assert told.keys() == {"shared-float", "rule-unused"}
    assert "100% of the weights" in told["shared-float"]
    assert "did you mean 'block.0'?" in told["rule-unused"]


def test_frames_of_what_is_no_video(tmp_path):
    result = run(compiled(Attribute("proj"), tmp_path / "out").path)
    flat = type(result)({"video": torch.zeros(2, 8, 16)}, 0.0, "generate")
    with pytest.raises(InputError, match=r"generate\(\) gave \[2, 8, 16\]"):
        write_frames(flat, tmp_path / "frames")
    assert not (tmp_path / "frames").exists()
