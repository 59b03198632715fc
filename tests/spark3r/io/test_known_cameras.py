"""Known cameras: the files they come from, and the models that take them."""

from __future__ import annotations

import json
import math
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import stand_ins
import torch
from command_line import run
from family_cases import ALL_CASES, build, images, missing
from torch import Tensor, nn

from spark3r.clips import Clip
from spark3r.errors import ClipError, FamilyError
from spark3r.io.clips import Footage
from spark3r.io.known_cameras import read_cameras
from spark3r.runner import Runner
from spark3r.transform import Transform

QUARTER = math.sqrt(0.5)  # a quarter turn about y: (w, x, y, z) = (√½, 0, √½, 0)
TURNED = [[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]]


def footage(*names: str, transform: Transform | None = None) -> Footage:
    clip = Clip("clip", torch.zeros(len(names), 3, 16, 16))
    times = tuple(map(float, range(len(names))))
    return Footage(clip, names, times, (transform or Transform((16, 16)),) * len(names))


def write_colmap(folder: Path, binary: bool) -> None:
    """Write two cameras and two images as COLMAP's documentation says."""
    folder.mkdir()
    if not binary:
        (folder / "cameras.txt").write_text(
            "# Camera list\n1 PINHOLE 40 20 30 31 20 10\n2 SIMPLE_PINHOLE 40 20 50 21 11\n"
        )
        (folder / "images.txt").write_text(
            "# Image list\n"
            f"1 {QUARTER} 0 {QUARTER} 0 1 2 3 2 b c.png\n0 0 -1 5 6 7\n"
            "2 1 0 0 0 4 5 6 1 a.png\n\n"
        )
        return
    cameras = struct.pack("<Q", 2)
    cameras += struct.pack("<iiQQ4d", 1, 1, 40, 20, 30, 31, 20, 10)
    cameras += struct.pack("<iiQQ3d", 2, 0, 40, 20, 50, 21, 11)
    (folder / "cameras.bin").write_bytes(cameras)
    parts = struct.pack("<Q", 2)
    parts += struct.pack("<i7di", 1, QUARTER, 0, QUARTER, 0, 1, 2, 3, 2) + b"b c.png\0"
    parts += struct.pack("<Q", 1) + struct.pack("<ddq", 5, 6, 7)
    parts += struct.pack("<i7di", 2, 1, 0, 0, 0, 4, 5, 6, 1) + b"a.png\0" + struct.pack("<Q", 0)
    (folder / "images.bin").write_bytes(parts)


@pytest.mark.parametrize("binary", [False, True])
def test_colmap(binary: bool, tmp_path: Path) -> None:
    write_colmap(tmp_path / "sparse", binary)
    placed = Transform((20, 40), scale=(0.5, 0.25), offset=(-2.0, 3.0))
    found = read_cameras(str(tmp_path / "sparse"), footage("a.png", "b c.png", transform=placed))
    extrinsics = [[[1, 0, 0, 4], [0, 1, 0, 5], [0, 0, 1, 6]], TURNED]
    extrinsics[1] = [[*row, t] for row, t in zip(TURNED, (1, 2, 3), strict=True)]
    torch.testing.assert_close(found[0], torch.tensor(extrinsics, dtype=torch.float32))
    intrinsics = [
        [[15, 0, 8], [0, 7.75, 5.5], [0, 0, 1]],
        [[25, 0, 8.5], [0, 12.5, 5.75], [0, 0, 1]],
    ]
    torch.testing.assert_close(found[1], torch.tensor(intrinsics, dtype=torch.float32))


def test_wrong_cameras(tmp_path: Path) -> None:
    write_colmap(tmp_path / "sparse", binary=False)
    (tmp_path / "broken.json").write_text('{"frames": [{"name": "a"}]}')
    (tmp_path / "list.json").write_text("[1")
    (tmp_path / "empty").mkdir()
    turned = footage("a.png", transform=Transform((20, 40), orientation=6))
    for name, given, message in (
        ("sparse", footage("c.png"), "has no camera of 'c.png', expected all frames"),
        ("sparse", turned, "'a.png' is turned by its EXIF orientation"),
        ("broken.json", footage("a"), "broken.json cannot be read"),
        ("list.json", footage("a"), "list.json cannot be read"),
        ("empty", footage("a"), "expected the cameras.json of a run, or a folder with COLMAP's"),
        ("nowhere", footage("a"), "expected the cameras.json of a run"),
    ):
        with pytest.raises(ClipError, match=message):
            read_cameras(str(tmp_path / name), given)
    text = (tmp_path / "sparse/cameras.txt").read_text().replace("1 PINHOLE", "1 OPENCV")
    (tmp_path / "sparse/cameras.txt").write_text(text)
    with pytest.raises(ClipError, match="OPENCV is distorted, expected SIMPLE_PINHOLE or PINHOLE"):
        read_cameras(str(tmp_path / "sparse"), footage("a.png"))


