"""Loss terms: what block-wise training minimises, by name.

::

    terms = parse("block+msad{global=1e-4,local=1e-4}+100*tmd")
    loss, parts = total(terms, ctx)

A term is a frozen dataclass (its fields are its options) that turns a ``LossContext`` into one
number. The teacher is the float block, the student the quantised one; all KL terms are
teacher-first and in natural logarithms. Weight ``auto`` makes a term as large as the first one at
the first call. Inside braces of a pass, where braces cannot nest, ``msad(global=1e-4;local=1e-4)``
is the same text.

Error: a term that is NaN or infinite raises InputError [loss-not-finite] with block and term; one
that a block cannot give what it needs raises InputError [loss-misfit], see ``LossTerm.misfit``.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from torch import Tensor

from vdqc.base.diagnostics import ConfigError, InputError, nearest
from vdqc.engine.frames import FrameMap
from vdqc.engine.recipe import convert

#: Term name to ``module:Class``; loaded when asked for.
LOSSES: Mapping[str, str] = {
    "block": "vdqc.engine.losses.block:BlockError",
    "msad": "vdqc.engine.losses.attention:AttentionDistillation",
    "std": "vdqc.engine.losses.tokens:TokenDistillation",
    "tmd": "vdqc.engine.losses.relation:FrameRelation",
    "trd": "vdqc.engine.losses.smoothed:SmoothedRelation",
    "mtrd": "vdqc.engine.losses.memory:MemoryRelation",
}

#: A number, or ``auto``: as large as the first term at the first call.
Weight = float | str
AUTO = "auto"


@final
@dataclass(frozen=True)
class AttentionSite:
    """What a term must know of an attention site besides what was tapped there.

    Attributes:
        scale: factor of the logits; None for 1 / sqrt(D).
        cross: True if key and value come from other tokens than the query.
        extent: ``video``, ``frame``, ``time`` or ``other``, as ``annotate`` notes it: whether the
            batch axis holds frames (``frame``) or positions (``time``) besides samples.
        frames: frame of each query token, None where unknown.
    """

    scale: float | None = None
    cross: bool = False
    extent: str = "other"
    frames: FrameMap | None = None


@final
@dataclass(frozen=True)
class LossContext:
    """One call of one block by teacher and student.

    Attributes:
        block: its name.
        sample: index of the sample.
        timestep: of the sample, if it names one.
        fp_out, q_out: the block's main output, float and quantised: [B, T, C], [B, C, H, W] or
            [B, C, F, H, W].
        fp_taps, q_taps: what was tapped, by ``tap(site, kind)``.
        frames: frame of each output token, None where unknown or where the output has a frame axis.
        state: flat name to tensor, what terms remember between calls; the trainer gives each lane
            of each block a dictionary of its own.
        weights: flat name to what ``auto`` found, the same for all lanes of a block.
        attention: the block's attention sites by name.
        fp_rest, q_rest: further outputs (a text stream), in order.
        trajectory, step, branch: where the sample comes from, if it was recorded from a sampler.
    """

    block: str
    sample: int
    timestep: float | None
    fp_out: Tensor
    q_out: Tensor
    fp_taps: Mapping[str, Tensor] = field(default_factory=dict)
    q_taps: Mapping[str, Tensor] = field(default_factory=dict)
    frames: FrameMap | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    attention: Mapping[str, AttentionSite] = field(default_factory=dict)
    fp_rest: tuple[Tensor, ...] = ()
    q_rest: tuple[Tensor, ...] = ()
    trajectory: int | None = None
    step: int | None = None
    branch: int = 0


def tap(site: str, kind: str) -> str:
    """Key of a tap: ``query`` and ``key`` [B, H, L, D] and ``mask``, as they enter self-attention.

    A site without a mask has no tap for it, one of cross-attention none at all.
    """
    return f"{site}/{kind}"


class LossTerm(abc.ABC):
    """Base of every term; subclasses are ``@final @dataclass(frozen=True)``.

    ``taps`` are the kinds it needs at every self-attention of the block. ``level``: ``block`` for
    every block, ``last`` for the last block only, ``model`` for end-to-end training only.
    ``ordered`` asks for the samples of a trajectory one after the other; the value of a term that
    ``remembers`` depends on the calls before.
    """

    name: ClassVar[str]
    taps: ClassVar[tuple[str, ...]] = ()
    ordered: ClassVar[bool] = False
    remembers: ClassVar[bool] = False

    @property
    def level(self) -> str:
        """Where it applies."""
        return "block"

    @abc.abstractmethod
    def __call__(self, ctx: LossContext) -> Tensor:
        """The term as a 0-d tensor, differentiable in what the student made."""

    def misfit(
        self, attention: Mapping[str, AttentionSite], frames: FrameMap | None, out: Tensor
    ) -> str:
        """Why a block cannot give what this term needs, or "" if it can.

        The trainer asks before it trains a block, says so in a remark and leaves the term out
        there; a term that fits no block is an error.
        """
        return ""

    def __str__(self) -> str:
        """``name{option=value,...}`` with the options that differ from their defaults."""
        options = [
            f"{f.name.rstrip('_')}={_text(getattr(self, f.name))}"
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(options)}}}" if options else "")

    def key(self, ctx: LossContext, *parts: object) -> str:
        """A name in ``ctx.state`` of this term's own, options included."""
        return "|".join(map(str, (self, ctx.block, *parts)))

    def require_fit(self, ctx: LossContext) -> None:
        """Raise InputError with the reason if the block does not fit."""
        reason = self.misfit(ctx.attention, ctx.frames, ctx.fp_out)
        if reason:
            raise InputError(f"loss term '{self}': {reason}", code="loss-misfit", site=ctx.block)


