"""Ray tracing: the first hits of rays from one point, for all rays and surfaces at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scene import BOX, CYLINDER, DOME, PLANE, Scene

NEAR = 1e-4
MISS = 1e6


@dataclass(frozen=True)
class Hits:
    """The points where R rays end."""

    distance: Tensor  # [R] in units of the ray's direction
    surface: Tensor  # [R] int64
    face: Tensor  # [R] int64, differs between the flat sides of one surface
    normal: Tensor  # [3, R] unit, world
    points: Tensor  # [3, R] world


def trace(scene: Scene, origin: Tensor, directions: Tensor) -> Hits:
    """Return the first hit of every ray, which always exists.

    Args:
        scene: Scene to trace.
        origin: Common origin of the rays, `[3]`, inside the scene's room and outside its objects.
        directions: Directions of any length, `[3, R]`.
    """
    approach = scene.plane_normal @ directions  # [m, R]
    gap = scene.plane_offset - scene.plane_normal @ origin
    planes = torch.where(approach > NEAR, gap[:, None] / approach.clamp(min=NEAR), MISS)
    squared = (directions * directions).sum(dim=0)
    along = origin @ directions
    inside = origin @ origin - scene.dome_radius**2
    dome = ((along * along - squared * inside).sqrt() - along) / squared
    boxes, spheres, cylinders = scene.counts
    local = (scene.to_local.flatten(0, 1) @ directions).unflatten(0, (-1, 3))  # [k, 3, R]
    start = ((origin - scene.centre)[:, None] * scene.to_local).sum(dim=2)[:, :, None]  # [k, 3, 1]
    parts = local.split([boxes, spheres, cylinders])
    starts = start.split([boxes, spheres, cylinders])
    distances = torch.cat(
        [
            planes,
            dome[None],
            _boxes(starts[0], parts[0]),
            _round(starts[1], parts[1]),
            _cylinders(starts[2], parts[2]),
        ]
    )
    distance, surface = distances.min(dim=0)
    points = origin[:, None] + distance * directions
    return _describe(scene, distance, surface, points)


def _interval(entry: Tensor, leave: Tensor) -> Tensor:
    """Return the distance of the hit from entry and exit, or MISS."""
    return torch.where((entry < leave) & (entry > NEAR), entry, MISS)


def _slabs(start: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return entry and exit of the slabs |x| < 1, elementwise."""
    inverse = direction.reciprocal()
    middle, half = -start * inverse, inverse.abs()
    return middle - half, middle + half


def _boxes(start: Tensor, direction: Tensor) -> Tensor:
    """Return distances `[k, R]` to cubes, from starts `[k, 3, 1]` and directions `[k, 3, R]`."""
    entry, leave = _slabs(start, direction)
    return _interval(entry.amax(dim=1), leave.amin(dim=1))


def _quadratic(start: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return entry and exit of the unit ball (disc) over dimension 1; MISS and 0 without a hit."""
    a = (direction * direction).sum(dim=1)
    b = (start * direction).sum(dim=1)
    c = (start * start).sum(dim=1) - 1.0
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0.0).sqrt()
    hit = discriminant > 0
    inverse = a.reciprocal()
    entry = torch.where(hit, (-b - root) * inverse, MISS)
    return entry, torch.where(hit, (root - b) * inverse, 0.0)


def _round(start: Tensor, direction: Tensor) -> Tensor:
    """Return distances to unit spheres, with the shapes of `_boxes`."""
    return _interval(*_quadratic(start, direction))


def _cylinders(start: Tensor, direction: Tensor) -> Tensor:
    """Return distances to unit cylinders along z, with the shapes of `_boxes`."""
    side_entry, side_leave = _quadratic(start[:, :2], direction[:, :2])
    cap_entry, cap_leave = _slabs(start[:, 2], direction[:, 2])
    return _interval(torch.maximum(side_entry, cap_entry), torch.minimum(side_leave, cap_leave))


def _describe(scene: Scene, distance: Tensor, surface: Tensor, points: Tensor) -> Hits:
    """Return hits with normals and faces. Coordinates come first, so that rows are long."""
    planes = len(scene.plane_normal)
    kind = scene.kind[surface]
    box, cylinder = kind == BOX, kind == CYLINDER
    item = (surface - planes - 1).clamp(min=0)
    to_local = scene.to_local.permute(1, 2, 0)[:, :, item]  # [3, 3, R]
    local = (to_local * (points - scene.centre.T[:, item])).sum(dim=1)  # [3, R]
    magnitude = local.abs()
    rho = (local[0] * local[0] + local[1] * local[1]).sqrt()
    cap = cylinder & (magnitude[2] >= rho)
    axis = torch.where(cap, 2, magnitude.argmax(dim=0))
    flat = box | cap
    on_axis = torch.arange(3)[:, None] == axis
    normal = torch.where(flat, on_axis * local.sign(), local)
    normal[2].masked_fill_(cylinder & ~cap, 0.0)
    normal = (to_local * normal[:, None]).sum(dim=0)
    wall = -scene.plane_normal.T[:, surface.clamp(max=planes - 1)]
    normal = torch.where(kind == PLANE, wall, normal)
    normal = torch.where(kind == DOME, -points, normal)
    normal = normal / (normal * normal).sum(dim=0).sqrt()
    sign = (local.gather(0, axis[None])[0] > 0).long()
    face = torch.where(flat, 2 * axis + sign + 1, 0) + 8 * surface
    return Hits(distance, surface, face, normal, points)
