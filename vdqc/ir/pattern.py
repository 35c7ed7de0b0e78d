"""Small patterns over nodes: what a rewrite looks for, written as the expression it stands for.

::

    x = any_("x")
    mean_square = op(A.mean, op(A.pow, x, 2), [-1], True)
    root = op(A.rsqrt, op(A.add, mean_square, number("eps")))
    found = match(op(A.mul, x, root, commutes=True), node)

A name that occurs twice must be the same node both times. The answer is a ``Match`` with the named
values, or a ``Mismatch`` that says where the graph differs, so that a pass can tell why it left a
node alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any, final

import torch
from torch import fx


@final
@dataclass(frozen=True)
class Match:
    """Values by name, and the op nodes that the pattern covers (its root last)."""

    values: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __bool__(self) -> bool:
        return True

    def is_private(self) -> bool:
        """True if nothing outside reads the nodes below the root, so that they may go."""
        inside = set(self.nodes)
        return all(user in inside for node in self.nodes[:-1] for user in node.users)


@final
@dataclass(frozen=True)
class Mismatch:
    """Why a pattern does not fit; false, so that ``if found := match(...)`` reads well."""

    reason: str

    def __bool__(self) -> bool:
        return False


#: What has been bound so far: named values, covered nodes.
_State = tuple[dict[str, Any], tuple[fx.Node, ...]]


@final
@dataclass(frozen=True)
class Op:
    """A call of one of ``targets`` (overloads or packets) whose first operands match ``operands``.

    Further operands are free unless ``exact``. ``name`` binds the node itself.
    """

    targets: tuple[Any, ...]
    operands: tuple[Any, ...]
    name: str = ""
    commutes: bool = False
    exact: bool = False


@final
@dataclass(frozen=True)
class Leaf:
    """Any value that passes ``test``; ``kind`` names it in a Mismatch."""

    name: str
    kind: str
    test: Callable[[Any], bool]


@final
@dataclass(frozen=True)
class Either:
    """The first alternative that fits."""

    alternatives: tuple[Any, ...]


def op(
    *parts: Any, name: str = "", commutes: bool = False, exact: bool = False, also: Any = ()
) -> Op:
    """``op(target, operand, ...)``: ``also`` are more targets, ``commutes`` tries both orders."""
    target, *operands = parts
    return Op((target, *also), tuple(operands), name, commutes, exact)


def any_(name: str = "") -> Leaf:
    """Any node."""
    return Leaf(name, "a value", lambda value: isinstance(value, fx.Node))


def param(name: str = "") -> Leaf:
    """A weight."""
    return Leaf(
        name, "a weight", lambda value: isinstance(value, fx.Node) and value.op == "get_attr"
    )


def number(name: str = "") -> Leaf:
    """A python int or float."""
    return Leaf(
        name,
        "a number",
        lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    )


def any_list(name: str = "") -> Leaf:
    """A list of sizes, axes or nodes."""
    return Leaf(name, "a list", lambda value: isinstance(value, (list, tuple)))


def where(pattern: Leaf, test: Callable[[Any], bool], kind: str) -> Leaf:
    """``pattern`` with one more condition, described by ``kind``."""
    return Leaf(pattern.name, kind, lambda value: pattern.test(value) and test(value))


def either(*alternatives: Any) -> Either:
    """One of several patterns."""
    return Either(alternatives)


def match(pattern: Any, node: Any) -> Match | Mismatch:
    """Fit ``pattern`` to ``node``."""
    found = _match(pattern, node, ({}, ()))
    return found if isinstance(found, Mismatch) else Match(*found)


def _match(pattern: Any, value: Any, state: _State) -> _State | Mismatch:
    match pattern:
        case Op():
            return _match_op(pattern, value, state)
        case Leaf():
            if not pattern.test(value):
                return Mismatch(f"expected {pattern.kind}, got {_show(value)}")
            return _bind(pattern.name, value, state)
        case Either(alternatives=alternatives):
            reasons = []
            for alternative in alternatives:
                found = _match(alternative, value, state)
                if not isinstance(found, Mismatch):
                    return found
                reasons.append(found.reason)
            return Mismatch("; ".join(reasons))
    same = type(pattern) is type(value) if isinstance(pattern, bool) else True
    if same and not isinstance(value, fx.Node) and pattern == value:
        return state
    return Mismatch(f"expected {pattern!r}, got {_show(value)}")


def _match_op(pattern: Op, value: Any, state: _State) -> _State | Mismatch:
    if not isinstance(value, fx.Node) or not _is_call(value, pattern.targets):
        return Mismatch(f"expected {' or '.join(map(_name, pattern.targets))}, got {_show(value)}")
    arity = len(pattern.operands)
    if len(value.args) < arity or (pattern.exact and len(value.args) != arity):
        return Mismatch(f"{_show(value)}: expected {arity} operands, got {len(value.args)}")
    orders = [pattern.operands]
    if pattern.commutes:
        orders = [(*head, *pattern.operands[2:]) for head in permutations(pattern.operands[:2])]
    failure = Mismatch("")
    for operands in orders:
        found = _match_all(operands, value.args, state)
        if not isinstance(found, Mismatch):
            names, nodes = found
            return _bind(pattern.name, value, (names, (*nodes, value)))
        failure = failure if failure.reason else found
    return failure


def _match_all(
    patterns: tuple[Any, ...], values: tuple[Any, ...], state: _State
) -> _State | Mismatch:
    for part, operand in zip(patterns, values, strict=False):
        found = _match(part, operand, state)
        if isinstance(found, Mismatch):
            return found
        state = found
    return state


def _bind(name: str, value: Any, state: _State) -> _State | Mismatch:
    names, nodes = state
    if not name:
        return state
    if name in names and names[name] is not value and names[name] != value:
        return Mismatch(f"'{name}' is {_show(names[name])} here and {_show(value)} there")
    return {**names, name: value}, nodes


def _is_call(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    packet = getattr(node.target, "overloadpacket", None)
    return node.op == "call_function" and (node.target in targets or packet in targets)


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target)
    return getattr(target, "__name__", str(target))


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"{_name(value.target)} (%{value.name})"
    return repr(value)
