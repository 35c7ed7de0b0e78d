"""Which tokens of an attention are which frames, read off the symbolic shapes.

A video token axis has a size such as ``s1*(s2//2)*(s3//2)``: a product in which one factor comes
from the frame axis of an input. Further terms of a sum are text tokens, joined by a ``cat``; where
every frame has tokens of its own beside its patches (a camera's, registers), all these terms have
the frames as a factor, and together they are the video: ``s1*(s2//2)*(s3//2) + 5*s1``. Where
the tokens themselves are the input, the grid of their positions tells: an axis of their number that
is made of three, frames first, whose sizes the call gives as numbers.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from typing import Any, final

import sympy
import torch
from torch import Tensor, fx

from vdqc.ir.analysis.channels import aligned, shape
from vdqc.ir.analysis.dataflow import MOVES
from vdqc.ir.graph import Graph
from vdqc.ir.signature import TensorInput
from vdqc.ir.site import SiteKind

A = torch.ops.aten


class Extent(enum.StrEnum):
    """What one attention spans."""

    VIDEO = "video"  # all frames at once, perhaps with text
    FRAME = "frame"  # the tokens of one frame
    TIME = "time"  # one position over all frames
    OTHER = "other"  # text alone, or sizes that do not tell


@final
@dataclass(frozen=True)
class TokenFrames:
    """The token axis of one attention's query; sizes are expressions over the signature's symbols.

    Attributes:
        site: name of the attention site.
        extent: what it spans.
        tokens: size of the axis.
        frames: latent frames F ("" where unknown).
        tokens_per_frame: tokens of one frame ("" where unknown).
        text: tokens beside the video's ("" for none).
        text_first: True if they come before the video's.
        frame_major: True if a frame's tokens are neighbours.
        frame_width: tokens in a row of a frame ("" where unknown).
    """

    site: str
    extent: Extent
    tokens: str
    frames: str = ""
    tokens_per_frame: str = ""
    text: str = ""
    text_first: bool = False
    frame_major: bool = False
    frame_width: str = ""


def token_frames(graph: Graph) -> list[TokenFrames]:
    """One entry per attention site, in program order."""
    merges = _merges(graph)
    frames = _frame_symbols(graph) or _grid_symbols(graph, merges)
    names = _signature_names(graph)
    found = [
        _frames_of(site.name, site.node, frames, merges)
        for site in graph.sites(kind=SiteKind.ATTENTION)
    ]
    return [_renamed(entry, names) for entry in found]


def _signature_names(graph: Graph) -> dict[str, str]:
    """Symbol of the fake values to symbol of the signature, which numbers its own."""
    names: dict[str, str] = {}
    for node, entry in zip(graph.inputs, graph.signature.inputs, strict=True):
        if isinstance(entry, TensorInput):
            for size, name in zip(shape(node), entry.sizes, strict=True):
                if isinstance(name, str) and name.isidentifier():
                    names[str(size)] = name
        elif isinstance(entry.size, str) and entry.size.isidentifier():
            names[str(node.meta["val"])] = entry.size
    return names


def _renamed(entry: TokenFrames, names: dict[str, str]) -> TokenFrames:
    def rename(text: str) -> str:
        return re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), text)

    return replace(
        entry,
        tokens=rename(entry.tokens),
        frames=rename(entry.frames),
        tokens_per_frame=rename(entry.tokens_per_frame),
        text=rename(entry.text),
        frame_width=rename(entry.frame_width),
    )


def _frames_of(
    name: str, node: fx.Node, frame_symbols: set[Any], merges: dict[Any, list[list[Any]]]
) -> TokenFrames:
    query = node.args[0]
    assert isinstance(query, fx.Node)
    tokens = sympy.sympify(shape(query)[-2])
    terms, video = _terms(tokens, frame_symbols)
    if len(video) != 1:
        batch = sympy.sympify(shape(query)[0]).free_symbols
        in_batch = bool(batch & frame_symbols) and len(tokens.free_symbols) > 0
        extent = Extent.FRAME if in_batch else Extent.OTHER
        per_frame = str(tokens) if in_batch else ""
        return TokenFrames(name, extent, str(tokens), tokens_per_frame=per_frame)
    frames = _frame_factor(video[0], frame_symbols)
    space = sympy.expand(video[0] / frames)
    text = sympy.Add(*(t for t in terms if t is not video[0]))
    time_only = space == 1 and not text.free_symbols
    return TokenFrames(
        name,
        Extent.TIME if time_only else Extent.VIDEO,
        str(tokens),
        str(frames),
        str(space),
        str(text) if text != 0 else "",
        text != 0 and _text_first(query, video[0]),
        _is_frame_major(video[0], frames, merges),
        _frame_width(video[0], merges),
    )


def video_tokens(graph: Graph, query: fx.Node) -> Any:
    """Tokens of the video among those of ``query``, in the symbols of the values; None for none."""
    frames = _frame_symbols(graph) or _grid_symbols(graph, _merges(graph))
    _, video = _terms(sympy.sympify(shape(query)[-2]), frames)
    return video[0] if len(video) == 1 else None


def _terms(tokens: Any, frame_symbols: set[Any]) -> tuple[list[Any], list[Any]]:
    """All terms of a sum, and those with frames; those that share their frames are one."""
    terms = list(sympy.Add.make_args(sympy.expand(tokens)))
    video = [term for term in terms if term.free_symbols & frame_symbols]
    if len(video) > 1 and len({_frame_factor(term, frame_symbols) for term in video}) == 1:
        rest = [term for term in terms if not term.free_symbols & frame_symbols]
        video = [sympy.Add(*video)]
        terms = [*video, *rest]
    return terms, video


def _frame_factor(video: Any, frame_symbols: set[Any]) -> Any:
    """The factor of a term, or of all terms of a sum, that counts frames."""
    term = sympy.Add.make_args(video)[0]
    factors = sympy.Mul.make_args(term)
    return sympy.Mul(*(f for f in factors if f.free_symbols & frame_symbols))


def _frame_symbols(graph: Graph) -> set[Any]:
    """Symbols of the frame axis of five-dimensional inputs, [B, C, F, H, W], [B, F, C, H, W] or
    [B, F, H, W, C].

    Channels do not vary, so that they are not the frames; where both axes vary they are last.
    """
    symbols: set[Any] = set()
    for node in graph.inputs:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim != 5:
            continue
        sizes = [sympy.sympify(size) for size in shape(node)]
        last = bool(sizes[1].free_symbols) and not sizes[4].free_symbols
        symbols |= (not last and sizes[2].free_symbols) or sizes[1].free_symbols
    return symbols


def _grid_symbols(graph: Graph, merges: dict[Any, list[list[Any]]]) -> set[Any]:
    """The first of three numbers of the call that make an axis of as many as an input's tokens."""
    numbers = {
        node.meta["val"].node.expr
        for node in graph.inputs
        if isinstance(node.meta.get("val"), torch.SymInt)
    }
    first: set[Any] = set()
    for node in graph.inputs:
        for size in shape(node):
            for sizes in merges.get(sympy.expand(sympy.sympify(size)), ()):
                grid = [part for part in sizes if part != 1]
                if len(grid) == 3 and set(grid) <= numbers:
                    first.add(grid[0])
    return first if len(first) == 1 else set()


