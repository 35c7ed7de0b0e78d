"""A model and samples of its calls, to a Graph; weights stay the model's own.

``torch.export`` (non-strict, keyword form) under every dimension that differs between samples marked
dynamic, then ``run_decompositions({})`` so that nothing mutates. Linear, normalisation, activation
and attention stay single nodes.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen

from vdqc.base.diagnostics import CaptureError, Diagnostics, InputError
from vdqc.ir.graph import Graph, Origin
from vdqc.ir.sample import Sample
from vdqc.ir.signature import IntInput, Signature, TensorInput, call_leaves


def capture(
    model: nn.Module, samples: Sequence[Sample], diagnostics: Diagnostics | None = None
) -> Graph:
    """The graph of ``model`` for calls like ``samples``; the first is the example.

    A dimension that differs between two samples is dynamic. Raises CaptureError.
    """
    if not samples:
        raise InputError("expected at least one sample, got none")
    example = dict(samples[0].inputs)
    parameters = inspect.signature(model.forward).parameters
    takes_return_dict = "return_dict" in parameters
    call = {**example, **({"return_dict": False} if takes_return_dict else {})}
    dynamic = {name: _dynamic(value, samples, name) for name, value in call.items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (), call, dynamic_shapes=dynamic, strict=False)
        exported = exported.run_decompositions({})
        module = exported.module(check_guards=False)
    _flatten_calls(module)
    inputs = _inputs(module, example)
    tensor_paths = {entry.path for entry in inputs}
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    full = {name: example.get(name, defaults.get(name)) for name in parameters}
    full.pop("return_dict", None)
    statics = {path: leaf for path, leaf in call_leaves(full).items() if path not in tensor_paths}
    signature = Signature(
        tuple(parameters), defaults, inputs, statics, ranges={}, output_fields=("",)
    )
    # a fresh module: export's own carries hooks that insist on its calling convention
    plain = fx.GraphModule(module, module.graph, class_name="Program")
    return Graph(plain, signature, origin=Origin(model_class=_class_path(model)))


def _class_path(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _dynamic(value: Any, samples: Sequence[Sample], name: str) -> Any:
    others = [sample.inputs[name] for sample in samples[1:] if name in sample.inputs]
    return _dynamic_leaf(value, others)


def _dynamic_leaf(value: Any, others: Sequence[Any]) -> Any:
    match value:
        case Tensor():
            axes = {
                axis: torch.export.Dim.DYNAMIC
                for axis in range(value.ndim)
                if any(other.shape[axis] != value.shape[axis] for other in others)
            }
            return axes or None
        case dict():
            return {k: _dynamic_leaf(v, [o[k] for o in others]) for k, v in value.items()}
        case list() | tuple():
            return type(value)(
                _dynamic_leaf(item, [other[i] for other in others]) for i, item in enumerate(value)
            )
        case int() if not isinstance(value, bool) and any(other != value for other in others):
            return torch.export.Dim.DYNAMIC
    return None


def _flatten_calls(module: fx.GraphModule) -> None:
    """Plain positional placeholders, no guards or assertions, no copies into dead storage."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" or "_assert" in str(node.target):
            graph.erase_node(node)
        elif node.target is torch.ops.aten.copy.default:
            _replace_copy(graph, node)
    graph.set_codegen(CodeGen())
    graph.eliminate_dead_code()
    module.recompile()


def _replace_copy(graph: fx.Graph, node: fx.Node) -> None:
    target, source = node.args[0].meta["val"], node.args[1].meta["val"]
    value = node.args[1]
    with graph.inserting_before(node):
        if source.dtype != target.dtype:
            value = graph.call_function(
                torch.ops.aten._to_copy.default, (value,), {"dtype": target.dtype}
            )
            value.meta = {**node.meta}
        if source.ndim != target.ndim or source.shape != target.shape:
            sizes = [_size_node(graph, node.args[0], axis) for axis in range(target.ndim)]
            value = graph.call_function(torch.ops.aten.expand.default, (value, sizes))
            value.meta = {**node.meta}
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _size_node(graph: fx.Graph, node: Any, axis: int) -> Any:
    size = node.meta["val"].shape[axis]
    if isinstance(size, int):
        return size
    sym = graph.call_function(torch.ops.aten.sym_size.int, (node, axis))
    sym.meta["val"] = size
    return sym


def _inputs(
    module: fx.GraphModule, example: Mapping[str, Any]
) -> tuple[TensorInput | IntInput, ...]:
    leaves = {
        path: leaf
        for path, leaf in call_leaves(example).items()
        if isinstance(leaf, Tensor) or (isinstance(leaf, int) and not isinstance(leaf, bool))
    }
    by_name = {_identifier(path): path for path in leaves}
    entries: list[TensorInput | IntInput] = []
    for node in list(module.graph.nodes):
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        path = by_name.get(str(node.target))
        if path is None:
            if node.users:
                raise CaptureError(f"cannot tell which argument '{node.target}' is")
            module.graph.erase_node(node)
        elif isinstance(value, Tensor):
            sizes = tuple(s if isinstance(s, int) else str(s) for s in value.shape)
            entries.append(TensorInput(path, str(value.dtype).removeprefix("torch."), sizes))
        elif isinstance(value, torch.SymInt):
            entries.append(IntInput(path, str(value)))
        else:
            module.graph.erase_node(node)
    module.recompile()
    return tuple(entries)


def _identifier(path: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in path).strip("_").replace("__", "_")
