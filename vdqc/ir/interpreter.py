"""Running a program whose weights are on disk, or whose values are observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import fx

from vdqc.ir.weights import StoredTensor


@final
class Interpreter(fx.Interpreter):
    """Runs node by node, reading stored weights when they are used and freeing dead values."""

    def __init__(
        self,
        module: fx.GraphModule,
        stored: Mapping[str, StoredTensor],
        observe: Callable[[fx.Node, Any], None] | None,
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._stored = stored
        self._observe = observe

    def run_node(self, n: fx.Node) -> Any:
        """The value of one node."""
        if n.op == "get_attr" and n.target in self._stored:
            return None  # read where it is used
        stored = [a for a in n.all_input_nodes if a.op == "get_attr" and a.target in self._stored]
        for operand in stored:
            self.env[operand] = self._stored[str(operand.target)].read()
        value = super().run_node(n)
        for operand in stored:
            self.env[operand] = None
        if self._observe is not None:
            self._observe(n, value)
        return value
