"""Graph to JSON and back: the executable form of a program, without pickles and without code.

One node a line, as in the printed IR, with typed operands::

    {"name": "linear", "op": "aten.linear.default", "args": [{"node": "x"}, {"node": "w"}], ...}

Reading builds the ``fx.Graph`` node by node from names that are looked up in tables: dispatcher ops
of a few namespaces, integer functions on sizes, weights that the artifact holds. Names are
identifiers, so that the python text which fx derives from the graph cannot hold anything else.
Values are typed by texts such as ``bf16[2, 4*s0]``, from which fake tensors with symbolic sizes are
made again.
"""

from __future__ import annotations

import json
import keyword
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, fx, nn

from vdqc.base.diagnostics import ArtifactError
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.names import module_path, source_line
from vdqc.ir.origin import Origin
from vdqc.ir.signature import IntInput, Signature
from vdqc.ir.site import note
from vdqc.ir.value_types import TypeReader, TypeWriter
from vdqc.ir.weights import StoredTensor

NAMESPACES = frozenset({"aten", "prims", "vdqc", "vdqc_kernels"})

#: Ops of these namespaces that reach outside of the program.
_REFUSED = frozenset({"aten.from_file"})

_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos")
_RELATIONS = ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
_SYMBOLIC = ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum")

#: Python functions on sizes that captured graphs hold, by the name under which they are written.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (*_ARITHMETIC, *_RELATIONS)},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC if hasattr(torch, name)},
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
#: A ``ModuleDict`` may name a module anything; fx writes a part that is no word in double quotes.
_PART = r"""[^."'\\\x00-\x1f\x7f]+"""
_WEIGHT = re.compile(rf"{_PART}(\.{_PART})*")


# -- writing --------------------------------------------------------------------------------


def dumps(graph: Graph, names: Mapping[str, str] | None = None) -> str:
    """The text of ``program.json``; ``names`` maps tied weights to the name that is stored."""
    data = to_json(graph, names)
    nodes = data.pop("nodes")
    head = json.dumps(data, allow_nan=False, indent=1)
    lines = ",\n".join(json.dumps(node, allow_nan=False) for node in nodes)
    return f'{head[:-2]},\n "nodes": [\n{lines}\n]}}\n'


