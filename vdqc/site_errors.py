"""How far every site's output is from the float model's, call by call.

Both models run the same calls; the outputs of equally named sites are compared where they appear::

    SQNR = 10 log10( sum y² / sum (y' - y)² )         y float, y' compiled, over up to 65536 values

The compiled side is the lowered program as it runs, so that a site's error holds that of everything
before it in the same call; the float side is the user's own model, looked at through its calls of
``linear``, ``conv`` and ``scaled_dot_product_attention`` and through the outputs of its blocks.

Exact passes may leave a site's output in another basis. Channels in another order are put back;
outputs that were rotated or scaled for their readers have no counterpart in the float model and are
listed with that reason: what reads them undoes it, and is measured.

Error: of values beyond 65536 elements the same rows of both are sampled, evenly with a jitter.
Source: SQNR as in ``vdqc.base.numerics``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from vdqc.base import numerics
from vdqc.base.block_mask import blocks, kept_blocks
from vdqc.base.sparsity import MaskPolicy
from vdqc.ir.blocks import block_name, block_of
from vdqc.ir.names import weighted_name
from vdqc.ir.site import note
from vdqc.observe import observed, produced_sites, programs_of

#: Elements of a value that are compared.
LIMIT = 1 << 16
_WEIGHTED = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_HALVES = re.compile(r"halves\{(\d+)\}")
_MASK = "video_mask"


@final
@dataclass(frozen=True)
class SiteError:
    """One site, or one block's output (``kind`` is ``block``).

    Attributes:
        sqnr_db: one per call, inf where equal, None where the call did not reach it.
        why: why nothing was measured, or "".
    """

    name: str
    block: str
    kind: str
    sqnr_db: tuple[float | None, ...] = ()
    why: str = ""


@final
@dataclass(frozen=True)
class SeenMask:
    """The blocks that one attention computed in one call: ``kept`` is bool[H, R, C] of its first
    sample, in the order of tokens ``order`` int64[H, T]."""

    call: int
    kept: Tensor
    order: Tensor
    block: int


@final
class SiteErrors:
    """Records while both models run the same calls: first the float one, then the compiled one."""

    def __init__(self, model: nn.Module, compiled: nn.Module) -> None:
        self.calls = 0
        self.masks: dict[str, SeenMask] = {}
        self._model, self._compiled = model, compiled
        self._float: dict[str, Tensor] = {}
        self._found: dict[str, dict[int, float]] = {}
        self._reasons: dict[str, str] = {}
        programs = [_Program(program) for program in programs_of(compiled)]
        self._sites = {node: site for p in programs for node, site in p.sites.items()}
        self._mask_nodes = {node: name for p in programs for node, name in p.masks.items()}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, calls of the float model are remembered, and the compiled model is compared."""
        with ExitStack() as stack:
            stack.enter_context(_float_taps(self._model, self._begin, self._keep))
            stack.enter_context(observed(self._compiled, self._look))
            yield

    def errors(self) -> tuple[SiteError, ...]:
        """Every site and block of the compiled program, in program order."""
        places = dict.fromkeys(self._sites.values())
        return tuple(self._error(site) for site in places)

    def _error(self, site: _Place) -> SiteError:
        found = self._found.get(site.name, {})
        if not found:
            why = self._reasons.get(site.name, "the float model's calls do not show it")
            return SiteError(site.name, site.block, site.kind, (), why)
        values = tuple(found.get(call) for call in range(self.calls))
        return SiteError(site.name, site.block, site.kind, values)

    def _begin(self) -> None:
        self._float.clear()
        self.calls += 1

    def _keep(self, name: str, value: Tensor) -> None:
        self._float[name] = value

    def _look(self, node: fx.Node, value: Any, seconds: float) -> None:
        if node in self._mask_nodes:
            self._see_mask(node, value)
        site = self._sites.get(node)
        if site is None or not isinstance(value, Tensor):
            return
        if site.why:
            self._reasons[site.name] = site.why
            return
        expected = self._float.get(site.name)
        actual = sampled(value)
        if expected is None or expected.shape != actual.shape:
            return
        if site.width:
            expected = in_halves(expected, site.width)
        error = numerics.sqnr_db(actual.double(), expected.double())
        self._found.setdefault(site.name, {})[self.calls - 1] = error

    def _see_mask(self, node: fx.Node, value: Any) -> None:
        """Keep the last mask that leaves something out: dense steps come first, and say nothing."""
        order, _, which, starts, counts, ids = (part.cpu() for part in value)
        policy = MaskPolicy.parse(str(node.args[6]))
        kept = kept_blocks(starts[0], counts[0], ids, blocks(order.shape[1], policy.block))
        name = self._mask_nodes[node]
        if name in self.masks and bool(kept.all()):
            return
        heads = which.shape[1]
        kept = kept.expand(heads, -1, -1)
        self.masks[name] = SeenMask(self.calls - 1, kept, order[which[0].long()], policy.block)


