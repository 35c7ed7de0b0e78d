"""What a pass author tests with: capture a module in one call, quote its IR, prove equivalence.

::

    graph = annotated(nn.Linear(16, 8), torch.randn(4, 16), scheme="w4a8")
    run(graph, Smooth(alpha=0.6))
    assert_equivalent(nn.Linear(16, 8), torch.randn(4, 16), Rotate())
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from vdqc.base import numerics
from vdqc.base.diagnostics import Diagnostics
from vdqc.engine.pass_manager import Context, Pass, PassManager, PassRecord
from vdqc.engine.recipe import load_pass, parse_rule
from vdqc.ir.frontend import capture
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.sample import Sample
from vdqc.passes.table import PASSES


def captured(model: nn.Module, *inputs: Tensor) -> Graph:
    """The graph of ``model`` for these positional inputs; the first axis of each is dynamic.

    Weights must not share storage between calls of a test: the graph shares the model's.
    """
    names = list(inspect.signature(model.forward).parameters)
    example = dict(zip(names, inputs, strict=False))
    larger = {name: torch.cat([value, value[:1]]) for name, value in example.items()}
    return capture(model.eval(), [Sample(example), Sample(larger)])


def context(*inputs: Tensor, model: nn.Module | None = None, scheme: str = "w8a8") -> Context:
    """A context whose one sample is these inputs; ``scheme`` is the rule for every site."""
    names = list(inspect.signature(model.forward).parameters) if model else ["x", "y", "z"]
    samples = [Sample(dict(zip(names, inputs, strict=False)), timestep=0.0)] if inputs else []
    return Context(samples=samples, rules=(parse_rule(scheme),), diagnostics=Diagnostics())


def annotated(model: nn.Module, *inputs: Tensor, scheme: str = "w8a8") -> Graph:
    """The canonical graph of ``model`` with ``scheme`` at every linear site."""
    graph = captured(model, *inputs)
    canonicalize, annotate = load_pass("canonicalize", PASSES), load_pass("annotate", PASSES)
    ctx = context(*inputs, model=model, scheme=scheme)
    PassManager([canonicalize(), annotate(keep="nothing")]).run(graph, ctx)  # type: ignore[call-arg]
    return graph


def run(graph: Graph, *passes: Pass, ctx: Context | None = None) -> list[PassRecord]:
    """Run passes on ``graph`` as the manager would: ordered, verified, exactness probed."""
    return PassManager(passes, start=graph.stage).run(graph, ctx or Context())


def assert_ir(graph: Graph, expected: str) -> None:
    """The printed graph is ``expected``, leading and trailing blank space and indentation aside.

    Quote the whole graph; for one that may change use ``expecttest`` and accept in place.
    """
    wanted, found = inspect.cleandoc(expected).strip(), str(graph).strip()
    if wanted != found:
        raise AssertionError(
            f"the graph is not as expected\n--- expected\n{wanted}\n--- got\n{found}"
        )


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Relative RMS error within the one tolerance table, for the dtype that computed ``actual``."""
    dtype = dtype or actual.dtype
    if actual.shape != expected.shape:
        raise AssertionError(f"expected shape {list(expected.shape)}, got {list(actual.shape)}")
    error = numerics.relative_error(actual, expected)
    if not error <= numerics.TOLERANCE[dtype]:
        raise AssertionError(
            f"expected a relative error of at most {numerics.TOLERANCE[dtype]:.0e}, got {error:.2e}"
        )


def assert_equivalent(
    model: nn.Module, inputs: Sequence[Tensor], *passes: Pass, scheme: str = "w8a8"
) -> Graph:
    """Exact passes leave the function of ``model`` as it is: in float64, to 1e-10 relative.

    Returns the rewritten graph, so that a test can also look at what was done.
    """
    twin = copy.deepcopy(model).double()
    doubles = [value.double() if value.is_floating_point() else value for value in inputs]
    graph = annotated(twin, *doubles, scheme=scheme)
    before = graph.run(*doubles)
    ctx = context(*doubles, model=twin, scheme=scheme)
    run(graph, *passes, ctx=ctx)
    for after, wanted in zip(graph.run(*doubles), before, strict=True):
        assert_close(after, wanted, torch.float64)
    return graph


def tensors(
    *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> st.SearchStrategy[Tensor]:
    """Gaussian tensors, some with outlier channels a hundred times the rest (last axis)."""

    def make(seed: int, outliers: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        if outliers:
            value[..., :: max(1, shape[-1] // 3)] *= 100
        return value.to(dtype)

    return st.builds(make, st.integers(0, 2**31), st.booleans())


@st.composite
def models(draw: st.DrawFn) -> tuple[nn.Module, list[Tensor]]:
    """Small modules with the patterns passes look for, and inputs for them.

    Norm into peer linears, gated residuals, GELU and gated MLPs, attention; widths that a power of
    two does not always divide.
    """
    width = draw(st.sampled_from([24, 32, 48]))
    seed = draw(st.integers(0, 2**31))
    gated = draw(st.booleans())
    affine = draw(st.booleans())
    torch.manual_seed(seed)
    model = AdaLNBlock(width, heads=2, gated=gated, affine=affine).eval()
    return model, [torch.randn(2, 6, width), torch.randn(2, width)]


class AdaLNBlock(nn.Module):
    """One DiT block: adaLN modulation, self-attention, MLP, gated residuals.

    ``x: [B, T, C]``, ``y: [B, C]`` the conditioning vector; returns ``[B, T, C]``.
    Source: Peebles and Xie, DiT, arXiv 2212.09748, figure 3.
    """

    def __init__(
        self, width: int, heads: int, *, gated: bool = False, affine: bool = False
    ) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=affine)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=affine)
        self.up = nn.Linear(width, 2 * width)
        self.gate = nn.Linear(width, 2 * width) if gated else None
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """See the class."""
        table = self.modulation(nn.functional.silu(y)).unsqueeze(1)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.chunk(6, dim=-1)
        h = self.norm1(x) * (1 + scale1) + shift1
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + gate1 * self.to_out(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x) * (1 + scale2) + shift2
        if self.gate is None:
            h = nn.functional.gelu(self.up(h), approximate="tanh")
        else:
            h = nn.functional.silu(self.gate(h)) * self.up(h)
        return x + gate2 * self.down(h)


def remarks(ctx: Context) -> list[tuple[str, str]]:
    """``(site, code)`` of everything said so far, for tests of what a pass leaves alone."""
    return [(entry.site, entry.code) for entry in ctx.diagnostics]


def assert_stage(graph: Graph, stage: Stage) -> None:
    """The graph stands at ``stage``."""
    if graph.stage is not stage:
        raise AssertionError(f"expected the graph at {stage}, got {graph.stage}")


__all__: list[str] = [
    "AdaLNBlock",
    "annotated",
    "assert_close",
    "assert_equivalent",
    "assert_ir",
    "assert_stage",
    "captured",
    "context",
    "models",
    "remarks",
    "run",
    "tensors",
]
