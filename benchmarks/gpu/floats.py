"""Linears with a float operand: fp8 on both sides, and packed weights for few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import cases, checks, peers, routes
from benchmarks.gpu.env import Env, kernel, route
from benchmarks.gpu.names import AUTO, PLAIN
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.trial import Case, Op, Trial, Work
from vdqc.base.packing import pack
from vdqc.base.scheme import QuantSpec
from vdqc.kernels.base import LinearProblem

BF16 = torch.bfloat16
#: Sums of fp8 products keep 13 bits of fraction on Hopper.
_FP8_ERROR = 2e-2


def _fp8_operands(env: Env, m: int, n: int, k: int) -> tuple[Any, ...]:
    codes = env.normal(m, k).to(torch.float8_e4m3fn)
    weight = env.normal(n, k).to(torch.float8_e4m3fn)
    return codes, env.scales(m, 1), weight, env.scales(n), env.normal(n), BF16


def check_fp8(env: Env) -> None:
    """Odd sizes against float32 sums of the same codes."""
    of = kernel("fp8_linear")
    if env.dry:
        from vdqc.kernels.gpu import gemm

        call: Callable[..., Tensor] = gemm.fp8_linear
    else:
        call = route(of, env)
    for m, n, k in (
        [(63, 40, 128)] if env.dry else [(1, 80, 128), (63, 528, 1152), (257, 1008, 144)]
    ):
        given = _fp8_operands(env, m, n, k)
        found = checks.ran_poisoned(call, *given)
        checks.close(f"fp8 {m}x{n}x{k}", found, of.reference(*given), _FP8_ERROR)


def fp8_trial(env: Env, m: int, n: int, k: int) -> Trial:
    """One shape of W8A8 in fp8."""
    m, n, k = env.rows(m), env.width(n), env.width(k)
    given, of = _fp8_operands(env, m, n, k), kernel("fp8_linear")
    call = of.reference if env.dry else route(of, env)
    x, weight = env.normal(m, k), (env.normal(n, k) * k**-0.5).to(BF16)
    notes: dict[str, str] = {}
    ours = {
        AUTO: lambda: call(*given),
        PLAIN: routes.plain(lambda: call(*given)),
    }

    def verify() -> None:
        with routes.watched() as watch:
            found = checks.ran_poisoned(ours[AUTO])
        notes[AUTO] = watch.note
        at = checks.sampled_rows(m).to(env.device)
        expected = of.reference(given[0][at], given[1][at], *given[2:])
        checks.close("sampled rows", found[at], expected, _FP8_ERROR)

    spec = QuantSpec.parse("fp8_e4m3/channel")
    cost = of.cost(LinearProblem(m, n, k, BF16, spec, QuantSpec.parse("fp8_e4m3/token/dynamic")))
    found = {"cublas bf16": Peer(lambda: peers.cublas_bf16(x, weight, given[4]))}
    if not env.dry:
        found["_scaled_mm fp8"] = Peer(lambda: peers.scaled_mm(x, weight))
    return Trial(ours, found, Work(2.0 * m * n * k, "fp8"), verify, {AUTO: cost}, notes)


def _weight_only(env: Env, m: int, n: int, k: int, groups: int) -> tuple[Any, ...]:
    packed = pack(env.codes(n, k, bits=4), 4)
    return env.normal(m, k), packed, 4, env.scales(n, groups), None, env.normal(n)


def check_weight_only(env: Env) -> None:
    """Few rows, one scale per channel and one per group."""
    of = kernel("weight_only_linear")
    call = route(of, env)
    for m, n, k, groups in [(3, 40, 128, 1)] if env.dry else [(1, 80, 128, 1), (17, 520, 1152, 9)]:
        given = _weight_only(env, m, n, k, groups)
        found = checks.ran_poisoned(call, *given)
        checks.close(f"weight-only {m}x{n}x{k}", found, of.reference(*given))


def weight_only_trial(env: Env, m: int, n: int, k: int) -> Trial:
    """W4A16 in groups of 128: what it reads are the weights."""
    n, k = env.width(n), env.width(k)
    given, of = _weight_only(env, m, n, k, max(1, k // 128)), kernel("weight_only_linear")
    call = route(of, env)
    weight = (env.normal(n, k) * k**-0.5).to(BF16)
    problem = LinearProblem(m, n, k, BF16, QuantSpec.parse("int4/group128"), None)

    def verify() -> None:
        checks.close("weight-only", checks.ran_poisoned(call, *given), of.reference(*given))

    moved = given[1].numel() + 4.0 * given[3].numel() + 2.0 * m * (n + k)
    return Trial(
        {AUTO: lambda: call(*given)},
        {"cublas bf16": Peer(lambda: peers.cublas_bf16(given[0], weight, given[5]))},
        Work(moved, "copy"),
        verify,
        {AUTO: of.cost(problem)},
    )


def _fp8_case(name: str, m: int, n: int, k: int, rank: int) -> Case:
    return Case(name, lambda env: fp8_trial(env, m, n, k), rank)


def _few(m: int, rank: int) -> Case:
    n, k = 6 * cases.HUNYUAN_33K.width, cases.HUNYUAN_33K.width  # the modulation of a block
    return Case(f"rows-{m}/modulation", lambda env: weight_only_trial(env, m, n, k), rank)


OPS: tuple[Op, ...] = (
    Op(
        "fp8",
        check_fp8,
        tuple(_fp8_case(*row) for row in cases.linears() if row[4] < 2),
    ),
    Op("weight-only", check_weight_only, tuple(_few(m, 2) for m in (1, 16, 64))),
)
