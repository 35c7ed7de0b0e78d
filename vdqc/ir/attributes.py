"""What lies at a dotted name of a module: weights under the names of the captured model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has_attribute(root: nn.Module, name: str) -> bool:
    """Whether ``root`` has something at the dotted ``name``."""
    value: Any = root
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


def attribute(root: nn.Module, name: str) -> Any:
    """What is at the dotted ``name``."""
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


def set_attribute(root: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` at the dotted ``name``, as a parameter where it is one."""
    path, _, leaf = name.rpartition(".")
    place: Any = attribute(root, path) if path else root
    delattr(place, leaf)
    if isinstance(value, nn.Parameter):
        place.register_parameter(leaf, value)
    else:
        place.register_buffer(leaf, value)


def owner(root: nn.Module, name: str) -> nn.Module:
    """The module that the dotted ``name`` lies in; made where there is none."""
    for part in name.split(".")[:-1]:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root
