"""Which parts of a call vary, and an example on which export can see that they do.

Export bakes every size of 0 or 1 and every python value, and takes sizes that are not marked for
constants. So: a size that differs between samples is marked; where samples show no difference every
size of at least 2 is tried; a batch of 1 is doubled first. Scalars that a sampler changes at every
step (timestep, guidance) become tensors of the batch size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from vdqc.base.diagnostics import Diagnostics
from vdqc.ir.sample import Sample
from vdqc.ir.signature import call_leaves

#: Arguments that are taken as float32 tensors of the batch size, whatever number a caller gives.
#: Models cast them to what they compute in, so float32 holds every value exactly.
PROMOTED = ("timestep", "timesteps", "guidance")


@final
@dataclass(frozen=True)
class Plan:
    """One attempt at export.

    Attributes:
        call: keyword arguments of the example, in ``forward``'s order.
        shapes: the ``dynamic_shapes`` for it.
        varying: (path, axis) of sizes that samples show to vary; axis -1 for a python integer.
        promoted: arguments that were turned into tensors.
    """

    call: Mapping[str, Any]
    shapes: Mapping[str, Any]
    varying: frozenset[tuple[str, int]]
    promoted: tuple[str, ...]


def plans(
    samples: Sequence[Sample], parameters: Sequence[str], diagnostics: Diagnostics
) -> list[Plan]:
    """Attempts, the most general first; the last one changes nothing about the first sample."""
    calls = _alike([_ordered(sample.inputs, parameters) for sample in samples], diagnostics)
    promoted_calls = [promote(call) for call in calls]
    attempts = []
    for variants, promoted in ((promoted_calls, True), (calls, False)):
        varying = _varying(variants)
        example = max(variants, key=lambda call: _open_axes(call, varying))
        names = tuple(name for name in PROMOTED if isinstance(example.get(name), Tensor))
        if varying:
            wide = _widen(example) if _has_unit(example, varying) else example
            marks = varying
        else:
            wide = _widen(example) if _unit_batch(example) else example
            marks = _every_axis(wide)
        attempts.append(Plan(wide, _shapes(wide, marks), varying, names if promoted else ()))
        if wide is not example:
            shapes = _shapes(example, marks)
            attempts.append(Plan(example, shapes, varying, names if promoted else ()))
    if not attempts[0].varying:
        tensors_only = {mark for mark in _every_axis(calls[0]) if mark[1] >= 0}
        attempts.append(Plan(calls[0], _shapes(calls[0], tensors_only), frozenset(), ()))
    return _distinct(attempts)


def promote(call: Mapping[str, Any]) -> dict[str, Any]:
    """``call`` with timestep and guidance as float32 tensors, scalars repeated over the batch."""
    result = dict(call)
    batch = next((leaf.shape[0] for leaf in _tensors(call) if leaf.ndim >= 2), 1)
    for name in PROMOTED:
        value = call.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
            continue
        tensor = torch.as_tensor(value)
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        result[name] = tensor.expand(batch).clone() if tensor.ndim == 0 else tensor
    return result


def coincidences(plan: Plan, diagnostics: Diagnostics) -> None:
    """Say which sizes of the example hide an axis from export."""
    leaves = call_leaves(plan.call)
    units = sorted(
        f"{path} axis {axis}"
        for path, axis in plan.varying
        if axis >= 0 and leaves[path].shape[axis] < 2
    )
    if units:
        diagnostics.warning(
            "",
            "unit-size",
            f"{', '.join(units)} is 1 in the example, so the graph takes only 1 there",
            "give a first sample whose sizes are all at least 2",
        )


def _ordered(inputs: Mapping[str, Any], parameters: Sequence[str]) -> dict[str, Any]:
    names = [name for name in parameters if name in inputs and name != "return_dict"]
    return {name: inputs[name] for name in names}


def _alike(calls: list[dict[str, Any]], diagnostics: Diagnostics) -> list[dict[str, Any]]:
    """The calls that have the first one's structure; one graph holds for one structure."""
    structure = [_structure(call) for call in calls]
    other = sum(one != structure[0] for one in structure)
    if other:
        diagnostics.remark(
            "",
            "sample-structure",
            f"{other} of {len(calls)} samples give other arguments than the first; "
            "the graph is captured for the first sample's",
        )
    return [call for call, one in zip(calls, structure, strict=True) if one == structure[0]]


