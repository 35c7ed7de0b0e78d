"""What selectors know of each candidate: statistics of layers, likeness of frames, latents.

Runs the float graph once per candidate and keeps J means and variances and F - 1 similarities of
each, never an activation: memory is one forward pass.

Error: InputError where a value is not finite, or where nothing tells the frames apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx

from vdqc.base.diagnostics import ConfigError, InputError, nearest
from vdqc.engine.diverse import Features, Reference, Similarity, frame_similarity, stacked
from vdqc.engine.frames import FrameMap, site_frames, sizes_of
from vdqc.engine.pool import candidates
from vdqc.engine.selection import (
    MatrixNorm,
    Neighbour,
    diffusion_salience,
    quantisation_salience,
)
from vdqc.ir.analysis.dataflow import MOVES
from vdqc.ir.analysis.tokens import token_frames
from vdqc.ir.graph import Graph
from vdqc.ir.sample import Sample
from vdqc.ir.signature import TensorInput
from vdqc.ir.site import SiteKind

Progress = Callable[[Any, str], Any]


# -- for noise-filtered diverse sampling ----------------------------------------------------------


@torch.no_grad()
def candidate_features(
    graph: Graph,
    samples: Sequence[Sample],
    *,
    layers: int = 4,
    reference: Reference = Reference.FIRST,
    similarity: Similarity = Similarity.FRAME,
    progress: Progress = lambda items, description: items,
) -> Features:
    """Statistics of the outputs of the last ``layers`` blocks, frames of the last one's.

    A model without repeated blocks is monitored at its outputs. Frames come from the last block's
    tokens, or where those do not tell, from the video that the model is given.
    """
    watched = monitored(graph, layers)
    frames_of = _FrameReader(graph, watched[-1])
    means, variances, similarities = [], [], []
    for index, sample in enumerate(progress(samples, "features")):
        seen: dict[fx.Node, tuple[float, float]] = {}
        frames: list[Tensor] = []
        inputs = graph.signature.bind((), sample.inputs)

        def look(
            node: fx.Node,
            value: Any,
            inputs: Sequence[Any] = inputs,
            seen: dict[fx.Node, tuple[float, float]] = seen,
            frames: list[Tensor] = frames,
        ) -> None:
            if node in watched:
                variance, mean = torch.var_mean(value.float(), correction=0)
                seen[node] = float(mean), float(variance)
            if node is watched[-1]:
                frames.append(frame_similarity(frames_of(value, inputs), reference, similarity))

        graph.run_inputs(inputs, look)
        row = torch.tensor([seen[node] for node in watched], dtype=torch.float64)
        if not bool(row.isfinite().all()) or not bool(frames[0].isfinite().all()):
            raise InputError(
                f"candidate {index} gives NaN or infinity in the float model",
                "expected finite activations: leave it out",
                code="not-finite",
            )
        means.append(row[:, 0])
        variances.append(row[:, 1])
        similarities.append(frames[0].cpu())
    return Features(torch.stack(means), torch.stack(variances), stacked(similarities))


def monitored(graph: Graph, layers: int) -> list[fx.Node]:
    """The main outputs of the last ``layers`` blocks, or the model's own outputs."""
    found = [node for block in graph.blocks() if (node := _main(block.outputs)) is not None]
    if found:
        return found[-layers:]
    outputs = [node for node in graph.output.all_input_nodes if _is_float(node)]
    if not outputs:
        raise InputError("expected a model with a float output to select by, got none")
    return outputs


def _main(outputs: Sequence[fx.Node]) -> fx.Node | None:
    """The last float value of three axes or more that leaves a block: its residual stream."""
    wide = [node for node in outputs if _is_float(node) and node.meta["val"].ndim >= 3]
    return wide[-1] if wide else None


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


class _FrameReader:
    """Reads [B, F, S, C] off a value of the graph, or off the video that it was given."""

    def __init__(self, graph: Graph, node: fx.Node) -> None:
        self._signature = graph.signature
        self._video = _video_input(graph)
        self._tokens = [asdict(entry) for entry in token_frames(graph)]
        self._name = node.name

    def __call__(self, value: Tensor, inputs: Sequence[Any]) -> Tensor:
        video = None
        if self._video is not None:
            place, axis = self._video
            video = inputs[place].movedim(axis, 1).flatten(3).transpose(2, 3)  # [B, F, S, C]
        frames = self._of_tokens(value, inputs)
        if frames is None and video is not None:
            batch, count = video.shape[:2]
            if value.ndim >= 3 and value.shape[0] == batch * count:  # frames in the batch
                frames = value.reshape(batch, count, -1, value.shape[-1])
        if frames is None:
            frames = video
        if frames is None or frames.shape[1] < 2:
            raise InputError(
                f"expected frames in %{self._name}, {list(value.shape)}, or a video as an input; "
                "found neither",
                "nfds compares frames: select otherwise, e.g. select{method=timestep}",
                code="no-frames",
            )
        return frames

    def _of_tokens(self, value: Tensor, inputs: Sequence[Any]) -> Tensor | None:
        if value.ndim != 3:
            return None
        sizes = sizes_of(self._signature, inputs)
        for entry in self._tokens:
            found = site_frames(entry, sizes)
            if found is None or found.frames < 2:
                continue
            if found.tokens == value.shape[1]:
                return value[:, found.members.to(value.device)]
            if int(found.video.sum()) == value.shape[1]:  # the video's stream of joint attention
                alone = FrameMap(found.index[found.video])
                return value[:, alone.members.to(value.device)]
        return None


