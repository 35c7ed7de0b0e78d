"""sparsify where text is padded: which masks become an operand, and what they do at every size."""

import functools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base.block_mask import block_means, expand, kept_blocks, valid_block_means
from vdqc.base.numerics import sqnr_db
from vdqc.base.sparsity import MaskPolicy
from vdqc.base.target import TARGETS
from vdqc.base.video_mask import reorder, valid_keys_first, video_mask
from vdqc.engine.pass_manager import Context, PassManager
from vdqc.engine.recipe import parse_rule
from vdqc.ir.analysis.key_masks import valid_come_first
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.sparse_ops import REPARAMETERIZED_ATTENTION, SPARSE_ATTENTION
from vdqc.kernels.video_mask import DENSE_MASK, KEY_ORDER
from vdqc.lowering.lower import lower
from vdqc.lowering.prepare import prepare
from vdqc.passes.annotate import Annotate
from vdqc.passes.canonicalize import Canonicalize
from vdqc.passes.quant import Quant
from vdqc.passes.reparameterize import Reparameterize
from vdqc.passes.sparsify import Heads, Scores, Sparsify
from vdqc.testing.harness import assert_close, remarks, run

FORMS = ["counted", "sorted", "joined", "both"]
POLICIES = ["svg", "tile", "radial", "topk", "mass"]


