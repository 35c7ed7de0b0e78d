"""Graph: an aten-level program with its weights, its sites and its stage.

It is the only thing passes edit. The program is a ``torch.fx.GraphModule``: placeholders are the
tensors of a call (``Signature`` binds them), ``get_attr`` nodes are weights under their original
names, everything else is a functional op with a fake value in ``meta["val"]``. Edits go through
``call``, ``replace`` and ``set_param``, which keep fake values, sites, provenance and weights in
step. Weights are shared with the captured model and never written in place.
"""

from __future__ import annotations

import copy
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from vdqc.base.diagnostics import ConfigError, nearest
from vdqc.base.scheme import QuantScheme
from vdqc.ir.attributes import attribute, owner
from vdqc.ir.blocks import Block, blocks_of
from vdqc.ir.finished import Finished
from vdqc.ir.interpreter import Interpreter
from vdqc.ir.names import name_sites, selects
from vdqc.ir.origin import Origin
from vdqc.ir.signature import Signature
from vdqc.ir.site import Site, SiteKind, note, set_note
from vdqc.ir.weights import StoredTensor, spill


class Stage(enum.IntEnum):
    """How far a graph has come; passes declare where they run by it."""

    CAPTURED = 0
    ANNOTATED = 1
    COMPRESSED = 2
    LOWERED = 3

    def __str__(self) -> str:
        return self.name.lower()


