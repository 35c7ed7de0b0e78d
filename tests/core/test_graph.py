import pytest
import torch
from torch import nn

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import source_line
from vdqc.ir.site import SiteKind, note
from vdqc.testing.harness import AdaLNBlock, assert_close, assert_ir, captured

aten = torch.ops.aten


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def small() -> Graph:
    return captured(mlp(), torch.randn(4, 16))


def test_prints_one_node_a_line() -> None:
    assert_ir(
        small(),
        """
        graph (%input: f32[s0, 16]) @captured {
          %0 = aten.linear(%input, @0.weight, @0.bias) : f32[s0, 32]  # site 0
          %1 = aten.gelu(%0) : f32[s0, 32]
          %2 = aten.linear(%1, @2.weight, @2.bias) : f32[s0, 16]  # site 2
          return [%2]
        }
        """,
    )


def test_runs_as_the_model_at_another_batch() -> None:
    model = mlp()
    graph = captured(model, torch.randn(4, 16))
    x = torch.randn(7, 16)
    assert torch.equal(graph.run(x)[0], model(x))


def test_sites_by_glob_and_kind() -> None:
    graph = captured(AdaLNBlock(16, 2), torch.randn(2, 3, 16), torch.randn(2, 16))
    assert [site.name for site in graph.sites("to_*", SiteKind.LINEAR)] == [
        "to_q",
        "to_k",
        "to_v",
        "to_out",
    ]
    assert [site.kind for site in graph.sites("*:attention")] == [SiteKind.ATTENTION]
    assert [site.name for site in graph.peers(graph.site("to_k"))] == ["to_q", "to_k", "to_v"]
    assert [[site.name for site in group] for group in graph.groups("to_v")] == [
        ["to_q", "to_k", "to_v"]
    ]


def test_unknown_site_offers_the_nearest() -> None:
    graph = captured(AdaLNBlock(16, 2), torch.randn(2, 3, 16), torch.randn(2, 16))
    with pytest.raises(ConfigError, match="did you mean 'to_q'"):
        graph.site("toq")


def test_a_module_called_twice_is_two_sites() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(x))

    graph = captured(Twice(), torch.randn(3, 8))
    assert [site.name for site in graph.sites()] == ["fc", "fc#2"]


def test_call_gives_value_stack_and_origin() -> None:
    graph = small()
    site = graph.site("2")
    with graph.edited_by("test"):
        doubled = graph.call(aten.mul.Tensor, site.input, 2.0, before=site.node)
        graph.set_operand(site.node, 0, doubled)
    assert doubled.meta["val"].shape == site.node.args[0].meta["val"].shape
    assert note(doubled) == {"origin": "test"}
    x = torch.randn(4, 16)
    expected = small_reference(graph, x)
    assert_close(graph.run(x)[0], expected)


def small_reference(graph: Graph, x: torch.Tensor) -> torch.Tensor:
    hidden = nn.functional.gelu(
        nn.functional.linear(x, graph.param("0.weight"), graph.param("0.bias"))
    )
    return nn.functional.linear(2 * hidden, graph.param("2.weight"), graph.param("2.bias"))


def test_replace_moves_the_site() -> None:
    graph = small()
    site = graph.site("0")
    new = graph.call(aten.linear.default, *site.node.args, before=site.node)
    graph.replace(site.node, new)
    graph.clean()
    assert graph.site("0").node is new
    assert graph.stage is Stage.CAPTURED


def test_replace_keeps_users_that_must_stay() -> None:
    graph = small()
    gelu = next(node for node in graph.nodes if node.target is aten.gelu.default)
    scaled = graph.call_after(aten.mul.Tensor, gelu, 3.0, after=gelu)
    graph.replace(gelu, scaled)
    assert scaled.args[0] is gelu
    assert graph.site("2").input is scaled


def test_set_param_rebinds_and_never_writes_in_place() -> None:
    model = mlp()
    kept = model[0].weight.detach().clone()
    graph = captured(model, torch.randn(4, 16))
    graph.set_param("0.weight", torch.zeros(32, 16))
    assert torch.equal(model[0].weight, kept)
    x = torch.randn(4, 16)
    hidden = nn.functional.gelu(model[0].bias.expand(4, -1))
    assert_close(graph.run(x)[0], model[2](hidden))


def test_weights_are_shared_with_the_model() -> None:
    model = mlp()
    graph = captured(model, torch.randn(4, 16))
    assert graph.param("0.weight").data_ptr() == model[0].weight.data_ptr()


def test_free_parameters_train() -> None:
    graph = small()
    node = graph.set_param("0.scale", torch.ones(16), free=True)
    site = graph.site("0")
    graph.set_operand(site.node, 0, graph.call(aten.mul.Tensor, site.input, node, before=site.node))
    graph.clean()
    graph.run(torch.randn(4, 16))[0].sum().backward()
    assert graph.param("0.scale").grad is not None
    assert "0.scale" in graph.free


def test_clean_drops_weights_nobody_reads() -> None:
    graph = small()
    site = graph.site("2")
    graph.replace(site.node, site.input)
    graph.clean()
    assert graph.param_names() == ["0.weight", "0.bias"]
    assert sorted(graph.module.state_dict()) == ["0.bias", "0.weight"]


def test_evaluate_computes_constant_expressions_only() -> None:
    graph = small()
    site = graph.site("0")
    doubled = graph.call(aten.mul.Tensor, site.weight, 2.0, before=site.node)
    assert graph.is_constant(doubled)
    assert not graph.is_constant(site.node)
    assert torch.equal(graph.evaluate(doubled), 2 * graph.param("0.weight"))


def test_clone_edits_apart_and_shares_weights() -> None:
    graph = small()
    twin = graph.clone()
    twin.set_param("0.weight", torch.zeros(32, 16))
    x = torch.randn(4, 16)
    assert not torch.equal(graph.run(x)[0], twin.run(x)[0])
    assert twin.param("2.weight").data_ptr() == graph.param("2.weight").data_ptr()


def test_source_line_points_at_the_users_code() -> None:
    graph = captured(AdaLNBlock(16, 2), torch.randn(2, 3, 16), torch.randn(2, 16))
    line = source_line(graph.site("to_out").node)
    assert "linear" in line or "to_out" in line


def test_observer_sees_every_value() -> None:
    graph = small()
    seen = {}
    graph.run_inputs([torch.randn(4, 16)], lambda node, value: seen.update({node.name: value}))
    assert {"linear", "gelu", "linear_1"} <= set(seen)


def test_wrong_calls_are_refused() -> None:
    graph = small()
    with pytest.raises(InputError, match="axis 1 of 'input' must be 16"):
        graph.run(torch.randn(4, 15))
    with pytest.raises(InputError, match="unknown argument 'inputs'"):
        graph.run(inputs=torch.randn(4, 16))
    with pytest.raises(InputError, match=r"expected float32\[s0, 16\] for 'input'"):
        graph.run(torch.randn(4, 16).double())
