"""A block as the compiler makes it: captured, quantised, lowered for this machine, compiled.

Beside the block whose kernels are placed by hand it shows what the compiler leaves on the table.
The same weights; attention stays dense.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.gpu import checks
from benchmarks.gpu.block_modules import Float, Stack
from benchmarks.gpu.cases import Model
from benchmarks.gpu.env import Env
from benchmarks.gpu.peers import Call

_NAMES = ("x", "text", "time", "cos", "sin")


class FloatStack(nn.Module):
    """A stack over bf16 torch ops, as a model that can be captured."""

    def __init__(self, net: Stack) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The video tokens."""
        found: Tensor = self.net(Float(), x, text, time, cos, sin)
        return found


def build(env: Env, model: Model, net: Stack, scheme: str, allowed: float) -> Call:
    """One forward of the compiled program; WrongError if it is off by more than ``allowed``."""
    from vdqc.base.diagnostics import Diagnostics
    from vdqc.compiler import complete
    from vdqc.engine.pass_manager import Context, PassManager
    from vdqc.engine.recipe import Recipe
    from vdqc.ir.frontend import capture
    from vdqc.ir.sample import Sample
    from vdqc.lowering.lower import lower
    from vdqc.lowering.prepare import compile_blocks, prepare
    from vdqc.passes.table import PASSES

    module = FloatStack(net).eval()
    small = [replace(model, grid=(frames, 8, 8)) for frames in (2, 3)]
    samples = [Sample(dict(zip(_NAMES, inputs(env, one), strict=True))) for one in small]
    graph = capture(module, samples)
    recipe = complete(Recipe.parse("quant", PASSES, [scheme]))
    context = Context(samples, env.target, rules=recipe.rules)
    PassManager(recipe.passes, probe=False).run(graph, context)
    lower(graph, env.target, Diagnostics())
    given = inputs(env, model)
    bound = graph.signature.bind((), dict(zip(_NAMES, given, strict=True)))
    program = prepare(graph.module, env.target)
    checks.close("lowered", program(*bound)[0], module(*given), allowed)
    if not env.dry:
        compile_blocks(program)
    return lambda: program(*bound)


def inputs(env: Env, model: Model) -> tuple[Tensor, ...]:
    """Arguments of a stack: tokens, text, time, and the angles of the rotary embedding."""
    text = model.text or (24 if env.dry else 512)
    angles = torch.rand(model.tokens, model.head_dim // 2, device=env.device) * 6.28
    return (
        env.normal(1, model.tokens, model.width),
        env.normal(1, text, model.width),
        env.normal(1, 6, model.width) * 0.1,
        angles.cos(),
        angles.sin(),
    )