class Padded(nn.Module):
    """Self-attention over a video and padded text behind it; ``form`` is that of the mask."""

    def __init__(self, form: str, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.form, self.heads = form, heads
        self.patch = nn.Conv3d(1, width, (1, 2, 2), (1, 2, 2))
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def mask(self, text_mask: Tensor, video: Any, text: Any) -> Tensor:
        batch, tokens = text_mask.shape[0], video + text
        match self.form:
            case "counted":  # HunyuanVideo
                place = torch.arange(tokens)[None]
                count = text_mask.sum(1, dtype=torch.int) + video
                valid = torch.ones(batch, tokens, dtype=torch.bool)
                return valid.masked_fill(place >= count[:, None], False)[:, None, None]
            case "sorted":  # Mochi, HunyuanVideo-1.5
                order = torch.argsort((~text_mask).int(), dim=1, stable=True)
                valid = nn.functional.pad(text_mask.gather(1, order), (video, 0), value=True)
                return valid[:, None, None]
            case "joined":
                ones = text_mask.new_ones(batch, video)
                return torch.cat([ones, text_mask], 1)[:, None, None]
            case "both":  # HunyuanVideo-1.5
                valid = nn.functional.pad(text_mask, (video, 0), value=True)
                keys = valid.view(batch, 1, 1, tokens).repeat(1, 1, tokens, 1)
                return keys & keys.transpose(2, 3)
            case "first":  # hides a token of the video
                return nn.functional.pad(text_mask, (video - 1, 1), value=True)[:, None, None]
            case "added":  # no mask of truth values
                bias = torch.zeros(batch, video), -1e4 * (~text_mask).float()
                return torch.cat(bias, 1)[:, None, None]
            case "causal":
                return torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        raise AssertionError

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        gain = (1 + timestep[:, None, None] / 1000).to(x.dtype)
        tokens = self.patch(x).flatten(2).transpose(1, 2) * gain
        video = tokens.shape[1]
        text = text * (1 + text_mask.to(text.dtype))[..., None]  # of one length with its mask
        joint = torch.cat([tokens, text], 1)
        mask = self.mask(text_mask, video, text.shape[1])
        parts = self.to_qkv(joint).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attend = nn.functional.scaled_dot_product_attention
        return joint + self.to_out(attend(*parts.unbind(), mask).transpose(1, 2).flatten(2))


def sample(frames: int, time: float, batch: int = 2, length: int = 5, size: int = 8) -> Sample:
    torch.manual_seed(int(time))
    keep = torch.rand(batch, length) < 0.6
    keep[0] = torch.arange(length) == length - 1  # one token, and that one last
    keep[1] = False  # no text at all
    call = {
        "x": torch.randn(batch, 1, frames, size, size + 4),
        "timestep": torch.full((batch,), time),
        "text": torch.randn(batch, length, 16) * 3,
        "text_mask": keep,
    }
    return Sample(call, timestep=time)


SAMPLES = [sample(6, 900.0), sample(7, 400.0, 3, 9, 12), sample(6, 100.0)]


@functools.cache
def _annotated(form: str) -> Graph:
    torch.manual_seed(0)
    graph = capture(Padded(form).eval(), SAMPLES)
    ctx = Context(SAMPLES, rules=(parse_rule("none"),))
    PassManager([Canonicalize(), Annotate(keep="nothing")], probe=False).run(graph, ctx)
    return graph


def padded(form: str) -> tuple[Graph, Context]:
    return _annotated(form).clone(), Context(SAMPLES, rules=(parse_rule("none"),))


def outputs(graph: Graph) -> list[Tensor]:
    return [graph.run(**s.inputs)[0] for s in SAMPLES]


def sparse_node(graph: Graph) -> Any:
    (found,) = [n for n in graph.nodes if n.target in (SPARSE_ATTENTION, REPARAMETERIZED_ATTENTION)]
    return found


@pytest.mark.parametrize("form", FORMS)
def test_density_one_is_dense_attention_with_the_mask(form: str) -> None:
    graph, ctx = padded(form)
    expected = outputs(graph)
    (record,) = run(graph, Sparsify(density=1.0, block=16), ctx=ctx)
    assert record.rewrites == 1
    assert not remarks(ctx)
    for found, wanted in zip(outputs(graph), expected, strict=True):
        assert_close(found, wanted)
    (site,) = [s.name for s in graph.sites() if "attention" in s.name]
    assert site == "scaled_dot_product_attention:attention"
    valid = sparse_node(graph).args[8]
    lines = str(graph).splitlines()
    printed = next(line for line in lines if "vdqc.sparse_attention" in line)
    operand = printed.split(") :")[0].rpartition(", ")[2]
    assert any(line.strip().startswith(f"{operand} = ") and ": bool[" in line for line in lines)
    assert valid_come_first(valid) == (form in ("counted", "sorted"))


@pytest.mark.parametrize("form", ["first", "added", "causal"])
def test_other_masks_stay_dense(form: str) -> None:
    graph, ctx = padded(form)
    before = str(graph)
    run(graph, Sparsify(density=0.5, block=16), ctx=ctx)
    assert str(graph) == before
    assert [code for _, code in remarks(ctx)] == ["masked", "nothing-sparse"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
def test_lowered_is_the_compressed_graph_at_every_size(policy: str, form: str) -> None:
    graph, ctx = padded(form)
    heads = Heads.ONLINE if form == "sorted" else Heads.CALIBRATED
    run(graph, Sparsify(policy=policy, density=0.5, block=16, heads=heads), ctx=ctx)
    expected = outputs(graph)
    (choice,) = [
        c for c in lower(graph, TARGETS["cpu"], ctx.diagnostics) if c.site.endswith(":attention")
    ]
    assert choice.kernel == "sparse_attention"
    assert sum(n.target is KEY_ORDER.op for n in graph.nodes) == (form in ("joined", "both"))
    for found, wanted in zip(outputs(graph), expected, strict=True):
        assert_close(found, wanted)


def test_where_no_sparse_kernel_runs_the_mask_is_written_out() -> None:
    graph, ctx = padded("joined")
    run(graph, Sparsify(density=0.5, block=16), ctx=ctx)
    expected = outputs(graph)
    lower(graph, TARGETS["sm90"], ctx.diagnostics)  # has no route for float32
    assert sum(n.target is DENSE_MASK.op for n in graph.nodes) == 1
    for found, wanted in zip(outputs(graph), expected, strict=True):
        assert_close(found, wanted)


def test_compiles_once_for_all_sizes() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graph, ctx = padded("both")
    run(graph, Sparsify(density=0.5, block=16), ctx=ctx)
    lower(graph, TARGETS["cpu"], ctx.diagnostics)
    counter = CompileCounterWithBackend("aot_eager")
    program = prepare(graph.module, TARGETS["cpu"])
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend=counter)
    for s in SAMPLES:
        inputs = graph.signature.bind((), s.inputs)
        with torch.no_grad():
            assert_close(compiled(*inputs)[0], graph.run_inputs(inputs)[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", ["counted", "joined"])
@pytest.mark.parametrize("policy", ["topk", "mass", "svg"])
def test_what_padding_holds_changes_nothing(form: str, policy: str) -> None:
    graph, ctx = padded(form)
    option = Sparsify(policy=policy, density=0.5, block=16, heads=Heads.ONLINE, mass=0.0)
    run(graph, option, ctx=ctx)
    lowered = graph.clone()
    lower(lowered, TARGETS["cpu"], ctx.diagnostics)
    for s in SAMPLES:
        keep = s.inputs["text_mask"]
        if form == "counted":  # so many leading tokens exist
            keep = torch.arange(keep.shape[1]) < keep.sum(1)[:, None]
        text = s.inputs["text"].masked_fill(~keep[..., None], 1e4)
        video = s.inputs["x"][0, 0].numel() // 4
        for own in (graph, lowered):
            found = own.run(**{**s.inputs, "text": text})[0]
            assert_close(found[:, :video], own.run(**s.inputs)[0][:, :video])


@pytest.mark.parametrize("form", ["sorted", "both"])
def test_residuals(form: str) -> None:
    graph, ctx = padded(form)
    dense = outputs(graph)
    run(graph, Sparsify(density=0.5, block=16), Reparameterize(), ctx=ctx)
    assert sparse_node(graph).target is REPARAMETERIZED_ATTENTION
    for found, wanted in zip(outputs(graph), dense, strict=True):
        assert_close(found, wanted)
    lower(graph, TARGETS["cpu"], ctx.diagnostics)
    sparse, ctx = padded(form)
    run(sparse, Sparsify(density=0.5, block=16), ctx=ctx)
    (compare,) = [n for n in graph.nodes if "compare" in str(n.target)]
    seen: dict[Any, Tensor] = {}
    for s in SAMPLES:
        looks = set(compare.args[:2])
        graph.run_inputs(
            graph.signature.bind((), s.inputs),
            lambda node, value, looks=looks: seen.update({node: value}) if node in looks else None,
        )
        attended: dict[Any, Tensor] = {}
        sparse.run_inputs(
            sparse.signature.bind((), s.inputs),
            lambda node, value, into=attended: into.update({node: value}),
        )
        node = sparse_node(sparse)
        assert_close(seen[compare.args[1]], attended[node])
        q, k, v = (attended[n] for n in node.args[:3])
        mask = attended[node.args[8]][:, None, None, :]
        wanted = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        assert_close(seen[compare.args[0]], wanted)


def test_training_sees_the_mask() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 2, 103, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    valid = torch.ones(2, 103, dtype=torch.bool)
    valid[0, 97:] = False
    mask, rest = valid[:, None, None], ([6, 16, 7, 0, 4], "svg{density=1,block=16}", 0.3)
    wanted = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
    wanted_grads = torch.autograd.grad(wanted.square().sum(), (q, k, v))
    heads = torch.tensor([0, 1])
    for op, cache in ((SPARSE_ATTENTION, ()), (REPARAMETERIZED_ATTENTION, ("residual{}",))):
        found = op(q, k, v, heads, None, *rest, *cache, valid)
        assert_close(found, wanted)
        for grad, own in zip(
            torch.autograd.grad(found.square().sum(), (q, k, v)), wanted_grads, strict=True
        ):
            assert_close(grad, own)
    args = (q, k, v, heads, None, *rest, valid)
    torch.library.opcheck(SPARSE_ATTENTION, args, test_utils=("test_schema", "test_faketensor"))
    nothing = torch.zeros_like(valid)
    assert not SPARSE_ATTENTION(q, k, v, heads, None, *rest, nothing).any()


@given(
    policy=st.sampled_from(
        [
            "svg{density=0.5,block=16}",
            "topk{density=0.5,block=16}",
            "mass{density=0.4,block=16,mass=0.5}",
        ]
    ),
    text=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_a_mask_is_for_every_order_of_its_text(policy: str, text: int, seed: int) -> None:
    torch.manual_seed(seed)
    layout, tokens = [4, 16, text, 0, 4], 64 + text
    q, k, v = (torch.randn(2, 3, tokens, 4) for _ in range(3))
    valid = torch.cat([torch.ones(2, 64, dtype=torch.bool), torch.rand(2, text) < 0.5], 1)
    with warnings.catch_warnings(action="ignore"):  # a density out of reach keeps everything
        mask = video_mask(q, k, v, None, None, layout, policy, 0.5, valid=valid)
    size = MaskPolicy.parse(policy).block
    kept = kept_blocks(mask.starts, mask.counts, mask.ids, mask.counts.shape[-1])
    wide = expand(kept, size, size, tokens, tokens).expand(2, 3, -1, -1)

    def attend(order: Tensor, index: Tensor, exists: Tensor) -> Tensor:
        keys = [reorder(x, order, index) for x in (k, v)]
        own = wide & exists[:, :, None]
        return nn.functional.scaled_dot_product_attention(query, *keys, own)

    query = reorder(q, mask.order, mask.which)
    exists = valid[:, None, :, None].expand(-1, 3, -1, -1)
    wanted = attend(mask.order, mask.which, reorder(exists, mask.order, mask.which)[..., 0])
    order, index = valid_keys_first(mask.order, mask.which, valid, 64)
    counted = (torch.arange(tokens) < valid.sum(1)[:, None])[:, None].expand(-1, 3, -1)
    assert torch.equal(reorder(exists, order, index)[..., 0], counted)
    assert_close(attend(order, index, counted), wanted)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(KEY_ORDER.op, (mask.order, mask.which, valid, 64), test_utils=checks)
    length = valid.sum(1, dtype=torch.int32)
    args = (mask.starts, mask.counts, mask.ids, size, q, length)
    torch.library.opcheck(DENSE_MASK.op, args, test_utils=checks)
    assert torch.equal(DENSE_MASK.op(*args).expand_as(wide), wide & counted[:, :, None])


@given(tokens=st.integers(1, 50), first=st.integers(0, 30), seed=st.integers(0, 99))
def test_means_of_blocks_leave_padding_out(tokens: int, first: int, seed: int) -> None:
    torch.manual_seed(seed)
    first = min(first, tokens)
    x = torch.randn(2, 1, tokens, 3)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    assert_close(valid_block_means(x, 8, valid, first), block_means(x, 8))
    valid[:, first:] = torch.rand(2, tokens - first) < 0.5
    x = x.masked_fill(~valid[:, None, :, None], float("nan"))
    found = valid_block_means(x, 8, valid, first)
    for b in range(2):
        for at, part in enumerate(valid[b].split(8)):
            own = x[b, :, at * 8 : at * 8 + 8][:, part]
            assert torch.allclose(found[b, :, at], own.mean(1), atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("target", ["cpu", "sm90"])
def test_scores_from_codes(target: str) -> None:
    torch.manual_seed(0)
    calls = [
        Sample({k: v.bfloat16() if v.is_floating_point() else v for k, v in s.inputs.items()}
               | {"text": torch.randn(*s.inputs["text_mask"].shape, 128).bfloat16()},
               timestep=s.timestep)
        for s in SAMPLES[:2]
    ]  # fmt: skip
    graph = capture(Padded("joined", 128).eval().bfloat16(), calls)
    ctx = Context(calls, rules=(parse_rule("w8a8"),))
    PassManager([Canonicalize(), Annotate(keep="nothing"), Quant()], probe=False).run(graph, ctx)
    option = Sparsify(policy="topk", density=0.7, block=64)
    plain = graph.clone()
    run(plain, option, ctx=Context(calls))
    run(graph, replace(option, scores=Scores.INT8), ctx=Context(calls))
    expected = [graph.run(**s.inputs)[0] for s in calls]
    for s, own in zip(calls, expected, strict=True):
        assert sqnr_db(own, plain.run(**s.inputs)[0]) > 30
    lower(graph, TARGETS[target], ctx.diagnostics)
    for s, wanted in zip(calls, expected, strict=True):
        assert sqnr_db(graph.run(**s.inputs)[0], wanted) > 30
