from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from vdqc import compile, load
from vdqc.base import numerics
from vdqc.base.diagnostics import Diagnostics
from vdqc.base.target import TARGETS
from vdqc.compiler import parse_recipe
from vdqc.engine.pass_manager import Context
from vdqc.explain import explain
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.ir.source import Source
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.im2col import Im2col
from vdqc.testing.architectures import ARCHITECTURES
from vdqc.testing.harness import assert_close, assert_ir, context, run


class ResNet(nn.Module):
    """An embedding convolution, a block around a norm, and the output projection."""

    def __init__(self, width: int = 16, **options: int | str) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        block = nn.ModuleDict({"norm": nn.GroupNorm(4, width)})
        block["conv"] = nn.Conv2d(width, width, **{"kernel_size": 3, "padding": 1, **options})
        self.blocks = nn.ModuleList([block])
        self.norm = nn.GroupNorm(4, width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        x = self.conv_in(input)
        for block in self.blocks:
            x = x + block["conv"](F.silu(block["norm"](x)))
        return self.conv_out(self.norm(x))


def captured(model: nn.Module, x: Tensor) -> Graph:
    """The graph for any batch and any size of space."""
    larger = F.pad(torch.cat([x, x]), [1, 2] * (x.ndim - 2))
    return capture(model.eval(), [Sample({"input": x}), Sample({"input": larger})])


def reasons(ctx: Context) -> dict[str, str]:
    """What was said of convolutions that stay, by site."""
    return {entry.site: entry.message for entry in ctx.diagnostics if entry.code == "conv-kept"}


def test_a_convolution_becomes_a_linear_over_patches() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1)).double()
    graph = captured(model, torch.randn(2, 2, 8, 8).double())
    run(graph, Canonicalize(), Im2col())
    assert_ir(
        graph,
        """
        graph (%input: f64[s0, 2, s1, s2]) @captured {
          %0 = aten.sym_size(%input, 0) : s0
          %1 = aten.sym_size(%input, 2) : s1
          %2 = add(-1, %1) : s1 - 1
          %3 = floordiv(%2, 2) : ((s1 - 1)//2)
          %4 = add(1, %3) : (((s1 - 1)//2)) + 1
          %5 = aten.sym_size(%input, 3) : s2
          %6 = add(-1, %5) : s2 - 1
          %7 = floordiv(%6, 2) : ((s2 - 1)//2)
          %8 = add(1, %7) : (((s2 - 1)//2)) + 1
          %9 = aten.reshape(@0.weight, [4, -1]) : f64[4, 18]
          %10 = aten.index_select(%9, 1, @0.kernel_order) : f64[4, 18]
          %11 = aten.constant_pad_nd(%input, [1, 1, 1, 1]) : f64[s0, 2, s1 + 2, s2 + 2]
          %12 = aten.permute(%11, [0, 2, 3, 1]) : f64[s0, s1 + 2, s2 + 2, 2]
          %13 = aten.clone(%12, memory_format=torch.contiguous_format) : f64[s0, s1 + 2, s2 + 2, 2]
          %14 = aten.unfold(%13, 1, 3, 2) : f64[s0, (((s1 - 1)//2)) + 1, s2 + 2, 2, 3]
          %15 = aten.unfold(%14, 2, 3, 2) : f64[s0, (((s1 - 1)//2)) + 1, (((s2 - 1)//2)) + 1, 2, 3, 3]
          %16 = aten.permute(%15, [0, 1, 2, 4, 5, 3]) : f64[s0, (((s1 - 1)//2)) + 1, (((s2 - 1)//2)) + 1, 3, 3, 2]
          %17 = aten.reshape(%16, [%0, %4, %8, -1]) : f64[s0, (((s1 - 1)//2)) + 1, (((s2 - 1)//2)) + 1, 18]
          %18 = aten.linear(%17, %10, @0.bias) : f64[s0, (((s1 - 1)//2)) + 1, (((s2 - 1)//2)) + 1, 4]  # site 0
          %19 = aten.permute(%18, [0, 3, 1, 2]) : f64[s0, 4, (((s1 - 1)//2)) + 1, (((s2 - 1)//2)) + 1]
          return [%19]
        }
        """,  # noqa: E501
    )


def test_what_every_recipe_keeps_in_float_stays_a_convolution() -> None:
    model, x = ResNet(), torch.randn(2, 3, 8, 8)
    graph, ctx = captured(model, x), context(x, model=model)
    run(graph, Canonicalize(), Im2col(), Annotate(), ctx=ctx)
    kinds = {site.name: site.kind for site in graph.sites()}
    assert kinds == {
        "conv_in": SiteKind.CONV,
        "blocks.0.conv": SiteKind.LINEAR,
        "conv_out": SiteKind.CONV,
    }
    assert graph.site("blocks.0.conv").scheme is not None
    assert "patch_embed" in reasons(ctx)["conv_in"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"groups": 4}, "4 groups"),
        ({"dilation": 2, "padding": 2}, "dilated"),
        ({"kernel_size": 2, "padding": "same"}, "unevenly"),
    ],
)
def test_a_convolution_that_no_linear_computes_stays(
    options: dict[str, int | str], why: str
) -> None:
    model, x = ResNet(**options), torch.randn(2, 3, 8, 8)
    graph, ctx = captured(model, x), context(x, model=model)
    run(graph, Canonicalize(), Im2col(), ctx=ctx)
    assert graph.site("blocks.0.conv").kind is SiteKind.CONV
    assert why in reasons(ctx)["blocks.0.conv"]


