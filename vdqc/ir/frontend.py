"""A model and samples of its calls, to a Graph; weights stay the model's own.

``torch.export`` (non-strict, keyword form) under every size that varies between samples, then
``run_decompositions({})`` so that nothing mutates. Linear, normalisation, activation and attention
stay single nodes. Where a forward does python arithmetic that export cannot follow, a repair
(``vdqc.ir.repairs``) stands in for that piece while it is traced.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import CaptureError, Diagnostics, InputError
from vdqc.ir.attributes import attribute, has_attribute, set_attribute
from vdqc.ir.dynamic import Plan, coincidences, plans
from vdqc.ir.functionalize import plain_module
from vdqc.ir.graph import Graph
from vdqc.ir.meta import retarget, tensors_on_meta, to_meta
from vdqc.ir.origin import Origin, class_path
from vdqc.ir.relations import Symbols, check_example
from vdqc.ir.repairs import PlainRepeats, repaired
from vdqc.ir.sample import Sample
from vdqc.ir.signature import (
    IntInput,
    Signature,
    TensorInput,
    call_leaves,
    describe_output,
    is_known_output,
)
from vdqc.ir.weights import StoredTensor


def capture(
    model: nn.Module,
    samples: Sequence[Sample],
    diagnostics: Diagnostics | None = None,
    stored: Mapping[str, StoredTensor] | None = None,
) -> Graph:
    """The graph of ``model`` for calls like ``samples``; the first is the example.

    A size that differs between two samples is dynamic; without a difference, whatever can vary
    does. ``stored`` are weights on disk whose parameters are on the meta device: then nothing is
    computed and nothing is read. Raises CaptureError with the line that could not be traced.
    """
    if stored:
        return _capture_stored(model, samples, diagnostics, stored)
    diagnostics = diagnostics or Diagnostics()
    if not samples:
        raise InputError("expected at least one sample, got none", "yield one from samples()")
    parameters = forward_parameters(model)
    for sample in samples:
        check_sample(sample, parameters)
    with _quiet(), _eval_mode(model), PlainRepeats(), repaired(model) as repairs:
        plan, exported = _export(model, plans(samples, list(parameters), diagnostics))
    coincidences(plan, diagnostics)
    symbols = Symbols()
    signature_inputs, names = _inputs(exported, plan, symbols)
    # before the decompositions, which reason about strides and add relations of their own
    ranges, guards = symbols.ranges(), symbols.guards()
    sizes = [e.sizes if isinstance(e, TensorInput) else (e.size,) for e in signature_inputs]
    leaves = call_leaves(plan.call)
    check_example(guards, sizes, [leaves[entry.path] for entry in signature_inputs])
    with _quiet():
        module = plain_module(_decomposed(exported))
    _drop_baked_inputs(module, names)
    _refuse_writes(module)
    output_class, output_fields = describe_output(exported.call_spec.out_spec)
    signature = Signature(
        tuple(parameters),
        _defaults(parameters),
        signature_inputs,
        _statics(plan, parameters, {entry.path for entry in signature_inputs}),
        ranges,
        guards,
        output_class,
        output_fields,
        tuple(name for name in plan.promoted if name in {e.path for e in signature_inputs}),
    )
    _say_what_froze(plan, signature, diagnostics)
    if not is_known_output(output_class):
        diagnostics.warning(
            "",
            "output-class",
            f"the forward returns {output_class}, which a loaded program does not import",
            "call it with return_dict=False: it then returns the fields as a tuple",
        )
    for sentence in repairs:
        diagnostics.remark("", "capture-repair", sentence)
    return Graph(module, signature, origin=origin_of(model, tuple(repairs)))


def _decomposed(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    try:
        return exported.run_decompositions({})
    except RuntimeError as error:
        raise CaptureError(
            f"the exported program cannot be decomposed: {str(error).splitlines()[0]}",
            "a module of the model may have a name that fx needs (code, graph): rename it",
        ) from error


def _refuse_writes(module: fx.GraphModule) -> None:
    """Raise CaptureError where the forward changes an argument or a buffer."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.copy_.default:
            raise CaptureError(
                f"the forward writes into '{getattr(node.args[0], 'target', node.args[0])}'",
                "expected one that leaves its arguments and buffers as they are: x = x * 2 "
                "instead of x *= 2",
                code="writes",
            )


