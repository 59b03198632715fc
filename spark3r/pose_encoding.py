"""VGGT's nine-number pose encoding, to and from camera matrices.

The encoding of one camera is ``[tx, ty, tz, qx, qy, qz, qw, fov_h, fov_w]``: translation and
rotation (unit quaternion, scalar last) of the camera-from-world transform in OpenCV axes (x right,
y down, z forward), then the vertical and horizontal field of view in radians. It is the encoding
called ``absT_quaR_FoV`` in VGGT (arXiv 2503.11651), also written by VGGT-Omega; Depth-Anything-3
uses the same nine numbers for the world-from-camera transform.

Arithmetic happens in float32 or wider: half precision inputs are promoted, because a bfloat16
quaternion is only good to about half a degree.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Fields of view outside this range have no usable focal length (tan → 0 or ∞). VGGT's head ends in
# a ReLU, so an exact 0 does occur.
MIN_FOV = 1e-3
MAX_FOV = math.pi - 1e-3


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices of quaternions, which need not have unit length.

    Differentiable everywhere, the zero quaternion included: it maps to the identity.

    Args:
        quaternion: ``[..., 4]``, order XYZW (scalar last).

    Returns:
        ``[..., 3, 3]`` rotation matrices, float32 or wider.

    Raises:
        ValueError: The last dimension is not 4.
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
    """Unit quaternions of rotation matrices, accurate at every angle up to 180 degrees.

    The sixteen entries of ``4 q qᵀ`` are linear in the matrix. Its row with the largest diagonal
    entry is a multiple of ``q`` of length at least 1, so nothing small is ever divided by, and no
    square root is taken near zero (gradients stay finite).

    Args:
        rotation: ``[..., 3, 3]`` rotation matrices.

    Returns:
        ``[..., 4]`` unit quaternions, order XYZW, with a scalar part ≥ 0 (as VGGT's), float32 or
        wider. At exactly 180 degrees both signs are right and either may be returned.

    Raises:
        ValueError: The last dimensions are not 3×3.
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
    """Encode cameras as VGGT does.

    The principal point is not part of the encoding; decoding puts it at the image centre.

    Args:
        extrinsics: ``[..., 3, 4]`` camera-from-world, OpenCV axes.
        intrinsics: ``[..., 3, 3]`` in pixels.
        image_size: ``(H, W)`` in pixels.

    Returns:
        ``[..., 9]`` pose encodings, float32 or wider.

    Raises:
        ValueError: A shape is wrong.
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
    """Camera matrices of VGGT pose encodings.

    Quaternions are normalised. Fields of view are clamped to ``[MIN_FOV, MAX_FOV]`` so that the
    focal lengths are finite; upstream divides by zero there.

    Args:
        pose_encoding: ``[..., 9]``.
        image_size: ``(H, W)`` in pixels.

    Returns:
        Extrinsics ``[..., 3, 4]`` (camera-from-world when the encoding is VGGT's) and intrinsics
        ``[..., 3, 3]`` in pixels with the principal point at ``(W / 2, H / 2)``; float32 or wider.

    Raises:
        ValueError: The last dimension is not 9.
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
