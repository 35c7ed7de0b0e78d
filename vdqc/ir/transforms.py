"""What passes did to the weight of each linear, so that the same can be done to an adapter later.

::

    W' = L · W · R        made of scales of rows and columns, rotations, orders of rows
    (B · A)' = (L · B) · (A · R)

Every exact transform of a weight is linear in it. ``start`` names the weights of a captured graph;
``bound`` notes each time that an expression of one becomes a weight itself; ``place`` notes, right
before weights are packed, what each site ends up with. A note is a small tree of ``Step``, its
operands (smoothing scales, signs, Kronecker factors) are as long as one side of the weight.
What rounds or corrects a weight (GPTQ, a low-rank part taken out, trained rounding) leaves the
update that an adapter adds as it is. A graph on which ``start`` was not called records nothing.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4; Xiao et al., SmoothQuant, arXiv
2211.10438, equation 3 (transforms that cancel); Hu et al., LoRA, arXiv 2106.09685, equation 3.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from vdqc.base import hadamard
from vdqc.base.diagnostics import ArtifactError
from vdqc.base.kronecker import kronecker
from vdqc.ir.finished import tensor_hash
from vdqc.ir.graph import Graph
from vdqc.ir.names import weight_source
from vdqc.ir.ops import FAKE_QUANTIZE, KRONECKER, ROTATE
from vdqc.ir.site import Site, SiteKind

#: Where an artifact keeps them; in a folder of its own, apart from the weights.
FILE = "lora/transforms.safetensors"

aten = torch.ops.aten
_UNCHANGED = {aten._to_copy.default, aten.clone.default, aten.detach.default}


@final
@dataclass(frozen=True, eq=False)
class Step:
    """One linear map of a weight; ``weight`` is where it begins.

    =========== ==================================== ===========================
    op          args                                 the weight [N, K] becomes
    =========== ==================================== ===========================
    weight      name, N, K                           itself
    times       axis, float[N or K]                  scaled along that axis
    rotate      signs float[K], block, inverse       ``vdqc::rotate`` of it
    kronecker   left, right                          ``vdqc::kronecker`` of it
    transpose                                        its transpose
    slice       axis, start, end                     a part of it
    select      axis, int64[...]                     rows or columns in an order
    cat                                              the sources' rows, stacked
    =========== ==================================== ===========================
    """

    op: str
    sources: tuple[Step, ...] = ()
    args: tuple[Any, ...] = ()

    @property
    def origin(self) -> Step:
        """The ``weight`` that it begins with."""
        step = self
        while step.sources:
            step = step.sources[0]
        return step


@final
@dataclass
class Transforms:
    """Steps by name of a weight, and by name of a site; a text says why there are none."""

    made: dict[str, Step | str] = field(default_factory=dict)
    sites: dict[str, Step | str] = field(default_factory=dict)

    def copy(self) -> Transforms:
        """One that grows apart."""
        return Transforms(dict(self.made), dict(self.sites))


def start(graph: Graph) -> None:
    """Record from here on what becomes of the weights of linears, and of flat convolutions."""
    found = Transforms()
    for site in graph.sites():
        source = None if site.kind is SiteKind.ATTENTION else weight_source(site.weight)
        if source is not None and source is site.weight:
            rows, *columns = (int(size) for size in source.meta["val"].shape)
            name = str(source.target)
            found.made[name] = Step("weight", args=(name, rows, math.prod(columns)))
    graph.transforms = found


def bound(graph: Graph, name: str, node: fx.Node) -> None:
    """Note that the value of the expression ``node`` becomes, or stands behind, weight ``name``."""
    if graph.transforms is None:
        return
    step = trace(graph, node)
    if step is not None:
        graph.transforms.made[name] = step


def place(graph: Graph, site: Site, rows: Tensor | None = None) -> None:
    """Note what became of the weight of ``site``; ``rows`` is the order that packing gives it."""
    if graph.transforms is None:
        return
    weight = site.weight
    if weight.target is FAKE_QUANTIZE:
        weight = weight.all_input_nodes[0]
    step = trace(graph, weight)
    if step is None:
        step = "its weight is not one of the model's: no pass recorded where it comes from"
    if isinstance(step, Step) and rows is not None:
        step = Step("select", (step,), (0, rows))
    graph.transforms.sites[site.name] = step


def trace(graph: Graph, node: fx.Node) -> Step | str | None:
    """How the constant expression ``node`` is made from a recorded weight.

    A text says why that cannot be told; None if no recorded weight takes part.
    """
    assert graph.transforms is not None
    made = graph.transforms.made
    known: dict[fx.Node, Step | str | None] = {}

    def visit(node: fx.Node) -> Step | str | None:
        if node not in known:
            if node.op == "get_attr":
                known[node] = made.get(str(node.target))
            else:
                sources = {operand: visit(operand) for operand in node.all_input_nodes}
                known[node] = _step(graph, node, sources)
        return known[node]

    return visit(node)


def _step(
    graph: Graph, node: fx.Node, sources: Mapping[fx.Node, Step | str | None]
) -> Step | str | None:
    carried = {operand: step for operand, step in sources.items() if step is not None}
    if not carried:
        return None
    for step in carried.values():
        if isinstance(step, str):
            return step
    steps = {operand: step for operand, step in carried.items() if isinstance(step, Step)}
    made = _linear(graph, node, steps)
    return (
        f"{node.target} is applied to its weight, which is not recorded" if made is None else made
    )


def _linear(graph: Graph, node: fx.Node, steps: Mapping[fx.Node, Step]) -> Step | None:
    """The step that ``node`` is, given those of its operands; None if it is none."""
    args: Any = node.args
    if node.target is aten.cat.default:
        axis = args[1] if len(args) > 1 else 0
        known = [steps.get(part) for part in args[0]]
        parts = tuple(part for part in known if part is not None)
        one = len(parts) == len(known) and len({part.origin for part in parts}) == 1
        return Step("cat", parts) if axis in (0, -2) and one else None
    if len(steps) != 1:
        return None
    ((operand, step),) = steps.items()
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        return _times(graph, node, operand, step)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        subtracted = node.target is aten.sub.Tensor and args[0] is not operand
        return None if subtracted or node.kwargs else step
    if not args or args[0] is not operand:
        return None
    flat = node.target is aten.reshape.default and node.meta["val"].ndim == 2
    if node.target in _UNCHANGED or (flat and tuple(node.meta["val"].shape) == step.args[1:]):
        return step
    if node.target is ROTATE:
        inverse = bool(args[3]) if len(args) > 3 else False
        return Step("rotate", (step,), (graph.evaluate(args[1]).detach(), args[2], inverse))
    if node.target is KRONECKER:
        factors = tuple(graph.evaluate(factor).detach() for factor in args[1:3])
        return Step("kronecker", (step,), factors)
    return _moved(graph, node, step)


def _moved(graph: Graph, node: fx.Node, step: Step) -> Step | None:
    args: Any = node.args
    if node.target is aten.transpose.int and {args[1] % 2, args[2] % 2} == {0, 1}:
        return Step("transpose", (step,))
    if node.target is aten.slice.Tensor and (len(args) < 5 or args[4] == 1):
        given: list[Any] = [*args[1:4], *[0, None, None][len(args) - 1 :]]
        axis, first, end = given
        return Step("slice", (step,), (axis % 2, first or 0, end))
    if node.target is aten.index_select.default:
        return Step("select", (step,), (args[1] % 2, graph.evaluate(args[2]).detach()))
    return None


def _times(graph: Graph, node: fx.Node, operand: fx.Node, step: Step) -> Step | None:
    first, second = node.args
    divided = node.target is aten.div.Tensor
    if divided and first is not operand:
        return None
    other = second if first is operand else first
    if isinstance(other, fx.Node):
        if max(other.meta["val"].shape, default=1) != other.meta["val"].numel():
            return None  # a number of its own for each weight
        factor = graph.evaluate(other).detach()
    else:
        factor = torch.tensor(float(other), dtype=torch.float64)  # type: ignore[arg-type]
    along_rows = factor.ndim == 2 and factor.shape[0] > 1
    factor = factor.reshape(-1)
    return Step("times", (step,), (0 if along_rows else 1, 1 / factor if divided else factor))


# -- applying -------------------------------------------------------------------------------


def transformed(step: Step, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down) with up·down = ``step`` applied to the update up[N, r] · down[r, K].

    In float64; the rank grows only where parts of a weight were transformed differently.
    """
    known: dict[Step, tuple[Tensor, Tensor]] = {}

    def visit(step: Step) -> tuple[Tensor, Tensor]:
        if step not in known:
            known[step] = _APPLIED[step.op](step, *[visit(source) for source in step.sources])
        return known[step]

    known[step.origin] = up.double(), down.double()
    return visit(step)


