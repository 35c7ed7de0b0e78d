"""What compile() checks on the way: weights, what was captured, what was lowered.

Error: one InputError for weights that are not finite, one VerifyError where a step that should
change nothing did.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from vdqc.base import numerics
from vdqc.base.diagnostics import InputError, VerifyError
from vdqc.calls import flat_output, users_code
from vdqc.engine.pass_manager import Context, PassManager, PassRecord, probe_output
from vdqc.ir.finished import Piece
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import weight_source
from vdqc.ir.resume import WeightWork, finish, share
from vdqc.ir.site import SiteKind
from vdqc.ir.source import Source
from vdqc.ir.weights import STORED_DTYPES
from vdqc.lowering.lower import lower
from vdqc.lowering.select import KernelChoice

#: Bytes of weights that are checked as one piece of work.
CHECKED_BYTES = 1 << 29
#: Wraps an iterable with a progress bar: ``(items, description) -> items``.
Progress = Callable[[Any, str], Any]


@torch.no_grad()
def float_output(source: Source) -> Tensor | None:
    """What the model itself computes for the first sample; None if its weights are on disk.

    Raises InputError, naming the user's line, if that call fails.
    """
    if source.stored:
        return None
    advice = "expected samples that the model takes: check their shapes and dtypes"
    with users_code("the model's forward on the first sample", advice):
        return flat_output(source.model(**source.samples[0].inputs))


@contextmanager
def surroundings_kept(model: object) -> Iterator[None]:
    """What the caller set does not enter the program, and what is set here does not stay.

    Autocast would be captured as casts, passes that learn need gradients, and modules go back to
    the mode, training or not, in which they came.
    """
    modes = [(m, m.training) for m in model.modules()] if isinstance(model, nn.Module) else []
    with ExitStack() as kept:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                kept.enter_context(torch.autocast(device, enabled=False))
        kept.enter_context(torch.inference_mode(False))
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def check_capture(graph: Graph, manager: PassManager, expected: Tensor | None) -> None:
    """Raise VerifyError unless the captured graph computes what the model itself does."""
    if expected is None or manager.probed is None:
        return
    error = numerics.relative_error(manager.probed[0], expected)
    allowed = tolerance(graph)
    if not error <= allowed:
        raise VerifyError(
            f"the captured graph differs from the model by {error:.2e} (allowed {allowed:.0e})",
            "is the model random, or does it keep state between calls? expected neither",
            code="not-exact",
        )


def check_weights(graph: Graph, progress: Progress = lambda items, description: items) -> None:
    """Raise InputError naming the first weight that cannot be meant; one pass over them.

    Nothing may hold NaN, nor a dtype that no file holds; what a site reads may hold no infinity,
    which is how a mask among the buffers says "never".
    """
    sites = [site.node for site in graph.sites() if site.kind is not SiteKind.ATTENTION]
    operands = [node for site in sites for node in site.all_input_nodes[1:]]
    read = {str(source.target) for node in operands if (source := weight_source(node)) is not None}
    nodes = {str(node.target): node for node in graph.nodes if node.op == "get_attr"}
    batches = _batches(nodes.values(), CHECKED_BYTES)
    works = [WeightWork("check", b, functools.partial(_check, graph, b, read)) for b in batches]
    share(graph, works, "check weights", progress)
    for work in progress(works, "check weights"):
        finish(graph, work)


def _check(graph: Graph, nodes: Iterable[fx.Node], read: Collection[str]) -> Piece:
    for name in (str(node.target) for node in nodes):
        value = graph.param(name)
        if value.dtype not in STORED_DTYPES.values():
            raise InputError(
                f"expected a weight that a safetensors file can hold, got {value.dtype}",
                "keep it in another dtype: complex64 instead of complex128",
                code="dtype",
                site=name,
            )
        if not value.is_floating_point() or not value.numel() or value.itemsize < 2:
            continue
        low, high = torch.aminmax(value)  # NaN spreads to both: no mask as large as the weight
        wrong = _not_finite if name in read else torch.isnan
        if bool(wrong(low) | wrong(high)):
            bad = int(wrong(value).sum())
            raise InputError(
                f"the weight holds NaN or infinity in {bad} of {value.numel()} places",
                "expected finite weights: load or train the model again",
                code="not-finite",
                site=name,
            )
    return Piece()


def _not_finite(value: Tensor) -> Tensor:
    return ~value.isfinite()


def _batches(nodes: Iterable[fx.Node], most: int) -> Iterator[list[fx.Node]]:
    """``nodes`` in order, in lists of about ``most`` bytes."""
    batch: list[fx.Node] = []
    size = 0
    for node in nodes:
        batch.append(node)
        size += _value_bytes(node)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def weight_bytes(graph: Graph) -> int:
    """Bytes of all weights that the program reads."""
    return sum(_value_bytes(node) for node in graph.nodes if node.op == "get_attr")


def _value_bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return int(value.numel()) * value.dtype.itemsize


def lower_checked(
    graph: Graph, ctx: Context, manager: PassManager
) -> tuple[list[KernelChoice], PassRecord]:
    """Lower ``graph`` in place and compare it with itself before, on the probe.

    Integer sums are exact, but float sums run in another order; a value at the edge of two codes
    then falls to the other side, and from there on the noise of quantisation is another draw of the
    same size. So the lowered program may differ from the compressed graph by no more than two such
    draws do, and must be as close to the float model. Raises VerifyError.
    """
    start = time.perf_counter()
    choices = lower(graph, ctx.target, ctx.diagnostics, progress=ctx.progress)
    seconds = time.perf_counter() - start
    error = sqnr = None
    if manager.probed is not None:
        reference, compressed = manager.probed
        lowered = probe_output(graph, ctx.probe_inputs(graph))
        error = numerics.relative_error(lowered, compressed)
        sqnr = numerics.sqnr_db(lowered, reference)
        noise = numerics.relative_error(compressed, reference)
        distance = numerics.relative_error(lowered, reference)
        equal = tolerance(graph)
        near = error <= max(equal, numerics.REDRAWN_NOISE * noise)
        if not (near and distance <= max(equal, numerics.REDRAWN_DISTANCE * noise)):
            raise VerifyError(
                f"lowering moved the probe output by {error:.2e}; its distance to the float model "
                f"went from {noise:.2e} to {distance:.2e}",
                "this is a fault of a kernel, not of the model: please report it",
                code="not-exact",
            )
    text = f"lower{{target={ctx.target}}}"
    return choices, PassRecord(text, True, Stage.LOWERED, seconds, len(choices), error, sqnr)


def tolerance(graph: Graph) -> float:
    """Relative error that counts as equal in the dtype of the model."""
    return numerics.TOLERANCE[getattr(torch, graph.origin.dtype)]
