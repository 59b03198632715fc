import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spark3r.reference.scenes.render import render_path
from spark3r.reference.scenes.scene import random_scene
from spark3r.reference.scenes.seeds import CALIBRATION
from training.batches import SKY, Pool
from training.curriculum import BatchShape
from training.losses import world_points
from training.pool import draw_path_times, render_shard, shard_size
from training.shards import BRIGHTEST, encode_radiance, exposure, read_shards

SIZES = [(64, 64), (56, 72), (88, 48)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pool_holds_training_seeds_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not training seeds"):
        render_shard(tmp_path, "v2", CALIBRATION[0], 4, (64, 64))


def test_a_shard_that_is_there_is_not_rendered_again(pool: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in pool.rglob("*.npy")}
    render_shard(pool, "v2", 0, 4, (56, 72), scenes=3)
    assert {path: path.stat().st_mtime_ns for path in pool.rglob("*.npy")} == before


def test_shards_of_the_new_generator_come_in_all_sizes_and_of_the_old_in_one() -> None:
    assert {shard_size("v2", 64 * index) for index in range(200)} > set(SIZES)
    assert {shard_size("v1", 64 * index) for index in range(50)} == {(64, 64)}


def test_codes_of_old_clips_are_their_colours(pool: Path) -> None:
    shard = read_shards(pool)["v1-64x64-04-0000000"]
    colours, depth, _ = render_path(random_scene(1), draw_path_times(1, 4), 64, 64)
    decoded = np.sqrt((shard.images[1].astype(np.float32) / 255) ** 2 * BRIGHTEST)
    assert np.abs(decoded - colours.numpy()).max() < 0.003
    assert np.allclose(shard.depth[1], depth.numpy(), rtol=1e-3)


def test_exposure_brings_any_scale_to_grey() -> None:
    light = np.random.default_rng(0).uniform(0.1, 1.0, (2, 3, 8, 8)).astype(np.float32)
    for scale in (0.01, 1.0, 50.0):
        assert (light * scale * exposure(light * scale)).mean() == pytest.approx(0.2, rel=1e-3)
    codes = encode_radiance(np.array([0.0, BRIGHTEST / 4, BRIGHTEST, 9.0], np.float32))
    assert codes.tolist() == [0, 128, 255, 255]


@pytest.mark.parametrize("size", SIZES)
def test_batches_are_in_the_models_units_and_consistent(pool: Path, size: tuple[int, int]) -> None:
    height, width = size
    batch = Pool(pool).sample(BatchShape(6, 3, size), generator())
    assert batch.images.shape == (6, 3, 3, *size)
    assert batch.fov.shape == (6, 2)
    assert ((batch.images >= 0) & (batch.images <= 1)).all()
    torch.testing.assert_close(batch.depth[:, 0].mean(dim=(1, 2)), torch.ones(6))
    torch.testing.assert_close(batch.extrinsics[:, 0], torch.eye(3, 4).expand(6, 3, 4))
    # Mirrored or not, the cameras are rotations, and frames agree on where the scene is: the point
    # that frame 1 sees at its centre has, in frame 0, the depth that frame 0 sees there.
    assert (torch.linalg.det(batch.extrinsics[..., :3]) > 0.99).all()
    _, world = world_points(batch, 1, 2)
    points = world[:, 1]  # in the axes of frame 0
    half = torch.tensor([width / 2, height / 2])
    focal = half / torch.tan(batch.fov.flip(1) / 2)
    pixel = (points[..., :2] / points[..., 2:] * focal[:, None] + half).floor().long()
    inside = ((pixel >= 0) & (pixel < 2 * half)).all(-1) & (points[..., 2] > 0)
    assert inside.float().mean() > 0.2
    row, column = pixel[..., 1].clamp(0, height - 1), pixel[..., 0].clamp(0, width - 1)
    seen = batch.depth[:, 0].flatten(1).gather(1, row * width + column)
    error = ((seen - points[..., 2]).abs() / points[..., 2])[inside]
    assert error.median() < 0.03


def test_batches_follow_the_seed(pool: Path) -> None:
    shape = BatchShape(2, 3, (56, 72))
    first, again, other = (Pool(pool).sample(shape, generator(seed)) for seed in (4, 4, 5))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)


def test_clips_of_several_sources_are_mixed(pool: Path, tmp_path: Path) -> None:
    for name in ("v1-64x64-04-0000000", "v2-56x72-04-0000000"):
        shutil.copytree(pool / name, tmp_path / name)
    shutil.copytree(pool / "v1-64x64-04-0000000", tmp_path / "path-64x64-04-0001000")
    wide = np.load(tmp_path / "path-64x64-04-0001000" / "fov.npy") + 1
    np.save(tmp_path / "path-64x64-04-0001000" / "fov.npy", wide)
    batch = Pool(tmp_path).sample(BatchShape(100, 2, (64, 64)), generator())
    path = (batch.fov[:, 0] > wide.min() - 1e-3).float().mean()
    assert path == pytest.approx(0.6, abs=0.12)  # .45 against .3


def test_the_sky_has_a_finite_depth(pool: Path, tmp_path: Path) -> None:
    name = "v2-56x72-04-0000000"
    shutil.copytree(pool / name, tmp_path / name)
    depth = np.load(tmp_path / name / "depth.npy")
    depth[:, :, :20] = np.inf
    np.save(tmp_path / name / "depth.npy", depth)
    batch = Pool(tmp_path).sample(BatchShape(4, 2, (56, 72)), generator())
    assert batch.depth.isfinite().all()
    sky, rest = batch.depth[:, 0, :20].flatten(1), batch.depth[:, 0, 20:].flatten(1)
    expected = SKY * rest.mean(dim=1, keepdim=True)
    torch.testing.assert_close(sky, expected.expand_as(sky), rtol=1e-3, atol=0)


def test_clips_that_no_shard_holds_are_an_error(pool: Path) -> None:
    with pytest.raises(ValueError, match="no clips of 5 frames or more at 56x72"):
        Pool(pool).sample(BatchShape(1, 5, (56, 72)), generator())
    with pytest.raises(ValueError, match="no clips of 2 frames or more at 48x88"):
        Pool(pool).sample(BatchShape(1, 2, (48, 88)), generator())
