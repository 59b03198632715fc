"""First hits of rays, all rays against one group of shapes after another.

Shapes stand in a room: a box that is seen from inside, whose walls may have holes. Around it is the
shell, another such box, where every ray ends at the latest. In an open place the two are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .geometry import Geometry, Group
from .shapes import BOX, TUBE

NEAR = 1e-4
TINY = 1e-12  # keeps the inverse of a direction finite
PENALTY = 1e9
FAR = 1e4  # farther than anything is
CACHED = 30_000  # numbers that a processor's cache holds well


# What a ray hits beside shapes, by its index after theirs: the room's sides x-, x+, ceiling, floor,
# z- and z+, the skirting along its walls, and the shell.
SKIRTING, SHELL, SURROUNDINGS = 6, 7, 8

# The parts of the local coordinates that make up the normal, by kind and by nearest axis.
NORMALS = (
    ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)),  # a box
    ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),  # a ball
    ((1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0)),  # a tube
)


@dataclass(frozen=True)
class Enclosure:
    """The room and the shell; fp32, metres, world axes."""

    room: Tensor  # [2, 3] least and largest corner
    holes: Tensor  # [h, 2, 3] corners of boxes that cut holes into the room's sides
    skirting: float  # its height; 0 for none
    shell: Tensor  # [2, 3]


@dataclass(frozen=True)
class Hits:
    """Where R rays end. The surroundings come after K shapes."""

    distance: Tensor  # [R] in units of the ray's direction
    shape: Tensor  # [R] int64, in [0, K + SURROUNDINGS)
    points: Tensor  # [3, R] world
    normal: Tensor  # [3, R] unit, world
    local: Tensor  # [3, R] coordinates of what was hit, in [-1, 1]
    axis: Tensor  # [R] int64, local axis that is normal to the face; of a ball the nearest one


def trace(geometry: Geometry, enclosure: Enclosure, origins: Tensor, directions: Tensor) -> Hits:
    """Intersect rays with a scene.

    Args:
        geometry: The shapes; no origin may lie inside one.
        enclosure: What is around them.
        origins: `[3, R]`, inside the room.
        directions: `[3, R]`, of any length.

    Returns:
        The first hit of every ray; there always is one.
    """
    wall, side, open_ = leave_room(enclosure, origins, directions)
    beyond, _ = _exit(enclosure.shell, origins, directions)
    limit = torch.where(open_, beyond, wall)
    distance, shape = nearest(geometry, origins, directions, limit)
    points = origins + distance * directions
    low = (points[1] > enclosure.room[1, 1] - enclosure.skirting) & (side != 2) & (side != 3)
    around = torch.where(open_, SHELL, torch.where(low, SKIRTING, side))
    count = len(geometry.kind)
    shape = torch.where(shape == count, around + count, shape)
    return _describe(geometry, enclosure, distance, shape, points)


def leave_room(
    enclosure: Enclosure, origins: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Find where rays meet the room's sides from inside.

    Args:
        enclosure: The room.
        origins: `[3, R]` or `[3, 1]`, inside the room.
        directions: `[3, R]`.

    Returns:
        Distance `[R]`, the side in the order x-, x+, ceiling, floor, z-, z+ `[R]`, and whether the
        ray leaves through a hole `[R]`.
    """
    distance, axis = _exit(enclosure.room, origins, directions)
    side = 2 * axis + (directions.gather(0, axis[None])[0] > 0)
    if len(enclosure.holes) == 0:
        return distance, side, torch.zeros(directions.shape[1], dtype=torch.bool)
    points = origins + distance * directions
    middle = enclosure.holes.mean(dim=1)[:, :, None]
    half = enclosure.holes[:, 1, :, None] - middle
    outside = ((points - middle).abs_() - half).amax(dim=1)  # [h, R], negative in a hole
    return distance, side, outside.amin(dim=0) < 0


