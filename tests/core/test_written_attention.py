"""Attention in the spellings that models use, against the one op that it becomes."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.site import SiteKind
from vdqc.passes.canonicalize import Canonicalize
from vdqc.testing.harness import assert_ir, captured

A = torch.ops.aten
HEADS, WIDTH = 2, 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Block(nn.Module):
    """Attention over ``[B, T, H * D]``; ``attend`` spells it."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        self.to_qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.to_out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        return self.to_out(self.attend(query, key, value))


class Model(nn.Module):
    """Two blocks of the same attention."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(attend) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def heads(x: Tensor) -> Tensor:
    """``[B, T, H * D] -> [B, H, T, D]``."""
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    """``[B, H, T, D] -> [B, T, H * D]``."""
    return x.transpose(1, 2).flatten(2)


def timm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) * WIDTH**-0.5) @ heads(k).transpose(-2, -1)
    return tokens(nn.functional.dropout(scores.softmax(dim=-1), 0.1, training=False) @ heads(v))


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(heads(q), heads(k).mT) / math.sqrt(WIDTH)
    return tokens(torch.matmul(torch.softmax(scores, dim=-1), heads(v)))


def einsum_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", heads(q), heads(k)) * WIDTH**-0.5
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return tokens(torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), heads(v)))


def einsum_of_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, WIDTH)) for x in (q, k, v))
    weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q * 0.5, k) * 0.7, dim=-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)


def einsum_with_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...id,...jd->...ji", heads(q), heads(k))
    return tokens(torch.einsum("...ji,...jd->...id", scores.softmax(-2), heads(v)))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, length, _ = q.shape
    q, k, v = (heads(x).reshape(batch * HEADS, length, WIDTH) for x in (q, k, v))
    empty = torch.empty(batch * HEADS, length, length, dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=WIDTH**-0.5)
    out = torch.bmm(scores.softmax(dim=-1), v)
    return tokens(out.reshape(batch, HEADS, length, WIDTH))


def biased_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(q.shape[1], dtype=q.dtype).expand(q.shape[0], q.shape[1], q.shape[1])
    scores = torch.baddbmm(bias, q, k.transpose(-1, -2), alpha=0.5)
    return torch.bmm(scores.softmax(dim=-1), v)


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).mul(q.shape[-1] ** -0.5).softmax(-1), v)


def weights_turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the autoencoder of latent diffusion: channels first, the weights transposed."""
    weights = nn.functional.softmax(torch.bmm(q, k.permute(0, 2, 1)) * 0.25, dim=2)
    return torch.bmm(v.permute(0, 2, 1), weights.permute(0, 2, 1)).permute(0, 2, 1)


def channels_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the UNets of guided diffusion: the scale on both operands."""
    batch, length, _ = q.shape
    q, k, v = (x.transpose(1, 2).reshape(batch * HEADS, WIDTH, length) for x in (q, k, v))
    scale = WIDTH**-0.25
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
    return torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length).transpose(1, 2)


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def filled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) @ heads(k).mT / 4).masked_fill(~causal(q.shape[1]), float("-inf"))
    return tokens(scores.softmax(-1) @ heads(v))


def filled_with_a_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT / 4
    scores = scores.masked_fill(~causal(q.shape[1]), -torch.finfo(torch.float32).max)
    return tokens(scores.softmax(-1) @ heads(v))


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.where(causal(q.shape[1]), heads(q) @ heads(k).mT, float("-inf"))
    return tokens(scores.softmax(-1) @ heads(v))


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k).mT * 0.25 + torch.arange(q.shape[1], dtype=q.dtype)
    return tokens(scores.softmax(-1) @ heads(v))


def relative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A second product as the bias of the first."""
    scores = heads(q) @ heads(k).mT + heads(q) @ heads(v).mT
    return tokens(scores.softmax(-1) @ heads(v))


SPELLINGS = [
    timm,
    divided,
    einsum_of_heads,
    einsum_of_tokens,
    einsum_with_dots,
    baddbmm,
    biased_baddbmm,
    one_head,
    weights_turned,
    channels_first,
    filled,
    filled_with_a_number,
    chosen,
    biased,
    relative,
]


def canonical(attend: Attend, dtype: torch.dtype = torch.float64) -> tuple[Graph, Context, Model]:
    torch.manual_seed(0)
    model = Model(attend).to(dtype)
    graph = captured(model, torch.randn(2, 6, HEADS * WIDTH, dtype=dtype))
    context = Context()
    PassManager([Canonicalize()], probe=False).run(graph, context)
    return graph, context, model


# rewrites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda attend: attend.__name__)
def test_every_spelling_becomes_the_one_op(attend: Attend) -> None:
    graph, _, model = canonical(attend)
    names = [site.name for site in graph.sites(kind=SiteKind.ATTENTION)]
    assert names == ["blocks.0:attention", "blocks.1:attention"]
    assert not [node for node in graph.nodes if node.target is A.softmax.int]
    x = torch.randn(3, 6, HEADS * WIDTH, dtype=torch.float64)
    torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-10, atol=1e-10)
    shapes = {site.input.meta["val"].ndim for site in graph.sites(kind=SiteKind.ATTENTION)}
    assert shapes == {4}


