"""What a place is made of, before it becomes tensors, and how things are set down in it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from .shapes import Assembly, Shape, Triple, moved


@dataclass(frozen=True)
class Footprint:
    """Ground that something covers, up to a height; metres."""

    x: tuple[float, float]
    z: tuple[float, float]
    up: float

    def overlaps(self, other: Footprint, gap: float) -> bool:
        """Tell whether two footprints are nearer to each other than a gap."""
        return (
            self.x[0] - gap < other.x[1]
            and other.x[0] - gap < self.x[1]
            and self.z[0] - gap < other.z[1]
            and other.z[0] - gap < self.z[1]
        )


@dataclass(frozen=True)
class LightPlan:
    """A light before its shadows are rendered: a position, or a direction towards it."""

    place: Triple  # x, up, z
    colour: Triple


@dataclass
class Place:
    """A room or an open place, x and z from 0 to `width` and `depth`; metres."""

    width: float
    depth: float
    height: float
    indoors: bool
    shell: tuple[Triple, Triple]  # corners (x, up, z) of the box around everything
    surroundings: list[int] = field(default_factory=list)  # materials, in the order of `tracing`
    skirting: float = 0.0  # height
    holes: list[tuple[Triple, Triple]] = field(default_factory=list)  # corners of what is cut out
    shapes: list[Shape] = field(default_factory=list)
    taken: list[Footprint] = field(default_factory=list)
    sights: list[Triple] = field(default_factory=list)  # what is worth looking at
    lamps: list[LightPlan] = field(default_factory=list)
    suns: list[LightPlan] = field(default_factory=list)
    ambient: Triple = (0.5, 0.5, 0.5)  # irradiance from everywhere

    def stand(self, thing: Assembly, x: float, z: float, yaw: float, gap: float = 0.03) -> bool:
        """Set something down if there is room for it.

        Args:
            thing: What to set down.
            x: Where its origin comes.
            z: Where its origin comes.
            yaw: Its turn.
            gap: Least distance to what is there already.

        Returns:
            Whether it was set down.
        """
        cos, sin = abs(math.cos(yaw)), abs(math.sin(yaw))
        half_x = (cos * thing.width + sin * thing.depth) / 2
        half_z = (sin * thing.width + cos * thing.depth) / 2
        footprint = Footprint((x - half_x, x + half_x), (z - half_z, z + half_z), thing.height)
        inside = (
            footprint.x[0] > -0.01
            and footprint.z[0] > -0.01
            and footprint.x[1] < self.width + 0.01
            and footprint.z[1] < self.depth + 0.01
        )
        if not inside or any(footprint.overlaps(other, gap) for other in self.taken):
            return False
        self.taken.append(footprint)
        self.shapes += moved(thing.shapes, x, 0.0, z, yaw)
        self.sights.append((x, min(max(thing.height, 0.5), 1.3), z))
        return True

    def clear(self, x: float, up: float, z: float, gap: float) -> bool:
        """Tell whether a camera at a point is clear of walls and of everything that stands."""
        if not (gap < x < self.width - gap and gap < z < self.depth - gap and up > 0.3):
            return False
        if self.indoors and up > self.height - 0.15:
            return False
        return not any(
            t.x[0] - gap < x < t.x[1] + gap and t.z[0] - gap < z < t.z[1] + gap and up < t.up + gap
            for t in self.taken
        )


def wall_frame(place: Place, side: int) -> tuple[float, float]:
    """Return a wall's length and the yaw of what stands with its back to it.

    Walls are numbered round: far (z = depth), right (x = width), near and left.
    """
    return (place.width, place.depth)[side % 2], side * math.pi / 2


def at_wall(place: Place, side: int, along: float, away: float) -> tuple[float, float]:
    """Return x and z of a point beside a wall.

    Args:
        place: The place.
        side: The wall; see `wall_frame`.
        along: Distance from the wall's left end, as seen from inside.
        away: Distance from the wall; negative behind it.
    """
    length, yaw = wall_frame(place, side)
    centre_x, centre_z = place.width / 2, place.depth / 2
    reach = (place.depth, place.width)[side % 2] / 2 - away
    x, z = along - length / 2, reach
    cos, sin = math.cos(yaw), math.sin(yaw)
    return centre_x + cos * x + sin * z, centre_z - sin * x + cos * z


def pack_walls(
    place: Place, rng: random.Random, makers: list[Assembly], openings: dict[int, list[Opening]]
) -> None:
    """Set furniture along the walls, from left to right, where doors and windows allow.

    Args:
        place: The place.
        rng: Source of every choice.
        makers: What to set down, in this order.
        openings: Doors and windows of each wall.
    """
    queue = list(makers)
    sides = list(range(4))
    rng.shuffle(sides)
    for side in sides:
        length, yaw = wall_frame(place, side)
        along = rng.uniform(0.0, 0.4)
        while queue and along < length - 0.4:
            thing = queue[0]
            middle = along + thing.width / 2
            blocked = [
                o for o in openings[side]
                if o.left < along + thing.width and o.right > along and o.bottom < thing.height
            ]  # fmt: skip
            if blocked:
                along = max(o.right for o in blocked) + 0.02
                continue
            if along + thing.width > length:
                break
            x, z = at_wall(place, side, middle, thing.depth / 2 + rng.uniform(0.0, 0.06))
            if place.stand(thing, x, z, yaw + (rng.gauss(0, 0.04) if thing.width < 1 else 0.0)):
                queue.pop(0)
                along += thing.width
            along += rng.choice((0.03, rng.uniform(0.05, 0.8)))


@dataclass(frozen=True)
class Opening:
    """A rectangle in a wall; metres from the wall's left end and from the floor."""

    left: float
    right: float
    bottom: float
    top: float
    window: bool