def _merges(graph: Graph) -> dict[Any, list[list[Any]]]:
    """Merged size to the sizes it was merged from, over all reshapes.

    Frames that were in the batch come from there: ``[B*F, T] -> [B, F*T]`` merges F and T.
    """
    found: dict[Any, list[list[Any]]] = {}
    for node in graph.nodes:
        if node.target is not A.reshape.default:
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        out, inner = shape(node), shape(source)
        for outs, ins in aligned(out, inner):
            size = sympy.expand(sympy.sympify(out[outs[-1]]))
            sizes = [inner[axis] for axis in ins]
            if len(outs) == 2 and len(ins) == 2:
                sizes[0] = sympy.cancel(sympy.sympify(sizes[0]) / out[outs[0]])
                if sympy.expand(sizes[0] * sizes[1] - size) == 0 and sizes[0] != 1:
                    found.setdefault(size, []).append(sizes)
            elif len(outs) == 1 and len(ins) > 1:
                found.setdefault(size, []).append(sizes)
    return found


def _is_frame_major(video: Any, frames: Any, merges: dict[Any, list[list[Any]]]) -> bool:
    sources = merges.get(sympy.expand(video), [])
    return bool(sources) and all(
        next((s for s in sizes if s != 1), None) == frames for sizes in sources
    )


def _frame_width(video: Any, merges: dict[Any, list[list[Any]]]) -> str:
    """The last of the sizes that the axis was merged from, where all merges agree on it."""
    sources = merges.get(sympy.expand(video), [])
    last = {str(sizes[-1]) for sizes in sources if len(sizes) > 2}
    return last.pop() if len(last) == 1 else ""


def _text_first(node: fx.Node, video: Any) -> bool:
    """Whether the joining ``cat`` above ``node`` has the video part last."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        if current.target is A.cat.default:
            parts: Any = current.args[0]
            extents = [[sympy.sympify(size) for size in shape(part)] for part in parts]
            at = [index for index, sizes in enumerate(extents) if video in sizes]
            if len(at) == 1 and len(parts) > 1:
                return at[0] == len(parts) - 1
        for operand in current.all_input_nodes:
            if operand not in seen and (
                current.target in MOVES or len(seen) < 60
            ):  # norms and rope lie between
                seen.add(operand)
                pending.append(operand)
    return False
