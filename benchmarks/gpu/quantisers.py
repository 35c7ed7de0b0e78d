"""Ops that read a row and write codes: limited by memory, so held against the measured copy.

Work is the fewest bytes: each value read once, each code written once. Peers are our own reference
as torch.compile and as eager torch run it: the same function, the same results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from benchmarks.gpu import cases, checks, peers
from benchmarks.gpu.cases import Model
from benchmarks.gpu.env import Env, kernel, route
from benchmarks.gpu.names import AUTO
from benchmarks.gpu.peers import Peer
from benchmarks.gpu.trial import Case, Op, Trial, Work
from vdqc.base import hadamard
from vdqc.base.numerics import REDRAWN_NOISE
from vdqc.kernels.base import Cost
from vdqc.kernels.fused_quantize import QuantizeProblem

BF16 = torch.bfloat16
SHAPES = [(1, 3072), (63, 520), (80, 5120), (257, 13824), (33, 16392)]
DRY_SHAPES = [(3, 72)]


@final
@dataclass(frozen=True)
class Form:
    """One fused quantiser.

    Attributes:
        block: order of Hadamard blocks; -1: the whole row, as a Kronecker product.
        wide: rows are as wide as the feed-forward.
    """

    norm: str = "none"
    modulated: bool = False
    activation: str = "none"
    block: int = 0
    bits: int = 8
    packed: bool = False
    asymmetric: bool = False
    residual: bool = False
    smooth: bool = False
    rank: int = 0
    wide: bool = False

    @property
    def op(self) -> str:
        """Name of the kernel."""
        kind = "residual" if self.residual else "fused"
        return f"{kind}_quantize{'_asym' if self.asymmetric else ''}"

    def arguments(self, env: Env, rows: int, width: int) -> tuple[Any, ...]:
        """Random arguments of the op."""
        x = env.normal(1, rows, width)
        head = (x, env.normal(1, rows, width), env.normal(1, 1, width)) if self.residual else (x,)
        scale, shift = (
            (env.normal(1, 1, width) * 0.1, env.normal(1, 1, width))
            if self.modulated
            else (None,) * 2
        )
        block = width if self.block < 0 else self.block
        signs = torch.where(env.normal(width) > 0, 1.0, -1.0) if block else None
        smooth = torch.rand(width, device=env.device) + 0.5 if self.smooth else None
        down = (env.normal(width, self.rank) * width**-0.5).to(BF16) if self.rank else None
        steps = (self.norm, None, None, 1e-6, scale, shift, self.activation, smooth, signs, block)
        return (*head, *steps, down, self.bits, self.packed)

    def cost(self, rows: int, width: int) -> Cost:
        """What lowering predicts with; its bytes are the fewest."""
        block = width if self.block < 0 else self.block
        problem = QuantizeProblem(
            rows, width, BF16, self.bits, self.packed, self.residual, block, self.rank,
            int(self.modulated),
        )  # fmt: skip
        return kernel(self.op).cost(problem)


def compare(form: Form, found: Any, expected: Any) -> None:
    """Results of the op by name; codes may be redrawn where float steps stand before them, and are
    where a rotation rounds its values first: those are compared as values.
    """
    names = ["stream"] if form.residual else []
    names += ["codes", "scale", *(["zero"] if form.asymmetric else []), "row_sum", "low"]
    for name, one, other in zip(names, found, expected, strict=True):
        what = f"{form.op} {name}"
        if form.block and name in ("codes", "scale", "row_sum"):
            continue
        if name == "codes" and form.packed:
            for part in (lambda x: x & 15, lambda x: x >> 4):
                _redrawn(what, _signed4(part(one)), _signed4(part(other)))
        elif name in ("codes", "zero"):
            _redrawn(what, one, other)
        elif name == "row_sum":
            checks.close(what, one.float(), other.float(), 0.05)
        elif one.numel():
            checks.close(what, one, other, 1e-4 if name == "scale" else None)

    if form.block:
        _like_noise(form, found[names.index("codes") :], expected[names.index("codes") :])


def _like_noise(form: Form, found: Any, expected: Any) -> None:
    """Values of the codes apart by no more than two drawings of the quantisation noise are."""
    apart = found[0].float() * found[1] - expected[0].float() * expected[1]
    noise = expected[1].square().mean().sqrt() * 12**-0.5
    if not float(apart.square().mean().sqrt()) < REDRAWN_NOISE * float(noise):
        raise checks.WrongError(f"{form.op}: values differ by more than the quantisation noise")


def _redrawn(what: str, one: Tensor, other: Tensor) -> None:
    checks.nearly_same(what, one, other, share=0.005)


def _signed4(nibble: Tensor) -> Tensor:
    wide = nibble.int()
    return torch.where(wide > 7, wide - 16, wide)


def check(env: Env, forms: tuple[Form, ...]) -> None:
    """Every form at odd sizes against the reference."""
    for form in forms:
        of = kernel(form.op)
        call = route(of, env)
        for rows, width in DRY_SHAPES if env.dry else SHAPES:
            if form.block < 0:
                width = width if hadamard.factors(width) else 384
            elif form.block and width % form.block:
                width = form.block * 3
            given = form.arguments(env, rows, width)
            compare(form, checks.ran_poisoned(call, *given), of.reference(*given))


def trial(env: Env, form: Form, model: Model) -> Trial:
    """One form at the size of one model."""
    rows = env.rows(model.tokens)
    width = env.width(model.ffn if form.wide else model.width)
    of = kernel(form.op)
    call, given = route(of, env), form.arguments(env, rows, width)
    cost = form.cost(rows, width)

    def verify() -> None:
        found = checks.ran_poisoned(call, *given)
        checks.finite(form.op, list(found))
        at = checks.sampled_rows(rows).to(env.device)
        count = 2 if form.residual else 1
        picked = [value[:, at] for value in given[:count]]
        expected = of.reference(*picked, *given[count:])
        compare(form, [value[:, at] for value in found], expected)

    return Trial(
        {AUTO: lambda: call(*given)},
        {
            "torch.compile": Peer(_compiled(env, of.reference, *given), bold=True),
            "eager": Peer(peers.eager(of.reference, *given)),
        },
        Work(cost.bytes, "copy"),
        verify,
        {AUTO: cost},
    )


def _compiled(env: Env, reference: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    return peers.eager(reference, *given) if env.dry else peers.compiled(reference, *given)


def _case(form: Form, name: str, model: Model, rank: int) -> Case:
    return Case(f"{model.name}/{name}", lambda env: trial(env, form, model), rank, name)


PLAIN = Form()
ADALN = Form(norm="layer", modulated=True)
FORMS: dict[str, tuple[Form, int]] = {
    "adaln": (ADALN, 0),
    "plain": (PLAIN, 0),
    "gelu-wide": (Form(activation="gelu_tanh", wide=True), 0),
    "residual-adaln": (Form(norm="layer", modulated=True, residual=True), 1),
    "rms": (Form(norm="rms"), 2),
    "smooth": (Form(smooth=True), 2),
    "adaln-int4": (Form(norm="layer", modulated=True, bits=4, packed=True), 1),
    "asym": (Form(asymmetric=True), 2),
    "adaln-hadamard128": (Form(norm="layer", modulated=True, block=128), 1),
    "hadamard-kronecker": (Form(block=-1), 2),
    "adaln-rank32": (Form(norm="layer", modulated=True, rank=32), 1),
}


# queries and keys ---------------------------------------------------------------------------------


def _rope_arguments(env: Env, model: Model, tokens: int, codes: bool) -> tuple[Any, ...]:
    heads, width = (2 if env.dry else model.heads), model.head_dim
    x = env.normal(1, tokens, heads, width)
    angles = torch.rand(tokens, width // 2, device=env.device) * 6.28
    head = (x, "rms", env.normal(width).abs(), None, 1e-6, angles.cos(), angles.sin(), 0, True)
    return (*head, True, 128) if codes else (*head, 128)


def rope_trial(env: Env, model: Model, codes: bool) -> Trial:
    """QK-norm, rotary embedding and block means; with ``codes`` also int8 of smoothed keys."""
    tokens = env.rows(model.tokens)
    of = kernel("rope_quantize" if codes else "rope")
    call, given = route(of, env), _rope_arguments(env, model, tokens, codes)
    moved = given[0].numel() * ((2 * 2 + 1) if codes else 4)  # smoothing reads twice

    def verify() -> None:
        found, expected = checks.ran_poisoned(call, *given), of.reference(*given)
        if codes:
            checks.nearly_same("codes", found[0], expected[0], 0.01)
        else:
            checks.close("values", found[0], expected[0])
        checks.close("means", found[-1], expected[-1], 1e-3)

    return Trial(
        {AUTO: lambda: call(*given)},
        {
            "torch.compile": Peer(_compiled(env, of.reference, *given), bold=True),
            "eager": Peer(peers.eager(of.reference, *given)),
        },
        Work(float(moved), "copy"),
        verify,
        {},
    )


def check_rope(env: Env) -> None:
    """Both ops at odd numbers of tokens."""
    for codes in (False, True):
        of = kernel("rope_quantize" if codes else "rope")
        call = route(of, env)
        for tokens in (70,) if env.dry else (1, 63, 80, 257):
            given = _rope_arguments(env, cases.HUNYUAN_33K, tokens, codes)
            found, expected = checks.ran_poisoned(call, *given), of.reference(*given)
            if codes:
                checks.nearly_same("codes", found[0], expected[0], 0.01)
            else:
                checks.close("values", found[0], expected[0])


def _rope_case(model: Model, codes: bool, rank: int) -> Case:
    name = "norm-rope-int8" if codes else "norm-rope"
    return Case(f"{model.name}/{name}", lambda env: rope_trial(env, model, codes), rank, name)


OPS: tuple[Op, ...] = (
    Op(
        "quantise",
        lambda env: check(env, tuple(form for form, _ in FORMS.values())),
        tuple(
            _case(form, name, model, min(2, rank + (0 if model is cases.HUNYUAN_33K else 1)))
            for model in (cases.HUNYUAN_33K, cases.WAN_33K, cases.COG_2B, cases.HUNYUAN_119K)
            for name, (form, rank) in FORMS.items()
        ),
    ),
    Op(
        "rope",
        check_rope,
        tuple(
            _rope_case(model, codes, rank)
            for model, rank in ((cases.HUNYUAN_33K, 1), (cases.COG_2B, 2), (cases.HUNYUAN_119K, 2))
            for codes in (True, False)
        ),
    ),
)
