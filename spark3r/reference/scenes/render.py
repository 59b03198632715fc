"""Rendered clips of procedural scenes, with exact depth and poses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...clips import Clip
from .scene import Scene, random_scene
from .textures import shade_texture
from .tracing import Hits, trace

SUBPIXELS = ((-0.25, -0.25), (-0.25, 0.25), (0.25, -0.25), (0.25, 0.25))


def rendered_clip(
    seed: int,
    frames: int,
    height: int = 64,
    width: int = 64,
    *,
    span: float = 1.0,
    ordered: bool = True,
) -> Clip:
    """Return a rendered clip of the scene of a seed.

    Frames lie evenly on the path from time 0 to `span`, so that a different number of frames
    samples the same path more or less densely. A span above 1 continues along the path, for clips
    of any length at the usual speed.

    Args:
        seed: Seed of scene and path, from a range of `spark3r.reference.scenes.seeds`.
        frames: Number of frames S, at least 1.
        height: Image height in pixels.
        width: Image width in pixels.
        span: Length of the path in path time, above 0.
        ordered: False for an unordered photo set, in which the frames after the first are shuffled.
            One seed and length always have the same order.

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
    images, depth, extrinsics = render_path(scene, u, height, width)
    focal = focal_length(scene, height)
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Clip(
        name=f"rendered:{seed}",
        images=images,
        intrinsics=intrinsics.expand(frames, 3, 3).clone(),
        depth=depth,
        extrinsics=extrinsics,
    )


def focal_length(scene: Scene, height: int) -> float:
    """Return the focal length in pixels of a scene's camera for images of this height."""
    return 0.5 * height / math.tan(scene.fov_rad / 2)


def render_path(scene: Scene, u: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rendered views at some times of a scene's path.

    Args:
        scene: Scene to render.
        u: Path times, float64 `[S]`.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        Images `[S, 3, H, W]`, z depth `[S, H, W]`, world-to-camera extrinsics `[S, 3, 4]`.
    """
    poses = scene.path.poses(u)
    focal = focal_length(scene, height)
    images = torch.empty(len(u), 3, height, width)
    depth = torch.empty(len(u), height, width)
    for index, pose in enumerate(poses.float()):
        images[index], depth[index] = render_frame(scene, pose, focal, height, width)
    rotation = poses[:, :, :3].transpose(1, 2)
    extrinsics = torch.cat([rotation, -rotation @ poses[:, :, 3:]], dim=2).float()
    return images, depth, extrinsics


def seen_objects(scene: Scene, u: Tensor, height: int, width: int) -> Tensor:
    """Return which object the centre of each pixel shows, `[S, H, W]` int64, -1 for none.

    Args are those of `render_path`.
    """
    focal = focal_length(scene, height)
    seen = []
    for pose in scene.path.poses(u).float():
        hits = trace(scene, pose[:, 3], _directions(pose, _centres(height, width), focal))
        item = hits.surface - len(scene.plane_normal) - 1
        seen.append(item.clamp_min(-1).view(height, width))
    return torch.stack(seen)


def render_frame(
    scene: Scene, pose: Tensor, focal: float, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Return one rendered view.

    Textures fade with the pixel's footprint, so one ray per pixel is enough inside a surface.
    Pixels at the border of two surfaces have the mean of 2x2 rays.

    Args:
        scene: Scene to render.
        pose: Camera-to-world pose, `[3, 4]`.
        focal: Focal length in pixels. The principal point is the image's centre.
        height: Image height in pixels.
        width: Image width in pixels.

    Returns:
        Colours `[3, H, W]` in [0, 1], and z depth of the pixels' centres `[H, W]` in metres.
    """
    pixels = _centres(height, width)
    directions = _directions(pose, pixels, focal)
    hits = trace(scene, pose[:, 3], directions)
    colours = _shade(scene, hits, directions, focal)
    border = _borders(hits.face.view(height, width)).view(-1).nonzero()[:, 0]
    offsets = torch.tensor(SUBPIXELS).T  # [2, 4]
    fine = _directions(pose, (pixels[:, border, None] + offsets[:, None]).flatten(1), focal)
    smooth = _shade(scene, trace(scene, pose[:, 3], fine), fine, focal)
    colours[:, border] = smooth.view(3, -1, len(SUBPIXELS)).mean(dim=2)
    return colours.view(3, height, width), hits.distance.view(height, width)


def _centres(height: int, width: int) -> Tensor:
    """Return the centres of the pixels relative to the image's centre, `[2, H * W]`."""
    y = torch.arange(height, dtype=torch.float32)[:, None].expand(height, width).reshape(-1) + 0.5
    x = torch.arange(width, dtype=torch.float32).repeat(height) + 0.5
    return torch.stack([x, y]) - torch.tensor([width / 2, height / 2])[:, None]


def _directions(pose: Tensor, pixels: Tensor, focal: float) -> Tensor:
    """Return world directions `[3, R]` of pixels `[2, R]`, with z = 1 in the camera's axes."""
    camera = torch.cat([pixels / focal, torch.ones(1, pixels.shape[1])])
    return pose[:, :3] @ camera


def _borders(face: Tensor) -> Tensor:
    """Return whether each pixel of `[H, W]` has a 4-neighbour of another face."""
    border = torch.zeros_like(face, dtype=torch.bool)
    vertical = face[1:] != face[:-1]
    horizontal = face[:, 1:] != face[:, :-1]
    border[1:] |= vertical
    border[:-1] |= vertical
    border[:, 1:] |= horizontal
    border[:, :-1] |= horizontal
    return border


def _shade(scene: Scene, hits: Hits, directions: Tensor, focal: float) -> Tensor:
    """Return texture times light, `[3, R]` in [0, 1]. Light does not depend on the view."""
    length = (directions * directions).sum(dim=0).sqrt()
    cosine = (hits.normal * directions).sum(dim=0).abs() / length
    footprint = hits.distance / focal / cosine.clamp(min=0.1).sqrt()
    points = hits.points
    if scene.shift is not None:
        points = points - scene.shift.T[:, hits.surface]
    colour = shade_texture(scene.textures, hits.surface, points, footprint)
    lambert = 0.5 + 0.5 * (scene.light @ hits.normal)
    light = scene.ambient + (1.05 - scene.ambient) * lambert
    return (colour * light).clamp(0.0, 1.0)