@final
class Graph:
    """See the module's text. ``version`` grows with every edit; analyses are cached by it.

    A graph larger than memory spills the weights that passes make into the folder ``spill``, and
    keeps finished work on weights in ``finished`` (``vdqc.ir.resume``).
    """

    def __init__(
        self,
        module: fx.GraphModule,
        signature: Signature,
        *,
        origin: Origin | None = None,
        stage: Stage = Stage.CAPTURED,
        stored: Mapping[str, StoredTensor] | None = None,
        spill: Path | None = None,
        finished: Finished | None = None,
    ) -> None:
        self.module = module
        self.signature = signature
        self.origin = origin or Origin()
        self.stage = stage
        self.stored = dict(stored or {})
        self.spill = spill
        self.finished = finished
        self.free: set[str] = set()
        self.transforms: Any = None  # a vdqc.ir.transforms.Transforms, where they are recorded
        self.version = 0
        self.provenance = ""
        self._compiled_version = -1
        if stage is Stage.CAPTURED:
            name_sites(module.graph)

    # -- reading ------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[fx.Node]:
        """Every node, in order; a copy, so that the graph may be edited while looping."""
        return list(self.module.graph.nodes)

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders, in the order of ``signature.inputs``."""
        return [node for node in self.module.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        """The output node."""
        return next(iter(reversed(self.module.graph.nodes)))

    def sites(self, select: str = "*", kind: SiteKind | None = None) -> list[Site]:
        """Sites that match the glob ``select``, or one of several in ``a|b``, in program order."""
        found = [_site(node) for node in self.module.graph.nodes if "site" in note(node)]
        return [
            site
            for site in found
            if (kind is None or site.kind is kind) and selects(select, site.name)
        ]

    def site(self, name: str) -> Site:
        """The site of exactly that name; raises ConfigError with the nearest one."""
        sites = {site.name: site for site in self.sites()}
        if name not in sites:
            raise ConfigError(f"no site is named '{name}'", nearest(name, sites))
        return sites[name]

    def peers(self, site: Site) -> list[Site]:
        """Linear sites that read the same value as ``site``, itself included (q, k, v)."""
        return [
            other
            for user in site.input.users
            if "site" in note(user)
            and (other := _site(user)).kind is SiteKind.LINEAR
            and other.input is site.input
        ]

    def groups(self, select: str = "*") -> list[list[Site]]:
        """Linear sites in groups of peers, in program order; a group is kept if any one matches."""
        wanted = {site.name for site in self.sites(select, SiteKind.LINEAR)}
        seen: dict[fx.Node, list[Site]] = {}
        for site in self.sites(kind=SiteKind.LINEAR):
            seen.setdefault(site.input, []).append(site)
        return [group for group in seen.values() if any(site.name in wanted for site in group)]

    def blocks(self) -> list[Block]:
        """Repeated blocks (children of a ModuleList), in program order, with their boundaries."""
        return blocks_of(self.module.graph)

    def param_names(self) -> list[str]:
        """Names of all weights that the program reads."""
        targets = (node.target for node in self.module.graph.nodes if node.op == "get_attr")
        return list(dict.fromkeys(str(target) for target in targets))

    def param(self, name: str) -> Tensor:
        """The weight ``name``; read from its file if it lives there, never cached."""
        if name in self.stored:
            return self.stored[name].read()
        tensor: Tensor = attribute(self.module, name)
        return tensor.detach() if name not in self.free else tensor

    def is_constant(self, node: fx.Node) -> bool:
        """True if no input of the call reaches ``node``: it is a function of weights alone."""
        waiting, seen = [node], set()
        while waiting:  # not by recursion: a residual stream is thousands of nodes deep
            found = waiting.pop()
            if found in seen or found.op == "get_attr":
                continue
            if found.op != "call_function" or not found.all_input_nodes:
                return False
            seen.add(found)
            waiting.extend(found.all_input_nodes)
        return True

    def evaluate(self, node: fx.Node) -> Tensor:
        """Value of a constant expression, computed now; nothing is kept."""
        if node.op == "get_attr":
            return self.param(str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.evaluate)
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result

    # -- editing ------------------------------------------------------------------------------

    def call(self, op: Any, *args: Any, before: fx.Node, **kwargs: Any) -> fx.Node:
        """Insert ``op(*args)`` before a node; fake value, module path and source line included."""
        with self.module.graph.inserting_before(before):
            node = self.module.graph.call_function(op, args, kwargs)
        values = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        # torch 2.11's own code of matmul and linear takes no symbolic sizes, its python code does
        with self.fake_mode, enable_python_dispatcher():
            node.meta["val"] = op(*values[0], **values[1])
        for key in ("nn_module_stack", "stack_trace"):
            if key in before.meta:
                node.meta[key] = before.meta[key]
        set_note(node, origin=self.provenance)
        self.version += 1
        return node

    def call_after(self, op: Any, *args: Any, after: fx.Node, **kwargs: Any) -> fx.Node:
        """As ``call``, placed right after ``after`` and with its module path."""
        node = self.call(op, *args, before=after.next, **kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            node.meta.pop(key, None)
            if key in after.meta:
                node.meta[key] = after.meta[key]
        return node

    def replace(self, old: fx.Node, new: fx.Node, *, keep: Iterable[fx.Node] = ()) -> None:
        """Give every user of ``old`` (but ``new`` and ``keep``) ``new`` instead.

        Site, scheme and source line move along; ``old`` is erased when nothing reads it.
        """
        kept = {new, *keep}
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in kept)
        moved = {key: value for key, value in note(old).items() if key != "origin"}
        if "site" in moved and not old.users:
            set_note(new, **moved)
        if not old.users:
            for key in ("nn_module_stack", "stack_trace"):
                if key in old.meta:
                    new.meta[key] = old.meta[key]
            self.module.graph.erase_node(old)
        self.version += 1

    def set_operand(self, node: fx.Node, index: int, value: Any) -> None:
        """Rebind one positional operand of ``node``."""
        node.update_arg(index, value)
        self.version += 1

    def set_param(self, name: str, value: Tensor | StoredTensor, *, free: bool = False) -> fx.Node:
        """Bind ``name`` to ``value`` and return its ``get_attr`` node.

        An existing weight is rebound, never written in place. ``free`` marks it as one that
        reconstruction may train. A ``StoredTensor`` stays on disk; with a ``spill`` folder every
        large tensor that is not free goes there, so that a rewritten model need not fit in memory.
        """
        self.stored.pop(name, None)
        if self.spill is not None and isinstance(value, Tensor) and not free:
            value = spill(value, self.spill)
        if isinstance(value, StoredTensor):
            self.stored[name] = value
            value = torch.empty(value.shape, dtype=value.dtype, device="meta")
        (self.free.add if free else self.free.discard)(name)
        place = owner(self.module, name)
        leaf = name.rpartition(".")[2]
        if hasattr(place, leaf):
            delattr(place, leaf)
        if free:
            place.register_parameter(leaf, nn.Parameter(value))
        else:
            place.register_buffer(leaf, value)
        node = self._param_node(name)
        node.meta["val"] = self._fake(value)
        self.version += 1
        return node

    def _param_node(self, name: str) -> fx.Node:
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        first = next(node for node in self.module.graph.nodes if node.op != "placeholder")
        with self.module.graph.inserting_before(first):
            return self.module.graph.get_attr(name)

    def _fake(self, value: Tensor) -> Tensor:
        with self.fake_mode:
            device = "cpu" if value.is_meta else value.device
            return torch.empty(value.shape, dtype=value.dtype, device=device)

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode that every ``meta["val"]`` of this graph lives in."""
        for node in self.module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch._subclasses.FakeTensor):
                return value.fake_mode
        return FakeTensorMode()

    def clean(self) -> None:
        """Drop dead code and weights nothing reads, check the structure, rebuild the code."""
        self.module.graph.eliminate_dead_code()
        self.module.graph.lint()
        used = set(self.param_names())
        for name, _ in [*self.module.named_parameters(), *self.module.named_buffers()]:
            if name not in used:
                delattr(owner(self.module, name), name.rpartition(".")[2])
        self.stored = {name: stored for name, stored in self.stored.items() if name in used}
        self.free &= used
        self._recompile()

    def _recompile(self) -> None:
        if self._compiled_version != self.version:
            self.module.recompile()
            self._compiled_version = self.version

    def clone(self) -> Graph:
        """A graph that may be edited apart; weights are shared."""
        module = fx.GraphModule(self.module, copy.deepcopy(self.module.graph, _shared_fakes(self)))
        twin = Graph(
            module,
            self.signature,
            origin=self.origin,
            stage=self.stage,
            stored=self.stored,
            spill=self.spill,
            finished=self.finished,
        )
        twin.free, twin.provenance = set(self.free), self.provenance
        twin.transforms = None if self.transforms is None else self.transforms.copy()
        return twin

    # -- running ------------------------------------------------------------------------------

    def run(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Outputs of the program for a call of the original ``forward``, as a flat tuple."""
        return self.run_inputs(self.signature.bind(args, kwargs))

    def run_inputs(
        self,
        inputs: Sequence[Any],
        observe: Callable[[fx.Node, Any], None] | None = None,
    ) -> tuple[Any, ...]:
        """Outputs for placeholder values; ``observe`` sees every node's value as it appears."""
        if observe is None and not self.stored:
            self._recompile()
            result = self.module(*inputs)
        else:
            result = Interpreter(self.module, self.stored, observe).run(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)

    @contextmanager
    def edited_by(self, text: str) -> Iterator[None]:
        """Nodes made inside carry ``text`` as their origin."""
        before, self.provenance = self.provenance, text
        try:
            yield
        finally:
            self.provenance = before

    def __str__(self) -> str:
        from vdqc.ir.printer import print_graph

        return print_graph(self)


def _site(node: fx.Node) -> Site:
    entries = note(node)
    scheme = QuantScheme.parse(entries["scheme"]) if "scheme" in entries else None
    return Site(entries["site"], SiteKind(entries["kind"]), node, scheme, entries.get("role", ""))


def _shared_fakes(graph: Graph) -> dict[int, Any]:
    """A deepcopy memo under which fake values and their symbols are shared, not copied."""
    memo: dict[int, Any] = {}
    for node in graph.module.graph.nodes:
        for value in node.meta.values():
            memo[id(value)] = value
    return memo
