import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base.diagnostics import Severity
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_rule
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.origin import Origin
from vdqc.ir.site import note
from vdqc.passes.annotate import Annotate, Keep, nearest_group
from vdqc.passes.canonicalize import Canonicalize
from vdqc.testing.architectures import ARCHITECTURES
from vdqc.testing.harness import AdaLNBlock, assert_ir, captured, models, remarks


def annotate(
    graph: Graph, *rules: str, keep: Keep = Keep.DEFAULT, hints: tuple[str, ...] = ()
) -> Context:
    graph.origin = Origin(keep=hints)
    ctx = Context(rules=[parse_rule(rule) for rule in rules])
    PassManager([Canonicalize(), Annotate(keep)], probe=False).run(graph, ctx)
    return ctx


def block(gated: bool = False) -> Graph:
    model = AdaLNBlock(32, heads=2, gated=gated)
    return captured(model, torch.randn(2, 6, 32), torch.randn(2, 32))


def schemes(graph: Graph) -> dict[str, str]:
    return {site.name: str(site.scheme) for site in graph.sites()}


# rewrites ---------------------------------------------------------------------------------------


def test_every_site_gets_a_scheme() -> None:
    graph = captured(nn.Sequential(nn.Linear(8, 4), nn.GELU(), nn.Linear(4, 2)), torch.randn(3, 8))
    annotate(graph, "w4a8", keep=Keep.NOTHING)
    assert graph.stage is Stage.ANNOTATED
    assert_ir(
        graph,
        """
        graph (%input: f32[s0, 8]) @annotated {
          %0 = aten.linear(%input, @0.weight, @0.bias) : f32[s0, 4]  # site 0 w4a8
          %1 = aten.gelu(%0) : f32[s0, 4]
          %2 = aten.linear(%1, @2.weight, @2.bias) : f32[s0, 2]  # site 2 w4a8
          return [%2]
        }
        """,
    )


@pytest.mark.parametrize("gated", [False, True])
def test_roles_are_found_by_dataflow(gated: bool) -> None:
    graph = block(gated)
    annotate(graph)
    expected = {
        "modulation": "modulation",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        ":attention": "attention",
        "to_out": "attn_out",
        "up": "mlp_up",
        "down": "mlp_down",
        **({"gate": "mlp_gate"} if gated else {}),
    }
    roles = {site.name.removeprefix("scaled_dot_product_attention"): site.role
             for site in graph.sites()}  # fmt: skip
    assert roles == expected


def test_norms_and_residual_adds_are_marked() -> None:
    graph = block()
    annotate(graph)
    marks = [note(node).get("role") for node in graph.nodes if "site" not in note(node)]
    assert marks.count("modulated_norm") == 2
    assert marks.count("residual_add") == 2


def test_the_last_matching_rule_wins() -> None:
    graph = block()
    annotate(graph, "w8a8", "to_*=w4a8", "to_out=none")
    found = schemes(graph)
    assert (found["up"], found["to_q"], found["to_out"]) == ("w8a8", "w4a8", "none")


# leaves alone -----------------------------------------------------------------------------------


def test_modulation_is_kept_unless_named() -> None:
    graph = block()
    ctx = annotate(graph, "w8a8")
    assert schemes(graph)["modulation"] == "none"
    assert ("modulation", "kept-by-role") in remarks(ctx)
    graph = block()
    annotate(graph, "w8a8", "modulation=w4a8")
    assert schemes(graph)["modulation"] == "w4a8"


@pytest.mark.parametrize(
    ("hint", "kept"), [("up", True), ("^u", True), ("u$", False), ("(", False)]
)
def test_hints_of_the_model_are_patterns(hint: str, kept: bool) -> None:
    graph = block()
    ctx = annotate(graph, "w8a8", keep=Keep.HINTS, hints=(hint,))
    assert schemes(graph)["up"] == ("none" if kept else "w8a8")
    assert (("up", "kept-by-model") in remarks(ctx)) == kept
    assert schemes(graph)["modulation"] == "w8a8", "hints alone do not keep a role"


