"""Shapes as tensors, in groups with bounding balls, so that a ray meets few of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shapes import BALL, BOX, TUBE, Shape

GROUP_SHAPES = 5  # the most shapes of a group


@dataclass(frozen=True)
class Group:
    """Consecutive shapes: boxes, then balls, then tubes."""

    first: int
    boxes: int
    balls: int
    tubes: int

    @property
    def shapes(self) -> slice:
        """The group's shapes."""
        return slice(self.first, self.first + self.boxes + self.balls + self.tubes)


@dataclass(frozen=True)
class Geometry:
    """K shapes in G groups; fp32, metres, world axes.

    A shape is a unit shape (half extents, radius and half height 1) in its own coordinates
    `to_local @ world - offset`. A tube's axis is its local y.
    """

    to_local: Tensor  # [K, 3, 3]
    offset: Tensor  # [K, 3]
    half: Tensor  # [K, 3]
    kind: Tensor  # [K] int64
    material: Tensor  # [K] int64
    groups: tuple[Group, ...]
    centre: Tensor  # [G, 3] of the bounding balls
    radius: Tensor  # [G]


def make_geometry(shapes: Sequence[Shape]) -> Geometry:
    """Turn shapes into tensors.

    Args:
        shapes: At least one shape.

    Returns:
        The geometry. Its shapes are in another order.
    """
    groups: list[Group] = []
    ordered: list[Shape] = []
    for cluster in _clusters(list(shapes)):
        members = [[shape for shape in cluster if shape.kind == kind] for kind in (BOX, BALL, TUBE)]
        groups.append(Group(len(ordered), *(len(part) for part in members)))
        ordered += (shape for part in members for shape in part)
    table = torch.tensor([shape[1:10] for shape in ordered])  # [K, 9]
    centre = table[:, :3] * torch.tensor([1.0, -1.0, 1.0])
    half, rotation = table[:, 3:6], _rotation(table[:, 6:9])
    to_local = rotation.transpose(1, 2) / half[:, :, None]
    reach = half.norm(dim=1)
    middle, radius = [], []
    for group in groups:
        points, sizes = centre[group.shapes], reach[group.shapes, None]
        low, high = (points - sizes).amin(dim=0), (points + sizes).amax(dim=0)
        middle.append((low + high) / 2)
        radius.append(((points - middle[-1]).norm(dim=1) + sizes[:, 0]).amax())
    return Geometry(
        to_local=to_local,
        offset=(to_local @ centre[:, :, None])[:, :, 0],
        half=half,
        kind=torch.tensor([shape.kind for shape in ordered]),
        material=torch.tensor([shape.material for shape in ordered]),
        groups=tuple(groups),
        centre=torch.stack(middle),
        radius=torch.stack(radius),
    )


def _clusters(shapes: list[Shape]) -> Iterator[list[Shape]]:
    """Cut shapes into groups that are near each other.

    Each cut is across the longest side, where the parts together are least likely to be met: where
    the sum of their numbers times their squared diagonals is least.
    """
    count = len(shapes)
    if count <= GROUP_SHAPES:
        if shapes:
            yield shapes
        return
    columns = list(zip(*(shape[1:4] for shape in shapes), strict=True))
    axis = max(range(3), key=lambda a: max(columns[a]) - min(columns[a]))
    ordered = sorted(shapes, key=lambda shape: shape[1 + axis])
    before, after = _diagonals(ordered), _diagonals(ordered[::-1])[::-1]
    cut = min(range(1, count), key=lambda i: i * before[i - 1] + (count - i) * after[i])
    yield from _clusters(ordered[:cut])
    yield from _clusters(ordered[cut:])


def _diagonals(shapes: list[Shape]) -> list[float]:
    """Squared diagonals of the boxes around the first 1, 2, ... shapes, turns left aside."""
    diagonals = []
    x0 = y0 = z0 = math.inf
    x1 = y1 = z1 = -math.inf
    for _, x, y, z, half_x, half_y, half_z, *_ in shapes:
        x0, x1 = min(x0, x - half_x), max(x1, x + half_x)
        y0, y1 = min(y0, y - half_y), max(y1, y + half_y)
        z0, z1 = min(z0, z - half_z), max(z1, z + half_z)
        diagonals.append((x1 - x0) ** 2 + (y1 - y0) ** 2 + (z1 - z0) ** 2)
    return diagonals


def _rotation(angles: Tensor) -> Tensor:
    """Rotations `[K, 3, 3]` from yaw, pitch and roll `[K, 3]`: roll first, then pitch, then yaw."""
    (cy, cp, cr), (sy, sp, sr) = angles.cos().T, angles.sin().T
    zero, one = torch.zeros_like(cy), torch.ones_like(cy)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], 1).view(-1, 3, 3)
    about_x = torch.stack([one, zero, zero, zero, cp, -sp, zero, sp, cp], 1).view(-1, 3, 3)
    about_z = torch.stack([cr, -sr, zero, sr, cr, zero, zero, zero, one], 1).view(-1, 3, 3)
    return about_y @ about_x @ about_z
