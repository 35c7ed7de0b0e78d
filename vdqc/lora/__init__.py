"""LoRA adapters on a compiled program, as branches that nothing is requantised for.

Passes rotated and scaled the weights; ``vdqc.ir.transforms`` recorded how, and the same is done to
the factors of an adapter::

    W' = L · W · R  ->  y' = kernel(x', W') + weight · (x' · (A · R)ᵀ) · (L · B)ᵀ

``Adapters`` holds those of one program. The program without them is kept as a graph, so that any
can go again; weights of all are buffers that no state dictionary holds.

Source: Hu et al., LoRA, arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import ConfigError, InputError, nearest
from vdqc.base.target import Target
from vdqc.ir import transforms
from vdqc.ir.graph import Graph, Stage
from vdqc.ir.origin import Origin
from vdqc.ir.signature import Signature
from vdqc.ir.site import Site, SiteKind
from vdqc.ir.transforms import Step
from vdqc.lora.branch import Branch, attach, bind, factor_names, takes_branch, weight_name
from vdqc.lora.keys import LowRank, factors, read_adapter

#: Keys that a message lists.
_LISTED = 10


@final
class Adapters:
    """The adapters of one program.

    Attributes:
        weights: weight of each adapter by name, in the order in which they were loaded.
        sites: names of the sites that each adapter changes.
    """

    def __init__(
        self, program: fx.GraphModule, signature: Signature, origin: Origin, target: Target
    ) -> None:
        self.weights: dict[str, float] = {}
        self.sites: dict[str, tuple[str, ...]] = {}
        self._program, self._target = program, target
        self._context = signature, origin
        self._plain = self._graph().clone().module.graph

    def add(
        self,
        source: str | Path | Mapping[str, Tensor],
        steps: Mapping[str, Step | str],
        weight: float,
        name: str,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Add the adapter ``source`` to the program; ``steps`` are the artifact's transforms.

        ``metadata`` stands for what lies beside the factors. Warns of keys that fit no layer.
        Raises InputError, and leaves the program as it is, for an adapter that does not fit.
        """
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise ConfigError(f"expected letters, digits and _ for an adapter's name, got '{name}'")
        if name in self.weights:
            raise ConfigError(
                f"an adapter '{name}' is loaded already", "unload it first, or pass another name="
            )
        weight = _finite(weight)
        state, written = read_adapter(source)
        made = self._branches(state, written if metadata is None else metadata, steps, name)
        self._rebuild({**self._loaded(), name: made}, {**self.weights, name: weight})

    def set_weight(self, name: str, weight: float) -> None:
        """Scale what the adapter ``name`` adds; nothing is compiled again."""
        self._require(name)
        self.weights[name] = _finite(weight)
        with torch.no_grad():
            self._program.get_buffer(weight_name(name)).fill_(weight)

    def remove(self, name: str) -> None:
        """Take the adapter ``name`` out of the program."""
        self._require(name)
        rest = {key: weight for key, weight in self.weights.items() if key != name}
        kept = {key: made for key, made in self._loaded().items() if key != name}
        self._rebuild(kept, rest)

    def _require(self, name: str) -> None:
        if name not in self.weights:
            known = nearest(name, self.weights) if self.weights else "no adapter is loaded"
            raise ConfigError(f"no adapter is named '{name}'", known)

    def _branches(
        self,
        state: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        steps: Mapping[str, Step | str],
        name: str,
    ) -> dict[str, Branch]:
        """What the adapter adds at each site, in the basis of the program."""
        sites = {site.name: site for site in self._graph(self._plain).sites(kind=SiteKind.LINEAR)}
        layers = _layers(sites, steps)
        found, unmatched = factors(state, metadata, layers)
        if not found:
            raise InputError(
                f"no key of the adapter names a layer of this model: {_some(list(state))}",
                f"expected names such as {next(iter(layers), 'none')}.lora_A.weight: is it an "
                "adapter of this model, and in the format of diffusers or peft?",
            )
        branches = {
            site.name: _branch(site, steps[site.name], update, name)
            for layer, update in found.items()
            for site in layers[layer]
        }
        if unmatched:
            warnings.warn(
                f"{len(unmatched)} of {len(state)} keys of the adapter name no linear layer of "
                f"this model and are left out: {_some(unmatched)}",
                stacklevel=4,
            )
        return branches

    def _loaded(self) -> dict[str, dict[str, Branch]]:
        """The adapters' branches as the program holds them: no second copy is kept."""
        return {
            name: {
                site: Branch(name, *map(self._program.get_buffer, factor_names(site, name)))
                for site in sites
            }
            for name, sites in self.sites.items()
        }

    def _rebuild(
        self, adapters: Mapping[str, Mapping[str, Branch]], weights: Mapping[str, float]
    ) -> None:
        """The program anew, with ``adapters``; as it was if one of them does not fit."""
        before = self._program.graph
        self._program.graph = self._graph(self._plain).clone().module.graph
        graph = self._graph()
        try:
            with graph.edited_by("lora"):
                self._attach(graph, adapters, weights)
        except BaseException:
            self._program.graph = before
            raise
        finally:
            self._program.recompile()
        for name, sites in self.sites.items():
            if name not in adapters:
                for leaf in (weight_name(name), *(n for s in sites for n in factor_names(s, name))):
                    owner, _, last = leaf.rpartition(".")
                    delattr(self._program.get_submodule(owner), last)
        self.weights = dict(weights)
        self.sites = {name: tuple(made) for name, made in adapters.items()}

    def _attach(
        self,
        graph: Graph,
        adapters: Mapping[str, Mapping[str, Branch]],
        weights: Mapping[str, float],
    ) -> None:
        device = _device(self._program)
        for name, weight in weights.items():
            bind(graph, weight_name(name), torch.tensor(weight, dtype=torch.float32))
        inputs: dict[Any, fx.Node] = {}
        for site in graph.sites(kind=SiteKind.LINEAR):
            branches = [made[site.name] for made in adapters.values() if site.name in made]
            if branches:
                attach(graph, site, branches, self._target, inputs)
        graph.module.graph.lint()
        for name, made in adapters.items():  # fake values are all of one device: move afterwards
            for leaf in (weight_name(name), *(n for s in made for n in factor_names(s, name))):
                owner, _, last = leaf.rpartition(".")
                module = graph.module.get_submodule(owner)
                setattr(module, last, graph.module.get_buffer(leaf).to(device))

    def _graph(self, nodes: fx.Graph | None = None) -> Graph:
        """The program, or ``nodes`` on its weights, as a graph that can be edited."""
        signature, origin = self._context
        module = self._program if nodes is None else fx.GraphModule(self._program, nodes)
        return Graph(module, signature, origin=origin, stage=Stage.LOWERED)


