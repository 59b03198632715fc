"""Procedural scenes: a room or an open place, with objects that the camera sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .paths import PERIOD, CameraPath, random_path
from .textures import Textures, random_textures

PLANE, DOME, BOX, SPHERE, CYLINDER = range(5)
CANDIDATES = 160
CLEARANCE_M = 0.5  # between the path and any object


@dataclass(frozen=True)
class Scene:
    """Surfaces in the order planes, dome, boxes, spheres, cylinders, in fp32 and metres.

    A box, sphere or cylinder is a unit shape (half extents, radius and half height 1) in its own
    coordinates `to_local @ (world - centre)`.
    """

    plane_normal: Tensor  # [m, 3] pointing out of the room
    plane_offset: Tensor  # [m] inside is normal . x < offset
    dome_radius: float  # around the origin, enclosing everything else
    centre: Tensor  # [k, 3]
    to_local: Tensor  # [k, 3, 3]
    counts: tuple[int, int, int]  # boxes, spheres, cylinders
    kind: Tensor  # [n] int64, n = m + 1 + k
    textures: Textures
    light: Tensor  # [3] unit vector towards the light
    ambient: float
    path: CameraPath
    fov_rad: float  # vertical field of view
    shift: Tensor | None = None  # [n, 3] way of each surface from where its texture lies


def random_scene(seed: int) -> Scene:
    """Return the scene of a seed, with a camera path through it. It is the same in every process.

    Args:
        seed: Non-negative integer from a range of `spark3r.reference.scenes.seeds`.
    """
    generator = torch.Generator().manual_seed(seed)
    path = random_path(generator)
    poses = path.poses(torch.linspace(0, PERIOD, 161, dtype=torch.float64)).float()
    draw = torch.rand(5, generator=generator).tolist()
    fov = math.radians(50 + 28 * draw[0])
    normals, offsets = _enclosure(generator, poses[:, :, 3])
    centre, to_local, counts = _objects(generator, poses, fov)
    kinds = [PLANE] * len(normals) + [DOME]
    for kind, count in zip((BOX, SPHERE, CYLINDER), counts, strict=True):
        kinds += [kind] * count
    return Scene(
        plane_normal=normals,
        plane_offset=offsets,
        dome_radius=max(4.5 + 2.0 * draw[1], float(poses[:, :, 3].norm(dim=1).amax()) + 1.0),
        centre=centre,
        to_local=to_local,
        counts=counts,
        kind=torch.tensor(kinds),
        textures=random_textures(len(kinds), generator),
        light=F.normalize(torch.randn(3, generator=generator), dim=0),
        ambient=0.55 + 0.3 * draw[2],
        path=path,
        fov_rad=fov,
    )


def moved(scene: Scene, objects: Tensor, ways: Tensor) -> Scene:
    """Return a scene in which some objects stand elsewhere, with their textures.

    Args:
        scene: The scene.
        objects: Indices of the objects, `[o]` int64.
        ways: How far each is moved, `[o, 3]` in metres.
    """
    shift = torch.zeros(len(scene.kind), 3) if scene.shift is None else scene.shift
    return replace(
        scene,
        centre=scene.centre.index_add(0, objects, ways),
        shift=shift.index_add(0, len(scene.plane_normal) + 1 + objects, ways),
    )


def _enclosure(generator: torch.Generator, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return walls around the whole path: normals `[m, 3]` and offsets `[m]`."""
    draw = torch.rand(4, generator=generator).tolist()
    random_normals = F.normalize(torch.randn(8, 3, generator=generator), dim=1)
    tilt = 0.15 * torch.randn(6, 3, generator=generator)
    margins = torch.rand(8, generator=generator)
    angles = 2 * math.pi * draw[0] + math.pi / 2 * torch.arange(4)
    walls = torch.stack([angles.sin(), torch.zeros(4), angles.cos()], dim=1)
    floor = torch.tensor([[0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    if draw[1] < 0.4:  # a room with slightly crooked walls
        normals = F.normalize(torch.cat([floor, walls]) + tilt, dim=1)
    elif draw[1] < 0.7:  # any convex polyhedron, most of it out of sight
        normals = random_normals[: 4 + int(4 * draw[2])]
    else:  # ground, perhaps one wall, and the dome
        normals = (
            F.normalize(torch.cat([floor[:1], walls[: int(2 * draw[3])]]) + tilt[:2], dim=1)
            if draw[3] >= 0.5
            else F.normalize(floor[:1] + tilt[:1], dim=1)
        )
    margin = 1.3 + 1.5 * margins[: len(normals)]
    return normals, (positions @ normals.T).amax(dim=0) + margin


def _objects(
    generator: torch.Generator, poses: Tensor, fov: float
) -> tuple[Tensor, Tensor, tuple[int, int, int]]:
    """Return objects that the path sees and does not touch: centres, local frames, counts."""
    wanted = 10 + int(16 * torch.rand(1, generator=generator).item())
    draw = torch.rand(CANDIDATES, 8, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(CANDIDATES, 3, 3, generator=generator))
    aspect = 0.35 + 0.65 * torch.rand(CANDIDATES, 3, generator=generator)
    # Three in four lie in front of the first stretch of the path, which most clips cover.
    first_stretch = len(poses) / PERIOD
    stretch = torch.where(draw[:, 0] < 0.75, first_stretch, float(len(poses)))
    pose = poses[(draw[:, 1] * stretch).long()]  # [c, 3, 4]
    reach = 1.1 * math.tan(fov / 2)
    ray = torch.stack(
        [reach * (2 * draw[:, 2] - 1), reach * (2 * draw[:, 3] - 1), torch.ones(CANDIDATES)], dim=1
    )
    distance = 1.6 * 2.3 ** draw[:, 4]
    centre = (pose[:, :, :3] @ ray[:, :, None])[:, :, 0] * distance[:, None] + pose[:, :, 3]
    half_size = aspect * (distance * (0.07 + 0.28 * draw[:, 5] ** 1.5))[:, None]
    clear = torch.cdist(centre, poses[:, :, 3]).amin(dim=1) > half_size.norm(dim=1) + CLEARANCE_M
    chosen = clear.nonzero()[:wanted, 0]
    centre, half_size, rotation = centre[chosen], half_size[chosen], rotation[chosen]
    shape = (draw[chosen, 6] * 3).long()  # box, sphere, cylinder
    order = torch.argsort(shape, stable=True)
    counts = torch.bincount(shape, minlength=3).tolist()
    to_local = rotation.transpose(1, 2) / half_size[:, :, None]
    return centre[order], to_local[order], (counts[0], counts[1], counts[2])
