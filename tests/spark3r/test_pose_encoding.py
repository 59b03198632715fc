from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spark3r.geometry import decode_pose, encode_pose, matrix_to_quaternion, quaternion_to_matrix
from spark3r.metrics import rotation_angle_deg

exactly = settings(deadline=None, derandomize=True)  # the same examples on every run
unit = st.floats(-1, 1, allow_subnormal=False)
axes = st.tuples(unit, unit, unit).filter(lambda v: math.hypot(*v) > 1e-2)
# 0 and 180 degrees, and angles a hair from them, are where naive conversions lose precision.
angles = st.one_of(
    st.sampled_from([0.0, 1e-9, 1e-4, math.pi / 2, math.pi - 1e-4, math.pi - 1e-9, math.pi]),
    st.floats(0, math.pi),
)


def axis_angle(axis: tuple[float, float, float], angle: float) -> Tensor:
    """Rodrigues' formula: independent of the code under test."""
    x, y, z = (torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis)).tolist()
    k = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    return eye + math.sin(angle) * k + (1 - math.cos(angle)) * k @ k


@exactly
@given(axes, angles)
def test_rotation_round_trip(axis: tuple[float, float, float], angle: float) -> None:
    rotation = axis_angle(axis, angle)
    quaternion = matrix_to_quaternion(rotation)
    assert quaternion.norm().item() == pytest.approx(1, abs=1e-14)
    assert quaternion[3] >= 0
    torch.testing.assert_close(quaternion_to_matrix(quaternion), rotation, atol=1e-13, rtol=0)


@exactly
@given(axes, angles)
def test_quaternion_is_the_half_angle(axis: tuple[float, float, float], angle: float) -> None:
    quaternion = matrix_to_quaternion(axis_angle(axis, angle))
    direction = torch.tensor(axis, dtype=torch.float64) / math.hypot(*axis)
    expected = torch.cat(
        (math.sin(angle / 2) * direction, direction.new_tensor([math.cos(angle / 2)]))
    )
    # q and -q are the same rotation.
    assert min((quaternion - expected).norm(), (quaternion + expected).norm()) < 1e-12


def test_hand_computed_quaternions() -> None:
    quarter_about_z = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(
        matrix_to_quaternion(quarter_about_z), torch.tensor([0, 0, half, half])
    )
    assert matrix_to_quaternion(torch.eye(3)).tolist() == [0, 0, 0, 1]
    for axis in range(3):
        flip = -torch.eye(3)
        flip[axis, axis] = 1
        expected = torch.zeros(4)
        expected[axis] = 1
        assert torch.equal(matrix_to_quaternion(flip).abs(), expected)
        assert torch.equal(quaternion_to_matrix(expected), flip)


@exactly
@given(axes, angles, st.floats(1e-30, 1e30))
def test_length_of_a_quaternion_does_not_matter(
    axis: tuple[float, float, float], angle: float, scale: float
) -> None:
    quaternion = matrix_to_quaternion(axis_angle(axis, angle))
    torch.testing.assert_close(
        quaternion_to_matrix(quaternion * scale), quaternion_to_matrix(quaternion)
    )


def test_zero_quaternion_is_the_identity_with_finite_gradient() -> None:
    quaternion = torch.zeros(4, requires_grad=True)
    matrix = quaternion_to_matrix(quaternion)
    assert torch.equal(matrix, torch.eye(3))
    matrix.sum().backward()
    assert quaternion.grad is not None
    assert torch.isfinite(quaternion.grad).all()


def test_gradients() -> None:
    torch.manual_seed(0)
    quaternion = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quaternion_to_matrix, (quaternion,))
    identity = torch.eye(3, requires_grad=True)
    matrix_to_quaternion(identity).sum().backward()
    assert identity.grad is not None
    assert torch.isfinite(identity.grad).all()


@exactly
@given(
    axes,
    angles,
    st.tuples(*[st.floats(-100, 100)] * 3),
    st.tuples(*[st.floats(0.1, 3.0)] * 2),
    st.tuples(*[st.integers(1, 2000)] * 2),
)
def test_camera_round_trip(
    axis: tuple[float, float, float],
    angle: float,
    translation: tuple[float, float, float],
    fov: tuple[float, float],
    size: tuple[int, int],
) -> None:
    height, width = size
    rotation = axis_angle(axis, angle)
    extrinsics = torch.cat((rotation, rotation.new_tensor(translation)[:, None]), dim=1)
    intrinsics = torch.eye(3, dtype=torch.float64)
    intrinsics[0, 0] = width / 2 / math.tan(fov[1] / 2)
    intrinsics[1, 1] = height / 2 / math.tan(fov[0] / 2)
    intrinsics[:2, 2] = intrinsics.new_tensor([width / 2, height / 2])
    encoding = encode_pose(extrinsics, intrinsics, size)
    torch.testing.assert_close(encoding[7:], encoding.new_tensor(fov))
    decoded = decode_pose(encoding, size)
    torch.testing.assert_close(decoded[0], extrinsics, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(decoded[1], intrinsics, atol=1e-9, rtol=1e-9)


def test_known_encoding() -> None:
    # 90 degrees of view over 100 rows: focal length 50; over 200 columns: 100.
    encoding = torch.tensor([1, 2, 3, 0, 0, 0, 2, math.pi / 2, math.pi / 2])
    extrinsics, intrinsics = decode_pose(encoding, (100, 200))
    torch.testing.assert_close(
        extrinsics, torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3]])
    )
    torch.testing.assert_close(intrinsics, torch.tensor([[100.0, 0, 100], [0, 50, 50], [0, 0, 1]]))


@pytest.mark.parametrize("fov", [0.0, -1.0, math.pi, 10.0])
def test_impossible_field_of_view_gives_finite_cameras(fov: float) -> None:
    encoding = torch.tensor([0, 0, 0, 0, 0, 0, 1, fov, fov])
    intrinsics = decode_pose(encoding, (64, 64))[1]
    assert torch.isfinite(intrinsics).all()
    assert intrinsics[0, 0] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_batches_and_dtypes(dtype: torch.dtype) -> None:
    encoding = torch.rand(2, 5, 9).to(dtype)
    extrinsics, intrinsics = decode_pose(encoding, (8, 8))
    wide = torch.promote_types(dtype, torch.float32)
    assert extrinsics.shape == (2, 5, 3, 4)
    assert intrinsics.shape == (2, 5, 3, 3)
    assert extrinsics.dtype == intrinsics.dtype == wide
    again = encode_pose(extrinsics, intrinsics, (8, 8))
    assert again.shape == (2, 5, 9)
    assert (
        rotation_angle_deg(decode_pose(again, (8, 8))[0][..., :3], extrinsics[..., :3]).max() < 1e-4
    )


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"pose_encoding: expected \[\.\.\., 9\]"):
        decode_pose(torch.zeros(2, 8), (4, 4))
    with pytest.raises(ValueError, match="quaternion"):
        quaternion_to_matrix(torch.zeros(3))
    with pytest.raises(ValueError, match="rotation"):
        matrix_to_quaternion(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="extrinsics"):
        encode_pose(torch.zeros(4, 4), torch.eye(3), (4, 4))
    with pytest.raises(ValueError, match="intrinsics"):
        encode_pose(torch.eye(3, 4), torch.eye(4), (4, 4))
