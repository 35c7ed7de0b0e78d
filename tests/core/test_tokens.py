"""Frames and tokens of attention, read off the sizes of a captured graph."""

import pytest
import torch
from torch import Tensor, nn

from vdqc.engine.pass_manager import Context, PassManager
from vdqc.ir.analysis.tokens import Extent, token_frames
from vdqc.ir.frontend import capture
from vdqc.ir.sample import Sample
from vdqc.ir.signature import evaluate
from vdqc.passes.canonicalize import Canonicalize


class Video(nn.Module):
    """Joint attention over text and a patched video, [B, C, F, H, W]."""

    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv3d(2, 8, (1, 2, 2), (1, 2, 2)), nn.Linear(8, 8)
        self.text_first = text_first

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        video = self.patch(x).flatten(2).transpose(1, 2)
        h = self.fc(torch.cat([y, video] if self.text_first else [video, y], 1))
        h = h.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(h, h, h)


@pytest.mark.parametrize("text_first", [True, False])
def test_tokens_are_mapped_to_frames(text_first: bool) -> None:

    calls = [
        Sample({"x": torch.randn(2, 2, f, 4 * f, 6 * f), "y": torch.randn(2, n, 8)})
        for f, n in ((3, 5), (4, 7))
    ]
    graph = capture(Video(text_first).eval(), calls)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    (found,) = token_frames(graph)
    sizes = [s for entry in graph.signature.inputs for s in entry.sizes if isinstance(s, str)]
    assert (found.extent, found.frames, found.text) == (Extent.VIDEO, sizes[0], sizes[3])
    factors = {f"(({sizes[1]}//2))", f"(({sizes[2]}//2))"}
    assert set(found.tokens_per_frame.split("*")) == factors
    assert (found.text_first, found.frame_major) == (text_first, True)


@pytest.mark.parametrize(
    "sizes",
    [[(3, 8, 12)], [(3, 8, 12), (3, 8, 12)], [(3, 8, 12), (4, 8, 16)], [(3, 8, 8), (5, 8, 8)]],
)
def test_frames_are_found_where_few_sizes_vary(sizes: list[tuple[int, int, int]]) -> None:

    calls = [
        Sample({"x": torch.randn(2, 2, *size), "y": torch.randn(2, 5, 8)}, timestep=float(index))
        for index, size in enumerate(sizes)
    ]
    graph = capture(Video(text_first=False).eval(), calls)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    (found,) = token_frames(graph)
    assert (found.extent, found.frame_major) == (Extent.VIDEO, True)
    assert found.frames == graph.signature.inputs[0].sizes[2]


class Packed(nn.Module):
    """Attention over tokens whose grid is three numbers of the call; ``axes`` is its order."""

    def __init__(self, axes: str) -> None:
        super().__init__()
        self.fc, self.axes = nn.Linear(8, 8), axes

    def forward(self, x: Tensor, frames: int, height: int, width: int) -> Tensor:
        sizes = {"f": frames, "h": height, "w": width}
        grid = torch.meshgrid(*[torch.arange(sizes[a]) for a in self.axes], indexing="ij")
        place = torch.stack(grid).flatten(1).sum(0).to(x.dtype)
        h = self.fc(x + place[:, None].cos()).unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(h, h, h)


@pytest.mark.parametrize("frame_major", [True, False])
def test_frames_may_have_tokens_of_their_own(frame_major: bool) -> None:

    calls = [
        Sample({"images": torch.randn(b, f, 3, 4 * h, 4 * w)})
        for b, f, h, w in ((2, 3, 5, 7), (3, 4, 6, 9))
    ]
    graph = capture(Views(frame_major).eval(), calls)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    (found,) = token_frames(graph)
    assert (found.extent, found.text, found.frame_major) == (Extent.VIDEO, "", frame_major)
    sizes = [str(size) for size in graph.signature.inputs[0].sizes]
    assert found.frames == sizes[1]
    values = {sizes[1]: 3, sizes[3]: 20, sizes[4]: 28}
    assert evaluate(found.tokens_per_frame, values) == 5 * 7 + 2


class Views(nn.Module):
    """Attention over views of patches and two further tokens each, [B, F, 3, H, W], as in VGGT."""

    def __init__(self, frame_major: bool) -> None:
        super().__init__()
        self.patch, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.special, self.frame_major = nn.Parameter(torch.randn(1, 2, 8)), frame_major

    def forward(self, images: Tensor) -> Tensor:
        batch, frames = images.shape[:2]
        patches = self.patch(images.flatten(0, 1)).flatten(2).transpose(1, 2)
        h = self.fc(torch.cat([self.special.expand(batch * frames, -1, -1), patches], 1))
        if not self.frame_major:
            h = h.unflatten(0, (batch, frames)).transpose(1, 2)
        h = h.reshape(batch, frames * (patches.shape[1] + 2), 8)
        h = h.unflatten(-1, (2, 4)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(h, h, h)


@pytest.mark.parametrize("axes", ["fhw", "hw"])
def test_the_grid_of_positions_tells_frames(axes: str) -> None:

    calls = []
    for f, h, w in ((3, 4, 5), (4, 6, 7)):
        tokens = f * h * w if "f" in axes else h * w
        call = {"x": torch.randn(2, tokens, 8), "frames": f, "height": h, "width": w}
        calls.append(Sample(call))
    graph = capture(Packed(axes).eval(), calls)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    (found,) = token_frames(graph)
    if axes == "hw":  # an image
        assert (found.extent, found.frames) == (Extent.OTHER, "")
        return
    frames, height, width = (str(entry.size) for entry in graph.signature.inputs[1:])
    assert (found.extent, found.frames, found.frame_width) == (Extent.VIDEO, frames, width)
    assert set(found.tokens_per_frame.split("*")) == {height, width}
    assert (found.text, found.frame_major) == ("", True)


def test_channels_may_be_last() -> None:

    class Last(Video):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x.permute(0, 4, 1, 2, 3), y)

    calls = [
        Sample({"x": torch.randn(2, f, 4 * f, 6 * f, 2), "y": torch.randn(2, n, 8)})
        for f, n in ((3, 5), (4, 7))
    ]
    graph = capture(Last(text_first=False).eval(), calls)
    PassManager([Canonicalize()], probe=False).run(graph, Context())
    (found,) = token_frames(graph)
    assert found.frames == graph.signature.inputs[0].sizes[1]
    assert found.frame_major
