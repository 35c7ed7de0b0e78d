"""Whole blocks and whole stacks of blocks: time of a forward against bf16, and peak memory.

``block`` is a twentieth of HunyuanVideo (one double and two single blocks) or one block of Wan;
``model`` is all of them. Ours and the peers have the same weights before quantisation. The variant
``w8a8 15 %, 20 % dense steps`` is what a sampler with 20 % dense steps pays on average; it is
computed from the two it names. ``w8a8 dense, lowered`` is the compiler's own program. The bf16
peers use cuDNN attention, compiled by torch.compile and as torch runs them.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import block_modules, cases, checks, lowered
from benchmarks.gpu.block_modules import Engine, Float, Quantised, Stack
from benchmarks.gpu.cases import Model
from benchmarks.gpu.env import Env
from benchmarks.gpu.names import EVERY
from benchmarks.gpu.peers import Call, Peer
from benchmarks.gpu.trial import Case, Op, Trial, Work

COMPILED, EAGER = "bf16 compiled", "bf16 eager"
#: Relative error of a block in W8A8 and W4A8 (rounded to nearest, no smoothing) against bf16.
ALLOWED = {8: 0.05, 4: 0.35}
TINY = Model("hunyuan-tiny", 128, 2, 256, 3, (2, 8, 16), 24)
TINY_WAN = Model("wan-tiny", 128, 2, 256, 1, (2, 8, 16))


def _cudnn(env: Env) -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return nullcontext() if env.dry else sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def _call(env: Env, net: Stack, engine: Engine, given: tuple[Tensor, ...], fast: bool) -> Call:
    """One forward; ``fast``: every block compiled on its own, on the same weights."""
    if fast and not env.dry:
        net = Stack([copy.copy(part) for part in net.parts])  # compiling marks the module
        for part in net.parts:
            part.compile(dynamic=False)

    def call() -> Any:
        with _cudnn(env):
            return net(engine, *given)

    return call


def trial(env: Env, model: Model, share: float, lean: bool = False) -> Trial:
    """bf16, W8A8 and W4A8 with the same weights; dense, 25 % and 15 % attention.

    ``lean``: one variant and one peer, for a model whose forward takes tens of seconds.
    """
    if env.dry:
        model, share = (TINY if model.name.startswith("hunyuan") else TINY_WAN), 1.0
    seed = int(torch.randint(1 << 30, ()))
    given = lowered.inputs(env, model)
    widths = (16, 8) if lean else (16, 8, 4)
    nets = {bits: block_modules.stack(model, share, bits, env.device, seed) for bits in widths}
    plain = _call(env, nets[16], Float(), given, fast=False)
    ours: dict[str, Call] = {}
    resident = {f"peer {name}": nets[16].weight_bytes() for name in (COMPILED, EAGER)}
    for bits in widths[1:]:
        for density in (0.15,) if lean else (0.15, 0.25, 1.0):
            name = f"w{bits}a8 {'dense' if density == 1 else f'{round(100 * density)} %'}"
            ours[name] = _call(env, nets[bits], Quantised(density), given, fast=True)
            resident[name] = nets[bits].weight_bytes()

    def verify() -> None:
        if lean:  # its blocks were compared at this size
            return checks.finite(model.name, [next(iter(ours.values()))()])
        expected = plain()
        for bits in widths[1:]:
            found = _call(env, nets[bits], Quantised(), given, fast=False)()
            # a stack adds up the noise of its blocks
            allowed = ALLOWED[bits] * len(nets[bits].parts) ** 0.5
            checks.close(f"w{bits}a8", found, expected, allowed)
        return None

    found = {COMPILED: Peer(lambda: _call(env, nets[16], Float(), given, True), EVERY, bold=True)}
    if not lean:
        found[EAGER] = Peer(lambda: plain, EVERY)
    derived = {
        f"w{bits}a8 15 %, 20 % dense steps": {f"w{bits}a8 dense": 0.2, f"w{bits}a8 15 %": 0.8}
        for bits in widths[1:]
        if not lean
    }
    extra = {}
    if share < 1 or env.dry:
        allowed = ALLOWED[8] * len(nets[16].parts) ** 0.5

        def compiled() -> Call:
            return lowered.build(env, model, nets[16], "w8a8", allowed)

        extra["w8a8 dense, lowered"] = Peer(compiled, bold=True, costly=True)
    work = Work(_operations(model, len(nets[16].parts)), "bf16")
    return Trial(ours, found, work, verify, derived=derived, resident=resident, extra=extra)


def _operations(model: Model, count: int) -> float:
    """Of dense bf16: linears and attention."""
    tokens, d = model.tokens + model.text, model.width
    linears = (4 * d * d + 2 * d * model.ffn) + (0 if model.text else 2 * d * d)
    return count * (2.0 * tokens * linears + 4.0 * tokens * tokens * d)


def check(env: Env) -> None:
    """Both architectures at a tiny width against bf16, dense."""
    if env.dry:
        return  # each case of a dry run is as tiny
    for model in (TINY, TINY_WAN):
        given = lowered.inputs(env, model)
        nets = {bits: block_modules.stack(model, 1, bits, env.device, 1) for bits in (16, 8)}
        expected = _call(env, nets[16], Float(), given, fast=False)()
        found = checks.ran_poisoned(_call(env, nets[8], Quantised(), given, fast=False))
        checks.close(model.name, found, expected, 0.1)


def _case(model: Model, whole: bool, rank: int, lean: bool = False) -> Case:
    share = 1.0 if whole else (1 / 20 if model.name.startswith("hunyuan") else 1 / model.layers)
    key = model.name.partition("-")[0]
    name = f"{model.name}/{'model' if whole else 'block'}"
    return Case(name, lambda env: trial(env, model, share, lean), rank, key)


OPS: tuple[Op, ...] = (
    Op(
        "blocks",
        check,
        (
            _case(cases.HUNYUAN_33K, False, 0),
            _case(cases.WAN_33K, False, 0),
            _case(cases.HUNYUAN_119K, False, 1),
            _case(cases.WAN_76K, False, 2),
            _case(cases.HUNYUAN_33K, True, 2),
            _case(cases.WAN_33K, True, 2),
            _case(cases.HUNYUAN_119K, True, 2, lean=True),
        ),
        280.0,
    ),
)
