"""Whether a compiled program fits the machine that it is loaded on, and the device it moves to.

=========== =============================== ==============================================
compiled    on a machine                    may move to
=========== =============================== ==============================================
``cpu``     any                             the CPU alone: its kernels were chosen for that
``sm90``    with a GPU of sm90 or later     that GPU and back to the CPU, to be offloaded
``sm90``    without one, ``reference=True`` the CPU: the kernels' references, slow
=========== =============================== ==============================================

A later GPU compiles the same kernels for itself; an earlier one lacks what they were chosen for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode

from vdqc.base.diagnostics import ArtifactError, InputError
from vdqc.base.target import Target


def check_machine(path: Path | str, target: Target, reference: bool) -> None:
    """Raise ArtifactError unless this machine runs programs for ``target``; warn of references."""
    found = unfit_gpu(target)
    if found is None:
        return
    if reference:
        warnings.warn(
            f"{path} was compiled for {target} and runs here through the references of its "
            "kernels, which are slow: compile with --target cpu to run it on this machine",
            stacklevel=3,
        )
        return
    raise ArtifactError(
        f"{path} was compiled for {target}: expected a GPU of {target} or later, found {found}",
        "run it on such a machine, or compile the model for this one (--target auto)",
        "to see what it computes, slowly, through the references of its kernels: "
        "vdqc.load(path, reference=True), vdqc run --reference",
        code="target",
    )


def unfit_gpu(target: Target) -> str | None:
    """The GPU of this machine (``sm80``, ``none``) if it cannot run programs for ``target``."""
    if target.device != "cuda":
        return None
    if not torch.cuda.is_available():
        return "none"
    found = "sm{}{}".format(*torch.cuda.get_device_capability())
    return None if _number(found) >= _number(target.name) else found


def destination(move: Callable[[Tensor], Tensor], dtype: torch.dtype, target: Target) -> Tensor:
    """What ``move`` makes of an empty tensor; raises InputError for a device that does not fit.

    A device that torch has not is told as well.
    """
    try:
        moved = move(torch.empty(0, dtype=dtype))
    except (AssertionError, RuntimeError) as error:
        device = _wanted(move, dtype)
        if device == "cuda" and target.device == "cpu":
            raise _unfit(target, device) from error
        raise InputError(
            f"expected a device that torch finds on this machine, got {device or 'another'}",
            str(error).splitlines()[0],
        ) from error
    if moved.device.type == "cuda" and target.device == "cpu":
        raise _unfit(target, str(moved.device))
    return moved


def name_device(program: fx.GraphModule, device: torch.device) -> bool:
    """Write ``device`` where the program names another; True if any changed."""
    changed = False
    for node in program.graph.nodes:
        named = node.kwargs.get("device")
        if isinstance(named, torch.device) and named != device:
            node.update_kwarg("device", device)
            changed = True
    if changed:
        program.recompile()
    return changed


@contextmanager
def following(follower: nn.Module, leader: nn.Module) -> Iterator[None]:
    """``leader`` moves inside; what ``follower`` shared of its weights it shares again after.

    In place where torch can: what is compiled stays so.
    """
    names = {_place(tensor): name for name, tensor in _tensors(leader)}
    groups: Iterator[dict[str, Any]] = (
        group for each in follower.modules() for group in (each._parameters, each._buffers)
    )
    shared = [
        (group, name, names[_place(tensor)])
        for group in groups
        for name, tensor in group.items()
        if tensor is not None and _place(tensor) in names
    ]
    yield
    moved = dict(_tensors(leader))
    for group, name, leading in shared:
        mine, now = group[name], moved[leading].detach()
        if torch._has_compatible_shallow_copy_type(mine, now):
            mine.data = now
        else:  # to and from the meta device
            is_parameter = isinstance(mine, nn.Parameter)
            group[name] = nn.Parameter(now, requires_grad=False) if is_parameter else now


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """The same for tensors on one storage that begin and run alike."""
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.dtype, *tensor.shape


def _wanted(move: Callable[[Tensor], Tensor], dtype: torch.dtype) -> str:
    """Type of the device that ``move`` goes to, which torch cannot reach; "" if it does not say.

    A fake tensor goes anywhere, but for ``Tensor.cuda`` of a torch without CUDA.
    """
    try:
        with FakeTensorMode():
            return move(torch.empty(0, dtype=dtype)).device.type
    except (AssertionError, RuntimeError) as error:
        return "cuda" if "cuda" in str(error).lower() else ""


def _unfit(target: Target, device: str) -> InputError:
    return InputError(
        f"the program was compiled for {target}, it cannot move to {device}",
        "compile the model again for that GPU: --target sm90, or auto on its machine",
        code="target",
    )


def _number(name: str) -> int:
    return int(name.removeprefix("sm"))
