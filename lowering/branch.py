"""The branch beside a linear, as its kernel takes it in, and what both of them store.

::

    %h = aten.linear(%x, @down)              (perhaps times a gain for each frame)
    %b = aten.linear(%h, @up)
    %y = aten.add(%linear, %b)
    -->
    %y = vdqc_kernels.int8_linear(..., down=%h, up=@up)

The narrow product and its gain stay ordinary ops; the wide one and the sum are the kernel's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import fx

from vdqc.base.target import Target

_aten = torch.ops.aten

#: What puts rows of several widths together again.
_JOINS = {_aten.cat.default, _aten.index_select.default}

#: Ranks that the epilogue of a GPU kernel takes; others stay beside it.
GPU_RANKS = (1, 16, 32)


@final
@dataclass(frozen=True)
class BranchNodes:
    """A branch in the graph: the input through its first factor, its second factor, the sum.

    ``direct``: the sum reads the linear itself.
    """

    narrow: fx.Node
    up: fx.Node
    total: fx.Node
    direct: bool

    def fits(self, target: Target) -> bool:
        """True if the kernels of ``target`` can take it in."""
        has_room = target.device == "cpu" or self.up.meta["val"].shape[1] in GPU_RANKS
        return self.direct and has_room


def branch_of(node: fx.Node) -> BranchNodes | None:
    """The branch that is added to ``node``, if nothing but that sum reads it.

    Where rows have several widths, it is added to all of them together (not ``direct``), and
    belongs to the first.
    """
    value, direct = node, True
    while len(value.users) == 1 and (user := next(iter(value.users))).target in _JOINS:
        if user.target is _aten.cat.default and user.all_input_nodes[0] is not value:
            return None
        value, direct = user, False
    if len(value.users) != 1:
        return None
    total = next(iter(value.users))
    if total.target is not _aten.add.Tensor or total.kwargs or total.args[0] is not value:
        return None
    product: Any = total.args[1]
    is_wide = isinstance(product, fx.Node) and product.target is _aten.linear.default
    if not is_wide or len(product.args) != 2 or len(product.users) != 1:
        return None
    narrow, up = product.args
    if not isinstance(up, fx.Node) or up.op != "get_attr" or not product < node:
        return None
    return BranchNodes(narrow, up, total, direct)


def stored_bytes(weight: Iterable[fx.Node | None], branch: BranchNodes | None) -> int:
    """Bytes of the packed parameters of a linear and of its branch."""
    nodes = {node for node in weight if node is not None}
    if branch is not None:
        nodes.add(branch.up)
        waiting = [branch.narrow]
        while waiting:  # back to the first factor, past a gain
            node = waiting.pop()
            is_factor = node.target is _aten.linear.default
            operands = node.all_input_nodes[1:2] if is_factor else node.all_input_nodes
            nodes.update(operand for operand in operands if operand.op == "get_attr")
            if not is_factor and node.op == "call_function":
                waiting.extend(node.all_input_nodes)
    return sum(int(n.meta["val"].numel()) * n.meta["val"].dtype.itemsize for n in nodes)
