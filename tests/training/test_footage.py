import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from spark3r.clips import Clip
from spark3r.geometry import encode_pose
from spark3r.reference import load
from training.checkpoints import export_weights
from training.footage import mean_scores, read_kitchen, read_room, read_rooms, score_footage
from training.scenes.render import rendered_clip
from training.train import Validation


def poses(count: int) -> np.ndarray:
    """Camera-to-world: a camera that moves to the right and turns about the vertical."""
    result = np.tile(np.eye(4), (count, 1, 1))
    angle = np.linspace(0, 0.5, count)
    result[:, 0, 0] = result[:, 2, 2] = np.cos(angle)
    result[:, 0, 2], result[:, 2, 0] = np.sin(angle), -np.sin(angle)
    result[:, 0, 3] = np.linspace(0, 1, count)
    return result


def write_room(folder: Path, count: int = 3) -> np.ndarray:
    folder.mkdir(parents=True)
    depth = np.linspace(1, 5, count * 210 * 280, dtype=np.float32).reshape(count, 210, 280)
    depth[:, :30] = np.inf
    np.savez(folder / "clip.npz", depth=depth, camera_to_world=poses(count).astype(np.float32))
    noise = np.random.default_rng(0).integers(0, 255, (count, 210, 280, 3), dtype=np.uint8)
    for index in range(count):
        Image.fromarray(noise[index]).save(folder / f"{index:03d}.png")
    return depth


def test_rooms_are_read_at_the_models_size_with_depth_at_its_pixels(tmp_path: Path) -> None:
    depth = write_room(tmp_path / "3")
    clip = read_room(tmp_path / "3")
    assert clip.images.shape == (3, 3, 56, 72)
    assert clip.depth is not None
    assert clip.depth[1, 20, 30] == depth[1, int(20.5 * 210 / 56), int(30.5 * 280 / 72)]
    assert torch.isinf(clip.depth[:, :7]).all()
    assert clip.extrinsics is not None
    world = clip.extrinsics[2, :, :3] @ torch.tensor([1.0, 0, 0]) + clip.extrinsics[2, :, 3]
    torch.testing.assert_close(world, torch.zeros(3), atol=1e-6, rtol=0)


def test_rooms_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "0"):
        write_room(tmp_path / name, 2)
    assert [clip.name for clip in read_rooms(tmp_path)] == ["0", "2", "10"]


def test_kitchen_depth_is_where_the_colour_camera_sees_it(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for index in range(0, 192, 4):
        image = Image.fromarray(np.full((240, 320, 3), index, np.uint8))
        image.save(tmp_path / "frames" / f"{index:04d}.jpg")
    (tmp_path / "poses.json").write_text(json.dumps({"camera_to_world": poses(192).tolist()}))
    # The depth camera's map holds its own column, in millimetres.
    maps = np.tile(np.arange(320, dtype=np.uint16) + 1000, (2, 240, 1))
    maps[1, 100:] = 0
    np.savez(tmp_path / "depth.npz", frames=np.array([0, 20]), depth_mm=maps)
    clip = read_kitchen(tmp_path, 0)
    assert clip.images.shape == (48, 3, 56, 72)
    assert clip.depth is not None
    known = clip.depth.isfinite().flatten(1).any(dim=1).nonzero()[:, 0]
    assert known.tolist() == [0, 5]
    # The ray through a colour pixel: x / z = (u - 320) / 525 at 640 columns.
    for column in (10, 36, 60):
        slope = ((column + 0.5) * 640 / 72 - 320) / 525
        expected = (320 + 585 * slope) / 2  # the depth camera's column, of 320
        assert float(clip.depth[0, 28, column]) * 1000 - 1000 == pytest.approx(expected, abs=1)
    assert clip.depth[0, 28, 0].isnan()  # the depth camera sees less to the sides
    assert clip.depth[5, 10, 36].isfinite()
    assert clip.depth[5, 50, 36].isnan()


class Exact(nn.Module):
    """Predicts a clip's ground truth, with a scale of its own."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.clip, self.place = clip, nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        clip = self.clip
        assert clip.depth is not None
        assert clip.extrinsics is not None
        assert clip.intrinsics is not None
        size = (images.shape[2], images.shape[3])
        encoding = encode_pose(clip.extrinsics, clip.intrinsics, size)[None]
        return {"pose_enc": encoding, "depth": 3 * clip.depth[None, ..., None]}


def test_ground_truth_scores_perfectly_whatever_its_scale() -> None:
    clip = rendered_clip(2_000_000, 4, 56, 72)
    scores = score_footage(Exact(clip), clip)
    assert scores.abs_rel < 1e-4
    assert scores.delta_125 == 1.0
    assert scores.auc_30 > 0.98
    assert scores.rotation_deg < 0.1
    assert mean_scores([scores, scores]) == scores


def test_validation_keeps_the_best_weights(tmp_path: Path) -> None:
    write_room(tmp_path / "rooms" / "100")
    run = tmp_path / "run"
    run.mkdir()
    export_weights(run / "weights.safetensors", load(weights="random"))
    validation = Validation(tmp_path / "rooms", run, minutes=1)
    validation.run({"step": 1}, 10.0)
    assert not (run / "validation.jsonl").exists()
    validation.run({"step": 2}, 61.0)
    validation.run({"step": 3}, 62.0)
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2]
    assert (run / "best.safetensors").exists() == (lines[0]["auc_30"] > 0)
    (run / "best.safetensors").unlink(missing_ok=True)
    with (run / "validation.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "auc_30": 1.0}) + "\n")
    Validation(tmp_path / "rooms", run, minutes=1).run({"step": 5}, 1e9)
    assert not (run / "best.safetensors").exists()