@pytest.mark.parametrize(("kernel", "padding"), [(3, "same"), ((5, 1), "same"), (3, "valid")])
def test_padding_by_name(kernel: int | tuple[int, int], padding: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 5, kernel, padding=padding)), torch.randn(2, 3, 8, 8)
    graph = captured(model.double(), x.double())
    run(graph, Canonicalize(), Im2col())
    assert [site.kind for site in graph.sites()] == [SiteKind.LINEAR]
    other = torch.randn(3, 3, 10, 9).double()
    assert_close(graph.run(other)[0], model(other))


@settings(deadline=None, max_examples=20)
@given(data=st.data(), axes=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_geometry_is_exact_at_any_size(data: st.DataObject, axes: int, seed: int) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    torch.manual_seed(seed)
    kernel, stride, padding = draw(1, 4), draw(1, 3), draw(0, 2)
    bias = data.draw(st.booleans())
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    model = nn.Sequential(kind(3, 5, kernel, stride, padding, bias=bias)).double()
    x = torch.randn(2, 3, *draw(8, 11)).double()
    graph = captured(model, x)
    run(graph, Canonicalize(), Im2col())
    assert not graph.sites(kind=SiteKind.CONV)
    other = torch.randn(3, 3, *draw(8, 11)).double()
    for value in (x, other):
        assert_close(graph.run(value)[0], model(value), torch.float64)


@pytest.mark.parametrize("name", ["unet2d-condition", "unet3d-condition"])
@torch.no_grad()
def test_convolutional_architectures_stay_as_they_are_at_other_sizes(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build().double()
    graph = capture(model, architecture.samples(torch.float64))
    before = len(graph.sites(kind=SiteKind.CONV))
    run(graph, Canonicalize(), Im2col())
    assert len(graph.sites(kind=SiteKind.CONV)) <= before / 2
    for inputs in architecture.variants(torch.float64).values():
        wanted = pytree.tree_leaves(model(**inputs))
        found = graph.run_inputs(graph.signature.bind((), inputs))
        for value, expected in zip(found, wanted, strict=True):
            assert_close(value, expected)


def test_annotate_names_the_pass_where_convolutions_hold_the_weights() -> None:
    plain, grouped, x = ResNet(), ResNet(groups=4), torch.randn(2, 3, 8, 8)
    for model, passes, told in (
        (plain, [], ["conv-float"]),
        (plain, [Im2col()], []),
        (grouped, [], []),  # im2col would not help
    ):
        graph, ctx = captured(model, x), context(x, model=model)
        run(graph, Canonicalize(), *passes, Annotate(), ctx=ctx)
        assert [entry.code for entry in ctx.diagnostics if entry.severity == "warning"] == told


def test_annotate_follows_what_respells() -> None:
    passes = parse_recipe("im2col,quant", "w8a8").passes
    assert [item.name for item in passes][:4] == ["canonicalize", "im2col", "annotate", "quant"]


def test_a_quantised_convolution_runs_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = ResNet(), torch.randn(2, 3, 8, 8)
    samples = [Sample({"input": value}) for value in (x, torch.randn(1, 3, 12, 10))]
    artifact = compile(model, samples, "im2col,quant", "w8a8", target="cpu", out=tmp_path / "out")
    compiled = load(artifact.path)
    for size in (8, 12):
        other = torch.randn(1, 3, size, size)
        assert numerics.sqnr_db(compiled(other), model(other)) > 35
    source = Source(model, samples)
    plan = explain(source, parse_recipe("im2col,quant", "w8a8"), TARGETS["cpu"], Diagnostics())
    rows = {row.name: (row.kind, row.shape) for row in plan.sites}
    assert rows["blocks.0.conv"] == ("linear", "f32[16, 144]")
    said = Diagnostics()
    explain(source, parse_recipe("quant", "w8a8"), TARGETS["cpu"], said)
    assert [entry.code for entry in said].count("conv-float") == 1
    assert "int8_linear" in (artifact.path / "ir" / "06_lower.txt").read_text()


class Strided(nn.Module):
    """A convolution that is the graph's first op, then a strided one; ``skip`` joins both ends."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 4, 2, 1) if skip else None
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.relu(self.first(input))
        y = torch.relu(self.middle(torch.relu(self.down(x))))
        return self.last(y if self.up is None else self.up(y) + x)


@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_sizes_stay_in_front_of_what_reads_them_where_the_first_op_is_respelled(skip: bool) -> None:
    torch.manual_seed(0)
    model = Strided(skip).eval()
    first, second, other = (
        torch.randn(b, 16, h, w) for b, h, w in ((1, 8, 8), (2, 12, 10), (3, 6, 14))
    )
    graph = capture(model, [Sample({"input": first}), Sample({"input": second})])
    run(graph, Canonicalize(), Im2col(), ctx=context(first, model=model))
    assert {site.kind for site in graph.sites("first|down")} == {SiteKind.LINEAR}
    for x in (first, second, other):
        assert_close(graph.run(x)[0], model(x))
