"""Predictions with known faults, on footage with known geometry."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spark3r import Clip, Prediction
from spark3r.geometry import unproject

SIZE = 16


def turn(degrees: float) -> Tensor:
    """Rotation about the vertical axis, ``[3, 3]``."""
    angle = torch.deg2rad(torch.tensor(degrees))
    c, s = float(angle.cos()), float(angle.sin())
    return torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def make_clip(frames: int = 6, step: float = 0.3, name: str = "curved wall") -> Clip:
    """Cameras that walk and turn past a bumpy surface, with exact depth."""
    generator = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[14.0, 0, SIZE / 2], [0, 14.0, SIZE / 2], [0, 0, 1]])
    extrinsics, depth = [], []
    grid = (torch.arange(SIZE) + 0.5 - SIZE / 2) / 14.0
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    for frame in range(frames):
        centre = torch.tensor([step * frame, 0.05 * step * frame**2, 0.1 * step * frame])
        rotation = turn(1.5 * frame)
        extrinsics.append(torch.cat((rotation, -(rotation @ centre)[:, None]), dim=1))
        # A plane z = 4 + 0.5 x in the world, met by the rays of this camera.
        rays = torch.stack((x, y, torch.ones_like(x)), dim=-1) @ rotation  # world directions
        normal = torch.tensor([-0.5, 0.0, 1.0])
        depth.append((4.0 - normal @ centre) / (rays @ normal))
    return Clip(
        name,
        torch.rand(frames, 3, SIZE, SIZE, generator=generator),
        intrinsics.expand(frames, 3, 3).clone(),
        torch.stack(depth),
        torch.stack(extrinsics),
    )


def perfect(clip: Clip) -> Prediction:
    assert clip.depth is not None
    assert clip.extrinsics is not None
    assert clip.intrinsics is not None
    return Prediction(
        clip.depth,
        torch.ones_like(clip.depth),
        clip.extrinsics,
        clip.intrinsics,
        unproject(clip.depth, clip.intrinsics, clip.extrinsics),
    )


def altered(
    prediction: Prediction,
    *,
    depth: Tensor | None = None,
    extrinsics: Tensor | None = None,
) -> Prediction:
    depth = prediction.depth if depth is None else depth
    extrinsics = prediction.extrinsics if extrinsics is None else extrinsics
    points = unproject(depth, prediction.intrinsics, extrinsics)
    return replace(prediction, depth=depth, extrinsics=extrinsics, points=points)


def noisy(prediction: Prediction, amount: float, seed: int = 0) -> Prediction:
    """Depth and cameras disturbed: relative depth noise, and as much in radians and lengths."""
    generator = torch.Generator().manual_seed(seed)
    depth = prediction.depth * (
        1 + amount * torch.randn(prediction.depth.shape, generator=generator)
    ).clamp(min=0.1)
    extrinsics = prediction.extrinsics.clone()
    for frame, angle in enumerate(torch.randn(len(extrinsics), generator=generator).tolist()):
        extrinsics[frame, :, :3] = turn(57.3 * amount * angle) @ extrinsics[frame, :, :3]
    extrinsics[:, :, 3] += amount * torch.randn(len(extrinsics), 3, generator=generator)
    return altered(prediction, depth=depth, extrinsics=extrinsics)


def frozen_cameras(prediction: Prediction, keep: float) -> Prediction:
    """The prediction with cameras that hardly move, and the same flat depth everywhere."""
    extrinsics = prediction.extrinsics[:1].repeat(prediction.frames, 1, 1)
    extrinsics[:, :, 3] += keep * (prediction.extrinsics[:, :, 3] - prediction.extrinsics[:1, :, 3])
    depth = prediction.depth[:1].repeat(prediction.frames, 1, 1)
    return altered(prediction, depth=depth, extrinsics=extrinsics)
