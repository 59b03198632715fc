"""Pinhole geometry the metrics share: poses, camera centres, unprojection.

Conventions, here and in every metric: extrinsics ``[..., 3, 4]`` map world to camera in OpenCV
axes (x right, y down, z forward); intrinsics ``[..., 3, 3]`` are in pixels; depth is the z
coordinate in the camera, not the distance along the ray.

Pixel ``(row v, column u)`` is sampled at its centre, ``(u + 0.5, v + 0.5)``, so that a principal
point at ``(W / 2, H / 2)`` is the middle of the image. VGGT's own unprojection samples at integer
coordinates; ``pixel_centre=0.0`` reproduces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXEL_CENTRE = 0.5


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless the last dimensions of a tensor are as expected.

    Args:
        name: What the message calls the tensor.
        tensor: The tensor.
        expected: Sizes of the last dimensions; None allows any size.

    Raises:
        ValueError: Too few dimensions, or a size differs.
    """
    shape = tuple(tensor.shape)
    last = shape[len(shape) - len(expected) :]
    if len(shape) < len(expected) or any(
        want is not None and want != have for want, have in zip(expected, last, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: expected [..., {wanted}], found {list(shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if a tensor holds NaN or infinity, saying how many.

    Raises:
        ValueError: A value is not finite.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")


def invert_pose(pose: Tensor) -> Tensor:
    """Inverse of rigid transforms: world-to-camera to camera-to-world and back.

    Args:
        pose: ``[..., 3, 4]``, the left block a rotation.

    Returns:
        ``[..., 3, 4]``, same dtype.
    """
    check_shape("pose", pose, (3, 4))
    rotation = pose[..., :3].transpose(-1, -2)
    return torch.cat((rotation, -rotation @ pose[..., 3:]), dim=-1)


def camera_centres(extrinsics: Tensor) -> Tensor:
    """World positions of cameras.

    Args:
        extrinsics: ``[..., 3, 4]`` world to camera.

    Returns:
        ``[..., 3]``, same dtype.
    """
    return invert_pose(extrinsics)[..., 3]


def pixel_grid(
    height: int, width: int, *, like: Tensor, pixel_centre: float = PIXEL_CENTRE
) -> Tensor:
    """Homogeneous image coordinates of every pixel.

    Args:
        height: Rows H.
        width: Columns W.
        like: Tensor whose dtype and device the result takes.
        pixel_centre: Offset of the sampled point inside a pixel.

    Returns:
        ``[H, W, 3]``, entries ``(u, v, 1)``.
    """
    v = torch.arange(height, dtype=like.dtype, device=like.device) + pixel_centre
    u = torch.arange(width, dtype=like.dtype, device=like.device) + pixel_centre
    rows, columns = torch.meshgrid(v, u, indexing="ij")
    return torch.stack((columns, rows, torch.ones_like(rows)), dim=-1)


def unproject(
    depth: Tensor,
    intrinsics: Tensor,
    extrinsics: Tensor,
    *,
    pixel_centre: float = PIXEL_CENTRE,
) -> Tensor:
    """World points of depth maps. Differentiable.

    Args:
        depth: ``[..., H, W]`` z-depth.
        intrinsics: ``[..., 3, 3]`` in pixels.
        extrinsics: ``[..., 3, 4]`` world to camera.
        pixel_centre: Offset of the sampled point inside a pixel (module docstring).

    Returns:
        ``[..., H, W, 3]`` world points, in the depth's dtype (float32 if that is narrower).

    Raises:
        ValueError: A shape is wrong.
    """
    check_shape("depth", depth, (None, None))
    check_shape("intrinsics", intrinsics, (3, 3))
    check_shape("extrinsics", extrinsics, (3, 4))
    dtype = torch.promote_types(depth.dtype, torch.float32)
    depth = depth.to(dtype)
    height, width = depth.shape[-2:]
    # The 3×3 matrices are composed in float64, only the per-pixel product runs in `dtype`.
    world_from_camera = invert_pose(extrinsics.double())
    rays_from_pixels = world_from_camera[..., :3] @ torch.linalg.inv(intrinsics.double())
    grid = pixel_grid(height, width, like=depth, pixel_centre=pixel_centre).flatten(0, 1)
    rays = grid @ rays_from_pixels.to(dtype).transpose(-1, -2)  # [..., H·W, 3]
    points = depth.flatten(-2)[..., None] * rays + world_from_camera[..., None, :, 3].to(dtype)
    return points.unflatten(-2, (height, width))


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Image coordinates and depth of world points.

    Args:
        points: ``[..., N, 3]`` world points.
        intrinsics: ``[..., 3, 3]`` in pixels.
        extrinsics: ``[..., 3, 4]`` world to camera.

    Returns:
        Image coordinates ``[..., N, 2]`` in pixels and depth ``[..., N]``. Where the depth is not
        positive the coordinates are meaningless (zero depth gives infinities).

    Raises:
        ValueError: A shape is wrong.
    """
    check_shape("points", points, (None, 3))
    check_shape("intrinsics", intrinsics, (3, 3))
    check_shape("extrinsics", extrinsics, (3, 4))
    in_camera = points @ extrinsics[..., :3].transpose(-1, -2) + extrinsics[..., None, :, 3]
    in_image = in_camera @ intrinsics.transpose(-1, -2)
    return in_image[..., :2] / in_image[..., 2:], in_camera[..., 2]
