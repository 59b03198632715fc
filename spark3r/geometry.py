"""Cameras: poses, quaternions, projection and unprojection, and VGGT's encoding of a camera.

Conventions, here and in every metric: extrinsics ``[..., 3, 4]`` map world to camera in OpenCV
axes (x right, y down, z forward); intrinsics ``[..., 3, 3]`` are in pixels; depth is the z
coordinate in the camera, not the distance along the ray.

Pixel ``(row v, column u)`` is sampled at its centre, ``(u + 0.5, v + 0.5)``, so that a principal
point at ``(W / 2, H / 2)`` is the middle of the image. VGGT's own unprojection samples at integer
coordinates; ``pixel_centre=0.0`` reproduces it.

A pose encoding is nine numbers: translation (3), quaternion in the order XYZW (4), and the vertical
and horizontal field of view in radians (2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

PIXEL_CENTRE = 0.5


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise unless the last dimensions of a tensor are as expected.

    Args:
        name: Name of the tensor in the message.
        tensor: The tensor.
        expected: Sizes of the last dimensions; None allows any size.

    Raises:
        ValueError: If there are too few dimensions, or a size differs.
    """
    shape = tuple(tensor.shape)
    last = shape[len(shape) - len(expected) :]
    if len(shape) < len(expected) or any(
        want is not None and want != have for want, have in zip(expected, last, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: expected [..., {wanted}], found {list(shape)}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise if a tensor holds NaN or infinity.

    Raises:
        ValueError: If a value is not finite; the message has their number.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ValueError(f"{name}: {bad} of {tensor.numel()} values are NaN or infinite")


def invert_pose(pose: Tensor) -> Tensor:
    """Return the inverse of rigid transforms: world-to-camera to camera-to-world and back.

    Args:
        pose: ``[..., 3, 4]``, the left block a rotation.

    Returns:
        ``[..., 3, 4]``, same dtype.
    """
    check_shape("pose", pose, (3, 4))
    rotation = pose[..., :3].transpose(-1, -2)
    return torch.cat((rotation, -rotation @ pose[..., 3:]), dim=-1)


def camera_centres(extrinsics: Tensor) -> Tensor:
    """Return the world positions of cameras.

    Args:
        extrinsics: ``[..., 3, 4]`` world to camera.

    Returns:
        ``[..., 3]``, same dtype.
    """
    return invert_pose(extrinsics)[..., 3]


def pixel_grid(
    height: int, width: int, *, like: Tensor, pixel_centre: float = PIXEL_CENTRE
) -> Tensor:
    """Return homogeneous image coordinates of every pixel.

    Args:
        height: Rows H.
        width: Columns W.
        like: Tensor whose dtype and device the result takes.
        pixel_centre: Offset of the sampled point inside a pixel, default 0.5.

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
    """Return the world points of depth maps. Differentiable.

    Args:
        depth: ``[..., H, W]`` z-depth.
        intrinsics: ``[..., 3, 3]`` in pixels.
        extrinsics: ``[..., 3, 4]`` world to camera.
        pixel_centre: Offset of the sampled point inside a pixel, default 0.5.

    Returns:
        ``[..., H, W, 3]`` world points, in the depth's dtype (float32 if that is narrower).

    Raises:
        ValueError: If a shape is wrong.
    """
    check_shape("depth", depth, (None, None))
    check_shape("intrinsics", intrinsics, (3, 3))
    check_shape("extrinsics", extrinsics, (3, 4))
    dtype = torch.promote_types(depth.dtype, torch.float32)
    depth = depth.to(dtype)
    height, width = depth.shape[-2:]
    # The 3×3 matrices are composed in float64; only the product per pixel runs in `dtype`.
    world_from_camera = invert_pose(extrinsics.double())
    rays_from_pixels = world_from_camera[..., :3] @ torch.linalg.inv(intrinsics.double())
    grid = pixel_grid(height, width, like=depth, pixel_centre=pixel_centre).flatten(0, 1)
    rays = grid @ rays_from_pixels.to(dtype).transpose(-1, -2)  # [..., H·W, 3]
    points = depth.flatten(-2)[..., None] * rays + world_from_camera[..., None, :, 3].to(dtype)
    return points.unflatten(-2, (height, width))


def project(points: Tensor, intrinsics: Tensor, extrinsics: Tensor) -> tuple[Tensor, Tensor]:
    """Return image coordinates and depth of world points.

    Args:
        points: ``[..., N, 3]`` world points.
        intrinsics: ``[..., 3, 3]`` in pixels.
        extrinsics: ``[..., 3, 4]`` world to camera.

    Returns:
        Image coordinates ``[..., N, 2]`` in pixels and depth ``[..., N]``. Where the depth is not
        positive the coordinates are meaningless (zero depth gives infinities).

    Raises:
        ValueError: If a shape is wrong.
    """
    check_shape("points", points, (None, 3))
    check_shape("intrinsics", intrinsics, (3, 3))
    check_shape("extrinsics", extrinsics, (3, 4))
    in_camera = points @ extrinsics[..., :3].transpose(-1, -2) + extrinsics[..., None, :, 3]
    in_image = in_camera @ intrinsics.transpose(-1, -2)
    return in_image[..., :2] / in_image[..., 2:], in_camera[..., 2]


# Fields of view outside this range have no usable focal length (tan → 0 or ∞). VGGT's head ends in
# a ReLU, so an exact 0 does occur.
MIN_FOV = 1e-3
MAX_FOV = math.pi - 1e-3


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Return the rotation matrices of quaternions, which need not have unit length.

    It is differentiable everywhere. The zero quaternion maps to the identity.

    Args:
        quaternion: ``[..., 4]``, order XYZW (scalar last).

    Returns:
        ``[..., 3, 3]`` rotation matrices, float32 or wider.

    Raises:
        ValueError: If the last dimension is not 4.
    """
    if quaternion.shape[-1:] != (4,):
        raise ValueError(f"quaternion: expected [..., 4], found {tuple(quaternion.shape)}")
    q = _at_least_float32(quaternion)
    # Scaling by the largest entry first keeps the squares of tiny or huge quaternions in range.
    largest = q.detach().abs().amax(dim=-1, keepdim=True)
    q = q / torch.where(largest > 0, largest, torch.ones_like(largest))
    squared = (q * q).sum(dim=-1)
    two_s = 2.0 / torch.where(squared > 0, squared, torch.ones_like(squared))
    x, y, z, w = q.unbind(dim=-1)
    rows = (
        1 - two_s * (y * y + z * z), two_s * (x * y - z * w), two_s * (x * z + y * w),
        two_s * (x * y + z * w), 1 - two_s * (x * x + z * z), two_s * (y * z - x * w),
        two_s * (x * z - y * w), two_s * (y * z + x * w), 1 - two_s * (x * x + y * y),
    )  # fmt: skip
    return torch.stack(rows, dim=-1).reshape(*x.shape, 3, 3)


def matrix_to_quaternion(rotation: Tensor) -> Tensor:
    """Return unit quaternions of rotation matrices, accurate at every angle up to 180 degrees.

    The sixteen entries of ``4 q qᵀ`` are linear in the matrix. Its row with the largest diagonal
    entry is a multiple of ``q`` of length at least 1, so there is no division by a small number and
    no square root near zero; gradients stay finite.

    Args:
        rotation: ``[..., 3, 3]`` rotation matrices.

    Returns:
        ``[..., 4]`` unit quaternions, order XYZW, with a scalar part ≥ 0 (as VGGT's), float32 or
        wider. At exactly 180 degrees both signs are correct, and the result is one of them.

    Raises:
        ValueError: If the last dimensions are not 3×3.
    """
    if rotation.shape[-2:] != (3, 3):
        raise ValueError(f"rotation: expected [..., 3, 3], found {tuple(rotation.shape)}")
    m = _at_least_float32(rotation)
    m00, m01, m02, m10, m11, m12, m20, m21, m22 = m.flatten(-2).unbind(dim=-1)
    xy, xz, yz = m10 + m01, m02 + m20, m21 + m12
    xw, yw, zw = m21 - m12, m02 - m20, m10 - m01
    outer = torch.stack(
        (
            1 + m00 - m11 - m22, xy, xz, xw,
            xy, 1 - m00 + m11 - m22, yz, yw,
            xz, yz, 1 - m00 - m11 + m22, zw,
            xw, yw, zw, 1 + m00 + m11 + m22,
        ),
        dim=-1,
    ).reshape(*m00.shape, 4, 4)  # fmt: skip
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    row = outer.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    quaternion = row / row.norm(dim=-1, keepdim=True)
    return torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)


def encode_pose(extrinsics: Tensor, intrinsics: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Return VGGT pose encodings of cameras.

    The principal point is not part of an encoding; decoding puts it at the image centre.

    Args:
        extrinsics: ``[..., 3, 4]`` camera-from-world, OpenCV axes.
        intrinsics: ``[..., 3, 3]`` in pixels.
        image_size: ``(H, W)`` in pixels.

    Returns:
        ``[..., 9]`` pose encodings, float32 or wider.

    Raises:
        ValueError: If a shape is wrong.
    """
    if extrinsics.shape[-2:] != (3, 4):
        raise ValueError(f"extrinsics: expected [..., 3, 4], found {tuple(extrinsics.shape)}")
    if intrinsics.shape[-2:] != (3, 3):
        raise ValueError(f"intrinsics: expected [..., 3, 3], found {tuple(intrinsics.shape)}")
    height, width = image_size
    extrinsics, intrinsics = _at_least_float32(extrinsics), _at_least_float32(intrinsics)
    fov_h = 2 * torch.atan((height / 2) / intrinsics[..., 1, 1])
    fov_w = 2 * torch.atan((width / 2) / intrinsics[..., 0, 0])
    quaternion = matrix_to_quaternion(extrinsics[..., :3])
    fov = torch.stack((fov_h, fov_w), dim=-1)
    return torch.cat((extrinsics[..., 3], quaternion, fov), dim=-1)


def decode_pose(pose_encoding: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the camera matrices of VGGT pose encodings.

    Quaternions are normalised. Fields of view are clamped to ``[MIN_FOV, MAX_FOV]``, so that focal
    lengths are finite; VGGT's code divides by zero there.

    Args:
        pose_encoding: ``[..., 9]``.
        image_size: ``(H, W)`` in pixels.

    Returns:
        Extrinsics ``[..., 3, 4]`` (camera-from-world when the encoding is VGGT's) and intrinsics
        ``[..., 3, 3]`` in pixels with the principal point at ``(W / 2, H / 2)``; float32 or wider.

    Raises:
        ValueError: If the last dimension is not 9.
    """
    if pose_encoding.shape[-1:] != (9,):
        raise ValueError(f"pose_encoding: expected [..., 9], found {tuple(pose_encoding.shape)}")
    height, width = image_size
    encoding = _at_least_float32(pose_encoding)
    rotation = quaternion_to_matrix(encoding[..., 3:7])
    extrinsics = torch.cat((rotation, encoding[..., :3, None]), dim=-1)
    tangent = torch.tan(encoding[..., 7:9].clamp(MIN_FOV, MAX_FOV) / 2)
    fy, fx = (height / 2) / tangent[..., 0], (width / 2) / tangent[..., 1]
    zero, one = torch.zeros_like(fx), torch.ones_like(fx)
    rows = (fx, zero, one * (width / 2), zero, fy, one * (height / 2), zero, zero, one)
    return extrinsics, torch.stack(rows, dim=-1).reshape(*fx.shape, 3, 3)