def _layers(sites: Mapping[str, Site], steps: Mapping[str, Step | str]) -> dict[str, list[Site]]:
    """Sites by the module of the model whose weight they read; a module may be read in parts."""
    layers: dict[str, list[Site]] = {}
    for name, site in sites.items():
        step = steps.get(name)
        weight = step.origin.args[0] if isinstance(step, Step) else f"{name.partition('#')[0]}."
        layers.setdefault(str(weight).removesuffix(".weight").removesuffix("."), []).append(site)
    return layers


def _branch(site: Site, step: Step | str | None, update: LowRank, adapter: str) -> Branch:
    reason = takes_branch(site) or (step if isinstance(step, str) else "")
    if reason or not isinstance(step, Step):
        raise InputError(
            f"the adapter changes this layer, which takes no branch: {reason or 'no record of it'}",
            "leave its keys out, or merge the adapter into the float model and compile that",
            site=site.name,
        )
    _, rows, columns = step.origin.args
    got = [int(update.up.shape[0]), int(update.down.shape[1])]
    if got != [rows, columns]:
        raise InputError(
            f"expected an update of a weight [{rows}, {columns}], got one of {got}",
            "is it an adapter of this model, and of this size of it?",
            site=site.name,
        )
    up, down = transforms.transformed(step, update.up.cpu(), update.down.cpu())
    return Branch(adapter, down, up)


def _device(program: fx.GraphModule) -> torch.device:
    for tensor in [*program.parameters(), *program.buffers()]:
        return tensor.device
    return torch.device("cpu")


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise ConfigError(f"expected a finite weight of an adapter, got {weight}")
    return float(weight)


def _some(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
