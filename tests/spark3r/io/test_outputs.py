"""Files of a reconstruction: read back by others' readers, and compared with what went in."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from evo.tools import file_interface
from PIL import Image

from spark3r import Prediction, Spark3rError
from spark3r.geometry import camera_centres, unproject
from spark3r.io.cameras import cameras_record
from spark3r.io.clips import Footage, load_clip
from spark3r.io.depth_maps import coloured_depth, depth_range
from spark3r.io.outputs import new_folder, refuse_full_disk, write_outputs
from spark3r.io.point_cloud import VERTEX, coloured_points, write_ply


@pytest.fixture(scope="module")
def footage() -> Footage:
    return load_clip("rendered:5", "reference", frames=4, rendered_size=24)


@pytest.fixture(scope="module")
def truth(footage: Footage) -> Prediction:
    """The rendered scene's own geometry as a prediction, more confident towards the right."""
    clip = footage.clip
    assert clip.depth is not None
    assert clip.extrinsics is not None
    assert clip.intrinsics is not None
    confidence = torch.arange(24.0).expand(4, 24, 24) + 1
    return Prediction.from_depth(clip.depth, confidence, clip.extrinsics, clip.intrinsics)


@pytest.fixture(scope="module")
def written(footage: Footage, truth: Prediction, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    made = write_outputs(folder, footage, truth, {"model": "none"})
    assert made == {"model": "none", "points": 4 * 24 * 15, "suspects": []}
    assert json.loads((folder / "run.json").read_text()) == made
    return folder


def read_ply(path: Path) -> np.ndarray:
    """Read a binary PLY by its header alone."""
    data = path.read_bytes()
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    kinds = {"float": "<f4", "uchar": "u1"}
    fields = [line.split()[1:] for line in lines if line.startswith("property")]
    points = np.frombuffer(body, np.dtype([(name, kinds[kind]) for kind, name in fields]))
    assert f"element vertex {len(points)}" in lines
    return points


def test_the_table_of_frames_has_their_figures_and_names_a_frame_of_flat_depth(
    footage: Footage, truth: Prediction, written: Path, tmp_path: Path
) -> None:
    rows = pd.read_csv(written / "quality.csv")
    assert rows["frame"].tolist() == [0, 1, 2, 3]
    assert rows["name"].tolist() == list(footage.frames)
    contrast = footage.clip.images.mean(dim=1).flatten(1).std(dim=1)
    assert np.allclose(rows["contrast"], contrast.numpy(), rtol=1e-4)
    assert rows["joint"].isna().tolist() == [True, False, False, False]
    assert rows["suspected"].isna().all()
    depth = truth.depth.clone()
    depth[2] = 2.0
    assert footage.clip.extrinsics is not None
    wrong = Prediction.from_depth(depth, truth.confidence, truth.extrinsics, truth.intrinsics)
    made = write_outputs(tmp_path, footage, wrong, {})
    assert made["suspects"] == [{"frame": 2, "name": footage.frames[2], "suspected": ["flat"]}]
    assert pd.read_csv(tmp_path / "quality.csv")["suspected"][2] == "flat"


def test_depths_of_panoramas_are_not_compared(
    footage: Footage, truth: Prediction, tmp_path: Path
) -> None:
    write_outputs(tmp_path, footage, truth, {"pinhole": False})
    rows = pd.read_csv(tmp_path / "quality.csv")
    assert rows["disagreement"].isna().all()
    assert rows["joint"].isna().all()
    assert rows["contrast"].notna().all()


def test_depth_and_confidence_come_back(written: Path, truth: Prediction) -> None:
    for name in ("depth", "confidence"):
        files = sorted((written / name).iterdir())
        assert [file.name for file in files] == [f"{i:05}.npy" for i in range(4)]
        maps = np.stack([np.load(file) for file in files])
        assert maps.dtype == np.float32
        assert np.array_equal(maps, getattr(truth, name).numpy())


def test_the_trajectory_is_what_tum_readers_read(written: Path, footage: Footage) -> None:
    trajectory = file_interface.read_tum_trajectory_file(written / "trajectory.txt")
    assert footage.clip.extrinsics is not None
    expected = camera_centres(footage.clip.extrinsics).numpy()
    assert np.allclose(trajectory.positions_xyz, expected, atol=1e-6)
    assert np.allclose(trajectory.timestamps, footage.times)
    rotations = np.stack(trajectory.poses_se3)[:, :3, :3]  # camera to world
    turned = footage.clip.extrinsics[:, :, :3].transpose(1, 2).numpy()
    assert np.allclose(rotations, turned, atol=1e-6)


def test_cameras_put_depth_where_the_points_are(written: Path, truth: Prediction) -> None:
    cameras = json.loads((written / "cameras.json").read_text())
    assert (cameras["height"], cameras["width"]) == (24, 24)
    for number, frame in enumerate(cameras["frames"]):
        depth = torch.from_numpy(np.load(written / frame["depth"]))
        intrinsics, extrinsics = (
            torch.tensor(frame["intrinsics"]),
            torch.tensor(frame["extrinsics"]),
        )
        points = unproject(depth[None], intrinsics[None], extrinsics[None])
        assert torch.allclose(points[0], truth.points[number], atol=1e-5)
        assert frame["name"] == f"frame {number}"


def test_cameras_say_where_each_pixel_lies_in_the_original(tmp_path: Path) -> None:
    """In each original, red counts its columns and green its rows."""
    sizes = [(180, 120), (100, 200)]  # height and width, upright: one is cropped, one padded
    for number, (height, width) in enumerate(sizes):
        grid = np.zeros((height, width, 3), np.uint8)
        grid[..., 0] = np.arange(width)
        grid[..., 1] = np.arange(height)[:, None]
        exif = Image.Exif()
        exif[0x0112] = 6  # stored turned counter-clockwise
        stored = Image.fromarray(grid).transpose(Image.Transpose.ROTATE_90)
        stored.save(tmp_path / f"{number}.png", exif=exif)
    footage = load_clip(str(tmp_path), "vggt")
    frames, _, rows, columns = footage.clip.images.shape
    depth = torch.ones(frames, rows, columns)
    extrinsics = torch.eye(3, 4).expand(frames, 3, 4)
    intrinsics = torch.tensor([[400.0, 0, 250.0], [0, 410.0, 255.0], [0, 0, 1]]).expand(2, 3, 3)
    prediction = Prediction.from_depth(depth, depth, extrinsics, intrinsics)
    cameras = json.loads(json.dumps(cameras_record(prediction, footage)))
    for number, frame in enumerate(cameras["frames"]):
        original = frame["original"]
        assert (original["width"], original["height"]) == sizes[number]  # as it is stored
        assert original["orientation"] == 6
        scale, offset = np.array(original["scale"]), np.array(original["offset"])
        matrix = np.array(frame["intrinsics"])
        focal = matrix[[0, 1], [0, 1]] / scale
        principal = (matrix[:2, 2] - offset) / scale
        for x, y in ((0.0, 0.0), (-0.3, 0.2), (0.35, -0.25)):
            upright = focal * (x, y) + principal
            seen = (matrix @ (x, y, 1))[:2]
            assert np.allclose(upright * scale + offset, seen)  # there
            assert np.allclose((seen - offset) / scale, upright)  # and back
            column, row = (int(part) for part in seen)
            red, green, _ = footage.clip.images[number, :, row, column] * 255
            assert np.allclose(upright - 0.5, (red, green), atol=1.0)
            stored = footage.transforms[number].to_original(torch.tensor(seen))
            turned = (upright[1], sizes[number][1] - upright[0])
            assert np.allclose(stored, turned)
        left, top, right, bottom = original["crop"]
        corners = np.array([[0, 0], [columns, rows]])
        (low_x, low_y), (high_x, high_y) = (corners - offset) / scale
        height, width = sizes[number]
        assert (left, top) == pytest.approx((max(0, low_x), max(0, low_y)))
        assert (right, bottom) == pytest.approx((min(width, high_x), min(height, high_y)))
    assert cameras["frames"][0]["original"]["crop"] == pytest.approx([0, 30, 120, 150], abs=1)
    assert cameras["frames"][1]["original"]["crop"] == [0, 0, 200, 100]


def test_the_cloud_holds_confident_pixels_in_their_colours(
    written: Path, truth: Prediction, footage: Footage
) -> None:
    points = read_ply(written / "points.ply")
    # 40 % of the pixels are left out: the 9 of 24 columns with the least confidence, as the tenth
    # ties with the threshold.
    expected = truth.points[:, :, 9:].reshape(-1, 3).numpy()
    assert np.array_equal(np.stack([points[axis] for axis in "xyz"], axis=-1), expected)
    colours = (footage.clip.images[:, :, :, 9:] * 255).round().permute(0, 2, 3, 1).reshape(-1, 3)
    read = np.stack([points[name] for name in ("red", "green", "blue")], axis=-1)
    assert np.array_equal(read, colours.numpy())


@pytest.mark.parametrize(("most", "percent"), [(100, 40.0), (1, 0.0), (1000, 99.0), (300, 75.0)])
def test_a_smaller_cloud_is_spread_over_all_frames(
    truth: Prediction, footage: Footage, most: int, percent: float
) -> None:
    points, colours = coloured_points(truth, footage.clip.images, most, percent)
    assert points.shape == colours.shape
    assert 1 <= len(points) <= most
    known = {tuple(point.tolist()) for point in truth.points.reshape(-1, 3)}
    assert all(tuple(point.tolist()) in known for point in points)
    if most >= 100:
        for frame in truth.points:
            assert bool((points[:, None] == frame.reshape(1, -1, 3)).all(dim=-1).any())


def test_an_empty_cloud_is_a_file_too(tmp_path: Path) -> None:
    write_ply(tmp_path / "none.ply", torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.uint8))
    assert len(read_ply(tmp_path / "none.ply")) == 0
    assert VERTEX.itemsize == 15