def path_of(frames: int) -> tuple[Tensor, Tensor]:
    """Return cameras on a circle that look ahead."""
    angle = 0.3 * torch.arange(frames)
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = (angle.cos(), zero, angle.sin(), zero, one, zero, -angle.sin(), zero, angle.cos())
    rotation = torch.stack(rows, dim=-1).view(-1, 3, 3)
    moved = torch.stack((angle.sin(), 0.2 * angle, angle), dim=-1)
    intrinsics = torch.tensor([[30.0, 0, 21], [0, 31, 14], [0, 0, 1]]).repeat(frames, 1, 1)
    return torch.cat((rotation, moved[:, :, None]), dim=2), intrinsics


CASES = [case for case in ALL_CASES if case.family == "da3" and not missing(case)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_depth_is_in_the_scale_of_the_cameras(case: object) -> None:
    model, clip = build(case), images(case, 5)[0]  # type: ignore[arg-type]
    runner = Runner.of(model)
    extrinsics, intrinsics = path_of(5)
    larger = extrinsics.clone()
    larger[:, :, 3] *= 10
    own = runner.predict(Clip("clip", clip))
    one, ten = (
        runner.reader(runner.run(clip, (each, intrinsics)), clip) for each in (extrinsics, larger)
    )
    torch.testing.assert_close(ten.depth, 10 * one.depth, rtol=1e-3, atol=0)
    torch.testing.assert_close(ten.extrinsics, larger)
    torch.testing.assert_close(ten.intrinsics, intrinsics)
    assert not torch.allclose(one.depth / one.depth.mean(), own.depth / own.depth.mean(), rtol=1e-5)


def test_cameras_are_normalised_as_upstream_does() -> None:
    api = pytest.importorskip("depth_anything_3.api", exc_type=ImportError)
    from spark3r.families.da3 import _normalised

    extrinsics, _ = path_of(6)
    whole = torch.cat((extrinsics, torch.tensor([0.0, 0, 0, 1]).expand(6, 1, 4)), dim=1)
    expected = api.DepthAnything3._normalize_extrinsics(None, 7 * whole[None])[0]
    torch.testing.assert_close(_normalised(7 * extrinsics), expected)


def test_a_network_without_a_camera_encoder_and_other_families_are_refused() -> None:
    model = stand_ins.Da3().eval()
    model.cam_enc = None  # type: ignore[assignment]
    clip, cameras = torch.rand(3, 3, 28, 42), path_of(3)
    with pytest.raises(FamilyError, match="has no camera encoder"):
        Runner.of(model).run(clip, cameras)
    with pytest.raises(FamilyError, match="family 'vggt' take no known cameras"):
        Runner.of(stand_ins.Vggt()).run(clip, cameras)


def network() -> nn.Module:
    torch.manual_seed(0)
    return stand_ins.Da3()


def test_a_run_takes_the_cameras_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "network_with_cameras", sys.modules[__name__])
    words = ("run", "--model", "network_with_cameras:network", "--clip", "rendered:7")
    words += ("--frames", "4")
    first = run(*words, "--output", "first")
    assert first.status == 0, first.err
    document = json.loads(Path("first/cameras.json").read_text())
    extrinsics, _ = path_of(4)
    for frame, each in zip(document["frames"], extrinsics, strict=True):
        frame["extrinsics"] = each.tolist()
    Path("known.json").write_text(json.dumps(document))
    second = run(*words, "--output", "second", "--cameras", "known.json", "--json")
    assert second.status == 0, second.err
    assert second.object["cameras"] == "known.json"
    found = json.loads(Path("second/cameras.json").read_text())["frames"]
    np.testing.assert_allclose([f["extrinsics"] for f in found], extrinsics, atol=1e-6)
    same = [f["intrinsics"] for f in document["frames"]]
    np.testing.assert_allclose([f["intrinsics"] for f in found], same, rtol=1e-5)

    refused = run("run", "--clip", "rendered:7", "--output", "third", "--cameras", "known.json")
    assert (refused.status, Path("third").exists()) == (1, False)
    assert "family 'reference' take no cameras" in refused.err.splitlines()[-1]
