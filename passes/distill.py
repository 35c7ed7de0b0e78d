"""Trains what passes left free, block by block, so that the compressed model follows the float one.

::

    smooth{learn=true},quant{clip=learned},distill
    min over @smooth, @weight_clip, @input_clip of one block:  loss(block(x), float block(x))

The float model is the graph as it was before the first lossy pass; what passes left free are
scales, clips, rotations, steps, branches. Parameters settle when it is done, so that ``fold`` makes
plain weights of them. A model without repeated blocks is trained as one block, with a remark.

Under ``torchrun`` the samples are split over the workers. With ``checkpoint`` a run that was killed
trains no finished block again.

Source: Li et al., BRECQ, arXiv 2102.05426, section 3.3; Sun et al., FlatQuant, arXiv 2410.09426,
section 3.4; Feng et al., QuantVGGT, arXiv 2509.21302, appendix; Feng et al., S2Q-VDiT, arXiv
2508.04016 (rates, 15 epochs, batch 1).
Invariant: no block ends with a larger loss than it started with, on the samples; the graph's nodes
stay as they are, only parameters change.
Online: nothing; learned transforms cost what the passes that inserted them say.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, final

from vdqc.base.diagnostics import ConfigError, InputError
from vdqc.base.options import check_seed
from vdqc.engine import losses
from vdqc.engine.block_cache import parse_bytes
from vdqc.engine.block_loss import misfit
from vdqc.engine.block_trainer import Schedule
from vdqc.engine.pass_manager import Context, Pass, PassResult
from vdqc.engine.reconstruct import Training, reconstruct
from vdqc.ir.graph import Graph, Stage


class Mode(enum.StrEnum):
    """What is trained at once."""

    BLOCKS = "blocks"
    MODEL = "model"


class Inputs(enum.StrEnum):
    """What a block is trained on."""

    FLOAT = "float"
    QUANTISED = "quantised"


@final
@dataclass(frozen=True)
class Distill(Pass):
    """Trains the free parameters.

    Attributes:
        loss: terms and weights, as ``block+msad(global=1e-4;local=1e-4)``; see ``engine/losses``.
        mode: ``blocks`` one after the other, or the whole ``model`` by its output.
        inputs: of a block: those of the ``float`` model, or what the ``quantised`` blocks before
            it make.
        epochs: passes over the samples.
        batch: samples a step; workers share it.
        rate: of transforms.
        clip_rate: of clips and steps.
        branch_rate: of low-rank branches.
        rounding_rate: of learned rounding.
        decay: weight decay.
        check: epochs between evaluations, among which the best state is chosen.
        patience: evaluations without improvement after which a block is done; 0 for never.
        memory: cached values beyond this go to disk.
        checkpoint: folder for finished blocks, to go on from after a kill; empty for none.
        seed: of the order of samples.
    """

    loss: str = "block"
    mode: Mode = Mode.BLOCKS
    inputs: Inputs = Inputs.FLOAT
    epochs: int = 15
    batch: int = 1
    rate: float = 5e-3
    clip_rate: float = 5e-2
    branch_rate: float = 1e-4
    rounding_rate: float = 1e-2
    decay: float = 0.0
    check: int = 3
    patience: int = 2
    memory: str = "2GiB"
    checkpoint: str = ""
    seed: int = 0

    name: ClassVar[str] = "distill"
    at: ClassVar[frozenset[Stage]] = frozenset({Stage.COMPRESSED})
    exact: ClassVar[bool] = False
    wants_teacher: ClassVar[bool] = True
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_seed(self.seed, "distill.seed")
        losses.parse(self.loss)
        parse_bytes(self.memory, "distill.memory")
        for option, least in (("epochs", 1), ("batch", 1), ("check", 1), ("patience", 0)):
            value = getattr(self, option)
            if value < least:
                raise ConfigError(f"distill.{option}: expected at least {least}, got {value}")
        for option in ("rate", "clip_rate", "branch_rate", "rounding_rate", "decay"):
            value = getattr(self, option)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"distill.{option}: expected a number from 0, got {value}")

    def refusal(self, graph: Graph, ctx: Context) -> InputError | None:
        """A loss term that no block can use."""
        return misfit(losses.parse(self.loss), graph, ctx, self.mode is Mode.MODEL)

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        """Train and settle; facts: per block the loss before and after, epochs, seconds."""
        if not graph.free:
            ctx.diagnostics.warning(
                "",
                "nothing-free",
                "no pass left anything to train",
                "ask for it: smooth{learn=true}, rotate{learn=true}, quant{clip=learned}",
            )
            return PassResult(0)
        results = reconstruct(graph, ctx, self.training(ctx))
        settle(graph)
        blocks: dict[str, Any] = {result.name: result.to_json() for result in results}
        return PassResult(len(results), {"loss": self.loss, "blocks": blocks})

    def forwards(self) -> float:
        """Every epoch forward and back, evaluations, and what both models' blocks read."""
        return 3.0 * self.epochs + self.epochs / self.check + 2.0

    def training(self, ctx: Context) -> Training:
        """The options as the engine takes them."""
        schedule = Schedule(
            epochs=self.epochs,
            batch=self.batch,
            rate=self.rate,
            clip_rate=self.clip_rate,
            branch_rate=self.branch_rate,
            rounding_rate=self.rounding_rate,
            decay=self.decay,
            check=self.check,
            patience=self.patience,
            seed=self.seed + ctx.seed,
        )
        return Training(
            losses.parse(self.loss),
            schedule,
            # where values are kept does not decide what comes out
            text=str(replace(self, checkpoint="", memory=Distill.memory)),
            whole_model=self.mode is Mode.MODEL,
            quantised_inputs=self.inputs is Inputs.QUANTISED,
            memory=parse_bytes(self.memory, "distill.memory"),
            checkpoint=Path(self.checkpoint) if self.checkpoint else None,
        )


def settle(graph: Graph) -> None:
    """Nothing is free any more: parameters keep the values that they have."""
    for name in sorted(graph.free):
        graph.set_param(name, graph.param(name).detach())