def test_previews_show_the_frame_beside_its_depth(written: Path, footage: Footage) -> None:
    picture = np.array(Image.open(written / "preview/00002.png"))
    assert picture.shape == (24, 48, 3)
    assert np.array_equal(
        picture[:, :24], (footage.clip.images[2] * 255).round().byte().permute(1, 2, 0).numpy()
    )
    assert len(np.unique(picture[:, 24:].reshape(-1, 3), axis=0)) > 20


def test_near_is_brighter_than_far_and_behind_is_black() -> None:
    depth = torch.linspace(1, 5, 100)[None, None]
    near, far = depth_range(depth)
    assert 1 <= near < 1.2
    assert 4.8 < far <= 5
    lightness = coloured_depth(depth[0], near, far).astype(int) @ [2126, 7152, 722]
    assert (np.diff(lightness[0]) <= 0).all()
    assert coloured_depth(torch.tensor([[-1.0, 0.0]]), near, far).max() == 0
    flat = torch.full((1, 2, 2), 3.0)
    assert len(np.unique(coloured_depth(flat[0], *depth_range(flat)).reshape(-1, 3), axis=0)) == 1
    assert depth_range(-flat) == (1.0, 1.0)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"), new_folder(tmp_path / "out") as folder:
        fail(folder)
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("")
        assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    making = new_folder(tmp_path / "out")
    making.__enter__()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").write_text("")
    with pytest.raises(Spark3rError, match="exists already: choose another"):
        making.__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_errors_of_the_work_are_not_called_errors_of_the_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "out"):
        (tmp_path / "no such file").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    for name in ("a" * 255, "a" * 300):  # too long with, and without, what a temporary name adds
        with (
            pytest.raises(Spark3rError, match="cannot be made \\(File name too long\\)"),
            new_folder(tmp_path / name),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_full_is_told_before_the_work(
    footage: Footage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * 24 * 24 * 8
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=needed))
    refuse_full_disk(tmp_path / "out", footage.clip.images)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=needed - 1))
    with pytest.raises(Spark3rError, match="depth and confidence of 4 frames take"):
        refuse_full_disk(tmp_path / "out", footage.clip.images)


def test_an_error_of_numpy_has_its_reason(
    footage: Footage, truth: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError("2304 requested and 0 written")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(Spark3rError, match=r"\(2304 requested and 0 written\)"):
        write_outputs(tmp_path, footage, truth, {})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
@pytest.mark.parametrize("most", [100, 1_000, 10_000])
def test_a_file_that_does_not_fit_is_named_with_the_reason(
    most: int, footage: Footage, truth: Prediction, tmp_path: Path
) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        with (
            pytest.raises(Spark3rError, match=r"cannot be written in .* \(File too large\)"),
            new_folder(tmp_path / "out") as folder,
        ):
            write_outputs(folder, footage, truth, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
