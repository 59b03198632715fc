from __future__ import annotations

import pytest
import torch
from hypothesis import given
from known_geometry import exactly, pinhole, random_cameras, seeds

from spark3r.geometry import invert_pose, project, unproject


@exactly
@given(seeds)
def test_project_undoes_unproject(seed: int) -> None:
    extrinsics, intrinsics = random_cameras(seed), pinhole(12, 16)
    depth = 1 + 5 * torch.rand(8, 12, 16, dtype=torch.float64)
    points = unproject(depth, intrinsics, extrinsics)
    uv, z = project(points.flatten(1, 2), intrinsics, extrinsics)
    torch.testing.assert_close(z.view_as(depth), depth)
    v, u = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(16) + 0.5, indexing="ij")
    expected = torch.stack((u, v), dim=-1).double().expand(8, 12, 16, 2)
    torch.testing.assert_close(uv.view(8, 12, 16, 2), expected, atol=1e-9, rtol=0)


def test_unproject_by_hand() -> None:
    # Camera at (0, 0, -1), focal length 2, principal point in the middle of a 2×2 image.
    extrinsics = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    intrinsics = torch.tensor([[2.0, 0, 1], [0, 2, 1], [0, 0, 1]])
    points = unproject(torch.full((2, 2), 4.0), intrinsics, extrinsics)
    assert points[0, 1].tolist() == [1, -1, 3]  # row 0, column 1: pixel centre (1.5, 0.5)
    corner = unproject(torch.full((2, 2), 4.0), intrinsics, extrinsics, pixel_centre=0.0)
    assert corner[0, 1].tolist() == [0, -2, 3]
    assert points.dtype == torch.float32


def test_unproject_takes_batches_and_gradients() -> None:
    extrinsics, intrinsics = random_cameras(0, frames=6), pinhole(frames=6)
    depth = torch.rand(6, 4, 5, dtype=torch.float64, requires_grad=True)
    flat = unproject(depth, intrinsics, extrinsics)
    nested = unproject(
        depth.view(2, 3, 4, 5), intrinsics.view(2, 3, 3, 3), extrinsics.view(2, 3, 3, 4)
    )
    torch.testing.assert_close(nested.flatten(0, 1), flat)
    flat.sum().backward()
    assert depth.grad is not None


def test_inverse_pose() -> None:
    extrinsics = random_cameras(3)
    torch.testing.assert_close(invert_pose(invert_pose(extrinsics)), extrinsics)
    with pytest.raises(ValueError, match=r"pose: expected \[\.\.\., 3, 4\], found \[4, 4\]"):
        invert_pose(torch.eye(4))
