"""What a stand-in shows of the model it stands in for: configuration, output class, call paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from vdqc.base.diagnostics import InputError
from vdqc.ir.origin import Origin
from vdqc.ir.signature import IntInput, Signature, output_type

Key = str | int
_KEY = re.compile(r"\[(?:(\d+)|'([^']*)'|\"([^\"]*)\")\]")


def config_object(origin: Origin) -> Any:
    """The configuration as the model's library presents it.

    A transformers configuration object where the class is from there and its type is known, else
    diffusers' frozen dictionary, whose entries are attributes too.
    """
    config = dict(origin.config)
    if origin.model_class.startswith("transformers.") and "model_type" in config:
        from transformers import AutoConfig

        return AutoConfig.for_model(config.pop("model_type"), **config)
    from diffusers.configuration_utils import FrozenDict

    return FrozenDict(config)


@final
@dataclass(frozen=True)
class Leaf:
    """Where one leaf stands in a call: a parameter, then keys into collections."""

    path: str
    name: str
    keys: tuple[Key, ...]

    @staticmethod
    def parse(path: str) -> Leaf:
        """``image_rotary_emb[0]``, ``added_cond_kwargs['text_embeds']``."""
        name = path.partition("[")[0]
        keys = [
            int(index) if index else first or second
            for index, first, second in _KEY.findall(path[len(name) :])
        ]
        return Leaf(path, name, tuple(keys))

    def of(self, call: Mapping[str, Any]) -> Any:
        """The value at this place; None if a collection on the way is None."""
        value = call[self.name]
        for key in self.keys:
            value = None if value is None else value[key]
        return value


@final
class TracedBinding:
    """``Signature.bind`` in the part of python that ``torch.compile`` follows without a break.

    Names, baked values, dtypes and ranks are checked while tracing, where they are constants; sizes
    are left to the program, because a check of each would fix it.
    """

    def __init__(self, signature: Signature) -> None:
        self.parameters = signature.parameters
        self.defaults = {name: signature.defaults.get(name) for name in signature.parameters}
        self.inputs = [Leaf.parse(entry.path) for entry in signature.inputs]
        self.dtypes = [
            None if isinstance(entry, IntInput) else getattr(torch, entry.dtype)
            for entry in signature.inputs
        ]
        self.ranks = [
            0 if isinstance(entry, IntInput) else len(entry.sizes) for entry in signature.inputs
        ]
        self.statics = [(Leaf.parse(path), value) for path, value in signature.statics.items()]
        self.scalars = [_scalar(index, signature) for index in range(len(signature.inputs))]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The program's inputs for a call."""
        call = dict(self.defaults)
        for name, value in zip(self.parameters, args, strict=False):
            call[name] = value
        for name, value in kwargs.items():
            if name not in call:
                raise InputError(f"unknown argument '{name}'")
            call[name] = value
        for leaf, expected in self.statics:
            value = leaf.of(call)
            if type(value) is not type(expected) or value != expected:
                raise InputError(f"'{leaf.path}' was {expected!r} at capture, got another value")
        values = [leaf.of(call) for leaf in self.inputs]
        for index, sizes in enumerate(self.scalars):
            if sizes is not None:
                values[index] = self._spread(values, index, sizes)
        for leaf, value, dtype, rank in zip(
            self.inputs, values, self.dtypes, self.ranks, strict=True
        ):
            if dtype is not None and (value.dtype != dtype or value.ndim != rank):
                raise InputError(f"expected {dtype} with {rank} axes for '{leaf.path}'")
        return values

    def _spread(self, values: Sequence[Any], index: int, sizes: Sequence[Any]) -> Tensor:
        """A number, or a tensor of one, for every row that another input shows."""
        value = values[index]
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=self.dtypes[index])
        value = value.to(self.dtypes[index])
        if value.ndim == 0:
            value = value.reshape((1,) * len(sizes))
        if all(size == 1 for size in value.shape):
            value = value.expand([_shown(size, values) for size in sizes])
        return value


def _shown(size: Any, values: Sequence[Any]) -> Any:
    return size if isinstance(size, int) else values[size[0]].shape[size[1]]


def _scalar(index: int, signature: Signature) -> tuple[Any, ...] | None:
    """For an input that may be given as a number: each size, or the (input, axis) that shows it."""
    entry = signature.inputs[index]
    if isinstance(entry, IntInput) or entry.path not in signature.promoted:
        return None
    shown: dict[Any, Any] = {}
    for number, other in enumerate(signature.inputs):
        if number != index and not isinstance(other, IntInput):
            for axis, size in enumerate(other.sizes):
                shown.setdefault(size, (number, axis))
    return tuple(size if isinstance(size, int) else shown.get(size, 1) for size in entry.sizes)


def output_builder(signature: Signature) -> Callable[[Sequence[Any], bool], Any]:
    """``Signature.rebuild`` with its class looked up once, traceable."""
    if not signature.output_class.startswith(("diffusers.", "transformers.")):
        return signature.rebuild
    cls = output_type(signature.output_class)
    fields = signature.output_fields

    def build(outputs: Sequence[Any], return_dict: bool) -> Any:
        if not return_dict:
            return tuple(outputs)
        return cls(**dict(zip(fields, outputs, strict=True)))

    return build
