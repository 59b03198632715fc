"""Light that is fixed to the scene, and its shadows, looked up in maps made once per scene."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Geometry
from .tracing import FAR, Enclosure, leave_room, nearest

LAMP_TEXELS = 96  # side of a lamp's octahedral map
BEAM_TEXELS = 112  # side of the sun's map
SKY_TEXELS = 40  # side of the maps that occlude the light from everywhere
SKY_DIRECTIONS = 9
CORNER_SHADE, CORNER_M = 0.3, 0.35  # how dark corners of a room are, and how far


@dataclass(frozen=True)
class Beams:
    """Parallel light from n directions; fp32."""

    basis: Tensor  # [n, 3, 3] rows: two axes of the map, and the direction towards the light
    colour: Tensor  # [n, 3] irradiance on a surface that faces the light
    maps: Tensor  # [n, 1, T, T] position along the direction of the first shape from the light
    centre: Tensor  # [3] of what the maps cover
    radius: float  # of what the maps cover, metres
    blur: float  # depth over which a shadow sets in, metres


@dataclass(frozen=True)
class Lamps:
    """Light from m points; fp32."""

    position: Tensor  # [m, 3]
    colour: Tensor  # [m, 3] irradiance at one metre
    maps: Tensor  # [m, 1, T, T] distance to the first shape, by octahedral direction


@dataclass(frozen=True)
class Lights:
    """All light of a scene."""

    sky: Beams  # from everywhere, softly
    sun: Beams  # one direction, or none
    lamps: Lamps
    base: Tensor  # [3] irradiance that nothing keeps away
    enclosure: Enclosure
    indoors: bool  # the sun shines through the room's holes, and its corners are darker


def make_beams(
    geometry: Geometry, directions: Tensor, colour: Tensor, cover: Tensor, texels: int, blur: float
) -> Beams:
    """Render the maps of parallel light.

    Args:
        geometry: What throws shadows.
        directions: Unit vectors towards the light, `[n, 3]`.
        colour: Irradiance, `[n, 3]`.
        cover: Least and largest corner of where shadows are needed, `[2, 3]`.
        texels: Side of a map.
        blur: Depth over which a shadow sets in, metres.

    Returns:
        The light.
    """
    centre = cover.mean(dim=0)
    radius = float((cover[1] - cover[0]).norm()) / 2
    helper = torch.where(
        directions[:, 1:2].abs() < 0.9, torch.tensor([0.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    )
    across = F.normalize(torch.linalg.cross(helper, directions), dim=1)
    up = torch.linalg.cross(directions, across)
    basis = torch.stack([across, up, directions], dim=1)
    line = (torch.arange(texels) + 0.5) * (2 / texels) - 1
    grid = torch.stack([line.repeat(texels), line.repeat_interleave(texels)]) * radius
    start = torch.cat([grid, torch.full((1, texels * texels), radius)])
    origins = (basis.transpose(1, 2) @ start).transpose(0, 1).flatten(1) + centre[:, None]
    rays = -directions.T.repeat_interleave(texels * texels, dim=1)
    limit = torch.full((origins.shape[1],), 2 * radius)
    distance, _ = nearest(geometry, origins, rays, limit)
    maps = (radius - distance).view(len(directions), 1, texels, texels)
    return Beams(basis, colour, maps, centre, radius, blur)


def make_lamps(geometry: Geometry, positions: Sequence[Sequence[float]], colour: Tensor) -> Lamps:
    """Render the maps of point lights.

    Args:
        geometry: What throws shadows.
        positions: World positions, m of them.
        colour: Irradiance at one metre, `[m, 3]`.

    Returns:
        The lights.
    """
    line = (torch.arange(LAMP_TEXELS) + 0.5) * (2 / LAMP_TEXELS) - 1
    x, y = line.repeat(LAMP_TEXELS), line.repeat_interleave(LAMP_TEXELS)
    z = 1 - x.abs() - y.abs()
    fold = (-z).clamp(min=0.0)
    rays = torch.stack([x - fold * x.sign(), y - fold * y.sign(), z])
    rays = rays / rays.norm(dim=0)
    maps = [torch.empty(0, 1, LAMP_TEXELS, LAMP_TEXELS)]
    for position in positions:
        origins = torch.tensor(position)[:, None].expand_as(rays)
        distance, _ = nearest(geometry, origins, rays, torch.full(x.shape, FAR))
        maps.append(distance.view(1, 1, LAMP_TEXELS, LAMP_TEXELS))
    return Lamps(torch.tensor(positions).view(-1, 3), colour.view(-1, 3), torch.cat(maps))


def sky_directions(rng: random.Random) -> Tensor:
    """Spread directions over the upper half space, most of them steep; unit, `[n, 3]`."""
    turn = rng.uniform(0, 2 * math.pi)
    rows = []
    for index in range(SKY_DIRECTIONS):
        height = 0.25 + 0.75 * (index + 0.5) / SKY_DIRECTIONS
        angle, side = turn + index * 2.399963, math.sqrt(1 - height * height)  # golden angle
        rows.append([side * math.cos(angle), -height, side * math.sin(angle)])
    return torch.tensor(rows)


def irradiance(lights: Lights, points: Tensor, normal: Tensor) -> Tensor:
    """Sum up the light on surface points, `[3, R]` from points and normals `[3, R]`."""
    lifted = points + 0.03 * normal
    total = _beams(lights.sky, lifted, normal) + lights.base[:, None]
    if lights.indoors:
        total *= _corners(lights.enclosure.room, points, normal)
    if len(lights.sun.basis):
        sun = _beams(lights.sun, lifted, normal)
        if lights.indoors:
            towards = lights.sun.basis[0, 2][:, None].expand_as(points)
            sun *= leave_room(lights.enclosure, lifted, towards)[2]
        total += sun
    for index in range(len(lights.lamps.position)):
        total += _lamp(lights.lamps, index, lifted, normal)
    return total


def _beams(beams: Beams, points: Tensor, normal: Tensor) -> Tensor:
    place = beams.basis.flatten(0, 1) @ (points - beams.centre[:, None])
    place = place.view(-1, 3, points.shape[1])  # [n, 3, R]
    grid = place[:, None, :2].transpose(2, 3) / beams.radius
    near = F.grid_sample(beams.maps, grid, align_corners=False, padding_mode="border")[:, 0, 0]
    visible = (1.0 - (near - place[:, 2]) / beams.blur).clamp_(0.0, 1.0)
    facing = (beams.basis[:, 2] @ normal).clamp_(min=0.0)
    return beams.colour.T @ (visible * facing)


def _lamp(lamps: Lamps, index: int, points: Tensor, normal: Tensor) -> Tensor:
    ray = points - lamps.position[index][:, None]
    squared = (ray * ray).sum(dim=0)
    distance = squared.sqrt()
    facing = (-(ray * normal).sum(dim=0) / distance.clamp(min=1e-3)).clamp_(min=0.0)
    flat = ray / ray.abs().sum(dim=0).clamp(min=1e-6)
    folded = (1 - flat[:2].flip(0).abs()) * torch.where(flat[:2] < 0, -1.0, 1.0)
    grid = torch.where(flat[2] < 0, folded, flat[:2]).T[None, None]
    near = F.grid_sample(lamps.maps[index][None], grid, align_corners=False, padding_mode="border")
    visible = (1.0 - (distance - near[0, 0, 0]) / 0.15).clamp_(0.0, 1.0)
    return lamps.colour[index][:, None] * (visible * facing / (squared + 0.3))


def _corners(room: Tensor, points: Tensor, normal: Tensor) -> Tensor:
    """Darken points near walls that they do not belong to, `[R]`."""
    low, high = (points - room[0][:, None]).abs(), (room[1][:, None] - points).abs()
    shade = torch.exp(torch.minimum(low, high) / -CORNER_M) * (1 - normal.abs())
    return (1 - CORNER_SHADE * shade).prod(dim=0)


def highlights(
    lights: Lights, points: Tensor, normal: Tensor, view: Tensor, sharpness: Tensor
) -> Tensor:
    """Sum up highlights, which move with the view.

    Args:
        lights: The light.
        points: Surface points `[3, R]`.
        normal: Unit normals `[3, R]`.
        view: Unit vectors towards the camera `[3, R]`.
        sharpness: Exponent `[R]`.

    Returns:
        Radiance `[3, R]` of a surface of gloss 1.
    """
    mirrored = 2 * (view * normal).sum(dim=0) * normal - view
    graze = (1 - (view * normal).sum(dim=0).clamp(0.0, 1.0)) ** 5  # Schlick's approximation
    total = torch.zeros_like(points)
    for index in range(len(lights.lamps.position)):
        ray = lights.lamps.position[index][:, None] - points
        squared = (ray * ray).sum(dim=0)
        cosine = ((mirrored * ray).sum(dim=0) / squared.sqrt()).clamp(min=0.0)
        strength = cosine**sharpness * (0.1 * sharpness + 1) / (squared + 0.3)
        total += lights.lamps.colour[index][:, None] * strength
    for direction, colour in zip(lights.sun.basis[:, 2], lights.sun.colour, strict=True):
        cosine = (direction @ mirrored).clamp(min=0.0)
        total += colour[:, None] * cosine**sharpness * (0.1 * sharpness + 1)
    # What is above is brighter than what is below, and shows in anything that is polished.
    ambient = lights.sky.colour.sum(dim=0)[:, None] * (0.35 - 0.65 * mirrored[1])
    total += ambient.clamp(min=0.0) * 0.5
    return total * (0.15 + 0.85 * graze)
