"""How a graph is called: which arguments become inputs, what they may look like, what comes out.

A captured graph takes a flat list of tensors. The signature binds a call written for the original
``forward`` to that list and refuses every call for which the graph was not captured: another
structure, another python value where one was baked in, another dtype, a size outside the captured
relations. Everything in it is JSON, so an artifact carries it without code.
"""

from __future__ import annotations

import ast
import importlib
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import CaptureError, InputError

#: A size: a number, or an expression over symbols ("s0", "4*s1").
Size = int | str


@final
@dataclass(frozen=True)
class TensorInput:
    """One tensor that a call must give.

    Attributes:
        path: where it stands in the call, e.g. ``hidden_states`` or ``image_rotary_emb[0]``.
        dtype: name of a torch dtype, e.g. ``float32``.
        sizes: one entry per axis; equal symbols must have equal sizes.
    """

    path: str
    dtype: str
    sizes: tuple[Size, ...]


@final
@dataclass(frozen=True)
class IntInput:
    """A python integer that varies from call to call (LTX ``num_frames``)."""

    path: str
    size: Size


@final
@dataclass(frozen=True)
class Signature:
    """The contract of one captured graph.

    Attributes:
        parameters: names of ``forward``'s parameters in order, so that positional calls bind.
        defaults: json-able defaults of those that have one.
        inputs: the graph's placeholders in order.
        statics: path to baked python value for every other leaf of the call.
        ranges: symbol to (least, greatest) size; greatest None for no limit.
        guards: further relations, python comparisons over symbols, e.g. ``s0 % 2 == 0``.
        output_class: import path of the object returned when ``return_dict`` is true; "tuple",
            "list" or "dict"; "" for a single tensor.
        output_fields: names of its fields, one per graph output ("" for unnamed).
        promoted: paths that the graph takes as float tensors over the batch and callers give in
            any number form: python number, scalar or one-element tensor, integer tensor.
    """

    parameters: tuple[str, ...]
    defaults: Mapping[str, Any]
    inputs: tuple[TensorInput | IntInput, ...]
    statics: Mapping[str, Any]
    ranges: Mapping[str, tuple[int, int | None]]
    guards: tuple[str, ...] = ()
    output_class: str = ""
    output_fields: tuple[str, ...] = ()
    promoted: tuple[str, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The graph's inputs for a call; raises InputError with what was expected and found."""
        return self.check(self.leaves(args, kwargs))

    def leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Path to value for every leaf of a call, defaults filled in, ``return_dict`` dropped."""
        if len(args) > len(self.parameters):
            raise InputError(f"expected at most {len(self.parameters)} arguments, got {len(args)}")
        given = dict(zip(self.parameters, args, strict=False))
        if twice := set(given) & set(kwargs):
            raise InputError(f"argument '{min(twice)}' is given twice")
        given.update(kwargs)
        if unknown := set(given) - set(self.parameters):
            raise InputError(
                f"unknown argument '{min(unknown)}'", f"known: {', '.join(self.parameters)}"
            )
        call = {name: given.get(name, self.defaults.get(name)) for name in self.parameters}
        call.pop("return_dict", None)
        return call_leaves(call)

    def check(self, leaves: Mapping[str, Any]) -> list[Any]:
        """Values of the graph's inputs, in order, after every rule was checked."""
        expected = {entry.path for entry in self.inputs}
        for path in sorted(set(leaves) | expected | set(self.statics)):
            if path in expected:
                if leaves.get(path) is None:
                    raise InputError(
                        f"expected a value for '{path}', got None",
                        "the graph was captured with it: give a sample without it to capture one",
                    )
            elif not _same(leaves.get(path), self.statics.get(path)):
                raise InputError(
                    f"'{path}' was {self.statics.get(path)!r} at capture, got "
                    f"{_short(leaves.get(path))}",
                    "python values are part of the graph: add a sample that has this one",
                )
        symbols: dict[str, int] = {}
        given = {entry.path: leaves[entry.path] for entry in self.inputs}
        for late in (False, True):  # scalars take the batch size that the other inputs show
            for entry in self.inputs:
                if (entry.path in self.promoted) is late:
                    given[entry.path] = self._check_leaf(entry, given[entry.path], symbols)
        values = list(given.values())
        self._check_sizes(values, symbols)
        return values

    def _check_leaf(
        self, entry: TensorInput | IntInput, value: Any, symbols: dict[str, int]
    ) -> Any:
        if isinstance(entry, IntInput):
            if not isinstance(value, int):
                raise InputError(f"expected an int for '{entry.path}', got {_short(value)}")
            if isinstance(entry.size, str) and entry.size.isidentifier():
                symbols.setdefault(entry.size, value)
            return value
        dtype: torch.dtype = getattr(torch, entry.dtype)
        if entry.path in self.promoted:
            value = _promote(value, entry, dtype, symbols)
        if not isinstance(value, Tensor):
            raise InputError(f"expected a tensor for '{entry.path}', got {_short(value)}")
        if value.ndim != len(entry.sizes) or value.dtype != dtype:
            raise InputError(
                f"expected {entry.dtype}[{', '.join(map(str, entry.sizes))}] for '{entry.path}', "
                f"got {_short(value)}"
            )
        for size, actual in zip(entry.sizes, value.shape, strict=True):
            if isinstance(size, str) and size.isidentifier():
                symbols.setdefault(size, int(actual))
        return value

    def _check_sizes(self, values: Sequence[Any], symbols: Mapping[str, int]) -> None:
        for entry, value in zip(self.inputs, values, strict=True):
            sizes = entry.sizes if isinstance(entry, TensorInput) else (entry.size,)
            actual = tuple(value.shape) if isinstance(value, Tensor) else (value,)
            for axis, (size, found) in enumerate(zip(sizes, actual, strict=True)):
                wanted = size if isinstance(size, int) else evaluate(size, symbols)
                if wanted != found:
                    fixed = isinstance(size, int)
                    advice = "to free it, compile with a second sample in which it differs"
                    raise InputError(
                        f"axis {axis} of '{entry.path}' must be {'' if fixed else f'{size} = '}"
                        f"{wanted}, got {found}",
                        *([advice] if fixed else []),
                    )
        for symbol, (low, high) in self.ranges.items():
            count = symbols.get(symbol)
            if count is not None and (count < low or (high is not None and count > high)):
                raise InputError(f"size {symbol} must be in [{low}, {high or 'inf'}], got {count}")
        for guard in self.guards:
            if not evaluate(guard, symbols):
                raise InputError(
                    f"the graph holds for {guard}; this call has {dict(symbols)}",
                    "add a sample of this size so that a graph for it is captured too",
                )

    def rebuild(self, outputs: Sequence[Any], return_dict: bool) -> Any:
        """What the original ``forward`` would return for these flat outputs."""
        match self.output_class:
            case "":
                return outputs[0]
            case "tuple":
                return tuple(outputs)
            case "list":
                return list(outputs)
            case "dict":
                return dict(zip(self.output_fields, outputs, strict=True))
        if not return_dict:
            return tuple(outputs)
        return output_type(self.output_class)(**dict(zip(self.output_fields, outputs, strict=True)))

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; ``from_json`` is its inverse."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Signature:
        """The signature that ``to_json`` wrote; raises KeyError or TypeError for anything else."""
        return Signature(
            parameters=tuple(data["parameters"]),
            defaults=dict(data["defaults"]),
            inputs=tuple(
                IntInput(entry["path"], entry["size"])
                if "size" in entry
                else TensorInput(entry["path"], entry["dtype"], tuple(entry["sizes"]))
                for entry in data["inputs"]
            ),
            statics=dict(data["statics"]),
            ranges={key: (low, high) for key, (low, high) in data["ranges"].items()},
            guards=tuple(data["guards"]),
            output_class=data["output_class"],
            output_fields=tuple(data["output_fields"]),
            promoted=tuple(data["promoted"]),
        )


def call_leaves(call: Mapping[str, Any]) -> dict[str, Any]:
    """Path to leaf for nested tuples, lists and dictionaries; None is a leaf."""
    flat, _ = pytree.tree_flatten_with_path(dict(call), is_leaf=lambda value: value is None)
    return {_path(keys): leaf for keys, leaf in flat}


def describe_output(spec: pytree.TreeSpec) -> tuple[str, tuple[str, ...]]:
    """``output_class`` and ``output_fields`` of what a forward returns.

    Raises CaptureError where a field is itself a collection.
    """
    if spec.is_leaf():
        return "", ("",)
    if any(not spec.child(i).is_leaf() for i in range(spec.num_children)):
        raise CaptureError(
            f"expected a flat output, got {spec.type.__name__} with collections inside",
            "return tensors, a tuple or dictionary of tensors, or a ModelOutput of tensors",
        )
    if spec.type in (tuple, list):
        return spec.type.__name__, ("",) * spec.num_children
    is_dict = spec.type in (dict, OrderedDict)
    path = "dict" if is_dict else f"{spec.type.__module__}.{spec.type.__qualname__}"
    keys = spec.context
    if isinstance(keys, tuple) or (isinstance(keys, list) and keys and isinstance(keys[0], list)):
        keys = keys[0]  # the names, and what the class says beside them
    if not isinstance(keys, Sequence) or not all(isinstance(key, str) for key in keys):
        raise CaptureError(
            f"expected an output with names as keys, got {spec.type.__name__}",
            "return tensors, a tuple or dictionary of tensors, or a ModelOutput of tensors",
        )
    return path, tuple(keys)


def _promote(value: Any, entry: TensorInput, dtype: torch.dtype, symbols: Mapping[str, int]) -> Any:
    """A number or tensor as the float tensor that the graph takes; others as they are."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        return value
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
    tensor = tensor.to(dtype)
    if tensor.numel() != 1:
        return tensor
    sizes = [
        size if isinstance(size, int) else int(evaluate(size, {size: 1, **symbols}))
        for size in entry.sizes
    ]
    return tensor.reshape((1,) * len(sizes)).expand(sizes)


def _same(value: Any, static: Any) -> bool:
    """Whether a python leaf is the one baked in; 1, 1.0 and True are three values."""
    if isinstance(value, Tensor):
        return False
    return type(value) is type(static) and bool(value == static)


def _path(keys: Sequence[Any]) -> str:
    head, *rest = keys
    return str(head.key) + "".join(pytree.keystr((key,)) for key in rest)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


_OUTPUT_PACKAGES = ("diffusers.", "transformers.")


def is_known_output(path: str) -> bool:
    """True for an output class that a loaded program may make."""
    return path in ("", "dict", "tuple", "list") or path.startswith(_OUTPUT_PACKAGES)


def output_type(path: str) -> Callable[..., Any]:
    """The output class at ``path``; only diffusers and transformers are ever imported."""
    if not path.startswith(_OUTPUT_PACKAGES):
        raise InputError(
            f"output class {path} is not from diffusers or transformers",
            "call with return_dict=False",
        )
    module, _, name = path.rpartition(".")
    cls: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return cls


_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "max": max,
    "min": min,
    "Max": max,
    "Min": min,
    "round": round,
    "math.trunc": math.trunc,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.sqrt": math.sqrt,
    "torch.sym_float": float,
    "torch.sym_int": int,
}


def evaluate(text: str, symbols: Mapping[str, int]) -> int | bool:
    """Value of an integer expression or comparison over ``symbols``; nothing else is understood."""

    def walk(node: ast.AST) -> Any:
        match node:
            case ast.Expression(body=body):
                return walk(body)
            case ast.Constant(value=int(value) | float(value)):
                return value
            case ast.Name(id=name) if name in symbols:
                return symbols[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not walk(operand)
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](walk(left), walk(right))
            case ast.Call(func=func, args=args) if ast.unparse(func) in _FUNCTIONS:
                return _FUNCTIONS[ast.unparse(func)](*(walk(arg) for arg in args))
            case ast.BoolOp(op=op, values=values):
                return (all if isinstance(op, ast.And) else any)(walk(item) for item in values)
        raise InputError(f"cannot evaluate size expression '{text}' over {dict(symbols)}")

    return walk(ast.parse(text, mode="eval"))
