import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from spark3r.clips import Clip
from training.scenes.paths import PERIOD
from training.scenes.render import focal_lengths, render_path, rendered_clip
from training.scenes.scene import random_scene
from training.scenes.tracing import leave_room, nearest

SEEDS = (1_000_010, 1_000_011, 1_000_012)


def digest(clip: Clip) -> str:
    assert clip.depth is not None
    assert clip.extrinsics is not None
    parts = [clip.images, clip.depth, clip.extrinsics]
    return hashlib.sha256(b"".join(p.contiguous().numpy().tobytes() for p in parts)).hexdigest()


def warped(
    look: Tensor, depth: Tensor, extrinsics: Tensor, intrinsics: Tensor, source: int, target: int
) -> tuple[Tensor, Tensor]:
    """`look` of `source` seen at the pixels of `target`, and where both see the same point."""
    height, width = depth.shape[1:]
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)]).reshape(3, -1)
    camera = torch.linalg.inv(intrinsics) @ pixels * depth[target].reshape(-1)
    to, of = extrinsics[target], extrinsics[source]
    there = of[:, :3] @ (to[:, :3].T @ (camera - to[:, 3:])) + of[:, 3:]
    uv = (intrinsics @ there)[:2] / there[2].clamp(min=1e-3)
    grid = torch.stack([uv[0] / width, uv[1] / height], -1).view(1, height, width, 2) * 2 - 1
    both = torch.cat([look[source], depth[source][None]])[None]
    sample = F.grid_sample(both, grid, align_corners=False)[0]
    distance = there[2].view(height, width)
    inside = (grid[0].abs() < 1 - 1 / width).all(-1) & (distance > 0.1)
    return sample[:-1], inside & ((sample[-1] - distance).abs() < 0.01 * distance)


@pytest.mark.parametrize("seed", SEEDS)
def test_warping_by_ground_truth_reproduces_colours(seed: int) -> None:
    scene = random_scene(seed)
    u = torch.linspace(0, 0.5, 5, dtype=torch.float64)
    radiance, depth, extrinsics = render_path(scene, u, 56, 72)
    focal_x, focal_y = focal_lengths(scene, 56, 72)
    intrinsics = torch.tensor([[focal_x, 0, 36], [0, focal_y, 28], [0, 0, 1]])
    images = radiance.clamp(0, 1).sqrt()
    errors, seen = [], 0.0
    for source, target in ((0, 1), (2, 1), (3, 4)):
        colours, valid = warped(images, depth, extrinsics, intrinsics, source, target)
        errors.append((colours - images[target]).abs().mean(0)[valid])
        seen += float(valid.float().mean()) / 3
    assert seen > 0.25
    assert torch.cat(errors).median() < 0.03
    wrong = extrinsics.clone()
    wrong[0, :, 3] += 0.3
    colours, valid = warped(images, depth, wrong, intrinsics, 0, 1)
    assert valid.float().mean() < 0.5 * seen


@pytest.mark.slow
def test_same_seed_same_bytes_in_another_process() -> None:
    code = (
        "import sys, torch; sys.path[:0] = sys.argv[1:]; torch.set_num_threads(2)\n"
        "from test_rendering import digest, rendered_clip\n"
        "print(digest(rendered_clip(7, 2)), digest(rendered_clip(8, 2)))"
    )
    here = os.path.dirname(__file__)
    root = os.path.abspath(os.path.join(here, "..", "..", ".."))
    result = subprocess.run(
        [sys.executable, "-c", code, here, root], capture_output=True, text=True, check=True
    )
    expected = [digest(rendered_clip(seed, 2)) for seed in (7, 8)]
    assert result.stdout.split() == expected
    assert expected[0] != expected[1]