def _exit(box: Tensor, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and axis at which rays leave a box from inside, each `[R]`."""
    middle, half = box.mean(dim=0)[:, None], (box[1] - box[0])[:, None] / 2
    inverse = (directions + TINY).reciprocal_()
    exits = (middle - origins) * inverse + half * inverse.abs()
    return exits.min(dim=0)


def nearest(
    geometry: Geometry, origins: Tensor, directions: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """Find the nearest shape along each ray.

    Args:
        geometry: The shapes.
        origins: `[3, R]`.
        directions: `[3, R]`, of any length.
        limit: Distance at which a ray ends at the latest, `[R]`.

    Returns:
        Distance `[R]` and shape `[R]`, int64; the number of shapes where the ray reaches its limit.
    """
    distance = limit.clone()
    shape = torch.full(limit.shape, len(geometry.kind))
    meets, seen = _meets(geometry, origins, directions)
    for index, group in enumerate(geometry.groups):
        if not seen[index]:
            continue
        rays = meets[index].nonzero()[:, 0]
        to_local = geometry.to_local[group.shapes].flatten(0, 1)
        local = (to_local @ directions.index_select(1, rays)).unflatten(0, (-1, 3))  # [k, 3, r]
        start = (to_local @ origins.index_select(1, rays)).unflatten(0, (-1, 3))
        start -= geometry.offset[group.shapes][:, :, None]
        found, which = _first(_distances(group, start, local.add_(TINY)))
        before = distance.index_select(0, rays)
        closer = (found < before).nonzero()[:, 0]
        nearer = rays.index_select(0, closer)
        distance.index_copy_(0, nearer, found.index_select(0, closer))
        shape.index_copy_(0, nearer, which.index_select(0, closer).add_(group.first))
    return distance, shape


def _meets(geometry: Geometry, origins: Tensor, directions: Tensor) -> tuple[Tensor, list[bool]]:
    """Tell which rays meet which groups' bounding balls, `[G, R]`, and which groups are met."""
    count = len(geometry.groups)
    # Squared distance to a ball's centre less its squared radius, and the way along the ray to the
    # point nearest to the centre; both are linear in what depends on the ray alone.
    room = geometry.centre.square().sum(dim=1) - geometry.radius.square()
    ball = torch.cat([-2.0 * geometry.centre, torch.ones(count, 1), room[:, None]], dim=1)
    point = torch.cat([geometry.centre, torch.full((count, 1), -1.0)], dim=1)
    unit = directions / (directions * directions).sum(dim=0).sqrt_()
    squared, along = (origins * origins).sum(dim=0)[None], (origins * unit).sum(dim=0)[None]
    start = torch.cat([origins, squared, torch.ones_like(squared)])
    way = torch.cat([unit, along])
    meets = torch.empty(count, directions.shape[1], dtype=torch.bool)
    deepest = torch.full((count,), -1.0)
    step = max(1, CACHED // count)
    for first in range(0, directions.shape[1], step):
        some = slice(first, first + step)
        inside = (point @ way[:, some]).clamp_(min=0.0).square_().sub_(ball @ start[:, some])
        torch.gt(inside, 0.0, out=meets[:, some])
        deepest = torch.maximum(deepest, inside.amax(dim=1))
    return meets, (deepest > 0.0).tolist()


def _first(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least of positive distances `[k, r]` and its row, each `[r]`.

    The row takes the place of a distance's last four bits. This is many times faster than a
    minimum with its index, and distances keep six digits.
    """
    rows = torch.arange(len(distances), dtype=torch.int32)[:, None]
    packed = (distances.view(torch.int32).bitwise_and_(-16).bitwise_or_(rows)).amin(dim=0)
    return packed.view(torch.float32), packed.bitwise_and(15).long()


def _distances(group: Group, start: Tensor, direction: Tensor) -> Tensor:
    """Hit unit shapes: starts and directions `[k, 3, r]` to distances `[k, r]`, both used up.

    Here and below conditions are sums of large penalties: comparing and choosing is slow.
    """
    boxes, round_ = group.boxes, group.boxes + group.balls
    parts = []
    if group.boxes:
        parts.append(_boxes(start[:boxes], direction[:boxes]))
    if group.balls:
        parts.append(_balls(start[boxes:round_], direction[boxes:round_]))
    if group.tubes:
        parts.append(_tubes(start[round_:], direction[round_:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _interval(entry: Tensor, leave: Tensor) -> Tensor:
    """Turn entry and exit into the hit distance, huge if the ray misses or starts behind."""
    late = (entry - leave).clamp_(min=0.0)
    behind = (NEAR - entry).clamp_(min=0.0)
    return entry.add_(late.add_(behind), alpha=PENALTY).clamp_(min=NEAR)


def _slabs(start: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Entry and exit of the slabs |x| < 1, elementwise."""
    inverse = direction.reciprocal_()
    middle = start.mul_(inverse).neg_()
    half = inverse.abs_()
    return middle - half, middle.add_(half)


def _boxes(start: Tensor, direction: Tensor) -> Tensor:
    entry, leave = _slabs(start, direction)
    return _interval(entry.amax(dim=1), leave.amin(dim=1))


def _quadratic(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Roots of a t² + 2 b t + c, a huge one and a small one if there are none."""
    discriminant = b * b - a * c
    root = discriminant.clamp(min=0.0).sqrt_()
    inverse = a.clamp(min=1e-12).reciprocal_()
    entry = (-b - root) * inverse
    return entry.add_(discriminant.clamp_(max=0.0), alpha=-PENALTY), (root - b).mul_(inverse)


def _balls(start: Tensor, direction: Tensor) -> Tensor:
    a = (direction * direction).sum(dim=1)
    b = (start * direction).sum(dim=1)
    return _interval(*_quadratic(a, b, (start * start).sum(dim=1) - 1.0))


def _tubes(start: Tensor, direction: Tensor) -> Tensor:
    (x, y, z), (u, v, w) = start.unbind(1), direction.unbind(1)
    side_entry, side_leave = _quadratic(u * u + w * w, x * u + z * w, x * x + z * z - 1.0)
    cap_entry, cap_leave = _slabs(y, v)
    return _interval(torch.maximum(side_entry, cap_entry), torch.minimum(side_leave, cap_leave))


def _describe(
    geometry: Geometry, enclosure: Enclosure, distance: Tensor, shape: Tensor, points: Tensor
) -> Hits:
    """Find local coordinates and normals of known hits."""
    boxes = torch.stack([enclosure.room] * SHELL + [enclosure.shell])
    extent, middle = (boxes[:, 1] - boxes[:, 0]) / 2, boxes.mean(dim=1)
    transforms = torch.cat([geometry.to_local, torch.diag_embed(1.0 / extent)]).flatten(1)
    offsets = torch.cat([geometry.offset, middle / extent])
    table = torch.cat([transforms, offsets], dim=1)
    columns = table.index_select(0, shape).T.contiguous()  # [12, R]
    transform = columns[:9].view(3, 3, -1)
    local = (transform * points).sum(dim=1) - columns[9:]
    kind = torch.cat([geometry.kind, torch.full((SURROUNDINGS,), BOX)])[shape]
    magnitude = local.abs()
    tube = (kind == TUBE).float()
    # On a tube's side the distance from the axis counts, and z does not.
    magnitude[0] += tube * ((magnitude[0].square() + magnitude[2].square()).sqrt_() - magnitude[0])
    magnitude[2] *= 1.0 - tube
    rows = torch.arange(3, dtype=torch.int32)[:, None]
    packed = magnitude.view(torch.int32).bitwise_and_(-4).bitwise_or_(rows).amax(dim=0)
    axis = packed.bitwise_and_(3).long()
    parts = torch.tensor(NORMALS).flatten(0, 1)
    normal = local * parts.index_select(0, 3 * kind + axis).T
    normal = (transform * normal[:, None]).sum(dim=0)
    inwards = 1.0 - 2.0 * (shape >= len(geometry.kind)).float()
    normal *= inwards / (normal * normal).sum(dim=0).sqrt_()
    return Hits(distance, shape, points, normal, local, axis)
