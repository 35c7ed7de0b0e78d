import pytest
import torch
from torch import Tensor, nn

from vdqc.base.diagnostics import Diagnostics
from vdqc.base.numerics import relative_error
from vdqc.base.target import TARGETS
from vdqc.lowering.fuse import half_split
from vdqc.lowering.lower import lower
from vdqc.passes.quant import Quant
from vdqc.testing.harness import annotated, run


class Interleaved(nn.Module):
    """Attention with rotary pairs written as Wan does; ``x: [B, T, C]``."""

    def __init__(self, width: int = 32, heads: int = 2, *, norm: str = "rms", leak: bool = False):
        super().__init__()
        self.heads, self.leak = heads, leak
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        kinds = {"rms": nn.RMSNorm, "layer": nn.LayerNorm, "none": nn.Identity}
        self.norm_q, self.norm_k = (
            kinds[norm](width, eps=1e-6) if norm != "none" else nn.Identity() for _ in range(2)
        )
        for value in self.parameters():
            nn.init.normal_(value, 0.2, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.linspace(0, 3, x.shape[1])[:, None] * torch.linspace(1, 2, 8)
        cos, sin = angle.cos()[None, :, None], angle.sin()[None, :, None]

        def rope(value: Tensor) -> Tensor:
            value = value.unflatten(2, (self.heads, -1))
            even, odd = value.unflatten(-1, (-1, 2)).unbind(-1)
            out = torch.empty_like(value)
            out[..., 0::2] = even * cos - odd * sin
            out[..., 1::2] = even * sin + odd * cos
            return out.transpose(1, 2)

        q, k = rope(self.norm_q(self.to_q(x))), rope(self.norm_k(self.to_k(x)))
        v = self.to_v(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return out + q.sum() if self.leak else out


@pytest.mark.parametrize(
    ("norm", "scheme"),
    [("rms", "w8a8"), ("layer", "w4a8-g16"), ("none", "w8a8-asym"), ("rms", "w4a16-g16")],
)
def test_pairs_become_halves_and_the_function_stays(norm: str, scheme: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32)
    graph = annotated(Interleaved(norm=norm), x, scheme=scheme)
    run(graph, Quant())
    expected = graph.run(x)[0]
    lower(graph, TARGETS["cpu"], Diagnostics())
    assert "slice_scatter" not in str(graph)
    assert relative_error(graph.run(x)[0], expected) < 1e-5


@pytest.mark.parametrize(("leak", "scheme"), [(True, "w8a8"), (False, "none")])
def test_left_alone_where_something_else_reads_it_or_weights_stay_float(
    leak: bool, scheme: str
) -> None:
    x = torch.randn(3, 5, 32)
    graph = annotated(Interleaved(leak=leak), x, scheme=scheme)
    if scheme != "none":
        run(graph, Quant())
    expected = graph.run(x)[0]
    lower(graph, TARGETS["cpu"], Diagnostics())
    assert "slice_scatter" in str(graph)
    assert relative_error(graph.run(x)[0], expected) < 1e-5


def test_half_split_is_a_permutation_within_heads() -> None:
    assert half_split(8, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