def sampled(value: Tensor) -> Tensor:
    """``value`` as f32[rows, C] on the CPU: whole rows of it, up to ``LIMIT`` elements."""
    flat = value.detach().reshape(-1, value.shape[-1]) if value.ndim else value.reshape(1, 1)
    rows = max(1, LIMIT // max(1, flat.shape[1]))
    if len(flat) > rows:
        cell = torch.arange(rows, dtype=torch.float64)
        place = (cell + cell * 0.6180339887498949 % 1) * (len(flat) / rows)
        flat = flat[place.long().clamp_max(len(flat) - 1).to(flat.device)]
    return flat.float().cpu().clone()


def in_halves(value: Tensor, width: int) -> Tensor:
    """Channels [..., C] as lowering orders them for RoPE: even ones of each head, then odd ones."""
    heads: Tensor = value.reshape(*value.shape[:-1], -1, width // 2, 2)
    return heads.mT.flatten(-3)


@final
@dataclass(frozen=True)
class _Place:
    """What a node of the compiled program holds, and how it compares."""

    name: str
    block: str
    kind: str
    width: int = 0  # of a head whose channels are in another order
    why: str = ""


@final
class _Program:
    """Where sites, block outputs and masks are in one program."""

    def __init__(self, program: fx.GraphModule) -> None:
        nodes = list(program.graph.nodes)
        self.sites = {node: _place(node, name) for node, name in produced_sites(nodes).items()}
        for name, outputs in _block_outputs(nodes).items():
            if outputs[-1] not in self.sites:  # the residual stream leaves last
                self.sites[outputs[-1]] = _Place(name, name, "block")
        self.masks = sparse_masks(nodes)


def sparse_masks(nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """The node that makes each sparse attention's mask, and the attention's site."""
    found = {}
    for node, name in produced_sites(nodes).items():
        mask = _mask_of(node) if note(node).get("policy") else None
        if mask is not None:
            found[mask] = name
    return found


def _place(node: fx.Node, name: str) -> _Place:
    entries = note(node)
    kind, block = str(entries.get("kind", "linear")), block_of(name)
    basis = str(entries.get("basis", ""))
    if kind == "attention":
        basis = _basis_of_value(node)
    halves = _HALVES.fullmatch(basis)
    if halves is not None:
        return _Place(name, block, kind, int(halves[1]))
    why = f"its output is {basis} for what reads it, which undoes that" if basis else ""
    return _Place(name, block, kind, 0, why)


def _basis_of_value(node: fx.Node | None) -> str:
    """Basis of the value operand of an attention, back to the linear that made it."""
    start = node
    while isinstance(node, fx.Node) and node.op == "call_function":
        entries = note(node)
        if node is not start and "site" in entries:
            basis = str(entries.get("basis", ""))
            return basis if entries.get("kind") != "attention" else ""
        tensors = [a for a in node.args[:3] if isinstance(a, fx.Node)]
        attends = "attention" in str(node.target) and len(tensors) == 3
        node = tensors[2] if attends else (tensors[0] if tensors else None)
    return ""


def _mask_of(node: fx.Node) -> fx.Node | None:
    """The mask of the attention that ends in ``node``: the nearest one against the flow."""
    waiting, seen = [node], {node}
    for _ in range(64):
        if not waiting:
            return None
        now = waiting.pop(0)
        if _MASK in str(now.target):
            return now
        fresh = [operand for operand in now.all_input_nodes if operand not in seen]
        seen.update(fresh)
        waiting += fresh
    return None


def _block_outputs(nodes: list[fx.Node]) -> dict[str, list[fx.Node]]:
    """Tensors with as many axes as a residual stream that leave a block, by block."""
    found: dict[str, list[fx.Node]] = {}
    for node in nodes:
        name = block_name(node) if node.op == "call_function" else ""
        value = node.meta.get("val")
        if not name or not isinstance(value, Tensor) or value.ndim < 3:
            continue
        if any(block_name(user) != name for user in node.users):
            found.setdefault(name, []).append(node)
    return found


# -- the float model -------------------------------------------------------------------------------


@contextmanager
def _float_taps(
    model: nn.Module, begin: Callable[[], None], keep: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Name and show what the float model's sites and blocks make, in every call of ``model``."""
    taps = _Taps(model, keep)
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not name:
                begin()
                taps.begin()
            taps.paths.append(name)

        return hook

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            taps.paths.pop()
            if name and block_of(name) == name:
                shown = [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor)]
                if len(shown) == 1:
                    keep(name, sampled(shown[0]))

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        # before hooks that are there already: one of those may run the compiled model
        handles.append(module.register_forward_hook(leave(name), prepend=True))
    try:
        with taps:
            yield
    finally:
        for handle in handles:
            handle.remove()


@final
class _Taps(TorchFunctionMode):
    """Sees the calls of functions whose results are sites."""

    def __init__(self, model: nn.Module, keep: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self.paths: list[str] = []
        self._names = {id(v): weighted_name(name) for name, v in model.named_parameters()}
        self._counts: dict[str, int] = {}
        self._keep = keep

    def begin(self) -> None:
        """A call of the model begins."""
        self.paths.clear()
        self._counts.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.paths:
            return result
        name = ""
        if func in _WEIGHTED:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            name = self._names.get(id(weight), "")
        elif func is F.scaled_dot_product_attention:
            name = f"{self.paths[-1]}:attention"
        if name and isinstance(result, Tensor):
            self._counts[name] = self._counts.get(name, 0) + 1
            again = f"#{self._counts[name]}" if self._counts[name] > 1 else ""
            self._keep(name + again, sampled(result))
        return result


def worst_sites(errors: tuple[SiteError, ...], count: int) -> list[tuple[SiteError, int, float]]:
    """The sites with the lowest SQNR in any call: (site, call, dB), worst first."""
    found = []
    for error in errors:
        reached = [(v, i) for i, v in enumerate(error.sqnr_db) if v is not None]
        if reached and error.kind != "block":
            value, call = min(reached)
            found.append((error, call, value))
    return sorted(found, key=lambda item: item[2])[:count]
