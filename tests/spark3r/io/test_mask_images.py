"""Masks of footage: names, sizes, and which pixels of the clip they cover."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from PIL import Image

from spark3r.clips import Clip
from spark3r.errors import ClipError
from spark3r.io.clips import Footage, load_clip
from spark3r.io.masks import read_masks
from spark3r.transform import Transform


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Return a picture of one black rectangle on white, at a place that depends on the seed."""
    values = np.full((height, width, 3), 255, np.uint8)
    values[height // 4 : height // 2 + 3 * seed, width // 5 + 2 * seed : width - 20] = 0
    return Image.fromarray(values)


@pytest.mark.parametrize("family", ["reference", "vggt", "pi3", "da3", "omega"])
def test_masks_go_where_the_frames_own_pixels_go(family: str, tmp_path: Path) -> None:
    # The reference is the family's own loader: it is given the masks as if they were the frames.
    frames, masks = tmp_path / "frames", tmp_path / "masks"
    frames.mkdir()
    masks.mkdir()
    for number, orientation in enumerate((1, 6, 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        size = (210, 300) if orientation == 6 else (300, 210)
        image = picture(size[1], size[0], number)
        image.save(frames / f"{number}.png", exif=exif)
        image.save(masks / f"{number}.png")  # editors of masks write no orientation
    footage = load_clip(str(frames), family)
    found, shown = read_masks(str(masks), footage), footage.clip.images.mean(dim=1)
    clear = (shown < 0.02) | (shown > 0.98)
    assert clear.float().mean() > 0.8
    wrong = (found != (shown > 0.5)) & clear
    assert wrong.float().mean() < 0.002  # a resampling filter reaches some pixels further
    assert 0.1 < (~found).float().mean() < 0.6


def footage(*names: str, size: tuple[int, int] = (16, 16)) -> Footage:
    clip = Clip("clip", torch.zeros(len(names), 3, 16, 16))
    times = tuple(map(float, range(len(names))))
    return Footage(clip, names, times, (Transform(size),) * len(names))


def test_names(tmp_path: Path) -> None:
    values = {"a.jpg.png": 0, "b.png": 1, "c.jpeg": 2, "00012.png": 3, "mask_0013.png": 4}
    for name, row in values.items():
        mask = np.zeros((16, 16), np.uint8)
        mask[row] = 255
        Image.fromarray(mask).save(tmp_path / name)
    found = read_masks(str(tmp_path), footage("a.jpg", "b.jpg", "c.jpeg", "frame 12", "frame 13"))
    assert [int(each.nonzero()[0, 0]) for each in found] == [0, 1, 2, 3, 4]


def test_wrong_masks(tmp_path: Path) -> None:
    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    Image.new("L", (15, 16), 255).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    for names, message in (
        (("a.png", "d.png"), "has no mask of 'd.png', expected one for each frame"),
        (("b.png",), "b.png has 15x16 pixels, but its frame has 16x16"),
        (("c.png",), "c.png cannot be read"),
        (("a.png",), "masks every pixel: black is masked"),
    ):
        with pytest.raises(ClipError, match=message):
            read_masks(str(tmp_path), footage(*names))
    with pytest.raises(ClipError, match="is not a folder"):
        read_masks(str(tmp_path / "none"), footage("a.png"))


def test_a_run_with_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("masks").mkdir()
    for number in range(4):
        mask = np.full((64, 64), 255, np.uint8)
        mask[:, :32] = 0
        Image.fromarray(mask).save(f"masks/{number:04}.png")
    words = ("run", "--clip", "rendered:7", "--frames", "4", "--json", "--least-confident", "0")
    answers = {}
    for name, more in (
        ("plain", ()),
        ("dense", ("--mask", "masks")),
        ("reduced", ("--mask", "masks", "--profile", "reference", "--compare-dense")),
    ):
        answer = run(*words, "--output", name, *more)
        assert answer.status == 0, answer.err
        answers[name] = answer.object
    assert [answers[name]["points"] for name in answers] == [16384, 8192, 8192]
    assert [answers[name]["masked_percent"] for name in answers] == [0, 50, 50]
    assert answers["reduced"]["mask"] == "masks"
    depth = {name: np.load(f"{name}/depth/00002.npy") for name in answers}
    assert depth["dense"].shape == (64, 64)  # masked pixels have depth as well
    assert not np.array_equal(depth["plain"], depth["dense"])
    assert json.loads(Path("reduced/run.json").read_text())["deviation"]["depth"] < 0.5

    Path("masks/0003.png").unlink()
    answer = run(*words, "--output", "none", "--mask", "masks")
    assert (answer.status, Path("none").exists()) == (1, False)
    assert answer.err.strip().splitlines()[-1].endswith("of 'frame 3', expected one for each frame")
    answer = run(*words, "--output", "none", "--mask", "nowhere")
    assert "nowhere is not a folder" in answer.err.splitlines()[-1]