def _video_input(graph: Graph) -> tuple[int, int] | None:
    """Place and frame axis of the first input of five axes, [B, C, F, H, W] or [B, F, C, H, W]."""
    for place, entry in enumerate(graph.signature.inputs):
        if isinstance(entry, TensorInput) and len(entry.sizes) == 5:
            varying = [axis for axis in range(1, 5) if isinstance(entry.sizes[axis], str)]
            return place, varying[0] if len(varying) == 3 else 2
    return None


# -- for salient data selection ---------------------------------------------------------------


@torch.no_grad()
def saliences(
    graph: Graph,
    samples: Sequence[Sample],
    *,
    latent: str = "",
    norm: MatrixNorm = MatrixNorm.SPECTRAL,
    neighbour: Neighbour = Neighbour.PREVIOUS,
    progress: Progress = lambda items, description: items,
) -> tuple[list[float], list[float]]:
    """Diffusion and quantisation salience of each candidate.

    ``latent`` names the input that is denoised; by default the first of most axes. Raises
    InputError for samples that were not recorded along trajectories.
    """
    found = candidates(samples)
    if found is None:
        raise InputError(
            "expected samples recorded along trajectories, got single calls",
            "record a pool from generate(model, seed), or select otherwise, e.g. "
            "select{method=timestep}",
            code="no-trajectory",
        )
    place = latent_input(graph, latent)
    patch = patch_size(graph, graph.inputs[place])
    at = {(c.seed, c.step, c.branch): index for index, c in enumerate(found)}
    recent: dict[int, Tensor] = {}

    def read(index: int) -> Tensor:
        if index not in recent:
            if len(recent) > 5:  # the neighbours of a step of three calls
                recent.pop(next(iter(recent)))
            recent[index] = graph.signature.bind((), samples[index].inputs)[place]
        return recent[index]

    diffusion, quantisation = [], []
    for index, here in enumerate(progress(found, "salience")):
        x = read(index)
        before, after = (at.get((here.seed, here.step + n, here.branch)) for n in (-1, 1))
        first, second = (before, after) if neighbour is Neighbour.PREVIOUS else (after, before)
        other = first if first is not None else second
        diffusion.append(0.0 if other is None else diffusion_salience(x, read(other)))
        quantisation.append(quantisation_salience(patchify(x, patch), norm))
        if not torch.isfinite(torch.tensor([diffusion[-1], quantisation[-1]])).all():
            raise InputError(
                f"candidate {index} (seed {here.seed}, step {here.step}) holds NaN or infinity",
                code="not-finite",
            )
    return diffusion, quantisation


def latent_input(graph: Graph, name: str = "") -> int:
    """Place of the input ``name``, or of the first float input of most axes."""
    inputs = {
        entry.path: place
        for place, entry in enumerate(graph.signature.inputs)
        if isinstance(entry, TensorInput)
        and getattr(torch, entry.dtype).is_floating_point
        and len(entry.sizes) >= 3
    }
    if name and name not in inputs:
        raise ConfigError(
            f"no float input of three axes or more is '{name}'", nearest(name, inputs)
        )
    if not inputs:
        raise InputError("expected a float input of three axes or more as the latent, found none")
    axes = {path: len(graph.signature.inputs[place].sizes) for path, place in inputs.items()}  # type: ignore[union-attr]
    return inputs[name or max(inputs, key=lambda path: axes[path])]


def patch_size(graph: Graph, latent: fx.Node) -> tuple[int, ...]:
    """Kernel of the convolution that makes tokens of ``latent``; () if none reads it."""
    for site in graph.sites(kind=SiteKind.CONV):
        node: Any = site.input
        while isinstance(node, fx.Node) and node.target in MOVES:
            node = node.args[0]
        if node is latent:
            return tuple(int(size) for size in site.weight.meta["val"].shape[2:])
    return ()


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """[B, n, d]: [B, C, ...] as patches of channels; tokens [B, T, C] as they are.

    What a patch does not fill at the far ends is left out, as a strided convolution does.
    """
    if x.ndim == 3:
        return x
    sizes = [1] * (x.ndim - 2) if len(patch) != x.ndim - 2 else list(patch)
    for axis, size in enumerate(sizes, start=2):
        size = min(size, x.shape[axis])
        x = x.narrow(axis, 0, x.shape[axis] // size * size)
        x = x.unflatten(axis, (-1, size)).movedim(axis + 1, 1).flatten(1, 2)
    return x.flatten(2).transpose(1, 2)