def test_keep_nothing_follows_the_rules_alone() -> None:
    graph = block()
    annotate(graph, "w8a8", keep=Keep.NOTHING, hints=("up",))
    assert {name for name, scheme in schemes(graph).items() if scheme == "none"} == {
        "scaled_dot_product_attention:attention" if ":attention" not in schemes(graph)
        else ":attention"
    }  # fmt: skip


def test_a_weight_that_varies_or_is_shared_stays_in_float() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.mean()
            return nn.functional.linear(self.fc(self.fc(x)), self.table * scale)

    graph = captured(Model(), torch.randn(3, 4))
    ctx = annotate(graph, "w8a8", keep=Keep.NOTHING)
    assert set(remarks(ctx)) == {
        ("fc", "weight-shared"),
        ("fc#2", "weight-shared"),
        ("", "shared-float"),
        ("table_linear", "weight-varies"),
    }
    assert set(schemes(graph).values()) == {"none"}


# invariant --------------------------------------------------------------------------------------


@given(models(), st.sampled_from(["w8a8", "w4a8-g64", "w3a6-asym", "none"]))
def test_only_notes_change(case: tuple[nn.Module, list[Tensor]], scheme: str) -> None:
    model, inputs = case
    graph = captured(model, *inputs)
    before = graph.run(*inputs)[0]
    annotate(graph, scheme)
    assert torch.equal(graph.run(*inputs)[0], before)
    assert all(site.scheme is not None and site.role for site in graph.sites())


# math -------------------------------------------------------------------------------------------


@given(st.integers(1, 4096), st.integers(1, 256))
def test_the_nearest_group_is_legal_and_near(width: int, wanted: int) -> None:
    group = nearest_group(width, wanted)
    legal = [size for size in range(16, width + 1, 16) if width % size == 0]
    near = [size for size in legal if wanted <= 2 * size and size <= 2 * wanted]
    if group is None:
        assert not near
    else:
        assert group in near
        assert all(
            max(group / wanted, wanted / group) <= max(size / wanted, wanted / size)
            for size in near
        )


@pytest.mark.parametrize(("width", "scheme"), [(96, "w4a8-g48"), (64, "w4a8-g64"), (37, "w4a8")])
def test_groups_that_do_not_divide_fall_back(width: int, scheme: str) -> None:
    graph = captured(nn.Sequential(nn.Linear(width, 4)), torch.randn(3, width))
    ctx = annotate(graph, "w4a8-g64", keep=Keep.NOTHING)
    assert schemes(graph)["0"] == scheme
    said = [entry for entry in ctx.diagnostics if entry.severity is Severity.WARNING]
    assert bool(said) == (scheme != "w4a8-g64")
    if said:
        assert f"groups of 64 do not divide {width} input channels" in str(said[0])


# real architectures -----------------------------------------------------------------------------


def test_a_video_transformer_is_understood() -> None:
    wan = ARCHITECTURES["wan-t2v"]
    graph = capture(wan.build(), wan.samples())
    records = PassManager([Canonicalize(), Annotate()], probe=False).run(graph, Context())
    facts = records[1].facts
    assert facts["roles"] == {
        "patch_embed": 1,
        "time_embed": 2,
        "modulation": 1,
        "text_embed": 2,
        "attention": 4,
        "q": 4,
        "k": 2,
        "v": 2,
        "cross_kv": 4,
        "attn_out": 4,
        "mlp_up": 2,
        "mlp_down": 2,
        "proj_out": 1,
    }
    assert facts["attention"] == {"self": 2, "cross": 2}
    assert facts["residual_adds"] == 6
    tokens = facts["tokens"][0]
    video = [size for size in graph.signature.inputs[0].sizes if isinstance(size, str)][1:]
    assert tokens["frames"] == video[0]
    assert tokens["frame_major"]
    assert (tokens["extent"], tokens["text"]) == ("video", "")
