"""Views of small rooms with their exact depth and camera poses: the data of this example.

A room of 6 x 3 x 6 holds four objects, balls and boxes, on its floor. Walls keep their colours from
room to room, shades and stripes differ; everything about the objects is random. Cameras stand
around the middle and look towards it. Every ray meets the nearest surface exactly, so that depth
has no error but float32's.

    scene = draw(8, torch.Generator().manual_seed(0))
    scene.images     float32 [B, F, 3, 32, 32] in [0, 1]
    scene.depth      float32 [B, F, 32, 32], distance along the camera's axis, in units of the room
    scene.rotation   float32 [B, F, 3, 3], camera axes (right, down, forward) → first camera's
    scene.centre     float32 [B, F, 3], place of the camera in the first camera's frame

Source: the slab test for boxes, Kay and Kajiya, "Ray Tracing Complex Scenes", 1986.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SIZE = 32
"""Height and width of a view, pixels."""
VIEWS = 4
"""Views of a scene."""
ROOM = (3.0, 1.5, 3.0)
"""Half extents of the room; y is up."""

_OBJECTS = 4
_TANGENT = math.tan(math.radians(35))  # half of the field of view of 70 degrees
#: Left, right; floor, ceiling; back, front.
_WALLS = (
    ((0.85, 0.30, 0.25), (0.25, 0.70, 0.35)),
    ((0.55, 0.45, 0.35), (0.90, 0.90, 0.90)),
    ((0.25, 0.40, 0.85), (0.90, 0.75, 0.25)),
)
_LIGHT = (0.4, 0.8, 0.45)


Uniform = Callable[..., Tensor]


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as the docstring of this module says."""

    images: Tensor
    depth: Tensor
    rotation: Tensor
    centre: Tensor


@dataclass(frozen=True)
class _Objects:
    """Balls and boxes [B, O]: `place` [B, O, 3], `half` [B, O, 3] (a ball's radius thrice)."""

    place: Tensor
    half: Tensor
    is_ball: Tensor
    colour: Tensor
    stripes: Tensor


def numbered(numbers: Tensor, views: int = VIEWS) -> Scenes:
    """The scenes of these numbers, int64 [N]; the same number is the same scene for ever."""
    one = [draw(1, torch.Generator().manual_seed(int(n)), views=views) for n in numbers]
    return Scenes(
        *(torch.cat([getattr(scene, name) for scene in one]) for name in Scenes.__annotations__)
    )


def draw(batch: int, generator: torch.Generator, *, views: int = VIEWS) -> Scenes:
    """Random scenes, `views` views each."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator)

    objects = _objects(uniform)
    shade, stripes = uniform(6, 1, low=0.75, high=1.0), uniform(6, 4)
    rotation, centre = _cameras(uniform, views)
    rays = torch.einsum("bfij,pj->bfpi", rotation, pixel_rays())
    depth, colour = _render(objects, shade, stripes, centre, rays)
    first = rotation[:, :1].mT
    return Scenes(
        colour.mT.unflatten(-1, (SIZE, SIZE)),
        depth.unflatten(-1, (SIZE, SIZE)),
        first @ rotation,
        (first @ (centre - centre[:, :1])[..., None])[..., 0],
    )


def pixel_rays() -> Tensor:
    """Directions [1024, 3] of the pixels in the camera's frame, 1 along its axis."""
    step = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    down, right = torch.meshgrid(step * _TANGENT, step * _TANGENT, indexing="ij")
    return torch.stack([right, down, torch.ones_like(right)], dim=-1).flatten(0, 1)


def _objects(uniform: Uniform) -> _Objects:
    is_ball = uniform(_OBJECTS) < 0.5
    half = uniform(_OBJECTS, 3, low=0.2, high=0.45)
    half = torch.where(is_ball[..., None], half[..., :1], half)
    angle = uniform(_OBJECTS, low=0.0, high=2 * math.pi)
    radius = 0.95 * uniform(_OBJECTS).sqrt()
    place = torch.stack([radius * angle.cos(), half[..., 1] - ROOM[1], radius * angle.sin()], -1)
    colour = uniform(_OBJECTS, 3, low=0.1, high=1.0)
    stripes = uniform(_OBJECTS, 4)
    return _Objects(place, half, is_ball, colour, stripes)


