"""Scenes: a room or open place with its materials, its light, and a camera path through it."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Geometry, make_geometry
from .lighting import (
    BEAM_TEXELS,
    SKY_DIRECTIONS,
    SKY_TEXELS,
    Lights,
    make_beams,
    make_lamps,
    sky_directions,
)
from .materials import Palette, Surfaces, make_surfaces
from .noise import Noise
from .outdoors import random_open_place
from .paths import CameraPath, choose_path
from .places import LightPlan, Place
from .rooms import random_room
from .shapes import Triple
from .textures import SIZE
from .tracing import Enclosure, leave_room, nearest

OUTDOOR_SHARE = 0.15
NEAREST_M, NEAR_VIEW_M = 0.3, 0.7  # least distance of anything, and of a view's median
NARROWEST, WIDEST = math.radians(45), math.radians(80)  # horizontal, of a sensor of 4:3


@dataclass(frozen=True)
class Scene:
    """Everything that a camera sees; fp32, metres."""

    geometry: Geometry
    surfaces: Surfaces
    lights: Lights
    enclosure: Enclosure
    path: CameraPath
    diagonal: float  # tangent of half the lens's angle across the sensor's diagonal
    squeeze: float  # width of a pixel over its height


def random_scene(seed: int) -> Scene:
    """Draw a scene with a camera path through it.

    Args:
        seed: Any non-negative integer; see `spark3r.reference.scenes.seeds`.

    Returns:
        The scene, the same in every process.
    """
    rng = random.Random(f"v2:{seed}")
    noise = Noise(SIZE, torch.Generator().manual_seed(seed))
    palette = Palette(rng, noise)
    place = random_open_place(palette) if rng.random() < OUTDOOR_SHARE else random_room(palette)
    geometry = make_geometry(place.shapes)
    enclosure = _enclosure(place)
    half = (
        math.tan(NARROWEST / 2) * (math.tan(WIDEST / 2) / math.tan(NARROWEST / 2)) ** rng.random()
    )
    return Scene(
        geometry=geometry,
        surfaces=make_surfaces(palette, geometry, enclosure, place.surroundings),
        lights=_lights(place, rng, geometry, enclosure),
        enclosure=enclosure,
        path=choose_path(place, rng, lambda poses: _shapes_seen(poses, geometry, enclosure)),
        diagonal=half * 1.25,  # of a rectangle of 4:3
        squeeze=math.exp(rng.uniform(-0.06, 0.06)),
    )


def _enclosure(place: Place) -> Enclosure:
    shell = _corners(place.shell)
    room = _corners(((0.0, 0.0, 0.0), (place.width, place.height, place.depth)))
    holes = [_corners(hole) for hole in place.holes]
    return Enclosure(
        room=room if place.indoors else shell,
        holes=torch.stack(holes) if holes else torch.empty(0, 2, 3),
        skirting=place.skirting,
        shell=shell,
    )


def _corners(corners: tuple[Triple, Triple]) -> Tensor:
    """Turn corners given as (x, up, z) into least and largest corner in world axes `[2, 3]`."""
    (left, low, near), (right, high, far) = corners
    return torch.tensor([[left, -high, near], [right, -low, far]])


def _lights(place: Place, rng: random.Random, geometry: Geometry, enclosure: Enclosure) -> Lights:
    cover = _corners(((0, -0.1, 0), (place.width, min(place.height, 4.0), place.depth)))
    towards = sky_directions(rng)
    ambient = torch.tensor(place.ambient)
    weight = 0.8 / (towards[:, 1].abs().sum())  # a level surface in the open gets 0.8 of it
    sky_colour = ambient.expand(SKY_DIRECTIONS, 3) * weight
    suns = F.normalize(_vectors(place.suns), dim=1)
    return Lights(
        sky=make_beams(geometry, towards, sky_colour, cover, SKY_TEXELS, 0.5),
        sun=make_beams(geometry, suns, _colours(place.suns), cover, BEAM_TEXELS, 0.12),
        lamps=make_lamps(geometry, _vectors(place.lamps).tolist(), _colours(place.lamps)),
        base=0.35 * ambient,
        enclosure=enclosure,
        indoors=place.indoors,
    )


def _vectors(plans: Sequence[LightPlan]) -> Tensor:
    rows = [[plan.place[0], -plan.place[1], plan.place[2]] for plan in plans]
    return torch.tensor(rows).view(-1, 3)


def _colours(plans: Sequence[LightPlan]) -> Tensor:
    return torch.tensor([plan.colour for plan in plans]).view(-1, 3)


def _shapes_seen(poses: Tensor, geometry: Geometry, enclosure: Enclosure) -> float:
    """Return how many shapes a view of a path shows on average, 0 if one is too close."""
    line = torch.linspace(-0.5, 0.5, 7)
    rays = torch.stack([line.repeat(7), line.repeat_interleave(7), torch.ones(49)])
    poses = poses.float()
    origins = poses[:, :, 3:].expand(-1, 3, 49).transpose(0, 1).flatten(1)
    directions = (poses[:, :, :3] @ rays).transpose(0, 1).flatten(1)
    limit, side, _ = leave_room(enclosure, origins, directions)
    distance, shape = nearest(geometry, origins, directions, limit)
    shape = torch.where(shape == len(geometry.kind), shape + side, shape).view(-1, 49)
    depth = distance.view(-1, 49)
    if float(depth.amin()) < NEAREST_M or float(depth.median(dim=1).values.amin()) < NEAR_VIEW_M:
        return 0.0
    return sum(len(row.unique()) for row in shape) / len(shape)
