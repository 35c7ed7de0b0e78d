"""A gain for each frame at the tokens of a linear: which axis holds frames, and the multiply.

::

    y = h · M[frame of the token]      h float[..., T, R], M float[F]; tokens of no frame keep h

Frames, positions and text are told apart by the sizes that ``annotate`` noted at attentions. A call
with another number of frames than M has stretches M to it, nearest frame first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from vdqc.base.diagnostics import InputError
from vdqc.ir.analysis.tokens import Extent
from vdqc.ir.blocks import block_name
from vdqc.ir.graph import Graph
from vdqc.ir.learned import cast
from vdqc.ir.signature import IntInput, evaluate
from vdqc.ir.site import Site, SiteKind, note
from vdqc.ir.sizes import SizeBuilder, size_expression

aten = torch.ops.aten


def linear_frames(graph: Graph, site: Site) -> Mapping[str, Any] | None:
    """What an attention over the tokens that ``site`` reads says of frames; None if none does.

    The answer is a note that ``annotate`` wrote (see ``TokenFrames``), of an attention in the
    site's block if there is one.
    """
    value = site.input.meta["val"]
    if value.ndim < 3:
        return None
    sizes = call_sizes(graph)
    attentions = graph.sites(kind=SiteKind.ATTENTION)
    attentions.sort(key=lambda other: block_name(other.node) != block_name(site.node))
    for attention in attentions:
        tokens: Mapping[str, Any] = note(attention.node).get("tokens", {})
        if not tokens.get("frames") or tokens["extent"] not in (Extent.VIDEO, Extent.TIME):
            continue
        try:
            found = evaluate(tokens["tokens"], sizes)
        except InputError:
            continue
        if sympy.expand(size_expression(found) - size_expression(value.shape[-2])) == 0:
            return tokens
    return None


def call_sizes(graph: Graph) -> dict[str, Any]:
    """Symbol of the signature to size of the fake inputs (symbolic, or a number)."""
    sizes: dict[str, Any] = {}
    for node, entry in zip(graph.inputs, graph.signature.inputs, strict=True):
        value = node.meta["val"]
        pairs = (
            [(entry.size, value)]
            if isinstance(entry, IntInput)
            else list(zip(entry.sizes, value.shape, strict=True))
        )
        sizes.update({name: size for name, size in pairs if isinstance(name, str)})
    return sizes


def size_builder(graph: Graph) -> SizeBuilder:
    """Builds sizes in front of everything, so that all nodes may use them."""
    return SizeBuilder(graph, next(n for n in graph.nodes if n.op == "call_function"))


def times_gain(
    builder: SizeBuilder,
    value: fx.Node,
    gain: fx.Node,
    tokens: Mapping[str, Any],
    before: fx.Node,
) -> fx.Node:
    """``value`` [..., T, R] times ``gain`` [F] of each token's frame."""
    graph = builder.graph
    sizes = call_sizes(graph)

    def size(text: str) -> Any:
        return builder.operand(evaluate(text, sizes))

    def call(op: Any, *args: Any) -> fx.Node:
        return graph.call(op, *args, before=before)

    axis = value.meta["val"].ndim - 2
    frames, count = size(tokens["frames"]), gain.meta["val"].shape[0]
    if frames != count:
        row = call(aten.reshape.default, gain, [1, 1, count])
        row = call(aten.upsample_nearest1d.default, row, [frames])
        gain = call(aten.reshape.default, row, [frames])
    video, text = value, None
    if tokens["text"]:
        words, whole = size(tokens["text"]), builder.operand(value.meta["val"].shape[axis])
        edge = words if tokens["text_first"] else size(f"({tokens['tokens']})-({tokens['text']})")
        parts = [
            call(aten.slice.Tensor, value, axis, 0, edge),
            call(aten.slice.Tensor, value, axis, edge, whole),
        ]
        text, video = parts if tokens["text_first"] else parts[::-1]
    per_frame = size(tokens["tokens_per_frame"])
    major = tokens["frame_major"]
    video = call(
        aten.unflatten.int, video, axis, [frames, per_frame] if major else [per_frame, frames]
    )
    factor = cast(graph, gain, value.meta["val"].dtype, before)
    factor = call(aten.reshape.default, factor, [frames, 1, 1] if major else [frames, 1])
    video = call(aten.mul.Tensor, video, factor)
    video = call(aten.flatten.using_ints, video, axis, axis + 1)
    if text is None:
        return video
    both = [text, video] if tokens["text_first"] else [video, text]
    return call(aten.cat.default, both, axis)
