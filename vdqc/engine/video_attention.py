"""Which attention spans the frames of a video, and how its tokens lie: what masks are made from.

Five sizes say where the tokens of one attention are, ``LAYOUT``: frames, tokens of a frame, text
tokens, whether text comes first, and the width of a frame in tokens (0 if unknown).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from vdqc.engine.frames import sizes_of
from vdqc.ir.analysis.key_masks import KeyMask, key_mask
from vdqc.ir.analysis.tokens import video_tokens
from vdqc.ir.graph import Graph
from vdqc.ir.signature import evaluate
from vdqc.ir.site import Site, note

LAYOUT = ("frames", "tokens_per_frame", "text", "text_first", "frame_width")
DENSE = torch.ops.aten.scaled_dot_product_attention.default
#: Arguments of dense attention that a sparse one has too.
_NAMED = ("scale", "attn_mask")


def obstacle(site: Site, mask: KeyMask | None) -> tuple[str, str] | None:
    """Code and sentence if this attention cannot be made sparse; ``mask`` is its ``padding``."""
    entries, node = note(site.node), site.node
    if node.target is not DENSE:
        return "already-sparse", "it is sparse already"
    tokens = entries.get("tokens", {})
    if entries.get("cross"):
        return "cross-attention", "its keys are other tokens than its queries"
    if tokens.get("extent") != "video" or not tokens.get("frames"):
        return "no-frames", "its shapes do not tell frames"
    if not tokens.get("frame_major"):
        return "no-frames", "the tokens of a frame are not neighbours"
    rest = [*node.args[4:], *(v for k, v in node.kwargs.items() if k not in _NAMED)]
    if any(value not in (None, False, 0.0) for value in rest):
        return "masked", "it drops out, is causal, or its heads share keys"
    if mask is None and _mask(node) is not None:
        return "masked", "it has a mask of its own, which is more than padded text after the video"
    return None


def padding(graph: Graph, site: Site) -> KeyMask | None:
    """Which keys of a dense self-attention exist, where its mask says just that."""
    entries, mask = note(site.node), _mask(site.node)
    if mask is None or entries.get("cross") or entries.get("tokens", {}).get("text_first"):
        return None
    video = video_tokens(graph, site.input)
    return None if video is None else key_mask(mask, site.input, video)


def _mask(node: fx.Node) -> fx.Node | None:
    if node.target is not DENSE:
        return None
    mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    return mask if isinstance(mask, fx.Node) else None


def layouts(graph: Graph, call: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, list[int]]:
    """The five sizes of every site's tokens in one call."""
    sizes = sizes_of(graph.signature, graph.signature.bind((), call))
    found = {}
    for site in sites:
        tokens = note(site.node)["tokens"]
        found[site.name] = [_number(tokens.get(key), sizes) for key in LAYOUT]
    return found


def _number(entry: str | bool | None, sizes: Mapping[str, int]) -> int:
    if isinstance(entry, bool):
        return int(entry)
    return int(evaluate(entry, sizes)) if entry else 0
