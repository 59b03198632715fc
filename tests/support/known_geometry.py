"""Scenes and trajectories whose geometry is known in closed form."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from spark3r.geometry import camera_centres, quaternion_to_matrix, unproject
from spark3r.metrics import Similarity

exactly = settings(deadline=None, derandomize=True, max_examples=30)
seeds = st.integers(0, 10_000)


def random_cameras(seed: int, frames: int = 8, turn: float = 0.15, move: float = 0.5) -> Tensor:
    """Return world-to-camera extrinsics ``[S, 3, 4]`` float64 of cameras that look along +z."""
    generator = torch.Generator().manual_seed(seed)
    quaternion = turn * torch.randn(frames, 4, generator=generator, dtype=torch.float64)
    quaternion[:, 3] = 1
    centres = move * torch.randn(frames, 3, generator=generator, dtype=torch.float64)
    return from_centres(quaternion_to_matrix(quaternion), centres)


def from_centres(world_to_camera: Tensor, centres: Tensor) -> Tensor:
    return torch.cat((world_to_camera, -(world_to_camera @ centres[..., None])), dim=-1)


def random_similarity(seed: int) -> Similarity:
    generator = torch.Generator().manual_seed(seed + 1_000_000)
    scale = torch.rand((), generator=generator, dtype=torch.float64) * 9.9 + 0.1
    quaternion = torch.randn(4, generator=generator, dtype=torch.float64)
    shift = 5 * torch.randn(3, generator=generator, dtype=torch.float64)
    return Similarity(scale, quaternion_to_matrix(quaternion), shift)


def pinhole(height: int = 48, width: int = 64, frames: int = 8) -> Tensor:
    focal = 0.8 * width
    matrix = [[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]
    return torch.tensor(matrix, dtype=torch.float64).repeat(frames, 1, 1)


def room_depth(extrinsics: Tensor, intrinsics: Tensor, height: int = 48, width: int = 64) -> Tensor:
    """Return the exact z-depth of a box-shaped room, 8 m wide and high, with a ball in it."""
    ones = torch.ones(len(extrinsics), height, width, dtype=torch.float64)
    origin = camera_centres(extrinsics)[:, None, None]
    ray = unproject(ones, intrinsics, extrinsics) - origin  # z-depth 1, so t is the depth
    low, high = ray.new_tensor([-4, -4, -4]), ray.new_tensor([4, 4, 5])
    wall = torch.where(ray > 0, (high - origin) / ray, (low - origin) / ray).amin(dim=-1)
    from_ball = origin - ray.new_tensor([0.3, 0.2, 3.0])
    a, b = ray.square().sum(-1), (ray * from_ball).sum(-1)
    discriminant = b * b - a * (from_ball.square().sum(-1) - 0.5**2)
    ball = (-b - discriminant.clamp(min=0).sqrt()) / a
    return torch.where((discriminant > 0) & (ball > 0), torch.minimum(ball, wall), wall)


def rotation_about_z(degrees: float) -> Tensor:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float64)
