"""Exports against the programs that read them, and against known geometry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from footage_files import AS_THEY_ARE, frames_of, levels, turn_clockwise, write_images, write_video
from PIL import Image, ImageOps

from spark3r import Clip, Prediction, Spark3rError
from spark3r.geometry import project, unproject
from spark3r.io import Output, export_output, load_clip, read_output, write_outputs
from spark3r.io.clips import Footage
from spark3r.io.exports.cloud import coloured_cloud
from spark3r.io.exports.colmap import write_model
from spark3r.io.exports.glb import write_glb
from spark3r.io.exports.overlap import overlapping_pairs
from spark3r.io.exports.refinement import refine
from spark3r.io.exports.tracks import Cameras, Features, Matches, track_numbers, triangulate
from spark3r.io.originals import write_originals
from spark3r.metrics import pose_metrics
from spark3r.reference.scenes.render import rendered_clip
from spark3r.transform import Transform

POINTS, HEIGHT, WIDTH = 300, 120, 160


def cameras_of(clip: Clip) -> Cameras:
    assert clip.extrinsics is not None
    assert clip.intrinsics is not None
    size = clip.images.shape[2], clip.images.shape[3]
    return Cameras(
        clip.extrinsics.double().numpy(), clip.intrinsics.double().numpy(), (size,) * clip.frames
    )


def known_scene(
    noise_px: float = 0.0, frames: int = 6, focal: float = 152.0
) -> tuple[Cameras, np.ndarray, Matches]:
    """Return cameras on an arc, points, and matches of their projections in successive frames."""
    rng = np.random.default_rng(1)
    points = rng.uniform((-2, -1.4, 3), (2, 1.4, 5), (POINTS, 3))
    extrinsics = np.zeros((frames, 3, 4))
    for number, angle in enumerate(np.linspace(-0.3, 0.3, frames)):
        turn = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        extrinsics[number, :, :3] = turn
        extrinsics[number, :, 3] = -np.array(turn) @ [4 * np.sin(-angle), 0.2 * number, 0]
    intrinsics = np.tile(np.array([[150.0, 0, 81], [0, focal, 59], [0, 0, 1]]), (frames, 1, 1))
    cameras = Cameras(extrinsics, intrinsics, ((HEIGHT, WIDTH),) * frames)
    places, _ = project(
        torch.from_numpy(points), torch.from_numpy(intrinsics), torch.from_numpy(extrinsics)
    )
    place = places.numpy().reshape(-1, 2) + noise_px * rng.normal(size=(frames * POINTS, 2))
    features = Features(
        np.repeat(np.arange(frames), POINTS),
        place,
        rng.integers(0, 255, (frames * POINTS, 3)).astype(np.uint8),
    )
    first = np.arange((frames - 1) * POINTS)
    return cameras, points, Matches(features, np.stack([first, first + POINTS], 1), frames - 1)


def test_tracks_are_the_groups_that_matches_join() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 200, (120, 2))
    features = Features(np.zeros(200, int), np.zeros((200, 2)), np.zeros((200, 3), np.uint8))
    groups = {number: {number} for number in range(200)}
    for first, second in pairs.tolist():
        joined = groups[first] | groups[second]
        for member in joined:
            groups[member] = joined
    expected = [min(groups[number]) for number in range(200)]
    assert track_numbers(Matches(features, pairs, 1)).tolist() == expected


def test_points_of_exact_matches_are_the_true_ones() -> None:
    cameras, points, matches = known_scene()
    tracks = triangulate(matches.features, track_numbers(matches), cameras)
    assert np.abs(tracks.points - points).max() < 1e-6
    assert tracks.error.max() < 1e-6
    assert (tracks.lengths == 6).all()
    assert np.array_equal(tracks.colours, matches.features.colour[:POINTS])


def test_observations_that_do_not_fit_leave_their_track() -> None:
    cameras, points, matches = known_scene()
    matches.features.place[2 * POINTS + 7] += 40  # point 7 in frame 2
    twice = Matches(matches.features, np.vstack([matches.pairs, [[8, 9]]]), 5)  # tracks 8 and 9
    tracks = triangulate(twice.features, track_numbers(twice), cameras, 4.0)
    assert len(tracks.points) == POINTS - 2
    assert tracks.lengths[7] == 5
    assert np.abs(tracks.points[:8] - points[:8]).max() < 1e-6


def test_pycolmap_reads_the_model_and_finds_the_same_errors(tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    cameras, _, matches = known_scene(noise_px=0.5)
    cameras.intrinsics[1, 0, 0] = 152  # of square pixels; the other frames share a camera
    tracks = triangulate(matches.features, track_numbers(matches), cameras)
    names = [f"{number:05}.png" for number in range(6)]
    write_model(tmp_path, cameras, names, matches.features, tracks)
    binary, text = pycolmap.Reconstruction(), pycolmap.Reconstruction()
    binary.read_binary(tmp_path)
    text.read_text(tmp_path)
    for model in (binary, text):
        assert (model.num_points3D(), model.compute_num_observations()) == (POINTS, 6 * POINTS)
        for number, name in enumerate(names):
            image = model.images[number + 1]
            assert image.name == name
            assert image.camera_id == (2 if number == 1 else 1)
            assert np.allclose(
                image.cam_from_world().matrix(), cameras.extrinsics[number], atol=1e-12
            )
            assert np.allclose(image.camera.calibration_matrix(), cameras.intrinsics[number])
            assert (image.camera.height, image.camera.width) == (HEIGHT, WIDTH)
        stored = [model.points3D[number + 1].error for number in range(POINTS)]
        model.update_point_3d_errors()
        found = [model.points3D[number + 1].error for number in range(POINTS)]
        assert stored == pytest.approx(found, rel=1e-9)
        own = np.bincount(tracks.track, tracks.error) / tracks.lengths
        assert found == pytest.approx(own, rel=1e-9)
        assert model.points3D[5].color.tolist() == tracks.colours[4].tolist()


def moved(cameras: Cameras, by: float) -> Cameras:
    extrinsics = cameras.extrinsics.copy()
    extrinsics[:, :, 3] += by * np.random.default_rng(3).normal(size=extrinsics.shape[:2])
    return Cameras(extrinsics, cameras.intrinsics * [[[1.02], [1.02], [1]]], cameras.sizes)


def test_refined_cameras_come_nearer_to_the_truth() -> None:
    pytest.importorskip("pycolmap")
    cameras, _, matches = known_scene(noise_px=0.3, focal=150.0)
    start = moved(cameras, 0.05)
    made = refine(start, [f"{number}.png" for number in range(6)], matches)
    assert made.rolled_back is None
    assert made.held_out_px[1] < 0.3 * made.held_out_px[0]
    assert made.track_length == 6
    true = torch.from_numpy(cameras.extrinsics)
    before = pose_metrics(torch.from_numpy(start.extrinsics), true)
    after = pose_metrics(torch.from_numpy(made.cameras.extrinsics), true)
    assert after.translation_mean_deg < 0.5 * before.translation_mean_deg
    assert after.rotation_mean_deg < 0.2
    assert np.abs(made.cameras.centres - start.centres).mean() < 0.2  # the world stays


def test_cameras_stay_where_held_out_matches_agree_less() -> None:
    pytest.importorskip("pycolmap")
    cameras, _, matches = known_scene(noise_px=0.3)
    label = track_numbers(matches)
    held = (np.random.default_rng(0).random(len(label)) < 0.2)[label]
    wrong = ~held & (matches.features.frame == 3)
    matches.features.place[wrong] += (25, 10)  # what is adjusted to contradicts what judges
    made = refine(cameras, [f"{number}.png" for number in range(6)], matches)
    assert made.rolled_back is not None
    assert made.cameras is cameras
    few = Matches(matches.features, matches.pairs[:40], 5)
    with pytest.raises(Spark3rError, match="too little to refine cameras"):
        refine(cameras, [f"{number}.png" for number in range(6)], few)


def test_trimesh_opens_the_glb_with_cloud_and_frusta(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    cameras, points, matches = known_scene()
    colours = matches.features.colour[:POINTS]
    write_glb(tmp_path / "scene.glb", points.astype(np.float32), colours, cameras)
    scene = trimesh.load(tmp_path / "scene.glb")
    cloud = scene.geometry["points"]
    assert np.allclose(cloud.vertices, points, atol=1e-6)
    assert np.array_equal(np.asarray(cloud.colors)[:, :3], colours)
    frusta = np.asarray(scene.geometry["cameras"].vertices).reshape(6, 5, 3)
    assert np.allclose(frusta[:, 0], cameras.centres, atol=1e-6)
    places, _ = project(
        torch.from_numpy(frusta[:, 1:].astype(float)),
        torch.from_numpy(cameras.intrinsics),
        torch.from_numpy(cameras.extrinsics),
    )
    corners = [[0, 0], [WIDTH, 0], [WIDTH, HEIGHT], [0, HEIGHT]]
    assert np.allclose(places.numpy(), corners, atol=1e-3)
    matrix, _ = scene.graph["points"]
    assert np.allclose(matrix[:3, :3], np.diag([1, -1, -1]))  # y up


def output_of(
    folder: Path, footage: Footage, clip: Clip, source: str, transforms: Any = None
) -> Output:
    """Write what a model that predicts the truth would have written of some footage."""
    assert clip.depth is not None
    assert clip.extrinsics is not None
    assert clip.intrinsics is not None
    prediction = Prediction.from_depth(
        clip.depth, torch.ones_like(clip.depth), clip.extrinsics, clip.intrinsics
    )
    footage = Footage(clip, footage.frames, footage.times, transforms or footage.transforms)
    folder.mkdir()
    write_outputs(folder, footage, prediction, {"clip": source})
    return read_output(folder)


@pytest.fixture
def rendered(tmp_path: Path) -> tuple[Output, Clip]:
    clip = rendered_clip(7, 4, 40, 56)
    footage = Footage(clip, tuple("abcd"), (0.0, 1.0, 2.0, 3.0), (Transform((40, 56)),) * 4)
    return output_of(tmp_path / "out", footage, clip, "rendered:7"), clip


def test_cameras_are_those_of_the_upright_original(tmp_path: Path) -> None:
    """A stored frame of 80x112, turned by a quarter, halved, and cropped by 4 rows."""
    clip = rendered_clip(7, 2, 52, 40)
    transform = Transform((80, 112), (0.5, 0.5), (0.0, -4.0), orientation=6)
    footage = Footage(clip, ("a", "b"), (0.0, 1.0), ())
    output = output_of(tmp_path / "out", footage, clip, "rendered:7", (transform,) * 2)
    assert output.sizes == ((112, 80),) * 2
    cameras = Cameras(output.extrinsics.numpy(), output.intrinsics.numpy(), output.sizes)
    assert clip.depth is not None
    assert clip.intrinsics is not None
    assert clip.extrinsics is not None
    world = unproject(clip.depth, clip.intrinsics, clip.extrinsics)[1, 10, 30]
    place, _ = project(world[None].double(), output.intrinsics[1], output.extrinsics[1])
    assert place[0].tolist() == pytest.approx([30.5 * 2, (10.5 + 4) * 2], abs=1e-3)
    whole = output.original_depth(1)
    assert whole.shape == (56, 40)
    assert bool((whole[:4] == 0).all())
    assert torch.equal(whole[4:56], clip.depth[1])
    points, colours = coloured_cloud(output, cameras, 10**6, 0.0)
    expected = unproject(clip.depth, clip.intrinsics, clip.extrinsics).reshape(-1, 3).numpy()
    assert np.allclose(points, expected, atol=1e-4)
    levels = (clip.images * 255).round().byte().permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    assert np.array_equal(colours, levels)


def test_nerfstudio_gets_the_same_rays_and_depth(
    rendered: tuple[Output, Clip], tmp_path: Path
) -> None:
    output, clip = rendered
    folder = tmp_path / "export"
    folder.mkdir()
    export_output(output, folder, ("nerfstudio",))
    document: Mapping[str, Any] = json.loads((folder / "transforms.json").read_text())
    frame = document["frames"][2]
    depth = np.load(folder / frame["depth_file_path"]) * 1e-3  # nerfstudio's default unit
    row, column = 25, 13
    camera = [
        (column + 0.5 - frame["cx"]) / frame["fl_x"],
        -(row + 0.5 - frame["cy"]) / frame["fl_y"],
        -1.0,
    ]
    pose = np.array(frame["transform_matrix"])
    point = pose[:3, :3] @ (np.array(camera) * depth[row, column]) + pose[:3, 3]
    assert clip.depth is not None
    assert clip.intrinsics is not None
    assert clip.extrinsics is not None
    expected = unproject(clip.depth, clip.intrinsics, clip.extrinsics)[2, row, column]
    assert point == pytest.approx(expected.tolist(), abs=1e-4)
    with Image.open(folder / frame["file_path"]) as image:
        assert image.size == (frame["w"], frame["h"]) == (56, 40)
        pixels = (clip.images[2] * 255).round().byte().permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(image), pixels)
    assert (folder / document["ply_file_path"]).read_bytes().startswith(b"ply\n")


def test_frames_that_overlap_are_compared(rendered: tuple[Output, Clip]) -> None:
    output, clip = rendered
    cameras = cameras_of(clip)
    pairs = overlapping_pairs(output, cameras)
    assert {(0, 1), (1, 2), (2, 3)} <= set(pairs)
    away = cameras.extrinsics.copy()
    away[3] = np.diag([-1.0, 1, -1]) @ away[3]  # frame 3 looks back
    pairs = overlapping_pairs(output, Cameras(away, cameras.intrinsics, cameras.sizes))
    assert [pair for pair in pairs if 3 in pair] == [(2, 3)]


def test_images_are_upright_files(tmp_path: Path) -> None:
    frames = frames_of(3, 3)
    folder = tmp_path / "photos"
    write_images(folder, frames[:1])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(frames[1]).save(folder / "frame_1.jpg", exif=exif, quality=95)
    Image.fromarray(frames[2]).convert("P").save(folder / "frame_2.png", exif=exif)
    (folder / "frame_3.png").symlink_to(folder / "frame_0.png")
    names_there = ("frame_0.png", "frame_1.jpg", "frame_2.png", "frame_3.png")
    transforms = tuple(Transform((48, 64), orientation=each) for each in (1, 6, 6, 1))
    output = Output(
        tmp_path, str(folder), names_there, transforms,
        torch.zeros(4, 3, 4), torch.zeros(4, 3, 3), (1, 1),
    )  # fmt: skip
    images = tmp_path / "images"
    images.mkdir()
    names = write_originals(output, images)
    assert names == ("00000.png", "00001.jpg", "00002.png", "00003.png")
    for name, source in zip(names, names_there, strict=True):
        with Image.open(images / name) as written, Image.open(folder / source) as stored:
            assert written.getexif().get(0x0112, 1) == 1
            expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
            found = np.asarray(written.convert("RGB")).astype(int)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 3
    assert not any(path.is_symlink() for path in images.iterdir())


def test_video_frames_become_upright_files(tmp_path: Path) -> None:
    video = write_video(tmp_path / "tour.mp4", frames_of(3, 6))
    turn_clockwise(video)
    footage = load_clip(str(video), AS_THEY_ARE, frames=3)
    output = Output(
        tmp_path, str(video), footage.frames, footage.transforms,
        torch.zeros(3, 3, 4), torch.zeros(3, 3, 3), (1, 1),
    )  # fmt: skip
    images = tmp_path / "images"
    images.mkdir()
    for name, expected in zip(write_originals(output, images), levels(footage), strict=True):
        with Image.open(images / name) as written:
            found = np.asarray(written).astype(int)
        assert found.shape == (64, 48, 3)
        assert np.abs(found - expected).mean() < 3