def _cameras(uniform: Uniform, views: int) -> tuple[Tensor, Tensor]:
    """Rotations [B, F, 3, 3] (columns: right, down, forward) and places [B, F, 3] in the room."""
    angle = uniform(views, low=-1.2, high=1.2)
    radius = uniform(views, low=1.6, high=2.8)
    height = uniform(views, low=-0.7, high=1.2)
    centre = torch.stack([radius * angle.cos(), height, radius * angle.sin()], -1)
    spread = torch.tensor([1.0, 0.6, 1.0])
    target = torch.tensor([0.0, -0.6, 0.0]) + spread * uniform(views, 3, low=-1.0, high=1.0)
    forward = F.normalize(target - centre, dim=-1)
    up = torch.tensor([0.0, 1.0, 0.0]).expand_as(forward)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    return torch.stack([right, down, forward], dim=-1), centre


def _render(
    objects: _Objects, shade: Tensor, stripes: Tensor, centre: Tensor, rays: Tensor
) -> tuple[Tensor, Tensor]:
    """Depth [B, F, P] and colour [B, F, P, 3] of rays [B, F, P, 3] from cameras [B, F, 3]."""
    origin = centre[:, :, None]
    rays = torch.where(rays.abs() < 1e-6, 1e-6, rays)  # one in a million is along a wall
    room = torch.tensor(ROOM)
    wall, axis = ((rays.sign() * room - origin) / rays).min(dim=-1)
    place, half = objects.place[:, None, None], objects.half[:, None, None]
    offset, ray = origin[:, :, :, None] - place, rays[..., None, :]  # [B, F, P, O, 3]
    ball = _ball(offset, ray, half[..., 0])
    box = _box(offset, ray, half)
    hit = torch.where(objects.is_ball[:, None, None], ball, box)
    nearest, which = hit.min(dim=-1)
    is_wall = wall <= nearest
    depth = torch.minimum(wall, nearest)
    point = origin + depth[..., None] * rays

    face = 2 * axis + (rays.gather(-1, axis[..., None])[..., 0] > 0)
    walls = torch.tensor(_WALLS).flatten(0, 1)[face] * _pick(shade, face)
    lit = _pick(objects.colour, which) * _light(objects, point, which)[..., None]
    colour = torch.where(is_wall[..., None], walls, lit)
    pattern = torch.where(is_wall[..., None], _pick(stripes, face), _pick(objects.stripes, which))
    phase = (point * (2 + 5 * pattern[..., :3])).sum(-1) + 2 * math.pi * pattern[..., 3]
    return depth, (colour * (0.85 + 0.15 * phase.sin())[..., None]).clamp(0, 1)


def _ball(offset: Tensor, ray: Tensor, radius: Tensor) -> Tensor:
    """Distance along the ray to the ball, inf where it misses."""
    a, b = ray.square().sum(-1), (offset * ray).sum(-1)
    inside = b.square() - a * (offset.square().sum(-1) - radius.square())
    near = (-b - inside.clamp(min=0).sqrt()) / a
    return torch.where((inside > 0) & (near > 0), near, torch.inf)


def _box(offset: Tensor, ray: Tensor, half: Tensor) -> Tensor:
    """Distance along the ray to the box, inf where it misses."""
    enter = ((-ray.sign() * half - offset) / ray).amax(-1)
    leave = ((ray.sign() * half - offset) / ray).amin(-1)
    return torch.where((enter < leave) & (enter > 0), enter, torch.inf)


def _light(objects: _Objects, point: Tensor, which: Tensor) -> Tensor:
    """Lambert's law with some ambient light, for points on objects."""
    local = (point - _pick(objects.place, which)) / _pick(objects.half, which)
    face = F.one_hot(local.abs().argmax(-1), 3) * local.sign()
    is_ball = _pick(objects.is_ball[..., None], which)
    normal = torch.where(is_ball, F.normalize(local, dim=-1), face)
    return 0.55 + 0.45 * (normal * F.normalize(torch.tensor(_LIGHT), dim=0)).sum(-1).clamp(min=0)


def _pick(values: Tensor, which: Tensor) -> Tensor:
    """Rows `which` [B, F, P] of values [B, O, C] → [B, F, P, C]."""
    batch = torch.arange(len(values))[:, None, None]
    return values[batch, which]
