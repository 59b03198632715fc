"""The page of a scene: what it holds, and that names in it do nothing."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spark3r import Prediction, Spark3rError
from spark3r.io.clips import Footage, load_clip
from spark3r.scene_page import MAX_BYTES, write_scene
from spark3r.scene_page.pictures import frame_pictures


def truth(footage: Footage) -> Prediction:
    clip = footage.clip
    assert clip.depth is not None
    assert clip.extrinsics is not None
    assert clip.intrinsics is not None
    confidence = torch.ones_like(clip.depth)
    return Prediction.from_depth(clip.depth, confidence, clip.extrinsics, clip.intrinsics)


@pytest.fixture(scope="module")
def footage() -> Footage:
    return load_clip("rendered:5", "reference", frames=4, rendered_size=24)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def floats(text: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), "<f4").reshape(-1, 3)


def test_it_holds_every_point_with_its_frame(footage: Footage, tmp_path: Path) -> None:
    made, path = truth(footage), tmp_path / "scene.html"
    write_scene(path, footage.clip.images, footage.frames, made, title="a")
    data = data_of(path.read_text())
    assert np.allclose(floats(data["views"][0]["points"]), made.points.reshape(-1, 3))
    assert data["ends"] == [576, 1152, 1728, 2304]
    colours = np.frombuffer(b64decode(data["colours"]), np.uint8).reshape(-1, 3)
    expected = (footage.clip.images.permute(0, 2, 3, 1).reshape(-1, 3) * 255).round()
    assert np.array_equal(colours, expected.numpy())
    assert sorted(data["pictures"]) == ["0", "1", "2", "3"]


def test_reduced_is_moved_onto_dense_and_their_distance_is_coloured(
    footage: Footage, tmp_path: Path
) -> None:
    dense = truth(footage)
    turn = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    rotation = dense.extrinsics[:, :, :3] @ turn.T
    moved = replace(
        dense,
        points=2 * dense.points @ turn.T,
        extrinsics=torch.cat([rotation, 2 * dense.extrinsics[:, :, 3:]], dim=2),
    )
    path = tmp_path / "scene.html"
    write_scene(path, footage.clip.images, footage.frames, moved, title="a", dense=dense)
    data = data_of(path.read_text())
    first, second = data["views"]
    assert [first["name"], second["name"]] == ["dense", "reduced"]
    assert np.allclose(floats(first["points"]), floats(second["points"]), atol=1e-4)
    assert np.allclose(floats(first["cameras"]), floats(second["cameras"]), atol=1e-4)

    wrong = dense.points.clone()
    wrong[0] += 0.1 * torch.randn(wrong[0].shape, generator=torch.Generator().manual_seed(0))
    write_scene(
        path, footage.clip.images, footage.frames, replace(dense, points=wrong), title="a",
        dense=dense,
    )  # fmt: skip
    levels = np.frombuffer(b64decode(data_of(path.read_text())["difference"]), np.uint8)
    levels = levels.reshape(4, 576, 3)[:, :, 1].mean(axis=1)  # green rises with the distance
    assert levels[0] > 2 * levels[1:].max()


def test_names_from_elsewhere_are_only_shown(footage: Footage, tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>{{three}}"
    path = tmp_path / "scene.html"
    names = [hostile] * 4
    write_scene(
        path, footage.clip.images, names, truth(footage), title=hostile, facts=[(hostile, hostile)]
    )
    page = path.read_text()
    assert page.count("<script") == 3
    assert "alert(1)</script>" not in page
    assert data_of(page)["names"] == names
    assert "connect-src" not in page
    assert "default-src 'none'" in page


def test_pictures_stay_within_their_share(footage: Footage) -> None:
    made = truth(footage)
    whole = frame_pictures(footage.clip.images, made, None, 10**9)
    few = frame_pictures(footage.clip.images, made, None, len("".join(whole.values())) - 1)
    assert sorted(few) == ["0", "2"]


def test_a_scene_in_one_point_is_refused_side_by_side(footage: Footage, tmp_path: Path) -> None:
    made = truth(footage)
    flat = replace(made, points=torch.zeros_like(made.points))
    with pytest.raises(Spark3rError, match="side by side"):
        write_scene(
            tmp_path / "a.html", footage.clip.images, footage.frames, flat, title="a", dense=flat
        )


@pytest.mark.slow
def test_a_full_page_is_within_its_size(tmp_path: Path) -> None:
    """Noise is the hardest content for JPEG."""
    frames, size = 300, 48
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(frames, size * 2, size * 3, generator=generator) + 1
    made = Prediction.from_depth(
        depth,
        torch.ones_like(depth),
        torch.eye(4)[:3].repeat(frames, 1, 1),
        torch.tensor([[90.0, 0, 72], [0, 90, 48], [0, 0, 1]]).repeat(frames, 1, 1),
    )
    images = torch.rand(frames, 3, size * 2, size * 3, generator=generator)
    path = tmp_path / "scene.html"
    write_scene(
        path, images, [str(number) for number in range(frames)], made, title="a", dense=made
    )
    assert 7_000_000 < path.stat().st_size < MAX_BYTES
