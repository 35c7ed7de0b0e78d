"""Pieces of known forwards that export cannot follow, replaced while it traces.

Export refuses or freezes what python computes from sizes (``int(n)``, ``numpy.sqrt``, the number of
steps of ``linspace``) and control flow on values (loops over the batch that drop padding). Each
repair is one function, found by the name of the class it stands in for, applied during capture
alone, and exact: it computes what the original computes, for every input. Which repairs were
applied is written into the graph's origin.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vdqc.ir import repairs_attention, repairs_positions


@final
@dataclass(frozen=True)
class Repair:
    """One replacement.

    Attributes:
        applies: class name of the module whose attribute is replaced.
        attribute: method of that class, or ``module:function`` beside it.
        replacement: what stands in.
        why: one sentence for the report.
    """

    applies: str
    attribute: str
    replacement: Callable[..., Any]
    why: str


@final
class PlainRepeats(TorchFunctionMode):
    """``repeat_interleave`` by one number without ``output_size``.

    torch 2.11 makes the stated size a guard, which holds for the example's batch and frames alone
    (UNet3D, UNetSpatioTemporal, SanaVideo); 2.13 does not.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func``; a tensor of repeats keeps its ``output_size``, which export needs."""
        kwargs = dict(kwargs or {})
        if func in _REPEATS:
            repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
            if isinstance(repeats, (int, torch.SymInt)):
                kwargs.pop("output_size", None)
        return func(*args, **kwargs)


_REPEATS = (torch.repeat_interleave, Tensor.repeat_interleave)


REPAIRS: tuple[Repair, ...] = (
    Repair(
        "HunyuanVideo15Transformer3DModel",
        "forward",
        repairs_attention.hunyuan_video15_forward,
        "text tokens are packed by a stable sort instead of boolean indexing, and the "
        "text-to-video case is selected by value",
    ),
    Repair(
        "MochiTransformer3DModel",
        "diffusers.models.attention_processor:MochiAttnProcessor2_0.__call__",
        repairs_attention.mochi_attention,
        "padding is masked in one attention over the batch instead of dropped per sample",
    ),
    Repair(
        "Lumina2Transformer2DModel",
        "forward",
        repairs_attention.lumina2_forward,
        "padding is masked behind a fixed text slot instead of dropped per sample",
    ),
    Repair(
        "QwenImageTransformer2DModel",
        "diffusers.models.transformers.transformer_qwenimage:compute_text_seq_len_from_mask",
        repairs_positions.qwen_text_length,
        "the text length is the tensor's own size; the unused length per sample is left out",
    ),
    Repair(
        "QwenEmbedRope",
        "forward",
        repairs_positions.qwen_rope,
        "the text length enters the rotary table as a symbolic size",
    ),
    Repair(
        "CosmosLearnablePositionalEmbed",
        "forward",
        repairs_positions.cosmos_positions,
        "the square root of a ratio of sizes, which is a constant, is computed from widths",
    ),
    Repair(
        "MochiRoPE",
        "_get_positions",
        repairs_positions.mochi_positions,
        "the grid is computed by tensor arithmetic on sizes instead of linspace",
    ),
    Repair(
        "MochiRoPE",
        "_create_rope",
        repairs_positions.mochi_rope,
        "angles are computed in float32 by casts instead of an autocast region",
    ),
    Repair(
        "EasyAnimateRotaryPosEmbed",
        "forward",
        repairs_positions.easyanimate_rope,
        "the grid is computed by tensor arithmetic on sizes, for both orientations at once",
    ),
    Repair(
        "DepthAnythingDepthEstimationHead",
        "forward",
        repairs_positions.depth_head,
        "the output size stays symbolic",
    ),
    Repair(
        "CogVideoXPatchEmbed",
        "_get_positional_embeddings",
        repairs_positions.cogvideox_positions,
        "the position table is joined to zeros for the text instead of written into them",
    ),
)


_LIBRARIES = ("diffusers.", "transformers.")


@contextmanager
def repaired(model: nn.Module) -> Iterator[list[str]]:
    """Apply every repair that ``model`` needs; yields one sentence for each."""
    classes: dict[str, type[nn.Module]] = {}
    for module in model.modules():
        classes.setdefault(type(module).__name__, type(module))
    done: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(_native_attention())
        for repair in REPAIRS:
            cls = classes.get(repair.applies)
            if cls is None or not cls.__module__.startswith(_LIBRARIES):
                continue
            owner, attribute = _place(cls, repair.attribute)
            stack.enter_context(mock.patch.object(owner, attribute, repair.replacement))
            done.append(f"{repair.applies}: {repair.why}")
        yield done


def _place(cls: type, attribute: str) -> tuple[Any, str]:
    if ":" not in attribute:
        return cls, attribute
    path, _, name = attribute.partition(":")
    owner: Any = importlib.import_module(path)
    *classes, leaf = name.split(".")
    for one in classes:
        owner = getattr(owner, one)
    return owner, leaf


@contextmanager
def _native_attention() -> Iterator[None]:
    """Trace diffusers' attention through torch's own op, whatever backend is set for running."""
    try:
        from diffusers.models.attention_dispatch import attention_backend
    except ImportError:
        yield
        return
    with attention_backend("native"):
        yield