def to_json(graph: Graph, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A JSON dictionary of the whole program but its weights.

    Raises ArtifactError if a node cannot be written, which a verified graph never does.
    """
    writer = TypeWriter(_symbol_names(graph))
    paths = _Table()
    sources = _Table()
    nodes = [_node_to_json(node, writer, paths, sources) for node in graph.nodes]
    return {
        "stage": str(graph.stage),
        "signature": graph.signature.to_json(),
        "symbols": writer.hints,
        "free": sorted(graph.free),
        "tied": dict(names or {}),
        "paths": paths.entries,
        "sources": sources.entries,
        "nodes": nodes,
    }


def _symbol_names(graph: Graph) -> dict[str, str]:
    """Names that the signature gives to sizes, by the names in the graph's own fake values."""
    names: dict[str, str] = {}
    for node, entry in zip(graph.inputs, graph.signature.inputs, strict=True):
        value = node.meta.get("val")
        texts = (entry.size,) if isinstance(entry, IntInput) else entry.sizes
        sizes = tuple(value.shape) if isinstance(value, Tensor) else (value,)
        for text, size in zip(texts, sizes, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(text, str) and text.isidentifier():
                names.setdefault(str(size), text)
    return names


class _Table:
    """Texts by number, each kept once."""

    def __init__(self) -> None:
        self.entries: list[str] = []
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        if text not in self._numbers:
            self._numbers[text] = len(self.entries)
            self.entries.append(text)
        return self._numbers[text]


def _node_to_json(
    node: fx.Node, writer: TypeWriter, paths: _Table, sources: _Table
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": node.name}
    match node.op:
        case "placeholder":
            entry["op"] = "placeholder"
        case "get_attr":
            entry["op"], entry["weight"] = "get_attr", str(node.target)
        case "call_function":
            entry["op"] = _target_name(node)
            entry["args"] = [encode(arg) for arg in node.args]
        case "output":
            entry["op"], entry["args"] = "output", [encode(arg) for arg in node.args]
        case _:
            raise ArtifactError(f"cannot write %{node.name}: {node.op} is not part of a program")
    if node.kwargs:
        entry["kwargs"] = {key: encode(value) for key, value in node.kwargs.items()}
    if "val" in node.meta:
        entry["type"] = writer.text(node.meta["val"])
    if entries := note(node):
        entry["note"] = dict(entries)
    if path := module_path(node):
        entry["path"] = paths.number(path)
    if line := source_line(node):
        entry["source"] = sources.number(line)
    return entry


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target._schema.name.replace("::", ".")
        return f"{name}.{node.target._overloadname}"
    if node.target not in _FUNCTION_NAMES:
        raise ArtifactError(f"cannot write %{node.name}: {node.target} is not an op")
    return _FUNCTION_NAMES[node.target]


def encode(value: Any) -> Any:
    """An operand as JSON: what JSON has not is an object of one key, its kind."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": repr(value)}
        case fx.Node():
            return {"node": value.name}
        case complex():
            return {"complex": [encode(value.real), encode(value.imag)]}
        case tuple() | list():
            return [encode(item) for item in value]
        case slice():
            return {"slice": [encode(part) for part in (value.start, value.stop, value.step)]}
        case torch.device():
            return {"device": str(value)}
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {type(value).__name__: str(value).removeprefix("torch.")}
    raise ArtifactError(f"cannot write an operand of type {type(value).__name__}: {value!r}")


# -- reading --------------------------------------------------------------------------------


def from_json(
    data: Any, weights: Mapping[str, Tensor | StoredTensor], origin: Origin | None = None
) -> Graph:
    """The graph that ``to_json`` wrote, bound to ``weights``.

    Raises ArtifactError for anything that ``to_json`` could not have written.
    """
    try:
        return _Reader(data, weights).graph(origin)
    except ArtifactError:
        raise
    except Exception as error:  # whatever else hostile or damaged JSON can provoke
        raise ArtifactError(
            f"the program is malformed: {type(error).__name__}: {error}",
            "compile the model again",
        ) from error


@final
class _Reader:
    def __init__(self, data: Any, weights: Mapping[str, Tensor | StoredTensor]) -> None:
        self.data = data
        self.weights = weights
        self.types = TypeReader(data["symbols"])
        self.paths: list[str] = data["paths"]
        self.sources: list[str] = data["sources"]
        self.free = set(data["free"])
        self.tied: Mapping[str, str] = data["tied"]
        self.root = nn.Module()
        self.stored: dict[str, StoredTensor] = {}
        self.nodes: dict[str, fx.Node] = {}

    def graph(self, origin: Origin | None) -> Graph:
        stages = {str(stage): stage for stage in Stage}
        signature = Signature.from_json(self.data["signature"])
        graph = fx.Graph()
        for entry in self.data["nodes"]:
            node = self.node(graph, entry)
            self.annotate(node, entry)
        module = fx.GraphModule(self.root, graph, class_name="Program")
        result = Graph(
            module,
            signature,
            origin=origin,
            stage=Stage.LOWERED,  # not captured: sites have names already
            stored=self.stored,
        )
        result.stage = stages[self.data["stage"]]
        result.free = self.free & set(result.param_names())
        if len(result.inputs) != len(signature.inputs):
            raise ArtifactError(
                f"the signature names {len(signature.inputs)} inputs, the program has "
                f"{len(result.inputs)}"
            )
        if not graph.nodes or result.output.op != "output":
            raise ArtifactError("the program has no output")
        return result

    def node(self, graph: fx.Graph, entry: Mapping[str, Any]) -> fx.Node:
        name, op = _word(entry["name"]), entry["op"]
        if name in self.nodes or "output" in self.nodes:
            raise ArtifactError(f"node '{name}' is defined twice, or after the output")
        args = tuple(decode(arg, self.nodes) for arg in entry.get("args", ()))
        kwargs = {_word(key): decode(v, self.nodes) for key, v in entry.get("kwargs", {}).items()}
        match op:
            case "placeholder":
                node = graph.create_node("placeholder", name, name=name)
            case "get_attr":
                node = graph.create_node("get_attr", self.place(entry["weight"]), name=name)
            case "output":
                (result,) = args
                node = graph.output(result)
            case _:
                node = graph.create_node("call_function", find_op(op), args, kwargs, name=name)
        self.nodes["output" if op == "output" else name] = node
        return node

    def annotate(self, node: fx.Node, entry: Mapping[str, Any]) -> None:
        if node.op == "get_attr" and "type" not in entry:
            raise ArtifactError(f"weight '{node.target}' has no type")
        if "type" in entry:
            node.meta["val"] = self.types.value(entry["type"])
        if "note" in entry:
            node.meta["custom"] = {"vdqc": dict(entry["note"])}
        if "path" in entry:
            path = str(self.paths[entry["path"]])
            node.meta["nn_module_stack"] = {path: (path, "")}
        if "source" in entry:
            place, _, text = str(self.sources[entry["source"]]).partition("  ")
            file, _, line = place.rpartition(":")
            node.stack_trace = f'  File "{file}", line {line}, in forward\n    {text}\n'

    def place(self, name: Any) -> str:
        """Bind the weight ``name`` in the module tree; returns it."""
        if not isinstance(name, str) or not _WEIGHT.fullmatch(name):
            raise ArtifactError(f"{name!r} cannot be the name of a weight")
        stored_name = self.tied.get(name, name)
        if stored_name not in self.weights:
            raise ArtifactError(
                f"the program reads weight '{name}', which the artifact does not hold"
            )
        value = self.weights[stored_name]
        if isinstance(value, StoredTensor):
            self.stored[name] = value
            value = torch.empty(value.shape, dtype=value.dtype, device="meta")
        *path, leaf = name.split(".")
        owner = self.root
        for part in path:
            if part not in owner._modules:
                self._check_free(owner, part, name)
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None
            owner = child
        if leaf in owner._parameters or leaf in owner._buffers:
            return name
        self._check_free(owner, leaf, name)
        if value.is_floating_point() or value.is_complex():
            owner.register_parameter(leaf, nn.Parameter(value, requires_grad=name in self.free))
        else:
            owner.register_buffer(leaf, value)
        return name

    def _check_free(self, owner: nn.Module, part: str, name: str) -> None:
        """A weight must not take the place of a method: ``forward``, ``_apply``, ``__class__``."""
        taken = dir(fx.GraphModule if owner is self.root else nn.Module)
        if part == "training" or part in taken or part in {*owner._modules, *owner._parameters}:
            raise ArtifactError(f"'{name}' cannot be the name of a weight: '{part}' is taken")


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The operand that ``encode`` wrote."""
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "node":
            return nodes[content]
        case "float" if content in ("inf", "-inf", "nan"):
            return float(content)
        case "complex":
            return complex(*(decode(part, nodes) for part in content))
        case "slice":
            return slice(*(decode(part, nodes) for part in content))
        case "device":
            return torch.device(str(content))
        case "dtype" | "layout" | "memory_format":
            found = getattr(torch, _word(content))
            if isinstance(found, getattr(torch, kind)):
                return found
    raise ArtifactError(f"operand {json.dumps(value)[:80]} is not understood")


def _word(text: Any) -> str:
    if not isinstance(text, str) or not _WORD.fullmatch(text) or keyword.iskeyword(text):
        raise ArtifactError(f"{text!r} is not a name")
    return text


def find_op(name: Any) -> Callable[..., Any]:
    """The op that ``namespace.name.overload`` or a size function's name stands for.

    Raises ArtifactError for one that is not allowed in a program, or not known here.
    """
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = str(name).partition(".")
    short, _, overload = rest.partition(".")
    if namespace not in NAMESPACES or not _WORD.fullmatch(short) or not _WORD.fullmatch(overload):
        raise ArtifactError(
            f"op {name!r} is not allowed in a program",
            f"expected namespace.name.overload of {', '.join(sorted(NAMESPACES))}",
        )
    packet = getattr(getattr(torch.ops, namespace), short, None)
    op = (
        getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    )
    if not isinstance(op, torch._ops.OpOverload):
        raise ArtifactError(
            f"op {name!r} is not known to this version of vdqc and torch",
            "upgrade both, or compile the model again",
        )
    if f"{namespace}.{short}" in _REFUSED or op._schema.is_mutable:
        raise ArtifactError(f"op {name!r} is not allowed in a program: it is not functional")
    return op


def needed_ops(graph: Graph) -> Iterator[str]:
    """Names of the dispatcher ops that the program calls, each once, sorted."""
    names = {_target_name(node) for node in graph.nodes if node.op == "call_function"}
    yield from sorted(names - FUNCTIONS.keys())
