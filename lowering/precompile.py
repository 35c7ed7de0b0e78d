"""Every GPU kernel that a lowered program launches, compiled beforehand on any machine.

Each ``vdqc_kernels::`` call goes through its GPU route once, with tensors of the shapes, dtypes and
strides that the captured example has and no memory, on a GPU that is not there (``gpu.absent``).
Equal calls, as those of equal blocks, are made once. Dense attention is torch's own and needs none.

A launch at other sizes finds the same kernel where sizes are specialised alike: Triton tells
multiples of 16 and the number 1 from the rest, and tiles may depend on the number of rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import Diagnostics, LoweringError
from vdqc.base.target import Target
from vdqc.ir.graph import Graph
from vdqc.kernels.attention import ATTENTION
from vdqc.kernels.base import Kernel
from vdqc.kernels.table import KERNELS
from vdqc.lowering.residual import has_residuals, split
from vdqc.lowering.rules import hint

#: Where the kernels are, in the artifact's folder.
CUBINS = "cubins"


def precompile(graph: Graph, target: Target, folder: Path, diagnostics: Diagnostics) -> int:
    """Compile what ``graph`` (lowered) launches on ``target`` into ``folder``; how many kernels.

    A call whose route fails is left to its first run, with a warning. Raises LoweringError for a
    target that is no GPU, or without Triton.
    """
    check_precompiles(target)
    from vdqc.kernels.gpu.absent import absent
    from vdqc.kernels.gpu.stored import keep

    routes, done = _routes(), set()
    with absent(target.name) as found:
        for node in _nodes(graph):
            kernel = routes.get(node.target)
            if kernel is None or kernel.cuda is None or kernel is ATTENTION:
                continue
            key = str((kernel.name, fx.map_arg((node.args, dict(node.kwargs)), _described)))
            if key in done:
                continue
            done.add(key)
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), _stand_in)
            try:
                kernel.cuda(*args, **kwargs)
            except Exception as error:  # whatever a route does with tensors that are not there
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                diagnostics.warning(
                    "",
                    "not-precompiled",
                    f"{kernel.name} (%{node.name}) will be compiled at its first run: {line}",
                )
    count = keep(folder, target.name, found)
    diagnostics.remark("", "precompiled", f"{count} kernels were compiled for {target}")
    return count


def offer_precompiled(folder: Path, device: torch.device) -> int:
    """Let this process run the kernels of an artifact's folder, where there are any that fit the
    GPU ``device`` (or the current one) and Triton; how many. Warns where there are, but none fits.
    """
    if not (folder / CUBINS).is_dir() or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device if device.type == "cuda" else None)
    from vdqc.kernels.gpu.stored import offer

    return offer(folder / CUBINS, f"sm{major}{minor}")


def check_precompiles(target: Target) -> None:
    """Raise LoweringError unless kernels can be compiled here for ``target``."""
    if target.device != "cuda":
        raise LoweringError(
            f"expected a GPU target for --precompile, got {target}",
            "give --target sm80 ... sm120, or leave --precompile out",
        )
    from vdqc.kernels.gpu.runtime import check_triton

    check_triton()


def _routes() -> dict[Any, Kernel]:
    found = {}
    for place in KERNELS.values():
        module, _, attribute = place.partition(":")
        kernel: Kernel = getattr(importlib.import_module(module), attribute)
        found[kernel.op] = kernel
    return found


def _nodes(graph: Graph) -> Iterator[fx.Node]:
    """Calls of the program, or of both programs that comparisons make of it."""
    if not has_residuals(graph.module):
        yield from graph.module.graph.nodes
        return
    programs = split(graph.module, torch.device("cpu"))
    yield from programs.refresh.graph.nodes
    yield from programs.reuse.graph.nodes


def _described(node: fx.Node) -> Any:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        return f"{value.dtype} {_sizes(value.shape)} {_sizes(value.stride())}"
    return str(_stand_in(node))


def _stand_in(node: fx.Node) -> Any:
    """A tensor like that of ``node`` without memory, or a size as a number."""
    value = node.meta["val"]
    if isinstance(value, Tensor):
        sizes, strides = _sizes(value.shape), _sizes(value.stride())
        return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
    return hint(value) if isinstance(value, (int, torch.SymInt)) else value


def _sizes(sizes: Any) -> list[int]:
    return [hint(size) for size in sizes]