_Factors = tuple[Tensor, Tensor]


def _apply_times(step: Step, factors: _Factors) -> _Factors:
    (up, down), (axis, scale) = factors, step.args
    return (up * scale.double()[:, None], down) if axis == 0 else (up, down * scale.double())


def _apply_rotate(step: Step, factors: _Factors) -> _Factors:
    (up, down), (signs, block, inverse) = factors, step.args
    return up, hadamard.rotate(down.contiguous(), signs.double(), block, inverse)


def _apply_kronecker(step: Step, factors: _Factors) -> _Factors:
    (up, down), (left, right) = factors, step.args
    return up, kronecker(down.contiguous(), left.double(), right.double())


def _apply_transpose(step: Step, factors: _Factors) -> _Factors:
    return factors[1].T, factors[0].T


def _apply_slice(step: Step, factors: _Factors) -> _Factors:
    (up, down), (axis, first, end) = factors, step.args
    return (up[first:end], down) if axis == 0 else (up, down[:, first:end])


def _apply_select(step: Step, factors: _Factors) -> _Factors:
    (up, down), (axis, index) = factors, step.args
    return (up[index], down) if axis == 0 else (up, down[:, index])


def _apply_cat(step: Step, *parts: _Factors) -> _Factors:
    ups, downs = [part[0] for part in parts], [part[1] for part in parts]
    if all(torch.equal(down, downs[0]) for down in downs):
        return torch.cat(ups), downs[0]
    return torch.block_diag(*ups), torch.cat(downs)


