"""One program with comparisons cut into two: one that refreshes residuals, one that reuses them.

::

    %o = vdqc_kernels.compare(%dense, %sparse, 'residual{...}')

    refresh:  %o = %dense                      outputs: those of the program, dense - sparse ...
    reuse:    %o = %sparse + %residual         inputs: those of the program, residual ...

Both share the program's weights, and neither has a part that it does not use. The residual joins
the epilogue of the last kernel of ``%sparse``. What is one more input depends on the store: the
residual, its codes and scales, its two factors, or the residual in the host's memory.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import fx

from vdqc.base.diagnostics import LoweringError
from vdqc.base.residual import CachePolicy, Store
from vdqc.kernels.compare import COMPARE
from vdqc.kernels.sparse_attention import SPARSE_ATTENTION
from vdqc.kernels.token_order import TOKEN_ORDER

_aten = torch.ops.aten
#: Where the kernels that can end sparse attention take the residual; its scale is the next operand.
_EPILOGUE = {SPARSE_ATTENTION.op: 9, TOKEN_ORDER.op: 3}


@final
@dataclass(frozen=True)
class Programs:
    """The two programs, how many attentions they compare, and the policy of all of them."""

    refresh: fx.GraphModule
    reuse: fx.GraphModule
    count: int
    policy: CachePolicy


def has_residuals(program: fx.GraphModule) -> bool:
    """True if ``program`` holds a comparison."""
    return any(node.target is COMPARE.op for node in program.graph.nodes)


def split(program: fx.GraphModule, device: torch.device) -> Programs:
    """The two programs of ``program``, which stays as it is; ``device`` is where they run."""
    found = _comparisons(program.graph)
    texts = {str(node.args[2]) for node in found}
    if len(texts) != 1:
        raise LoweringError(f"expected one cache policy in a program, got {sorted(texts)}")
    policy = CachePolicy.parse(texts.pop())
    return Programs(_refresh(program), _reuse(program, policy, device), len(found), policy)


def _refresh(program: fx.GraphModule) -> fx.GraphModule:
    twin = _twin(program)
    residuals = []
    for node in _comparisons(twin.graph):
        dense, sparse = node.args[0], node.args[1]
        assert isinstance(dense, fx.Node)
        residual = _insert(twin.graph, node, _aten.sub.Tensor, dense, sparse)
        residual.meta = {**node.meta, "val": dense.meta["val"]}
        residuals.append(residual)
        node.replace_all_uses_with(dense)
        twin.graph.erase_node(node)
    output = next(iter(reversed(twin.graph.nodes)))
    outputs: Any = output.args[0]
    output.args = ((*outputs, *residuals),)
    return _finished(twin)


def _reuse(program: fx.GraphModule, policy: CachePolicy, device: torch.device) -> fx.GraphModule:
    twin = _twin(program)
    last = [node for node in twin.graph.nodes if node.op == "placeholder"][-1]
    for index, node in enumerate(_comparisons(twin.graph)):
        dense, sparse = node.args[:2]
        assert isinstance(dense, fx.Node)
        assert isinstance(sparse, fx.Node)
        at = _EPILOGUE.get(cast(Any, sparse.target))
        if at is None:
            raise LoweringError(f"{sparse.target} takes no residual (%{sparse.name})")
        given = []
        for name, value in _inputs(policy, sparse.meta["val"]).items():
            with twin.graph.inserting_after(last):
                last = twin.graph.placeholder(f"residual_{index}_{name}")
            last.meta["val"] = value
            given.append(last)
        parts = _operands(twin.graph, sparse, policy, given, device)
        for offset, part in enumerate(parts):
            sparse.update_arg(at + offset, part)
        node.replace_all_uses_with(sparse)
        twin.graph.erase_node(node)
        if not dense.users:  # by hand: torch counts attention as random, which is never dead
            twin.graph.erase_node(dense)
    return _finished(twin)


def _inputs(policy: CachePolicy, value: Any) -> dict[str, Any]:
    """Names and fake values of the inputs that one residual becomes."""
    shape = list(value.shape)
    match policy.store:
        case Store.INT8:
            scale = value.new_empty([*shape[:-1], 1], dtype=torch.float32)
            return {"codes": value.new_empty(shape, dtype=torch.int8), "scale": scale}
        case Store.LOWRANK:
            rank = min(policy.rank, int(shape[-1])) * (2 if policy.second else 1)
            left, right = [*shape[:-1], rank], [*shape[:-2], rank, shape[-1]]
            return {"left": value.new_empty(left), "right": value.new_empty(right)}
    return {"value": value}


def _operands(
    graph: fx.Graph, sparse: fx.Node, policy: CachePolicy, given: list[fx.Node], device: Any
) -> list[fx.Node]:
    """Residual and scale for the epilogue, made right where they are used."""
    match policy.store:
        case Store.LOWRANK:
            made = _insert(graph, sparse, _aten.matmul.default, *given)
        case Store.HOST:
            made = _insert(graph, sparse, _aten._to_copy.default, given[0], device=device)
        case _:
            return given
    made.meta = {**sparse.meta, "val": sparse.meta["val"]}
    return [made]


def _twin(program: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(program, copy.deepcopy(program.graph, _shared(program.graph)))


def _shared(graph: fx.Graph) -> dict[int, Any]:
    """A deepcopy memo under which the nodes' metadata is shared, not copied."""
    return {id(value): value for node in graph.nodes for value in node.meta.values()}


def _comparisons(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is COMPARE.op]


def _insert(graph: fx.Graph, before: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
    with graph.inserting_before(before):
        return graph.call_function(op, args, kwargs)


def _finished(twin: fx.GraphModule) -> fx.GraphModule:
    twin.graph.eliminate_dead_code()
    twin.graph.lint()
    twin.recompile()
    return twin
