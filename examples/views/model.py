"""A trained model of VGGT's kind: four small views of a room to camera poses and depth maps.

    vdqc compile examples/views/model.py -o out/

`model` has 1.6 M weights, trained by `train.py` in this folder on rooms that `views_scenes.py`
renders. It is one forward pass, not a sampler: `generate` runs it over the held-out rooms of a
seed. `accuracy` is the area under the curve of relative camera poses, `depth_accuracy` the share of
pixels whose depth is right within a quarter. See README.md.

Source: the pose measure, Wang et al., "PoseDiffusion", 2023, section 4.1; of depth, Eigen et al.,
"Depth Map Prediction from a Single Image", 2014, section 4.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vdqc import Sample

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE))
try:
    import views_net as net
    import views_scenes as data
finally:
    sys.path.remove(str(HERE))

SCENES = 32
"""Scenes that `generate` looks at."""
BATCH = 2
"""Scenes in one call of the model."""
HELD_OUT = 1_000_000
"""Numbers of held-out scenes start here; the training scenes are not numbered at all."""
REACH = 8.0
"""Units of the room that `generate` maps to [0, 1]."""


def model(path: Path = HERE / "weights.safetensors") -> nn.Module:
    """The trained model in evaluation mode, float32 (float16 on disk)."""
    loaded = net.ViewsNet()
    loaded.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return loaded.eval()


def samples() -> Iterable[Sample]:
    """Rooms that are not measured; the first two differ in rooms and views: both axes vary."""
    for index, (batch, views) in enumerate([(2, 4), (5, 3)] + [(4, 4)] * 6):
        scenes = data.draw(batch, torch.Generator().manual_seed(500 + index), views=views)
        yield Sample({"images": scenes.images})


def generate(model: nn.Module, seed: int) -> Tensor:
    """Depth and points, [32, 4, F, 32, 32], of the held-out scenes `labels(seed)`: see `sample`."""
    return sample(model, labels(seed), seed)


def labels(seed: int) -> Tensor:
    """Numbers of the scenes that belong to a seed: int64 [32]."""
    return HELD_OUT + seed * SCENES + torch.arange(SCENES)


@torch.no_grad()
def sample(model: nn.Module, numbers: Tensor, seed: int) -> Tensor:
    """What the model sees in scenes [N], as one picture [N, 4, F, 32, 32] around [0, 1].

    Channel 0 is depth; 1 to 3 are where each pixel lies in the first camera's frame, by depth and
    pose. One picture holds all that the model says: poses can be read back from it.
    """
    weight = next(itertools.chain(model.parameters(), model.buffers()), None)
    device = torch.device("cpu") if weight is None else weight.device
    found = []
    for part in numbers.split(BATCH):
        output = model(images=data.numbered(part).images.to(device))
        rotation, centre = net.decode_pose(output["pose"].float().cpu())
        found.append(picture(output["depth"].float().cpu(), rotation, centre))
    return torch.cat(found)


def picture(depth: Tensor, rotation: Tensor, centre: Tensor) -> Tensor:
    """Depth [B, F, H, W] and poses to a picture [B, 4, F, H, W]."""
    seen = depth.flatten(2)[..., None] * data.pixel_rays()
    points = (seen @ rotation.mT + centre[:, :, None]).mT.unflatten(-1, depth.shape[-2:])
    return torch.cat([depth[:, :, None] / REACH, points / REACH + 0.5], dim=2).transpose(1, 2)


def unpicture(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Depth, rotations and places of the cameras of a picture.

    The points are a rigid motion of `depth * ray`, found by Kabsch's method.
    """
    depth = image[:, 0] * REACH
    points = ((image[:, 1:] - 0.5) * REACH).transpose(1, 2).flatten(3).mT.double()
    seen = (depth.flatten(2)[..., None] * data.pixel_rays()).double()
    middle, seen_middle = points.mean(2, keepdim=True), seen.mean(2, keepdim=True)
    u, _, vt = torch.linalg.svd((points - middle).mT @ (seen - seen_middle))
    sign = torch.ones(*u.shape[:2], 3, dtype=u.dtype)
    sign[..., 2] = torch.linalg.det(u @ vt).sign()
    rotation = (u * sign[..., None, :]) @ vt
    centre = (middle - seen_middle @ rotation.mT)[:, :, 0]
    return depth, rotation, centre


def accuracy(image: Tensor, seed: int) -> float:
    """AUC@30 of the relative poses of all pairs of views: 1 is perfect.

    A pair's error is the greater of the angles of its rotation and of its direction; the area is
    under the share of pairs below a threshold, over thresholds of 1 to 30 degrees.
    """
    errors = pose_errors(image, seed)
    thresholds = torch.arange(1, 31, dtype=errors.dtype)
    return (errors.flatten() < thresholds[:, None]).double().mean().item()


def pose_errors(image: Tensor, seed: int) -> Tensor:
    """Error of every pair of views in degrees, [N, pairs]."""
    truth = data.numbered(labels(seed), image.shape[2])
    _, rotation, centre = unpicture(image)
    first, second = torch.triu_indices(image.shape[2], image.shape[2], 1)
    angles = []
    for r, c in ((rotation, centre), (truth.rotation.double(), truth.centre.double())):
        back = r[:, first].mT
        angles.append((back @ r[:, second], back @ (c[:, second] - c[:, first])[..., None]))
    (turn, way), (true_turn, true_way) = angles
    trace = (turn.mT @ true_turn).diagonal(dim1=-2, dim2=-1).sum(-1)
    rotated = ((trace - 1) / 2).clamp(-1, 1).acos()
    moved = torch.cosine_similarity(way, true_way, dim=-2)[..., 0].clamp(-1, 1).acos()
    return torch.maximum(rotated, moved).rad2deg()


def depth_accuracy(image: Tensor, seed: int, factor: float = 1.25) -> float:
    """Share of pixels whose depth is within a factor of the true one."""
    truth = data.numbered(labels(seed), image.shape[2]).depth
    ratio = image[:, 0] * REACH / truth
    return (torch.maximum(ratio, 1 / ratio) < factor).double().mean().item()
