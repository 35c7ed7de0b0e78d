import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir.blocks import block_name
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.verifier import verify
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.testing.architectures import ARCHITECTURES
from vdqc.testing.harness import assert_close, assert_ir, captured, models

A = torch.ops.aten


def canonical(model: nn.Module, *inputs: Tensor) -> Graph:
    graph = captured(model, *inputs)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    return graph


class Function(nn.Module):
    """A module around a function of ``x``."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


class RMSNorm(nn.Module):
    """As diffusers and T5 write it: float32 statistics, the gain in the model's own dtype."""

    def __init__(self, width: int, dtype: torch.dtype, gain: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(width).to(dtype) / 8) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        h = x * torch.rsqrt(variance + 1e-6)
        if self.weight is None:
            return h.to(x.dtype)
        return h.to(self.weight.dtype) * self.weight


# rewrites ---------------------------------------------------------------------------------------


def test_what_has_no_effect_goes() -> None:
    def idle(x: Tensor) -> Tensor:
        y = nn.functional.dropout(x.clone().contiguous().type_as(x), 0.5, training=False)
        return (y[:, :].detach() * 1 + 0).float().tanh()

    assert_ir(
        canonical(Function(idle), torch.randn(2, 4)),
        """
        graph (%x: f32[s0, 4]) @captured {
          %0 = aten.tanh(%x) : f32[s0, 4]
          return [%0]
        }
        """,
    )


def test_an_assignment_to_all_and_a_single_repeat_go() -> None:
    def idle(x: Tensor) -> Tensor:
        y = x.tanh()
        y[:, 1:] = x[:, 1:]  # goes through y[:], the slice of all rows
        return y.repeat_interleave(1, dim=0)

    assert_ir(
        canonical(Function(idle), torch.randn(2, 4)),
        """
        graph (%x: f32[s0, 4]) @captured {
          %0 = aten.tanh(%x) : f32[s0, 4]
          %1 = aten.slice(%x, 1, 1, 9223372036854775807) : f32[s0, 3]
          %2 = aten.slice_scatter(%0, %1, 1, 1, 9223372036854775807) : f32[s0, 4]
          return [%2]
        }
        """,
    )


def test_casts_reshapes_and_splits_have_one_spelling() -> None:
    def spelled(x: Tensor) -> Tensor:
        a, b = torch.split(x.view(-1, 2, 4).flatten(1), [4, 4], dim=1)
        c, d = x.chunk(2, dim=1)
        e = torch.concat([a.unflatten(1, (2, 2)).squeeze(-1).flatten(1), b * c, d], 1)
        return e.type_as(e.double())

    assert_ir(
        canonical(Function(spelled), torch.randn(2, 8)),
        """
        graph (%x: f32[s0, 8]) @captured {
          %0 = aten.sym_size(%x, 0) : s0
          %1 = aten.reshape(%x, [-1, 2, 4]) : f32[s0, 2, 4]
          %2 = aten.reshape(%1, [%0, 8]) : f32[s0, 8]
          %3 = aten.split(%2, 4, 1) : (f32[s0, 4], f32[s0, 4])
          %4 = getitem(%3, 0) : f32[s0, 4]
          %5 = getitem(%3, 1) : f32[s0, 4]
          %6 = aten.split(%x, 4, 1) : (f32[s0, 4], f32[s0, 4])
          %7 = getitem(%6, 0) : f32[s0, 4]
          %8 = getitem(%6, 1) : f32[s0, 4]
          %9 = aten.reshape(%4, [%0, 2, 2]) : f32[s0, 2, 2]
          %10 = aten.reshape(%9, [%0, 4]) : f32[s0, 4]
          %11 = aten.mul(%5, %7) : f32[s0, 4]
          %12 = aten.cat([%10, %11, %8], 1) : f32[s0, 12]
          %13 = aten._to_copy(%12, dtype=f64) : f64[s0, 12]
          return [%13]
        }
        """,
    )


def test_sizes_are_computed_once_from_the_inputs() -> None:
    def sized(x: Tensor) -> Tensor:
        y = torch.cat([x, x])
        z = y.reshape(y.shape[0], 2, 2) + torch.cat([x, x]).reshape(2 * x.shape[0], 2, 2)
        return z.reshape(z.shape[0] * 2, 2)

    assert_ir(
        canonical(Function(sized), torch.randn(3, 4)),
        """
        graph (%x: f32[s0, 4]) @captured {
          %0 = aten.sym_size(%x, 0) : s0
          %1 = mul(2, %0) : 2*s0
          %2 = mul(4, %0) : 4*s0
          %3 = aten.cat([%x, %x], 0) : f32[2*s0, 4]
          %4 = aten.reshape(%3, [%1, 2, 2]) : f32[2*s0, 2, 2]
          %5 = aten.add(%4, %4) : f32[2*s0, 2, 2]
          %6 = aten.reshape(%5, [%2, 2]) : f32[4*s0, 2]
          return [%6]
        }
        """,
    )


