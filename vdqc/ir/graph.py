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
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from vdqc.base.diagnostics import ConfigError, nearest
from vdqc.base.scheme import QuantScheme
from vdqc.ir.finished import Finished
from vdqc.ir.signature import Signature
from vdqc.ir.site import SITE_KINDS, Site, SiteKind, note, set_note
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
@dataclass(frozen=True)
class Origin:
    """Where a graph came from, as far as a stand-in for the model needs it. All JSON.

    Attributes:
        model_class: import path of the captured class.
        config: the model's configuration, or empty.
        dtype: name of the dtype the model was captured in.
        keep: name patterns that the model's own class wants in high precision
            (diffusers' ``_keep_in_fp32_modules`` and ``_skip_layerwise_casting_patterns``).
        repairs: what capture had to change in the forward, one sentence each.
    """

    model_class: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    keep: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Block:
    """One repeated block: its nodes in order, the values that enter and leave it."""

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


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
            _name_sites(module.graph)

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
        globs = select.split("|")
        found = [_site(node) for node in self.module.graph.nodes if "site" in note(node)]
        return [
            site
            for site in found
            if (kind is None or site.kind is kind)
            and any(fnmatch.fnmatchcase(site.name, glob) for glob in globs)
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
        members: dict[str, list[fx.Node]] = {}
        for node in self.module.graph.nodes:
            if node.op == "call_function" and (name := block_name(node)):
                members.setdefault(name, []).append(node)
        return [_block(name, nodes) for name, nodes in members.items()]

    def param_names(self) -> list[str]:
        """Names of all weights that the program reads."""
        targets = (node.target for node in self.module.graph.nodes if node.op == "get_attr")
        return list(dict.fromkeys(str(target) for target in targets))

    def param(self, name: str) -> Tensor:
        """The weight ``name``; read from its file if it lives there, never cached."""
        if name in self.stored:
            return self.stored[name].read()
        tensor: Tensor = _attribute(self.module, name)
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
        owner = _owner(self.module, name)
        leaf = name.rpartition(".")[2]
        if hasattr(owner, leaf):
            delattr(owner, leaf)
        if free:
            owner.register_parameter(leaf, nn.Parameter(value))
        else:
            owner.register_buffer(leaf, value)
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
                delattr(_owner(self.module, name), name.rpartition(".")[2])
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
            result = _Interpreter(self, observe).run(*inputs)
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


class _Interpreter(fx.Interpreter):
    """Runs node by node, reading stored weights when they are used and freeing dead values."""

    def __init__(self, graph: Graph, observe: Callable[[fx.Node, Any], None] | None) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self._graph = graph
        self._observe = observe

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "get_attr" and n.target in self._graph.stored:
            return None  # read where it is used: see call_function
        stored = [
            a for a in n.all_input_nodes if a.op == "get_attr" and a.target in self._graph.stored
        ]
        for operand in stored:
            self.env[operand] = self._graph.param(str(operand.target))
        value = super().run_node(n)
        for operand in stored:
            self.env[operand] = None
        if self._observe is not None:
            self._observe(n, value)
        return value


_BLOCK = re.compile(r"(?:^|.*?\.)\w+\.\d+(?=\.|$)")


def block_name(node: fx.Node) -> str:
    """Name of the outermost ModuleList child that ``node`` was captured in, or ""."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        if name := block_of(str(path)):
            return name
    return ""


def block_of(path: str) -> str:
    """Name of the outermost ModuleList child on a module path, or of a site's name, or ""."""
    match = _BLOCK.match(path.partition(":")[0])
    return match[0] if match else ""


def module_path(node: fx.Node) -> str:
    """Full name of the innermost module that ``node`` was captured in, or ""."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def source_line(node: fx.Node) -> str:
    """``file:line  text`` of the user's code behind ``node``, or ""."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.stack_trace or "")
    frames = [frame for frame in frames if "/torch/" not in frame[0]] or frames
    if not frames:
        return ""
    file, line, text = frames[-1]
    return f"{file.rpartition('/')[2]}:{line}  {text.strip()}"


def weighted_name(weight: str) -> str:
    """Name of the site that reads ``weight``: its module; ``model`` for the model itself.

    What passes add to a site lies under its name, so that cannot be the weight's own: one that is
    no module's ``weight`` loses the word (``attn.in_proj_weight``) or gets one more.
    """
    path, _, leaf = weight.rpartition(".")
    if leaf == "weight":
        return path or "model"
    return weight.removesuffix("_weight") if leaf.endswith("_weight") else f"{weight}_linear"


def weight_source(node: fx.Node) -> fx.Node | None:
    """The ``get_attr`` that a weight expression starts from, following first operands."""
    while node.op == "call_function":
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node):
            return None
        node = first
    return node if node.op == "get_attr" else None


def _site(node: fx.Node) -> Site:
    entries = note(node)
    scheme = QuantScheme.parse(entries["scheme"]) if "scheme" in entries else None
    return Site(entries["site"], SiteKind(entries["kind"]), node, scheme, entries.get("role", ""))


def _name_sites(graph: fx.Graph) -> None:
    """Name every site once: by its weight, or by its module for attention; ``#2`` for repeats."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        kind = SITE_KINDS.get(node.target) if node.op == "call_function" else None
        if kind is None:
            continue
        if kind is SiteKind.ATTENTION:
            name = f"{module_path(node) or node.name}:attention"
        else:
            weight = weight_source(node.args[1])
            if weight is None:
                continue
            name = weighted_name(str(weight.target))
        counts[name] = counts.get(name, 0) + 1
        suffix = f"#{counts[name]}" if counts[name] > 1 else ""
        set_note(node, site=name + suffix, kind=str(kind))


def _block(name: str, nodes: list[fx.Node]) -> Block:
    inside = set(nodes)
    inputs = dict.fromkeys(
        operand
        for node in nodes
        for operand in node.all_input_nodes
        if operand not in inside and operand.op != "get_attr"
    )
    outputs = [node for node in nodes if any(user not in inside for user in node.users)]
    return Block(name, tuple(nodes), tuple(inputs), tuple(outputs))


def _attribute(root: nn.Module, name: str) -> Any:
    value: Any = root
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _owner(root: nn.Module, name: str) -> nn.Module:
    for part in name.split(".")[:-1]:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    return root


def _shared_fakes(graph: Graph) -> dict[int, Any]:
    """A deepcopy memo under which fake values and their symbols are shared, not copied."""
    memo: dict[int, Any] = {}
    for node in graph.module.graph.nodes:
        for value in node.meta.values():
            memo[id(value)] = value
    return memo