def test_the_text_of_one() -> None:
    class Einsums(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            weights = torch.softmax(torch.einsum("bthd,bshd->bhts", q * 0.5, k) * 0.7, dim=-1)
            return torch.einsum("bhts,bshd->bthd", weights, k)

    graph = captured(Einsums(), torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8))
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    assert_ir(
        graph,
        """
        graph (%q: f32[s0, 5, 3, 8], %k: f32[s0, 7, 3, 8]) @captured {
          %0 = aten.permute(%q, [0, 2, 1, 3]) : f32[s0, 3, 5, 8]
          %1 = aten.permute(%k, [0, 2, 1, 3]) : f32[s0, 3, 7, 8]
          %2 = aten.scaled_dot_product_attention(%0, %1, %1, scale=0.35) : f32[s0, 3, 5, 8]  # site scaled_dot_product_attention_default:attention
          %3 = aten.permute(%2, [0, 2, 1, 3]) : f32[s0, 5, 3, 8]
          return [%3]
        }
        """,  # noqa: E501
    )


def test_merged_heads_come_apart() -> None:
    graph, _, _ = canonical(baddbmm)
    site = graph.site("blocks.0:attention")
    assert tuple(site.input.meta["val"].shape[1:]) == (HEADS, 6, WIDTH)


def test_narrow_operands_stay_narrow() -> None:
    def upcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = heads(q).float() @ heads(k).float().mT * 0.25
        return tokens(scores.softmax(-1).to(v.dtype) @ heads(v))

    graph, _, model = canonical(upcast, torch.bfloat16)
    site = graph.site("blocks.0:attention")
    assert {operand.meta["val"].dtype for operand in site.node.args[:3]} == {torch.bfloat16}
    x = torch.randn(3, 6, HEADS * WIDTH, dtype=torch.bfloat16)
    torch.testing.assert_close(graph.run(x)[0], model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("top", "sites"), [(2.0, 2), (200.0, 0)])
def test_scores_that_half_precision_rounds_away_stay_rounded(top: float, sites: int) -> None:
    def steep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = heads(q) @ heads(k).mT + torch.linspace(top - 1, top, 160, dtype=q.dtype)
        return tokens(scores.softmax(-1) @ heads(v))

    torch.manual_seed(0)
    model = Model(steep).bfloat16().eval()
    sample = Sample({"x": torch.randn(2, 160, HEADS * WIDTH, dtype=torch.bfloat16)})
    graph, context = capture(model, [sample]), Context([sample])
    PassManager([Canonicalize()]).run(graph, context)
    assert len(graph.sites(kind=SiteKind.ATTENTION)) == sites
    assert ("attention-written-out" in [d.code for d in context.diagnostics]) == (sites == 0)


@given(
    order=st.permutations("bhts"),
    query=st.permutations("bhtd"),
    key=st.permutations("bhsd"),
    value=st.permutations("bhse"),
    result=st.permutations("bhte"),
)
@settings(max_examples=12, deadline=None)
def test_axes_may_lie_in_any_order(
    order: list[str], query: list[str], key: list[str], value: list[str], result: list[str]
) -> None:
    scores_of, q, k, v, out = map("".join, (order, query, key, value, result))

    class Einsums(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            a = torch.einsum(f"bhtd->{q}", x)
            b = torch.einsum(f"bhsd->{k}", y)
            c = torch.einsum(f"bhse->{v}", y)
            scores = torch.einsum(f"{q},{k}->{scores_of}", a, b)
            weights = torch.softmax(scores, dim=scores_of.index("s"))
            return torch.einsum(f"{scores_of},{v}->{out}", weights, c)

    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    y = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    graph = captured(Einsums(), x, y)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    assert [site.kind for site in graph.sites()] == [SiteKind.ATTENTION]
    torch.testing.assert_close(graph.run(x, y)[0], Einsums()(x, y), rtol=1e-10, atol=1e-10)


# leaves alone -----------------------------------------------------------------------------------


def weights_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (heads(q) @ heads(k).mT).softmax(-1)
    return tokens(weights @ heads(v)) * weights.sum()


def mask_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(q.shape[1], dtype=q.dtype)
    return tokens(((heads(q) @ heads(k).mT + bias) * 0.5).softmax(-1) @ heads(v))


def filled_weakly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (heads(q) @ heads(k).mT).masked_fill(~causal(q.shape[1]), -1e4)
    return tokens(scores.softmax(-1) @ heads(v))


def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return tokens((heads(q) @ heads(k).mT).softmax(-2) @ heads(v))


def heads_broadcast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = heads(q) @ heads(k)[:, :1].mT
    return tokens(scores.softmax(-1) @ heads(v))


def two_masks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.arange(q.shape[1], dtype=q.dtype)
    scores = (heads(q) @ heads(k).mT + bias).masked_fill(~causal(q.shape[1]), float("-inf"))
    return tokens(scores.softmax(-1) @ heads(v))


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (weights_read, "its scores or weights have other readers"),
        (mask_scaled, "its scale multiplies its mask, too"),
        (filled_weakly, "its mask fills with -10000"),
        (softmax_over_queries, "its products sum over other axes than channels and keys"),
        (heads_broadcast, "its operands broadcast"),
        (two_masks, "it has two masks"),
    ],
)
def test_what_is_more_than_attention_stays_and_says_why(attend: Attend, reason: str) -> None:
    graph, context, model = canonical(attend)
    assert not graph.sites(kind=SiteKind.ATTENTION)
    remarks = [d for d in context.diagnostics if d.code == "attention-written-out"]
    assert [d.site for d in remarks] == ["blocks.0", "blocks.1"]
    assert all(reason in d.message for d in remarks)
    x = torch.randn(3, 6, HEADS * WIDTH, dtype=torch.float64)
    torch.testing.assert_close(graph.run(x)[0], model(x), rtol=1e-10, atol=1e-10)


def test_a_softmax_between_linears_is_no_attention() -> None:
    def gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) * k + v

    graph, context, _ = canonical(gate)
    assert not graph.sites(kind=SiteKind.ATTENTION)
    assert not list(context.diagnostics)
