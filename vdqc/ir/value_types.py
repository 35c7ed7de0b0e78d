"""Types of a program's values as text, and fake values made from such text.

``bf16[2, 4*s0]`` a tensor, ``s0 + 1`` a size, ``[f32[2], f32[3]]`` several values, ``?`` a value
that has no type here (a float computed from sizes). Size expressions are integer arithmetic over
symbols.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vdqc.ir.printer import SHORT_DTYPE

_DTYPES = {text: dtype for dtype, text in SHORT_DTYPE.items()}

_BINARY: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


@final
class TypeWriter:
    """Values to text. ``names`` renames symbols; ``hints`` collects a size for each one used."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names
        self.hints: dict[str, int] = {}

    def text(self, value: Any) -> str:
        """The type of ``value``."""
        match value:
            case Tensor():
                sizes = ", ".join(self.size(size) for size in value.shape)
                return f"{SHORT_DTYPE[value.dtype]}[{sizes}]"
            case list() | tuple():
                return f"[{', '.join(self.text(item) for item in value)}]"
            case torch.SymInt() | int():
                return self.size(value)
        return "?"

    def size(self, size: int | torch.SymInt) -> str:
        """A number, or an expression over symbols if it can be read back."""
        if isinstance(size, int):
            return str(int(size))
        expression = size.node.expr
        renamed = {}
        hints = {}
        for symbol in expression.free_symbols:
            name = self.names.get(str(symbol), str(symbol))
            renamed[symbol] = type(symbol)(name, integer=True)
            hints[name] = _hint(size, symbol)
        text = str(expression.xreplace(renamed))
        try:
            found = _evaluate(ast.parse(text, mode="eval").body, hints)
        except (ValueError, SyntaxError):
            found = None
        if found is None or found != size.node.hint:
            return str(size.node.hint)
        self.hints.update(hints)
        return text


def _hint(size: torch.SymInt, symbol: Any) -> int:
    env = size.node.shape_env
    values = getattr(env, "backed_var_to_val", None) or env.var_to_val
    return int(values[symbol])


@final
class TypeReader:
    """Text to fake values that share one mode and one set of symbols."""

    def __init__(self, hints: Mapping[str, int]) -> None:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

        class NamedShapeEnv(ShapeEnv):
            """Numbers each symbol as the text does, so that it prints under the same name."""

            def _generate_unique_id(self, source_name: str) -> int:
                number = source_name.removeprefix("size_s")
                return (
                    int(number) if number.isdecimal() else super()._generate_unique_id(source_name)
                )

        env = NamedShapeEnv()
        self.mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
        self.symbols: dict[str, Any] = {}
        for name, hint in hints.items():
            source = ConstantSource(f"size_{name}")
            symbol = env.create_symbol(max(2, int(hint)), source, DimDynamic.DYNAMIC)
            self.symbols[name] = env.create_symintnode(symbol, hint=max(2, int(hint)))
        self._values: dict[str, Any] = {"?": None}

    def value(self, text: str) -> Any:
        """A fake tensor, a size, a list of those, or None; equal texts share one value.

        Making a fake tensor with symbolic sizes takes 0.7 ms (measured), and a program of 10,000
        nodes has some hundred types.
        """
        if text not in self._values:
            with self.mode:
                body = ast.parse(text.replace("[]", "[()]"), mode="eval").body
                self._values[text] = self._value(body)
        return self._values[text]

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.List(elts=items):
                return [self._value(item) for item in items]
            case ast.Subscript(value=ast.Name(id=dtype), slice=sizes):
                parts = sizes.elts if isinstance(sizes, ast.Tuple) else [sizes]
                shape = [_evaluate(part, self.symbols) for part in parts]
                return torch.empty(shape, dtype=_DTYPES[dtype])
        return _evaluate(node, self.symbols)


def _evaluate(node: ast.expr, symbols: Mapping[str, Any]) -> Any:
    """Value of an integer expression; ValueError for anything else."""
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in symbols:
            return symbols[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, symbols)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_evaluate(left, symbols), _evaluate(right, symbols))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            values = [_evaluate(arg, symbols) for arg in args]
            result = values[0]
            for value in values[1:]:
                result = _FUNCTIONS[name](result, value)
            return result
    raise ValueError(f"'{ast.unparse(node)}' is not an integer expression over sizes")
