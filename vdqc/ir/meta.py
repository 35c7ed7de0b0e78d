"""Capture without memory: everything on the meta device, and the program moved off it after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree


def to_meta(value: Any) -> Any:
    """``value`` with every tensor on the meta device."""
    return pytree.tree_map(
        lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, value
    )


@contextmanager
def tensors_on_meta(model: nn.Module) -> Iterator[None]:
    """Every tensor of ``model`` without its data; the tensors themselves are put back after."""
    tables: list[Any] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    before = [dict(table) for table in tables]
    twins: dict[int, Any] = {}  # a tied weight stays one tensor

    def twin(value: Tensor) -> Any:
        if id(value) not in twins:
            meta = value.detach().to("meta")
            is_parameter = isinstance(value, nn.Parameter)
            twins[id(value)] = nn.Parameter(meta, value.requires_grad) if is_parameter else meta
        return twins[id(value)]

    try:
        for table in tables:
            for name, value in table.items():
                if value is not None and not value.is_meta:
                    table[name] = twin(value)
        yield
    finally:
        for table, values in zip(tables, before, strict=True):
            table.update(values)


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Move the program's own device arguments and fake values to ``device``."""
    for node in module.graph.nodes:
        node.args, node.kwargs = map_aggregate(
            (node.args, node.kwargs),
            lambda value: device if isinstance(value, torch.device) else value,
        )
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(
                lambda value: _moved(value, device), node.meta["val"]
            )
    module.recompile()


def _moved(value: Any, device: torch.device) -> Any:
    if not isinstance(value, FakeTensor) or value.device == device:
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
