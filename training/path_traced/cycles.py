"""Radiance by Cycles and exact depth by rays, through the same camera."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np
import torch
from mathutils import Matrix, Vector
from mathutils.bvhtree import BVHTree
from numpy.typing import NDArray
from torch import Tensor

OVERSAMPLING = 2  # rendered pixels along a side of a training pixel
# World-to-world: Blender's axes (x right, y to the back, z up) from OpenCV's (y down, z forward).
BLENDER = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]], dtype=torch.float64)


@dataclass(frozen=True)
class Lens:
    """A camera's field of view and image size.

    Attributes:
        size: Height and width in pixels.
        fov: Vertical and horizontal field of view in radians.
    """

    size: tuple[int, int]
    fov: tuple[float, float]

    def rays(self) -> NDArray[np.float64]:
        """Return rays through the pixels' centres, `[H, W, 3]`; their z is 1."""
        height, width = self.size
        y = ((np.arange(height) + 0.5) * 2 / height - 1) * math.tan(self.fov[0] / 2)
        x = ((np.arange(width) + 0.5) * 2 / width - 1) * math.tan(self.fov[1] / 2)
        u, v = np.meshgrid(x, y)
        return np.stack([u, v, np.ones_like(u)], axis=-1)


def blender_pose(pose: Tensor) -> Tensor:
    """Return a camera-to-world pose `[3, 4]` of OpenCV's world in Blender's world."""
    return BLENDER @ pose


def cast(
    tree: BVHTree, pose: Tensor, rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cast rays.

    Args:
        tree: The scene's faces.
        pose: Camera-to-world in Blender's world, OpenCV camera axes, `[3, 4]`.
        rays: `[..., 3]` in the camera's axes; their z is 1.

    Returns:
        Depth along the optical axis, inf where nothing is, and the face that was hit or -1.
    """
    world = rays.reshape(-1, 3) @ pose[:, :3].numpy().T
    length = np.linalg.norm(world, axis=1)
    origin = Vector(pose[:, 3].tolist())
    depth, face = np.full(len(world), np.inf), np.full(len(world), -1)
    for index, direction in enumerate(world.tolist()):
        _, _, hit, distance = tree.ray_cast(origin, Vector(direction))
        if distance is not None:
            depth[index], face[index] = distance / length[index], hit
    return depth.reshape(rays.shape[:-1]), face.reshape(rays.shape[:-1])


def prepare(lens: Lens, samples: int, threads: int, seed: int) -> bpy.types.Object:
    """Set up Cycles and return the camera."""
    scene = bpy.context.scene
    camera = bpy.data.cameras.new("camera")
    camera.sensor_fit = "HORIZONTAL"
    camera.angle = lens.fov[1]
    camera.clip_start = 0.01
    viewer = bpy.data.objects.new("camera", camera)
    scene.collection.objects.link(viewer)
    scene.camera = viewer
    render, cycles = scene.render, scene.cycles
    render.engine = "CYCLES"
    height, width = (OVERSAMPLING * side for side in lens.size)
    render.resolution_x, render.resolution_y = width, height
    render.resolution_percentage = 100
    # Blender wants the shape of pixels, not a second field of view.
    ratio = math.tan(lens.fov[0] / 2) / height * width / math.tan(lens.fov[1] / 2)
    render.pixel_aspect_x, render.pixel_aspect_y = max(1.0, 1 / ratio), max(1.0, ratio)
    render.use_persistent_data = True
    render.threads_mode, render.threads = "FIXED", threads
    render.image_settings.file_format = "OPEN_EXR"
    render.image_settings.color_depth = "32"
    cycles.device, cycles.samples, cycles.seed = "CPU", samples, seed
    cycles.use_adaptive_sampling = False
    cycles.use_denoising, cycles.denoiser = True, "OPENIMAGEDENOISE"
    cycles.denoising_quality, cycles.denoising_prefilter = "FAST", "NONE"
    cycles.max_bounces, cycles.diffuse_bounces, cycles.glossy_bounces = 4, 3, 2
    cycles.caustics_reflective = cycles.caustics_refractive = False
    return viewer


def render(viewer: bpy.types.Object, pose: Tensor, seed: int) -> NDArray[np.float32]:
    """Render a view.

    Args:
        viewer: The camera that `prepare` returned.
        pose: Camera-to-world in Blender's world, OpenCV camera axes, `[3, 4]`.
        seed: Seed of the noise.

    Returns:
        Scene-linear radiance, averaged to the lens's size, `[3, H, W]`.
    """
    full = np.eye(4)
    full[:3] = pose.numpy()
    viewer.matrix_world = Matrix((full @ np.diag([1.0, -1.0, -1.0, 1.0])).tolist())
    scene = bpy.context.scene
    scene.cycles.seed = seed
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "view.exr"
        scene.render.filepath = str(path)
        bpy.ops.render.render(write_still=True)
        image = bpy.data.images.load(str(path))
        width, height = image.size
        pixels = np.empty(width * height * 4, np.float32)
        image.pixels.foreach_get(pixels)
        bpy.data.images.remove(image)
    rows = pixels.reshape(height, width, 4)[::-1, :, :3]
    step = OVERSAMPLING
    blocks = rows.reshape(height // step, step, width // step, step, 3)
    return np.ascontiguousarray(blocks.mean(axis=(1, 3)).transpose(2, 0, 1))