def _capture_stored(
    model: nn.Module,
    samples: Sequence[Sample],
    diagnostics: Diagnostics | None,
    stored: Mapping[str, StoredTensor],
) -> Graph:
    """Capture on the meta device, then retarget to the CPU with every tensor in its place."""
    meta = [Sample(to_meta(dict(sample.inputs)), sample.timestep) for sample in samples]
    with tensors_on_meta(model), torch.device("meta"):
        graph = capture(model, meta, diagnostics)
    retarget(graph.module, torch.device("cpu"))
    names = graph.param_names()
    for name in names:
        if name in stored:
            continue
        value = attribute(model, name) if has_attribute(model, name) else None
        value = value if value is not None else attribute(graph.module, name)
        if value.is_meta:
            raise CaptureError(
                f"the value of constant '{name}' is not known on the meta device",
                "load the model in memory: mapped=False",
            )
        set_attribute(graph.module, name, value)
    kept = {name: tensor for name, tensor in stored.items() if name in names}
    return Graph(graph.module, graph.signature, origin=graph.origin, stored=kept)


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Named parameters of ``forward`` in order; ``*args`` and ``**kwargs`` are left out."""
    return {
        name: parameter
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def check_sample(sample: Sample, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raises InputError unless the sample's arguments are ones that ``forward`` takes."""
    takes = ", ".join(parameters)
    if unknown := sorted(set(sample.inputs) - set(parameters)):
        raise InputError(f"a sample gives '{unknown[0]}', which forward does not take", takes)
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and name not in sample.inputs
    ]
    if missing:
        raise InputError(f"a sample lacks '{missing[0]}', which forward needs", f"takes: {takes}")


def origin_of(model: nn.Module, repairs: tuple[str, ...] = ()) -> Origin:
    """What a stand-in needs to know about ``model``."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    skipped = getattr(model, "_skip_layerwise_casting_patterns", None) or ()
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    # the commonest: a model keeps a few modules in float32
    dtype = max(set(dtypes), key=dtypes.count) if dtypes else torch.float32
    return Origin(
        model_class=class_path(type(model)),
        config=config_of(model),
        dtype=str(dtype).removeprefix("torch."),
        keep=tuple(dict.fromkeys([*kept, *skipped])),
        repairs=repairs,
    )


def config_of(model: nn.Module) -> dict[str, Any]:
    """The model's configuration as far as it is JSON; empty if it has none."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return {}
    return {key: value for key, value in config.items() if _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _export(model: nn.Module, attempts: Sequence[Plan]) -> tuple[Plan, ExportedProgram]:
    """The first attempt that export follows; raises CaptureError for the first that it did not."""
    first: Exception | None = None
    for plan in attempts:
        try:
            with torch.no_grad():
                exported = torch.export.export(
                    model, (), dict(plan.call), dynamic_shapes=dict(plan.shapes), strict=False
                )
        except Exception as error:
            first = first or error
        else:
            return plan, exported
    assert first is not None
    raise _capture_error(model, first) from first


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_machinery(frame.filename)
    ]
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not frames:
        return CaptureError(f"{type(model).__name__} cannot be captured: {reason}")
    frame = frames[-1]
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {Path(frame.filename).name}:{frame.lineno} "
        f"in {frame.name}: {frame.line}",
        f"{type(error).__name__}: {reason}",
        f"file: {frame.filename}",
        "the graph must not depend on values of tensors: use torch.where or a mask instead of "
        "python control flow, and move such work out of forward",
    )


_MACHINERY = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def _is_machinery(filename: str) -> bool:
    return filename.startswith(_MACHINERY) or filename.startswith("<")