Terms = Sequence[tuple[Weight, LossTerm]]


def total(terms: Terms, ctx: LossContext) -> tuple[Tensor, dict[str, float]]:
    """The weighted sum, and the unweighted value of each term by its text.

    Raises InputError naming block and term where one is not finite.
    """
    loss: Tensor | None = None
    first = 0.0
    parts: dict[str, float] = {}
    for weight, term in terms:
        value = term(ctx)
        size = parts[str(term)] = float(value.detach())
        if not math.isfinite(size):
            raise InputError(
                f"loss term '{term}' is {size} at sample {ctx.sample}, timestep {ctx.timestep}",
                blame(ctx),
                code="loss-not-finite",
                site=ctx.block,
            )
        if loss is None:
            first = abs(float(weight) * size)
        weighted = value * (
            auto_weight(term, ctx, size, first) if weight == AUTO else float(weight)
        )
        loss = weighted if loss is None else loss + weighted
    assert loss is not None, "parse gives at least one term"
    if not bool(loss.detach().isfinite()):
        raise InputError(
            f"the weighted sum of the loss terms is {float(loss.detach())} at sample "
            f"{ctx.sample}, timestep {ctx.timestep}: {parts}",
            "each of them is finite: a weight is too large for their dtype",
            code="loss-not-finite",
            site=ctx.block,
        )
    return loss, parts


def auto_weight(
    term: LossTerm, ctx: LossContext, size: float, reference: float, part: str = ""
) -> float:
    """What makes the first ``size`` of ``term`` that is not zero as large as ``reference``.

    Kept from then on; 1 until both are above zero.
    """
    key = term.key(ctx, part)
    if key not in ctx.weights:
        if not (abs(size) > 0 and reference > 0):
            return 1.0
        ctx.weights[key] = reference / abs(size)
    return ctx.weights[key]


def blame(ctx: LossContext) -> str:
    """Which of the tensors behind a term holds NaN or infinity."""
    named = {
        "the float block's output": ctx.fp_out,
        **{f"the float {name}": value for name, value in ctx.fp_taps.items()},
        **{f"the float block's output {i}": v for i, v in enumerate(ctx.fp_rest, 1)},
        "the quantised block's output": ctx.q_out,
        **{f"the quantised block's output {i}": v for i, v in enumerate(ctx.q_rest, 1)},
        **{f"the quantised {name}": value for name, value in ctx.q_taps.items()},
    }
    for name, value in named.items():
        if name.endswith("/mask"):
            continue  # -inf is how masks say "never"
        bad = int((~value.isfinite()).sum())
        if bad:
            return f"{name} holds NaN or infinity in {bad} of {value.numel()} places"
    return "every tensor behind it is finite: the term itself overflows in this dtype"


_ITEM = re.compile(
    r"\s*(?:(?P<weight>[\w.]+(?:e[+-]?\d+)?)\s*\*\s*)?(?P<name>[A-Za-z_]\w*)\s*"
    r"(?:\{(?P<braces>[^{}]*)\}|\((?P<parentheses>[^()]*)\))?\s*(?P<end>\+|$)"
)


def parse(text: str) -> list[tuple[Weight, LossTerm]]:
    """``block+msad{global=1e-4}+100*tmd`` to weights and terms; raises ConfigError."""
    terms: list[tuple[Weight, LossTerm]] = []
    position, more = 0, True
    while more:
        match = _ITEM.match(text, position)
        if match is None:
            raise ConfigError(
                f"cannot read the loss at '{text[position:]}'",
                "expected e.g. block+msad{global=1e-4,local=1e-4}+100*tmd",
            )
        options = match["braces"] or (match["parentheses"] or "").replace(";", ",")
        terms.append((_weight(match["weight"] or "1"), make_term(match["name"], options)))
        position, more = match.end(), bool(match["end"])
    if terms[0][0] == AUTO:
        raise ConfigError(
            "the first loss term sets the scale for 'auto'", "give the first one a number"
        )
    texts = [str(term) for _, term in terms]
    if len(set(texts)) != len(texts):
        raise ConfigError(f"a loss term is given twice in '{text}'", "give one a larger weight")
    return terms


def make_term(name: str, options: str = "") -> LossTerm:
    """A term from its name and ``option=value,...``; raises ConfigError with the nearest word."""
    if name not in LOSSES:
        raise ConfigError(f"unknown loss term '{name}'", nearest(name, LOSSES), code="unknown-loss")
    module, _, attribute = LOSSES[name].partition(":")
    cls: type[LossTerm] = getattr(importlib.import_module(module), attribute)
    hints = typing.get_type_hints(cls)
    fields = {f.name.rstrip("_"): f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in options.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or key not in fields:
            raise ConfigError(
                f"loss term '{name}' has no option '{key}'",
                nearest(key, fields) if fields else "it has no options",
                code="unknown-option",
            )
        values[fields[key]] = convert(value, hints[fields[key]], f"{name}.{key}")
    return cls(**values)


def loss_text(terms: Terms) -> str:
    """The text that ``parse`` reads back."""
    texts = [(str(weight).removesuffix(".0"), term) for weight, term in terms]
    return "+".join(f"{term}" if weight == "1" else f"{weight}*{term}" for weight, term in texts)


def _weight(text: str) -> Weight:
    if text == AUTO:
        return AUTO
    try:
        weight = float(text)
    except ValueError as error:
        raise ConfigError(f"expected a number or auto as a weight, got '{text}'") from error
    if not math.isfinite(weight) or weight < 0:
        raise ConfigError(f"expected a weight of at least 0, got {weight:g}")
    return weight


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"
