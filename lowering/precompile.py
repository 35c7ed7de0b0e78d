"""Every GPU kernel that a lowered program launches, compiled beforehand on any machine.

Each ``vdqc_kernels::`` call goes through its GPU route for every size of the samples, with tensors
of the shapes, dtypes and strides that it has there and no memory, on a GPU that is not there
(``gpu.absent``). Equal calls, as those of equal blocks, are made once, and calls that ask for the
same kernel store one. Dense attention is torch's own and needs none.

A launch at other sizes finds the same kernel where sizes are specialised alike: Triton tells
multiples of 16 and the number 1 from the rest, and tiles may depend on the number of rows.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
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
from vdqc.lowering.rules import hint, sized_like, sizes_of

#: Where the kernels are, in the artifact's folder.
CUBINS = "cubins"


def precompile(
    graph: Graph,
    target: Target,
    folder: Path,
    diagnostics: Diagnostics,
    calls: Iterable[Mapping[str, Any]],
) -> int:
    """Compile what ``graph`` (lowered) launches on ``target`` into ``folder``; how many kernels.

    ``calls`` are keyword arguments of the model; the index says which sizes they have.
    A call whose route fails is left to its first run, with a warning. Raises LoweringError for a
    target that is no GPU, or without Triton.
    """
    check_precompiles(target)
    from vdqc.kernels.gpu.absent import absent
    from vdqc.kernels.gpu.stored import keep

    distinct = {tuple(sorted(sizes_of(graph, c).items(), key=str)): c for c in calls}
    launches = list(_launches(graph))
    done: set[str] = set()
    failed: set[fx.Node] = set()
    with absent(target.name) as found:
        for inputs in distinct.values():
            with sized_like(graph, inputs):
                for node, kernel in launches:
                    if node not in failed and (fault := _launch(node, kernel, done)):
                        failed.add(node)
                        diagnostics.warning(
                            "",
                            "not-precompiled",
                            f"{kernel.name} (%{node.name}) will be compiled at its first run: "
                            f"{fault}",
                        )
    sizes = [input_shapes(graph, inputs) for inputs in distinct.values()]
    count = keep(folder, target.name, found, sizes)
    diagnostics.remark(
        "",
        "precompiled",
        f"{count} kernels were compiled for {target}, for calls of {len(sizes)} sizes",
    )
    return count


def input_shapes(graph: Graph, inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    """Shapes of the tensors that a call with these keyword arguments gives, by name."""
    given = zip(graph.inputs, graph.signature.bind((), inputs), strict=True)
    return {node.name: list(value.shape) for node, value in given if isinstance(value, Tensor)}


def _launches(graph: Graph) -> Iterator[tuple[fx.Node, Kernel]]:
    """Calls that have a route on GPUs, dense attention aside."""
    routes = _routes()
    for node in _nodes(graph):
        kernel = routes.get(node.target)
        if kernel is not None and kernel.cuda is not None and kernel is not ATTENTION:
            yield node, kernel


def _launch(node: fx.Node, kernel: Kernel, done: set[str]) -> str | None:
    """Take one call through its route, unless an equal one is ``done``; what went wrong, if so."""
    key = str((kernel.name, fx.map_arg((node.args, dict(node.kwargs)), _described)))
    if key in done:
        return None
    done.add(key)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), _stand_in)
    assert kernel.cuda is not None
    try:
        kernel.cuda(*args, **kwargs)
    except Exception as error:  # whatever a route does with tensors that are not there
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


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