def _inputs(
    exported: ExportedProgram, plan: Plan, symbols: Symbols
) -> tuple[tuple[TensorInput | IntInput, ...], dict[str, str]]:
    """Signature entries in placeholder order, and placeholder name to path for all leaves."""
    flat, _ = pytree.tree_flatten_with_path(dict(plan.call))
    known = call_leaves(plan.call)
    paths = [path for path, leaf in known.items() if leaf is not None]
    if len(flat) == len(known):
        paths = list(known)
    user = set(exported.graph_signature.user_inputs)
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder" and n.name in user]
    by_position = _by_position(exported, placeholders, paths)
    entries: list[TensorInput | IntInput] = []
    for node, path in by_position.items():
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            sizes = tuple(symbols.size(size) for size in value.shape)
            entries.append(TensorInput(path, str(value.dtype).removeprefix("torch."), sizes))
        elif isinstance(value, torch.SymInt) and isinstance(size := symbols.size(value), str):
            entries.append(IntInput(path, size))
    return tuple(entries), {node.name: path for node, path in by_position.items()}


def _by_position(
    exported: ExportedProgram, placeholders: Sequence[fx.Node], paths: Sequence[str]
) -> dict[fx.Node, str]:
    """Placeholder to path; export lists every leaf of the call in order, constants as values."""
    specs = [
        spec
        for spec in exported.graph_signature.input_specs
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
    ]
    if len(specs) != len(paths):
        raise CaptureError(f"expected {len(paths)} inputs in the exported program: {len(specs)}")
    nodes = {node.name: node for node in placeholders}
    return {
        nodes[spec.arg.name]: path
        for spec, path in zip(specs, paths, strict=True)
        if getattr(spec.arg, "name", None) in nodes
    }


def _drop_baked_inputs(module: fx.GraphModule, names: Mapping[str, str]) -> None:
    """Erase placeholders of python values that were baked in."""
    for node in list(module.graph.nodes):
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        is_symbol = isinstance(value, torch.SymInt) and bool(value.node.expr.free_symbols)
        if isinstance(value, Tensor) or is_symbol:
            continue
        if node.users:
            raise CaptureError(f"'{names.get(node.name, node.name)}' is baked but still read")
        module.graph.erase_node(node)
    module.recompile()


def _defaults(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty and _is_json(parameter.default)
    }


def _statics(
    plan: Plan, parameters: Mapping[str, inspect.Parameter], inputs: set[str]
) -> dict[str, Any]:
    defaults = _defaults(parameters)
    call = {name: plan.call.get(name, defaults.get(name)) for name in parameters}
    call.pop("return_dict", None)
    statics = {path: leaf for path, leaf in call_leaves(call).items() if path not in inputs}
    for path, leaf in statics.items():
        if not _is_json(leaf):
            raise CaptureError(
                f"expected a tensor, number or text for '{path}', got {type(leaf).__name__}",
                "the graph cannot take such an object as input: leave it out of the sample",
            )
    return statics


def _say_what_froze(plan: Plan, signature: Signature, diagnostics: Diagnostics) -> None:
    by_path = {entry.path: entry for entry in signature.inputs}
    frozen = []
    for path, axis in sorted(plan.varying):
        entry = by_path.get(path)
        if isinstance(entry, TensorInput) and isinstance(entry.sizes[axis], int):
            frozen.append(f"axis {axis} of {path} = {entry.sizes[axis]}")
        elif entry is None:
            frozen.append(f"{path} = {signature.statics[path]}")
    if frozen:
        diagnostics.warning(
            "",
            "frozen-axis",
            f"samples differ in what the forward bakes in: {', '.join(frozen)}",
            "the graph holds for these sizes alone; capture one graph per size",
        )
    elif not plan.varying:
        fixed = [
            f"{entry.path}{list(entry.sizes)}"
            for entry in signature.inputs
            if isinstance(entry, TensorInput)
        ]
        diagnostics.remark(
            "", "found-axes", f"no two samples differ in size; found: {', '.join(fixed)}"
        )


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off while tracing; modes are put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Export's own warnings and printed graphs are about its internals; our errors say the rest."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
