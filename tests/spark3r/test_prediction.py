from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spark3r.errors import Spark3rError
from spark3r.geometry import encode_pose, invert_pose, quaternion_to_matrix, unproject
from spark3r.prediction import Prediction, PredictionError

S, H, W = 3, 6, 8


def cameras() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    quaternion = torch.randn(S, 4, generator=generator)
    extrinsics = torch.cat(
        (quaternion_to_matrix(quaternion), torch.randn(S, 3, 1, generator=generator)), dim=-1
    )
    intrinsics = torch.tensor([[7.0, 0, W / 2], [0, 9, H / 2], [0, 0, 1]]).repeat(S, 1, 1)
    return extrinsics, intrinsics


def tensors() -> dict[str, Tensor]:
    extrinsics, intrinsics = cameras()
    depth = 1 + torch.rand(S, H, W, generator=torch.Generator().manual_seed(1))
    return {
        "depth": depth,
        "confidence": torch.ones(S, H, W),
        "extrinsics": extrinsics,
        "intrinsics": intrinsics,
        "points": unproject(depth, intrinsics, extrinsics),
    }


def test_a_prediction_holds_its_tensors() -> None:
    prediction = Prediction(**tensors())
    assert prediction.frames == S
    assert prediction.image_size == (H, W)
    assert prediction.to("cpu") is prediction
    assert torch.equal(prediction.select(torch.tensor([2, 0])).depth, prediction.depth[[2, 0]])
    with pytest.raises(AttributeError):
        prediction.depth = torch.zeros(1)  # type: ignore[misc]


@pytest.mark.gpu
def test_moves_to_another_device() -> None:
    moved = Prediction(**tensors()).to("cuda")
    assert {getattr(moved, name).device.type for name in tensors()} == {"cuda"}
    with pytest.raises(PredictionError, match="move one of them"):
        Prediction(**{**tensors(), "points": moved.points})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": torch.ones(1, S, H, W)}, r"depth has shape \[1, 3, 6, 8\].*one element"),
        ({"confidence": torch.ones(S, H)}, r"confidence has shape \[3, 6\], expected \[3, 6, 8\]"),
        ({"extrinsics": torch.eye(4).repeat(S, 1, 1)}, "extrinsics has shape"),
        ({"intrinsics": torch.eye(3)}, "intrinsics has shape"),
        ({"points": torch.ones(S, H, W)}, "points has shape"),
        ({"confidence": torch.ones(S, H, W, dtype=torch.int64)}, "confidence is torch.int64"),
        ({"depth": torch.full((S, H, W), float("nan"))}, "depth: 144 of 144 values are NaN"),
        ({"points": torch.full((S, H, W, 3), float("inf"))}, "points: 432 of 432"),
        ({"extrinsics": 2 * torch.eye(3, 4).repeat(S, 1, 1)}, "extrinsics of frame 0 .and 2 more"),
        ({"extrinsics": -torch.eye(3, 4).repeat(S, 1, 1)}, "not a rotation"),
    ],
)  # fmt: skip
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PredictionError, match=message) as caught:
        Prediction(**{**tensors(), **changes})
    assert isinstance(caught.value, Spark3rError)
    assert isinstance(caught.value, ValueError)


def test_from_pose_encoding() -> None:
    given = tensors()
    encoding = encode_pose(given["extrinsics"], given["intrinsics"], (H, W))
    prediction = Prediction.from_pose_encoding(
        given["depth"][..., None], given["confidence"], encoding
    )
    for name, value in given.items():
        torch.testing.assert_close(getattr(prediction, name), value, msg=name)
    own = torch.zeros(S, H, W, 3)
    kept = Prediction.from_pose_encoding(given["depth"], given["confidence"], encoding, own)
    assert torch.equal(kept.points, own)


def test_half_precision_outputs_are_widened() -> None:
    given = tensors()
    encoding = encode_pose(given["extrinsics"], given["intrinsics"], (H, W)).bfloat16()
    prediction = Prediction.from_pose_encoding(
        given["depth"].bfloat16(), given["confidence"].bfloat16(), encoding
    )
    assert {getattr(prediction, name).dtype for name in given} == {torch.float32}


def test_from_depth_takes_square_extrinsics() -> None:
    given = tensors()
    bottom = torch.tensor([0.0, 0, 0, 1]).expand(S, 1, 4)
    prediction = Prediction.from_depth(
        given["depth"],
        given["confidence"],
        torch.cat((given["extrinsics"], bottom), dim=1),
        given["intrinsics"],
    )
    torch.testing.assert_close(prediction.points, given["points"])


def test_from_local_points_recovers_cameras() -> None:
    given = tensors()
    identity = torch.eye(3, 4).repeat(S, 1, 1)
    local = unproject(given["depth"], given["intrinsics"], identity)
    prediction = Prediction.from_local_points(
        local, given["confidence"][..., None], invert_pose(given["extrinsics"])
    )
    for name, value in given.items():
        torch.testing.assert_close(getattr(prediction, name), value, msg=name)


def test_constructors_refuse_a_batch() -> None:
    depth, confidence = torch.ones(2, S, H, W, 1), torch.ones(2, S, H, W)
    with pytest.raises(PredictionError, match="one clip"):
        Prediction.from_pose_encoding(depth, confidence, torch.zeros(2, S, 9))
    with pytest.raises(PredictionError, match="local_points has shape"):
        Prediction.from_local_points(torch.ones(2, S, H, W, 3), confidence, torch.eye(4))
    with pytest.raises(PredictionError, match="cannot unproject"):
        Prediction.from_depth(
            torch.ones(S, H, W), torch.ones(S, H, W), torch.eye(3, 4), torch.eye(4)
        )


def test_singular_intrinsics_are_named() -> None:
    given = tensors()
    with pytest.raises(PredictionError, match="cannot unproject"):
        Prediction.from_depth(
            given["depth"], given["confidence"], given["extrinsics"], torch.zeros(S, 3, 3)
        )
