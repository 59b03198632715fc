"""Render clips of rooms and places with exact depth and poses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spark3r.clips import Clip

from .lighting import highlights, irradiance
from .materials import look_up
from .photography import brightness, photograph, random_camera
from .scene import Scene, random_scene
from .tracing import trace

VERSION = "v2"
RAYS_AT_A_TIME = 26_000


def rendered_clip(
    seed: int,
    frames: int,
    height: int = 64,
    width: int = 64,
    *,
    span: float = 1.0,
    ordered: bool = True,
) -> Clip:
    """Render a clip of the scene with this seed, as a camera would record it.

    Frames lie evenly on the path from time 0 to `span`, so that another number of frames samples
    the same path more or less densely. A span above 1 goes on along the path, for footage of any
    length at the usual speed.

    Args:
        seed: Scene and path; see `spark3r.reference.scenes.seeds` for which seeds are for what.
        frames: Number of frames S, at least 1.
        height: Image height in pixels.
        width: Image width in pixels.
        span: Length of the path in path time, above 0.
        ordered: False for an unordered photo set: the frames after the first are shuffled, always
            in the same way for one seed and length.

    Returns:
        The clip, fp32: images in [0, 1], intrinsics in pixels, z depth and world-to-camera
        extrinsics in metres.

    Raises:
        ValueError: If `frames`, the sides or `span` are not positive.
    """
    if frames < 1 or height < 1 or width < 1 or not span > 0:
        raise ValueError(
            f"need positive frames, sides and span, got {frames} frames of {height}x{width}, "
            f"span {span}"
        )
    scene = random_scene(seed)
    u = torch.linspace(0.0, span, frames, dtype=torch.float64)
    if not ordered:
        generator = torch.Generator().manual_seed(seed)
        u[1:] = u[1:][torch.randperm(frames - 1, generator=generator)]
    radiance, depth, extrinsics = render_path(scene, u, height, width)
    images = torch.cat(
        [_recorded(seed, time, frame, radiance[0]) for time, frame in zip(u, radiance, strict=True)]
    )
    focal = focal_lengths(scene, height, width)
    intrinsics = torch.tensor([[focal[0], 0, width / 2], [0, focal[1], height / 2], [0, 0, 1]])
    return Clip(
        name=f"rendered:{VERSION}:{seed}",
        images=images,
        intrinsics=intrinsics.expand(frames, 3, 3).clone(),
        depth=depth,
        extrinsics=extrinsics,
    )


def _recorded(seed: int, time: Tensor, frame: Tensor, first: Tensor) -> Tensor:
    """Record a frame, `[1, 3, H, W]`; it depends on the path time, not on how many frames are."""
    generator, moments = torch.Generator(), torch.Generator()
    generator.manual_seed(seed)
    moments.manual_seed(((seed << 32) + round(float(time) * 2**20)) % 2**63)
    camera = random_camera(1, 1, generator, moments)
    return photograph(frame[None, None], camera, brightness(first[None]), moments)[0]


def field_of_view(scene: Scene, height: int, width: int) -> tuple[float, float]:
    """Return a scene's vertical and horizontal field of view in radians.

    The lens covers the same diagonal whatever the aspect ratio. Pixels are nearly square, because
    footage is resized to sides of whole patches.

    Args:
        scene: The scene.
        height: Image height in pixels.
        width: Image width in pixels.
    """
    wide = width * scene.squeeze
    half = scene.diagonal / math.hypot(wide, height)
    return 2 * math.atan(half * height), 2 * math.atan(half * wide)


def focal_lengths(scene: Scene, height: int, width: int) -> tuple[float, float]:
    """Return a scene's horizontal and vertical focal length in pixels; as `field_of_view`."""
    vertical, horizontal = field_of_view(scene, height, width)
    return width / 2 / math.tan(horizontal / 2), height / 2 / math.tan(vertical / 2)


def render_path(scene: Scene, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Render the views at given times of a scene's path.

    Rays go through the pixels' centres and corners. A pixel takes half of its colour from its
    centre and an eighth from each corner, and its depth from its centre.

    Args:
        scene: The scene.
        u: Path times, float64 `[S]`.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        Scene-linear radiance `[S, 3, H, W]` (see `photograph`), z depth `[S, H, W]`, and
        world-to-camera extrinsics `[S, 3, 4]`.
    """
    poses = scene.path.poses(u)
    rays = _camera_rays(scene, height, width)
    images = torch.empty(len(u), 3, height, width)
    depth = torch.empty(len(u), height, width)
    step = max(1, RAYS_AT_A_TIME // rays.shape[1])
    for start in range(0, len(u), step):
        some = slice(start, start + step)
        images[some], depth[some] = _render_views(scene, poses[some].float(), rays, height, width)
    rotation = poses[:, :, :3].transpose(1, 2)
    extrinsics = torch.cat([rotation, -rotation @ poses[:, :, 3:]], dim=2).float()
    return images, depth, extrinsics


def _camera_rays(scene: Scene, height: int, width: int) -> Tensor:
    """Rays of the pixels' centres, then of their corners, `[3, R]`; their z is 1."""
    focal_x, focal_y = focal_lengths(scene, height, width)
    parts = []
    for rows, columns, start in ((height, width, 0.5), (height + 1, width + 1, 0.0)):
        y = (torch.arange(rows) + (start - height / 2)) / focal_y
        x = (torch.arange(columns) + (start - width / 2)) / focal_x
        parts.append(torch.stack([x.repeat(rows), y.repeat_interleave(columns)]))
    plane = torch.cat(parts, dim=1)
    return torch.cat([plane, torch.ones(1, plane.shape[1])])


def _render_views(
    scene: Scene, poses: Tensor, rays: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Render frames at once: poses `[s, 3, 4]` to radiance `[s, 3, H, W]` and depth."""
    frames, count = len(poses), rays.shape[1]
    directions = (poses[:, :, :3] @ rays).transpose(0, 1).flatten(1)  # [3, s * R]
    origins = poses[:, :, 3:].expand(-1, 3, count).transpose(0, 1).flatten(1)
    hits = trace(scene.geometry, scene.enclosure, origins, directions)
    length = (directions * directions).sum(dim=0).sqrt()
    view = -directions / length
    cosine = (view * hits.normal).sum(dim=0).clamp(min=0.05)
    pixel = 1.0 / focal_lengths(scene, height, width)[1]
    footprint = hits.distance * pixel / cosine.sqrt()
    seen = look_up(scene.surfaces, hits, footprint)
    glow = (seen.glow > 0).float()
    light = irradiance(scene.lights, hits.points, hits.normal)
    radiance = seen.colour * torch.lerp(light, seen.glow, glow)
    shiny = seen.gloss.nonzero()[:, 0]
    shine = highlights(
        scene.lights,
        hits.points[:, shiny],
        hits.normal[:, shiny],
        view[:, shiny],
        seen.sharpness[shiny],
    )
    radiance[:, shiny] += seen.gloss[shiny] * shine
    radiance = radiance.view(3, frames, count).transpose(0, 1)
    centres = radiance[:, :, : height * width].unflatten(2, (height, width))
    corners = radiance[:, :, height * width :].unflatten(2, (height + 1, width + 1))
    around = corners[:, :, 1:, 1:] + corners[:, :, 1:, :-1]
    around = around + corners[:, :, :-1, 1:] + corners[:, :, :-1, :-1]
    depth = hits.distance.view(frames, count)[:, : height * width]
    return centres / 2 + around / 8, depth.unflatten(1, (height, width))
