"""Names that a node goes by: the module and the source line that it was captured in, its site.

A site is named after the module whose weight it reads, or that calls the attention.
"""

from __future__ import annotations

import fnmatch
import itertools
import re

from torch import fx

from vdqc.ir.site import SITE_KINDS, SiteKind, note, set_note


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


def selects(globs: str, name: str) -> bool:
    """True if ``name`` is or matches the glob, or one of several in ``a|b``."""
    return name == globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs_of(globs))


def globs_of(text: str) -> list[str]:
    """The globs in ``a|b``, which may have spaces around them."""
    return [glob.strip() for glob in text.split("|")]


def name_sites(graph: fx.Graph) -> None:
    """Name every site once: by its weight, or by its module for attention; ``#2`` for repeats."""
    counts: dict[str, int] = {}
    for node in graph.nodes:
        kind = SITE_KINDS.get(node.target) if node.op == "call_function" else None
        if kind is None:
            continue
        if kind is SiteKind.ATTENTION:
            name = _attention_name(node)
        else:
            weight = weight_source(node.args[1])
            if weight is None:
                continue
            name = weighted_name(str(weight.target))
        counts[name] = counts.get(name, 0) + 1
        suffix = f"#{counts[name]}" if counts[name] > 1 else ""
        set_note(node, site=name + suffix, kind=str(kind))


def name_attention(node: fx.Node) -> None:
    """Name one attention that was found after the others got their names."""
    name = _attention_name(node)
    taken = {note(other).get("site") for other in node.graph.nodes}
    repeats = (f"{name}#{count}" for count in itertools.count(2))
    free = name if name not in taken else next(text for text in repeats if text not in taken)
    set_note(node, site=free, kind=str(SiteKind.ATTENTION))


def _attention_name(node: fx.Node) -> str:
    return f"{module_path(node) or node.name}:attention"
