"""Fusion on GPUs: what stands behind a GEMM moves into its kernel, as its epilogue.

::

    %y = vdqc_kernels.int8_linear(...)
    %s = aten.add(%x, aten.mul(%y, %gate))            ->  int8_linear(..., gate=%gate, residual=%x)
    %g = aten.gelu(%y, approximate='tanh')            ->  int8_linear(..., activation='gelu_tanh')

Only values that nothing else reads are taken in.

Source: traffic: the sum or activation is written once, and the product of the GEMM never.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from vdqc.ir.graph import Graph
from vdqc.lowering.operands import (
    DTYPE_AT,
    LINEARS,
    before_casts,
    is_cast,
    is_gelu_tanh,
    only_user,
    other_operand,
    past_casts,
    same_shape,
    spreads,
    widens,
)

A = torch.ops.aten
#: Operands that come before the activation: an epilogue may follow them.
_BEFORE_EPILOGUE = {"row_sum", "down", "up", "code_bits"}


def fuse_epilogues(graph: Graph) -> int:
    """Fuse in place; how many epilogues moved into a linear's kernel."""
    return sum(_fuse_epilogue(graph, n) for n in graph.nodes if n.target in LINEARS)


def _fuse_epilogue(graph: Graph, linear: fx.Node) -> bool:
    """Take in an activation, or a gate and a residual, or a residual alone."""
    given = [*linear.args[DTYPE_AT[linear.target] + 1 :], *linear.kwargs]  # type: ignore[index]
    if any(value is not None and value not in _BEFORE_EPILOGUE for value in given):
        return False  # it ends in something already, as the sums of binary planes
    end = past_casts(linear)
    user = only_user(end)
    if user is None:
        return False
    if is_gelu_tanh(user):
        return _finish(graph, linear, user, activation="gelu_tanh")
    gate = None
    if user.target is A.mul.Tensor:
        gate = before_casts(other_operand(user, end))
        end = past_casts(user)
        user = only_user(end)
    if user is None or user.target is not A.add.Tensor or user.kwargs:
        return False
    residual = before_casts(other_operand(user, end))
    if not same_shape(residual, user) or (gate is not None and not spreads(gate, user)):
        return False
    return _finish(graph, linear, user, gate=gate, residual=residual)


def _finish(graph: Graph, linear: fx.Node, last: fx.Node, **epilogue: Any) -> bool:
    """Replace ``last`` by the linear with an epilogue, in the dtype that leaves the chain."""
    cast = only_user(last)
    if cast is not None and is_cast(cast) and not widens(cast):
        last = cast
    args = list(linear.args)
    args[DTYPE_AT[linear.target]] = last.meta["val"].dtype  # type: ignore[index]
    given = {key: value for key, value in epilogue.items() if value is not None}
    fused = graph.call(linear.target, *args, before=last, **linear.kwargs, **given)
    for key in ("nn_module_stack", "stack_trace"):
        if key in linear.meta:
            fused.meta[key] = linear.meta[key]
    graph.replace(last, fused)
    fused.meta["custom"] = linear.meta.get("custom", {})
    graph.module.graph.eliminate_dead_code()
    return True