_APPLIED: Mapping[str, Callable[..., _Factors]] = {
    "times": _apply_times,
    "rotate": _apply_rotate,
    "kronecker": _apply_kronecker,
    "transpose": _apply_transpose,
    "slice": _apply_slice,
    "select": _apply_select,
    "cat": _apply_cat,
}


# -- writing and reading --------------------------------------------------------------------


def write(transforms: Transforms, folder: Path) -> None:
    """Write what was recorded for sites into ``folder / FILE``; equal operands are kept once."""
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    numbers: dict[Step, int] = {}
    steps: list[dict[str, Any]] = []

    def argument(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu().contiguous()
        key = tensor_hash(value)
        if key not in names:
            names[key] = f"operand_{len(names)}"
            tensors[names[key]] = value.clone()
        return {"tensor": names[key]}

    def number(step: Step) -> int:
        if step not in numbers:
            sources = [number(source) for source in step.sources]
            args = [argument(value) for value in step.args]
            steps.append({"op": step.op, "from": sources, "args": args})
            numbers[step] = len(steps) - 1
        return numbers[step]

    sites = {
        name: step if isinstance(step, str) else number(step)
        for name, step in transforms.sites.items()
    }
    place = folder / FILE
    place.parent.mkdir(exist_ok=True)
    save_file(tensors, place, {"transforms": json.dumps({"steps": steps, "sites": sites})})


def read(folder: Path) -> dict[str, Step | str]:
    """Steps by site, or why there are none. Raises ArtifactError for an artifact without them."""
    file = folder / FILE
    if not file.is_file():
        raise ArtifactError(
            f"{folder} was compiled without a record of what was done to its weights",
            "compile the model again with this version of vdqc: then it takes adapters",
        )
    try:
        return dict(_read(file))
    except Exception as error:
        raise ArtifactError(
            f"the artifact is damaged: {file} cannot be read: {type(error).__name__}: {error}",
            "copy it again, or compile the model again",
        ) from error


def _read(file: Path) -> Iterator[tuple[str, Step | str]]:
    with safe_open(file, framework="pt") as handle:
        data = json.loads(handle.metadata()["transforms"])
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    steps: list[Step] = []
    for entry in data["steps"]:
        args = (
            tensors[value["tensor"]] if isinstance(value, dict) else value
            for value in entry["args"]
        )
        op, sources = entry["op"], tuple(steps[index] for index in entry["from"])
        if op != "weight" and (op not in _APPLIED or not sources):
            raise ValueError(f"'{op}' is no step")
        steps.append(Step(op, sources, tuple(args)))
    for name, value in data["sites"].items():
        yield name, value if isinstance(value, str) else steps[value]
