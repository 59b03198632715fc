"""The solid shapes that scenes are made of, and how they are put together.

Furniture is described in its own axes: x to the right, z to the back, and heights (`up`) from the
floor that it stands on. World axes follow OpenCV (y down), so a height becomes y = -up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

BOX, BALL, TUBE = range(3)  # a tube is an elliptic cylinder along the vertical
Triple = tuple[float, float, float]
LEAST_HALF_M = 1e-3  # half the thickness of the thinnest shape


class Shape(NamedTuple):
    """A box, ellipsoid or cylinder; metres and radians."""

    kind: int
    x: float
    up: float  # of the centre
    z: float
    half_x: float
    half_up: float
    half_z: float
    yaw: float
    pitch: float
    roll: float
    material: int


class Top(NamedTuple):
    """A level rectangle on which things can stand; metres."""

    x: float  # of the centre
    up: float
    z: float
    width: float
    depth: float
    headroom: float  # height up to the next board


@dataclass
class Assembly:
    """Shapes that belong together, in their own axes; the front looks towards -z.

    Width and depth are those of the footprint about the origin, in metres.
    """

    width: float
    height: float
    depth: float
    shapes: list[Shape] = field(default_factory=list)
    tops: list[Top] = field(default_factory=list)

    def add(
        self,
        kind: int,
        material: int,
        size: Triple,
        at: Triple = (0.0, 0.0, 0.0),
        turn: Triple = (0.0, 0.0, 0.0),
    ) -> None:
        """Add a shape.

        Args:
            kind: `BOX`, `BALL` or `TUBE`.
            material: Index of its material.
            size: Width, height and depth.
            at: x of the centre, height of the lower side, z of the centre.
            turn: Roll about z, pitch about x and yaw about the vertical, in this order, about the
                shape's centre; given as (yaw, pitch, roll).
        """
        half = [max(side / 2, LEAST_HALF_M) for side in size]
        self.shapes.append(
            Shape(
                kind, at[0], at[1] + size[1] / 2, at[2], half[0], half[1], half[2], *turn, material
            )
        )

    def box(
        self,
        material: int,
        size: Triple,
        at: Triple = (0.0, 0.0, 0.0),
        turn: Triple = (0.0, 0.0, 0.0),
    ) -> None:
        """Add a box; arguments as for `add`."""
        self.add(BOX, material, size, at, turn)

    def ball(
        self,
        material: int,
        size: Triple,
        at: Triple = (0.0, 0.0, 0.0),
        turn: Triple = (0.0, 0.0, 0.0),
    ) -> None:
        """Add an ellipsoid; arguments as for `add`."""
        self.add(BALL, material, size, at, turn)

    def tube(
        self,
        material: int,
        size: Triple,
        at: Triple = (0.0, 0.0, 0.0),
        turn: Triple = (0.0, 0.0, 0.0),
    ) -> None:
        """Add a cylinder, upright unless it is turned; arguments as for `add`."""
        self.add(TUBE, material, size, at, turn)

    def put(self, other: Assembly, x: float, up: float, z: float, yaw: float = 0.0) -> None:
        """Add another assembly's shapes, turned and then moved."""
        self.shapes += moved(other.shapes, x, up, z, yaw)


def moved(shapes: Iterable[Shape], x: float, up: float, z: float, yaw: float) -> list[Shape]:
    """Return shapes that are turned about the vertical through the origin, then moved."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return [
        shape._replace(
            x=x + cos * shape.x + sin * shape.z,
            up=up + shape.up,
            z=z - sin * shape.x + cos * shape.z,
            yaw=shape.yaw + yaw,
        )
        for shape in shapes
    ]