def test_slices_that_are_joined_again_go() -> None:
    def rejoined(x: Tensor) -> Tensor:
        return torch.cat([x[:, :-3], x[:, -3:]], dim=1).tanh()

    graph = canonical(Function(rejoined), torch.randn(2, 8))
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [A.tanh.default]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gain", [True, False])
def test_decomposed_rms_norm_becomes_one_op(dtype: torch.dtype, gain: bool) -> None:
    model, x = RMSNorm(16, dtype, gain), torch.randn(3, 16).to(dtype)
    graph = canonical(model, x)
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [node.target for node in calls] == [A.rms_norm.default]
    assert (calls[0].args[2] is not None) == gain
    assert_close(graph.run(x)[0], model(x), dtype)


def test_equal_nodes_of_two_blocks_move_in_front_of_both() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + self.fc(nn.functional.silu(y))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, y)
            return x

    graph = canonical(Model(), torch.randn(2, 4), torch.randn(2, 4))
    (silu,) = (node for node in graph.nodes if node.target is A.silu.default)
    assert block_name(silu) == ""
    assert [len(block.nodes) for block in graph.blocks()] == [2, 2]


# leaves alone -----------------------------------------------------------------------------------


def test_what_has_an_effect_stays() -> None:
    def busy(x: Tensor) -> Tensor:
        return (x[:, ::2] * 2 + 1).to(torch.float64)[:, 1:]

    graph = canonical(Function(busy), torch.randn(2, 8))
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    expected = [A.slice, A.mul, A.add, A._to_copy, A.slice]
    assert [target.overloadpacket for target in targets] == expected


@pytest.mark.parametrize(
    "almost",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6),  # another axis
        lambda x: x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6),  # another value
        lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),  # not the mean
    ],
)
def test_what_is_not_quite_rms_norm_stays(almost: object) -> None:
    graph = canonical(Function(almost), torch.randn(3, 8))
    assert A.rms_norm.default not in [node.target for node in graph.nodes]


def test_statistics_in_half_precision_stay() -> None:
    def narrow(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    graph = canonical(Function(narrow), torch.randn(3, 8).bfloat16())
    assert A.rms_norm.default not in [node.target for node in graph.nodes]


def test_a_copy_that_keeps_an_input_from_the_caller_stays() -> None:
    graph = canonical(Function(lambda x: x.clone()), torch.randn(2, 4))
    x = torch.randn(5, 4)
    assert graph.run(x)[0].data_ptr() != x.data_ptr()


def test_calls_of_one_module_stay_two_sites() -> None:
    layer = nn.Linear(4, 4)
    graph = canonical(Function(lambda x: layer(x) + layer(x)), torch.randn(2, 4))
    assert sum(node.target is A.linear.default for node in graph.nodes) == 2


# invariant --------------------------------------------------------------------------------------


@given(models())
def test_the_function_is_unchanged(case: tuple[nn.Module, list[Tensor]]) -> None:
    model, inputs = case
    graph = captured(model, *inputs)
    before = graph.run(*inputs)[0]
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    assert torch.equal(graph.run(*inputs)[0], before)
    text = str(graph)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    assert str(graph) == text, "canonical already: nothing to do"


@settings(max_examples=25)
@given(st.lists(st.sampled_from(["view", "slice", "cast", "clone", "split", "one"]), max_size=6))
def test_any_chain_of_spellings_keeps_its_value(steps: list[str]) -> None:
    actions = {
        "view": lambda x: x.reshape(x.shape[0], 2, 4).transpose(0, 1).transpose(0, 1).flatten(1),
        "slice": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1)[:, 0:],
        "cast": lambda x: x.double().to(torch.float32).type_as(x),
        "clone": lambda x: x.t().contiguous().t(),
        "split": lambda x: sum(x.split([2, 6], 1)[1].split(2, 1)) + x.chunk(4, 1)[0],
        "one": lambda x: (x * 1 + 0) / 1 - 0,
    }

    def chain(x: Tensor) -> Tensor:
        for step in steps:
            x = actions[step](x)
            x = x.repeat(1, 8 // x.shape[1])
        return x.sin()

    x = torch.randn(3, 8)
    graph = canonical(Function(chain), x)
    assert torch.equal(graph.run(x)[0], chain(x))


# math -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e3]))
def test_fused_rms_norm_is_at_least_as_accurate(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    model = RMSNorm(32, torch.bfloat16)
    x = (torch.randn(4, 32) * scale).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    fused = numerics.relative_error(canonical(model, x).run(x)[0], exact)
    assert fused <= 1.05 * numerics.relative_error(model(x), exact)


# real architectures -----------------------------------------------------------------------------

#: RMSNorms in the graph: those torch keeps whole and those diffusers and transformers spell out.
_NORMS = {"wan-t2v": 8, "cogvideox-5b": 0, "t5": 5}


@pytest.mark.parametrize("name", sorted(_NORMS))
def test_real_architectures_keep_their_function(name: str) -> None:
    architecture = ARCHITECTURES[name]
    graph = capture(architecture.build(), architecture.samples())
    before = graph.clone()
    PassManager([Canonicalize(), Annotate()], probe=False).run(graph, Context())
    verify(graph)
    assert sum(node.target is A.rms_norm.default for node in graph.nodes) == _NORMS[name]
    with torch.no_grad():  # attention that is trained lays its result out as no captured view can
        for call in architecture.variants().values():
            for value, wanted in zip(graph.run(**call), before.run(**call), strict=True):
                assert_close(value, wanted)
