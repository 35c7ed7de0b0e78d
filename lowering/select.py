"""Which kernel runs each site, and why; predicted times are rooflines of the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import fx

from vdqc.base.numerics import has_whole_multiples
from vdqc.base.scheme import QuantScheme, QuantSpec
from vdqc.base.target import Target
from vdqc.ir.graph import Graph
from vdqc.ir.ops import FAKE_QUANTIZE
from vdqc.ir.site import Site, SiteKind
from vdqc.ir.sparse_ops import REPARAMETERIZED_ATTENTION
from vdqc.kernels.attention import torch_attention_cost
from vdqc.kernels.base import (
    FLOAT_FORMAT,
    NOTHING,
    Cost,
    Kernel,
    LinearProblem,
    Problem,
)
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.sparse_attention import SPARSE_ATTENTION, SPARSE_ATTENTION_INT8
from vdqc.lowering.rules import (
    ATTENTION_KERNELS,
    LINEAR_KERNELS,
    attention_obstacle,
    attention_problem,
    hint,
    linear_site,
)
from vdqc.lowering.sparse import dense_problem, is_sparse, sparse_problem


@final
@dataclass(frozen=True)
class KernelChoice:
    """What runs one site.

    Attributes:
        site: its name.
        kernel: name of a kernel, or ``aten`` for torch's own op.
        why: one sentence with the numbers.
        predicted_us: roofline time for the captured example's sizes.
        runner_up: the next best as ``name at N us``, or "".
        fallback: a quantised site that no kernel supports; it runs in float.
        bytes, bits: what lowering stored for its weight and branch, in all and for each weight;
            None before it did.
        cost: what ``predicted_us`` is the price of, on whatever machine.
    """

    site: str
    kernel: str
    why: str
    predicted_us: float
    runner_up: str = ""
    fallback: bool = False
    bytes: int | None = None
    bits: float | None = None
    cost: Cost = NOTHING

    def priced(self, machine: Target) -> KernelChoice:
        """The same choice at its price on ``machine``."""
        return replace(self, predicted_us=self.cost.us(machine))


def choose(graph: Graph, target: Target, *, planned: bool = False) -> list[KernelChoice]:
    """The choice for every site, in program order; the graph stays as it is.

    ``planned`` asks before anything is quantised: what each site's scheme will get.
    """
    return [choose_site(graph, site, target, planned=planned) for site in graph.sites()]


def choose_site(graph: Graph, site: Site, target: Target, *, planned: bool = False) -> KernelChoice:
    """The choice for one site, as it is or, if ``planned``, as its scheme says."""
    if site.kind is SiteKind.LINEAR:
        problem = linear_site(graph, site).problem
        if planned and site.scheme is not None:
            problem = _planned(problem, site.scheme)
        return _linear(site.name, problem, target)
    if is_sparse(site.node):
        return _sparse(graph, site, target)
    if site.kind is SiteKind.ATTENTION:
        return _attention(site, target)
    quantised = any(operand.target is FAKE_QUANTIZE for operand in site.node.all_input_nodes)
    why = f"no kernel for {site.kind}" if quantised else "the site is in float"
    return _plain(site.name, why, _conv_cost(site), target, fallback=quantised)


def _plain(
    name: str, why: str, cost: Cost, target: Target, *, fallback: bool = False
) -> KernelChoice:
    """torch's own op."""
    return KernelChoice(name, "aten", why, cost.us(target), fallback=fallback, cost=cost)


def _planned(problem: LinearProblem, scheme: QuantScheme) -> LinearProblem:
    """``problem`` once ``quant`` has run: group scales of narrow codes become whole multiples."""
    spec = scheme.weight
    whole = spec is not None and scheme.input is not None and has_whole_multiples(spec)
    return replace(problem, weight=spec, input=scheme.input, integer_groups=whole)


def _linear(name: str, problem: LinearProblem, target: Target) -> KernelChoice:
    plain = _float_cost(problem)
    if problem.weight is None and problem.input is None:
        return _plain(name, "the site is in float", plain, target)
    best, refused = _rank(LINEAR_KERNELS, problem, target)
    if not best:
        return _plain(name, _reasons(refused), plain, target, fallback=True)
    kernel = best[0][1]
    cost = kernel.cost(problem)
    if problem.weight is not None and problem.weight.planes:
        plane = replace(problem, weight=QuantSpec.parse("int1/channel/asym"))
        cost += PACKED_LINEAR.cost(plane) * problem.weight.planes
    others = [*((t, k.name) for t, k in best[1:]), (plain.us(target), "aten.linear in float")]
    next_time, next_name = min(others)
    size = f"{problem.m} x {problem.k} x {problem.n}"
    spec = f"weight {problem.weight}, input {problem.input or 'float'}"
    return KernelChoice(
        name,
        kernel.name,
        f"{size}, {spec}; " + ("; ".join(refused) if refused else "nothing refused"),
        cost.us(target),
        f"{next_name} at {next_time:.0f} us",
        cost=cost,
    )