def _structure(call: Mapping[str, Any]) -> list[Any]:
    leaves = call_leaves(call)
    return [
        (path, leaf.ndim if isinstance(leaf, Tensor) else type(leaf).__name__)
        for path, leaf in leaves.items()
    ]


def _tensors(call: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for leaf in call_leaves(call).values() if isinstance(leaf, Tensor)]


def _varying(calls: Sequence[Mapping[str, Any]]) -> frozenset[tuple[str, int]]:
    first, *others = [call_leaves(call) for call in calls]
    found = set()
    for path, leaf in first.items():
        for other in others:
            if isinstance(leaf, Tensor):
                found |= {
                    (path, axis)
                    for axis in range(leaf.ndim)
                    if leaf.shape[axis] != other[path].shape[axis]
                }
            elif type(leaf) is int and other[path] != leaf:
                found.add((path, -1))
    return frozenset(found)


def _open_axes(call: Mapping[str, Any], varying: frozenset[tuple[str, int]]) -> int:
    leaves = call_leaves(call)
    return sum(axis < 0 or leaves[path].shape[axis] >= 2 for path, axis in varying)


def _has_unit(call: Mapping[str, Any], varying: frozenset[tuple[str, int]]) -> bool:
    leaves = call_leaves(call)
    return any(axis == 0 and leaves[path].shape[0] == 1 for path, axis in varying)


def _unit_batch(call: Mapping[str, Any]) -> bool:
    return next((leaf.shape[0] == 1 for leaf in _tensors(call) if leaf.ndim >= 2), False)


def _widen(call: Mapping[str, Any]) -> dict[str, Any]:
    """``call`` with every tensor of batch 1 repeated to batch 2."""

    def twice(leaf: Any) -> Any:
        is_single = isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == 1
        return torch.cat([leaf, leaf]) if is_single else leaf

    return pytree.tree_map(twice, dict(call))


def _every_axis(call: Mapping[str, Any]) -> frozenset[tuple[str, int]]:
    found = set()
    for path, leaf in call_leaves(call).items():
        if isinstance(leaf, Tensor):
            found |= {(path, axis) for axis in range(leaf.ndim) if leaf.shape[axis] >= 2}
        elif type(leaf) is int and leaf >= 2:
            found.add((path, -1))
    return frozenset(found)


def _shapes(call: Mapping[str, Any], marks: frozenset[tuple[str, int]] | set[Any]) -> Any:
    """``dynamic_shapes`` of ``call`` with AUTO at every marked (path, axis)."""
    flat, spec = pytree.tree_flatten(dict(call))
    paths = [path for path, leaf in call_leaves(call).items() if leaf is not None]
    nones = [path for path, leaf in call_leaves(call).items() if leaf is None]
    if len(flat) == len(paths) + len(nones):  # this torch counts None as a leaf
        paths = list(call_leaves(call))
    leaves = []
    for path, leaf in zip(paths, flat, strict=True):
        axes = sorted(axis for marked, axis in marks if marked == path)
        if axes == [-1]:
            leaves.append(Dim.AUTO)
        else:
            leaves.append({axis: Dim.AUTO for axis in axes} if isinstance(leaf, Tensor) else None)
    return pytree.tree_unflatten(leaves, spec)


def _distinct(attempts: list[Plan]) -> list[Plan]:
    seen: list[Any] = []
    kept = []
    for plan in attempts:
        key = (_sizes(plan.call), plan.shapes)
        if key not in seen:
            seen.append(key)
            kept.append(plan)
    return kept


def _sizes(call: Mapping[str, Any]) -> list[Any]:
    return [
        (path, leaf.dtype, leaf.shape) if isinstance(leaf, Tensor) else (path, leaf)
        for path, leaf in call_leaves(call).items()
    ]
