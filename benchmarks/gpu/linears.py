"""Ops that are GEMMs: W8A8, packed weights, four-bit activations, branches, weight-only.

Operands are random codes and scales of the shapes in ``cases``; every case also builds the float
operands for the peers. Work is 2 M N K operations whatever the width of the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from benchmarks.gpu import cases, checks, peers, routes
from benchmarks.gpu.env import Env, route
from benchmarks.gpu.names import AUTO, PLAIN, WITH_QUANTISER
from benchmarks.gpu.peers import Call, Peer
from benchmarks.gpu.trial import Case, Op, Trial, Work
from vdqc.base.packing import pack
from vdqc.base.scheme import QuantSpec
from vdqc.kernels.base import Cost, Kernel, LinearProblem
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS

BF16 = torch.bfloat16
#: Odd shapes for checks: (M, N, K).
SHAPES = [(1, 80, 128), (63, 520, 1152), (257, 1000, 136), (80, 96, 13824), (300, 3072, 3072)]
DRY_SHAPES = [(1, 24, 64), (63, 40, 136)]


@final
@dataclass(frozen=True)
class Format:
    """How the two operands of a linear are stored.

    Attributes:
        groups: columns that share a whole-number multiplier; 0 for none.
        binary: four bits and a plane of residual signs.
    """

    bits: int = 8
    code_bits: int = 8
    groups: int = 0
    binary: bool = False

    @property
    def kernel(self) -> Kernel:
        """What runs it."""
        return INT8_LINEAR if self.bits == 8 else PACKED_LINEAR

    def cost(self, m: int, n: int, k: int) -> Cost:
        """What lowering predicts with."""
        kind = f"group{self.groups}" if self.groups else "channel"
        weight = QuantSpec.parse(f"int{self.bits}/{kind}")
        problem = LinearProblem(
            m, n, k, BF16, weight, QuantSpec.parse("int8/token/dynamic"), bool(self.groups)
        )
        return self.kernel.cost(problem)


@final
@dataclass(frozen=True, eq=False)
class Operands:
    """A linear and what the peers need of it; ``wide`` are the weights as int8."""

    form: Format
    codes: Tensor
    scale: Tensor
    weight: Tensor
    wide: Tensor
    multiplier: Tensor | None
    weight_scale: Tensor
    bias: Tensor

    def args(self, rows: Tensor | None = None) -> tuple[Any, ...]:
        """Arguments of the op, for some rows or all."""
        pick = slice(None) if rows is None else rows.to(self.codes.device)
        codes, scale, form = self.codes[pick], self.scale[pick], self.form
        if form.bits == 8:
            head: tuple[Any, ...] = (codes, scale, None, self.weight)
        else:
            head = (codes, scale, None, self.weight, form.bits, self.multiplier)
        return (*head, self.weight_scale, None, None, self.bias, BF16)

    def named(self, **more: Any) -> dict[str, Any]:
        """Keyword arguments of the op."""
        form = self.form
        if form.bits == 8:
            return more
        return {"code_bits": form.code_bits, "binary": form.binary, **more}


def operands(env: Env, form: Format, m: int, n: int, k: int) -> Operands:
    """Random operands; sizes as given."""
    codes = env.codes(m, k, bits=form.code_bits)
    low = env.codes(n, k, bits=form.bits if not form.binary else 5)
    multiplier = None
    if form.binary:
        multiplier = torch.randint(1, 16, (n, 1), device=env.device, dtype=torch.int8)
    elif form.groups and k % form.groups == 0:
        most = 127 // (2 ** (form.bits - 1) - 1)
        shape = (n, k // form.groups)
        multiplier = torch.randint(1, most + 1, shape, device=env.device, dtype=torch.int8)
    return Operands(
        form,
        pack(codes, 4) if form.code_bits == 4 else codes,
        env.scales(m, 1),
        low if form.bits == 8 else pack(low, form.bits),
        low,
        multiplier,
        env.scales(n),
        env.normal(n),
    )


def check(env: Env, form: Format) -> None:
    """The op against its reference at odd sizes, with what an epilogue may hold."""
    kernel = form.kernel
    call = route(kernel, env)
    for index, (m, n, k) in enumerate(DRY_SHAPES if env.dry else SHAPES):
        given = operands(env, form, m, n, k)
        for epilogue in _epilogues(env, m, n) if index == 1 else [{}]:
            named = given.named(**epilogue)
            found = checks.ran_poisoned(call, *given.args(), **named)
            expected = kernel.reference(*given.args(), **named)
            checks.close(f"{kernel.name} {m}x{n}x{k} {sorted(named)}", found, expected)


def _epilogues(env: Env, m: int, n: int) -> list[dict[str, Any]]:
    return [
        {},
        {"activation": "gelu_tanh"},
        {"gate": env.normal(1, n), "residual": env.normal(m, n)},
        {"down": env.normal(m, 32), "up": env.normal(n, 32)},
    ]


def trial(env: Env, form: Format, m: int, n: int, k: int, **epilogue: str) -> Trial:
    """One shape of a format; ``epilogue`` names what stands behind the sums."""
    m, n, k = env.rows(m), env.width(n), env.width(k)
    given = operands(env, form, m, n, k)
    named = given.named(**_made(env, m, n, epilogue))
    kernel, work = form.kernel, Work(2.0 * m * n * k, "int8")
    call, notes = route(kernel, env), dict[str, str]()
    ours: dict[str, Call] = {
        AUTO: lambda: call(*given.args(), **named),
        PLAIN: routes.plain(lambda: call(*given.args(), **named)),
    }
    x = env.normal(m, k)
    weight = (env.normal(n, k) * k**-0.5).to(BF16)
    found = _peers(given, x, weight) if not epilogue else {}
    if form.code_bits == 8 and not epilogue:
        ours[WITH_QUANTISER] = _with_quantiser(env, call, given, named, x)
    if form != Format():
        other = operands(env, Format(), m, n, k)
        eight = route(INT8_LINEAR, env)
        found["vdqc w8a8"] = Peer(lambda: lambda: eight(*other.args()))
        if form.binary:
            four, packed = operands(env, W4, m, n, k), route(PACKED_LINEAR, env)
            found["vdqc w4a8"] = Peer(lambda: lambda: packed(*four.args()))
    if epilogue:
        found["without it"] = Peer(lambda: lambda: call(*given.args(), **given.named()))

    def verify() -> None:
        with routes.watched() as watch:
            result = checks.ran_poisoned(ours[AUTO])
        notes[AUTO] = watch.note
        _verify_rows(given, named, result)
        _verify_rows(given, named, checks.ran_poisoned(ours[PLAIN]))

    return Trial(ours, found, work, verify, {AUTO: form.cost(m, n, k)}, notes)


def _made(env: Env, m: int, n: int, epilogue: dict[str, str]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for name in epilogue:
        if name == "gelu":
            named["activation"] = "gelu_tanh"
        elif name == "residual":
            named |= {"gate": env.normal(1, n), "residual": env.normal(m, n)}
        else:
            rank = int(name.removeprefix("rank"))
            named |= {"down": env.normal(m, rank), "up": env.normal(n, rank)}
    return named


def _verify_rows(given: Operands, named: dict[str, Any], result: Tensor) -> None:
    """The timed operands, on sampled rows; all of the result is finite, so all was written."""
    checks.finite("result", [result])
    rows = checks.sampled_rows(result.shape[0])
    at = rows.to(result.device)
    picked = {
        name: value[at] if name in ("residual", "down") and isinstance(value, Tensor) else value
        for name, value in named.items()
    }
    expected = given.form.kernel.reference(*given.args(rows), **picked)
    checks.close("sampled rows", result[at], expected)


def _with_quantiser(
    env: Env, call: Callable[..., Any], given: Operands, named: dict[str, Any], x: Tensor
) -> Call:
    quantise, rest = route(QUANTIZE_ROWS, env), given.args()[2:]
    return lambda: call(*quantise(x, 127, False), *rest, **named)


def _peers(given: Operands, x: Tensor, weight: Tensor) -> dict[str, Peer]:
    form, bias = given.form, given.bias
    found = {"cublas bf16": Peer(lambda: peers.cublas_bf16(x, weight, bias))}
    if form == Format():
        eager = (given.codes, given.scale, given.wide, given.weight_scale, bias)
        found["_int_mm + eager"] = Peer(lambda: peers.int_mm_eager(*eager))
        found["_scaled_mm fp8"] = Peer(lambda: peers.scaled_mm(x, weight))
        found["torchao int8"] = Peer(lambda: peers.torchao(x, weight), WITH_QUANTISER, True, True)
    if form.code_bits == 8 and not form.binary:
        bits = form.bits
        found["humming"] = Peer(lambda: peers.humming(x, weight, bits), WITH_QUANTISER, True, True)
        if bits in (4, 8):
            found["gemlite"] = Peer(
                lambda: peers.gemlite(x, weight, bits), WITH_QUANTISER, True, True
            )
    return found


def _case(form: Format, name: str, m: int, n: int, k: int, rank: int, *epilogue: str) -> Case:
    extra = dict.fromkeys(epilogue, "")
    suffix = f"/{'+'.join(epilogue)}" if epilogue else ""
    key = f"{'+'.join(epilogue)}{'few' if m <= 256 else ''}"
    return Case(name + suffix, lambda env: trial(env, form, m, n, k, **extra), rank, key)


def _cases(form: Format, *, everywhere: bool, least: int = 0) -> tuple[Case, ...]:
    """All sites of all models, or the up-projections only; then few rows."""
    found = [
        _case(form, name, m, n, k, max(rank, least))
        for name, m, n, k, rank in cases.linears()
        if everywhere or (name.endswith("/up") and rank < 2)
    ]
    d, f = cases.HUNYUAN_33K.width, cases.HUNYUAN_33K.ffn
    few = cases.SMALL_ROWS if everywhere else cases.SMALL_ROWS[:2]
    return (*found, *(_case(form, f"rows-{m}", m, f, d, 2) for m in few))


def _branches(form: Format) -> tuple[Case, ...]:
    models = (cases.HUNYUAN_33K, cases.WAN_33K)
    found = []
    for model in models:
        sizes = model.linears()
        for site, name, rank in (
            ("up", "rank32", 0),
            ("up", "rank16", 1),
            ("down", "rank1", 1),
        ):
            found.append(_case(form, f"{model.name}/{site}", *sizes[site], rank, name))
    return tuple(found)


def _epilogue_cases() -> tuple[Case, ...]:
    found = []
    for model in (cases.HUNYUAN_33K, cases.WAN_33K):
        sizes = model.linears()
        found.append(_case(Format(), f"{model.name}/up", *sizes["up"], 1, "gelu"))
        found.append(_case(Format(), f"{model.name}/down", *sizes["down"], 1, "residual"))
    return tuple(found)


def _op(name: str, form: Format, found: tuple[Case, ...]) -> Op:
    return Op(name, lambda env: check(env, form), found)


W4 = Format(bits=4)
OPS: tuple[Op, ...] = (
    _op("w8a8", Format(), _cases(Format(), everywhere=True)),
    _op("w4a8", W4, _cases(W4, everywhere=True)),
    _op("low-rank", Format(), _branches(Format())),
    _op("low-rank-w4a8", W4, _branches(W4)),
    _op("epilogue", Format(), _epilogue_cases()),
    *(
        _op(name, form, _cases(form, everywhere=False, least=least))
        for name, form, least in (
            ("w4a4", Format(4, code_bits=4), 0),
            ("w4a8-g128", Format(4, groups=128), 0),
            ("binary", Format(5, binary=True), 0),
            ("w2a8", Format(2), 1),
            ("w3a8", Format(3), 1),
            ("w6a8", Format(6), 1),
        )
    ),
)