def _attention(site: Site, target: Target) -> KernelChoice:
    obstacle = attention_obstacle(site.node)
    if obstacle is not None:
        return _plain(site.name, obstacle, _any_attention_cost(site.node), target)
    problem = attention_problem(site.node)
    plain = torch_attention_cost(problem)
    best, refused = _rank(ATTENTION_KERNELS, problem, target)
    if not best:
        return _plain(site.name, "; ".join(refused), plain, target)
    time, kernel = best[0]
    plain_time = plain.us(target)
    shape = f"{problem.heads} heads, {problem.queries} x {problem.keys} scores of {problem.width}"
    if plain_time < time:
        choice = _plain(site.name, shape, plain, target)
        return replace(choice, runner_up=f"{kernel.name} at {time:.0f} us")
    runner_up, cost = f"aten at {plain_time:.0f} us", kernel.cost(problem)
    return KernelChoice(site.name, kernel.name, shape, time, runner_up, cost=cost)


def _sparse(graph: Graph, site: Site, target: Target) -> KernelChoice:
    problem = sparse_problem(graph, site.node)
    dense = torch_attention_cost(dense_problem(problem))
    shape = f"{problem.heads} heads, {problem.queries} x {problem.keys} scores of {problem.width}"
    why = f"{site.node.args[6]}: {problem.density:.3f} of {shape}"
    if site.node.target is REPARAMETERIZED_ATTENTION:
        why += f"; {site.node.args[8]}"
    plain = replace(problem, int8=False)
    reason = SPARSE_ATTENTION.supports(plain, target)
    if reason is not None:
        return _plain(site.name, f"{why}; {reason}", dense, target, fallback=True)
    cost, kernel = SPARSE_ATTENTION.cost(plain), SPARSE_ATTENTION
    if problem.int8 and target.device == "cuda":  # a CPU multiplies the codes' values instead
        cost, kernel = SPARSE_ATTENTION_INT8.cost(problem), SPARSE_ATTENTION_INT8
    runner_up = f"dense at {dense.us(target):.0f} us"
    return KernelChoice(site.name, kernel.name, why, cost.us(target), runner_up, cost=cost)


def _rank(
    kernels: Sequence[Kernel], problem: Problem, target: Target
) -> tuple[list[tuple[float, Kernel]], list[str]]:
    """Kernels that can run ``problem``, fastest first, and why the others cannot."""
    able, refused = [], []
    for kernel in kernels:
        reason = kernel.supports(problem, target)
        if reason is None:
            able.append((kernel.cost(problem).us(target), kernel))
        else:
            refused.append(f"{kernel.name}: {reason}")
    return sorted(able, key=lambda pair: pair[0]), refused


def _reasons(refused: Sequence[str]) -> str:
    """Why no kernel will do, each reason once."""
    return "; ".join(dict.fromkeys(text.partition(": ")[2] for text in refused))


def _float_cost(problem: LinearProblem) -> Cost:
    m, n, k = problem.m, problem.n, problem.k
    size = problem.dtype.itemsize
    return Cost({FLOAT_FORMAT[problem.dtype]: 2.0 * m * n * k}, size * (m * k + n * k + m * n))


def _conv_cost(site: Site) -> Cost:
    """torch's own convolution."""
    out, weight = site.node.meta["val"], site.weight.meta["val"]
    values = math.prod(map(hint, out.shape))
    moved = (values + math.prod(map(hint, site.input.meta["val"].shape))) * out.dtype.itemsize
    work = 2.0 * values * weight[0].numel()
    gpu = Cost({FLOAT_FORMAT[out.dtype]: work}, float(moved))  # cuDNN multiplies as linears do
    return Cost({"conv": work}, float(moved), gpu=gpu)


def _any_attention_cost(node: fx.Node) -> Cost:
    """Scores times channels, of whatever shape."""
    query, key = (node.args[i].meta["val"] for i in (0, 1))  # type: ignore[union-attr]
    values = math.prod(map(hint, query.shape))
    return Cost({"sdpa": 4.0 * values * hint(key.shape[-2])}, 0.0)


def kernel_named(name: str) -> Kernel:
    """One of the kernels that ``choose`` picks from."""
    return next(k for k in (*LINEAR_KERNELS, *ATTENTION_KERNELS) if k.name == name)


def attention_scale(node: fx.Node) -> float:
    """The factor on scores: the one given, or D^-0.5."""
    given = node.kwargs.get("scale")
    width = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
    return float(given) if given is not None else float(width) ** -0.5  # type: ignore[arg-type]
