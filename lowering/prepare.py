"""A lowered program made ready to run: kernels that a compiler should fuse are spelled out in torch
ops, and equal blocks become instances of one class.

::

    vdqc_kernels.int8_linear(codes, scale, ...)  ->  int8_matmul (opaque), then scale and bias in
    aten gelu(x, tanh)                                ->  x / (1 + exp2(x (a + b x²))), the same
    function blocks 0 ... 11                              ->  Block0(x, ...) twelve times, one code
    object

The result is an ``nn.Module`` that runs eagerly and under ``torch.compile(fullgraph=True)``; its
parameters are those of the program. ``compile_blocks`` compiles each piece: blocks of one class
share one compilation, so compile time does not grow with depth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from vdqc.base import hadamard
from vdqc.base.target import Target
from vdqc.kernels.base import Kernel
from vdqc.kernels.int8_linear import INT8_LINEAR
from vdqc.kernels.packed_linear import PACKED_LINEAR
from vdqc.kernels.quantize_rows import QUANTIZE_ROWS, QUANTIZE_ROWS_ASYM, QUANTIZE_STATIC
from vdqc.kernels.rotation import ROTATION, rotated
from vdqc.lowering.outline import outline

_FUSED: tuple[Kernel, ...] = (
    QUANTIZE_ROWS,
    QUANTIZE_ROWS_ASYM,
    QUANTIZE_STATIC,
    INT8_LINEAR,
    PACKED_LINEAR,
)
_aten = torch.ops.aten


def prepare(module: fx.GraphModule, target: Target) -> nn.Module:
    """The runnable form of a lowered program; shares its weights, leaves ``module`` as it is."""
    program = fx.GraphModule(module, copy.deepcopy(module.graph))
    _freeze(program)
    spell_kernels(program, target)
    return outline(program)


def compile_blocks(prepared: nn.Module, **options: Any) -> nn.Module:
    """``torch.compile`` every piece of ``prepared`` in place; equal pieces compile once."""
    for child in prepared.children():
        if isinstance(child, fx.GraphModule):
            child.compile(**options)
    return prepared


def spell_kernels(program: fx.GraphModule, target: Target) -> None:
    """Replace every kernel that the target's compiler fuses by its spelled-out form."""
    forms: dict[Any, Callable[..., Any]] = {
        kernel.op: kernel.spelled[target.device]
        for kernel in _FUSED
        if target.device in kernel.spelled
    }
    for node in list(program.graph.nodes):
        if node.target in forms:
            node.target = forms[node.target]
        elif node.target is ROTATION.op and target.device == "cpu":
            _spell_rotation(program, node)
        elif node.target is _aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            node.target, node.kwargs = gelu_tanh, {}
    program.graph.lint()
    program.recompile()


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU, tanh form: ``x / (1 + exp(-2 sqrt(2/pi) (x + 0.044715 x³)))``, float32 inside.

    The same function as torch's, up to rounding (5e-7 absolute). tanh does not vectorise; and exp,
    unlike exp2, is on Inductor's list of ops too heavy to compute twice where a row is read twice,
    as quantising it does (measured with the quantiser, 4096 x 8960: tanh 140 ms, exp2 105, exp 31).
    """
    wide = x if x.dtype == torch.float64 else x.float()
    exponent = wide * (-1.5957691216057308 - 0.07135481627260025 * wide * wide)
    return (wide / (1 + torch.exp(exponent))).to(x.dtype)


def _spell_rotation(program: fx.GraphModule, node: fx.Node) -> None:
    x, signs, block, inverse = node.args
    assert isinstance(x, fx.Node)
    assert isinstance(block, int)
    pair = hadamard.factors(block)
    assert pair is not None, f"no rotation of order {block}"
    dtype = x.meta["val"].dtype
    with program.graph.inserting_before(node):
        left = None if pair[0] == 1 else _matrix(program, pair[0], dtype)
        node.args = (x, signs, left, _matrix(program, pair[1], dtype), inverse)
    node.target = rotated


def _matrix(program: fx.GraphModule, order: int, dtype: torch.dtype) -> fx.Node:
    name = f"hadamard_{order}_{str(dtype).removeprefix('torch.')}"
    if not hasattr(program, name):
        program.register_buffer(name, hadamard.hadamard(order).to(dtype), persistent=False)
    return program.graph.get_attr(name)


def _freeze(program: fx.GraphModule) -> None:
    """Parameters that need no gradient, on the same storage: kernels have no backward."""
    for name, parameter in list(program.named_parameters()):
        owner = program.get_submodule(name.rpartition(".")[0])
        frozen = nn.Parameter(parameter.detach(), requires_grad=False)
        setattr(owner, name.rpartition(".")[2], frozen)