def test_callers_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    rendered_clip(3, 1)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("seed", SEEDS)
def test_clips_are_named_finite_and_rigid(seed: int) -> None:
    clip = rendered_clip(seed, 3, 88, 48)
    assert clip.name == f"rendered:v2:{seed}"
    assert clip.depth is not None
    assert clip.extrinsics is not None
    assert clip.images.shape == (3, 3, 88, 48)
    assert torch.isfinite(clip.depth).all()
    assert (clip.depth > 0.05).all()
    assert (clip.depth < 100).all()
    assert ((clip.images >= 0) & (clip.images <= 1)).all()
    rotation = clip.extrinsics[:, :, :3]
    identity = torch.eye(3).expand(3, 3, 3)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), identity, atol=1e-5, rtol=0)
    assert (torch.linalg.det(rotation) > 0).all()


def test_more_frames_sample_the_same_path() -> None:
    sparse, dense = rendered_clip(5, 3), rendered_clip(5, 9)
    for name in ("images", "depth", "extrinsics"):
        assert torch.equal(getattr(sparse, name), getattr(dense, name)[::4])


def test_unordered_is_a_permutation_that_keeps_the_first_frame() -> None:
    ordered = rendered_clip(5, 6).images
    shuffled = rendered_clip(5, 6, ordered=False).images
    assert torch.equal(shuffled[0], ordered[0])
    assert not torch.equal(shuffled, ordered)
    distance = (shuffled[:, None] - ordered[None]).abs().amax((2, 3, 4))
    assert (distance.amin(0) == 0).all()


def test_other_resolutions_show_the_same_scene() -> None:
    scene, u = random_scene(9), torch.zeros(1, dtype=torch.float64)
    small, large = (render_path(scene, u, side, side * 2)[1] for side in (24, 72))
    # The centre of every third pixel of the larger image is the centre of one of the smaller.
    assert torch.allclose(small, large[:, 1::3, 1::3], rtol=1e-4)


def test_the_lens_covers_the_same_diagonal_at_any_aspect() -> None:
    scene = random_scene(SEEDS[0])
    for height, width in ((64, 64), (56, 72), (48, 88), (88, 48)):
        focal_x, focal_y = focal_lengths(scene, height, width)
        half = torch.tensor([width / 2 / focal_x, height / 2 / focal_y])
        assert half.norm() == pytest.approx(scene.diagonal, rel=1e-5)
        assert 0.94 < focal_x / focal_y < 1.07


@pytest.mark.parametrize("seed", range(8))
def test_cameras_stay_in_the_room_and_out_of_things(seed: int) -> None:
    scene = random_scene(seed)
    poses = scene.path.poses(torch.linspace(0, 2 * PERIOD, 300, dtype=torch.float64)).float()
    points = poses[:, :, 3]
    room = scene.enclosure.room
    assert ((points > room[0]) & (points < room[1])).all()
    # From every position there is a way of 10 cm in all directions.
    directions = torch.cat([torch.eye(3), -torch.eye(3)]).T + 1e-3
    for point in points[::10]:
        origins = point[:, None].expand(3, 6)
        limit = leave_room(scene.enclosure, origins, directions)[0]
        distance, _ = nearest(scene.geometry, origins, directions, limit)
        assert distance.min() > 0.1


def test_neighbouring_frames_of_a_long_path_are_close() -> None:
    poses = random_scene(4).path.poses(torch.linspace(0, 10, 6000, dtype=torch.float64))
    assert (poses[1:, :, 3] - poses[:-1, :, 3]).norm(dim=1).max() < 0.1
    relative = poses[1:, :, :3].transpose(1, 2) @ poses[:-1, :, :3]
    cosine = ((relative.diagonal(dim1=1, dim2=2).sum(1) - 1) / 2).clamp(-1, 1)
    assert torch.rad2deg(cosine.acos()).max() < 3.0


@pytest.mark.parametrize("arguments", [(0, 64, 64), (1, 0, 64), (1, 64, 0)])
def test_empty_clips_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="need positive frames, sides and span"):
        rendered_clip(0, *arguments)
