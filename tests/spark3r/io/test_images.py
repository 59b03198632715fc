"""Folders of images: as Pillow turns them, in a person's order, with nothing lost in silence."""

from __future__ import annotations

import io
import os
import random
import struct
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from footage_files import AS_THEY_ARE, frames_of, levels, write_images
from PIL import Image, ImageOps

from spark3r import ClipError, Spark3rWarning
from spark3r.io.clips import load_clip
from spark3r.io.images import natural_key


def exif(orientation: int, other: bytes = b"") -> bytes:
    """Return EXIF data of an orientation, and of one other tag as it lies in the file."""
    tags = other + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0)
    count = struct.pack(">H", len(tags) // 12)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + count + tags + struct.pack(">I", 0)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_all_eight_orientations_are_those_of_pillow(tmp_path: Path, suffix: str) -> None:
    expected = []
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.{suffix}"
        picture = Image.fromarray(frames_of(orientation, 1)[0])
        if suffix == "tif":
            picture.save(path, tiffinfo={0x0112: orientation})
        else:
            picture.save(path, exif=exif(orientation))
        with Image.open(path) as stored:
            shown = ImageOps.exif_transpose(stored)
            assert shown is not None
            expected.append(np.asarray(shown.convert("RGB")))
    for pair in ([0, 1], [2, 3], [4, 5], [6, 7]):
        (folder := tmp_path / f"pair{pair[0]}").mkdir()
        for number in pair:
            name = f"{number + 1}.{suffix}"
            (tmp_path / name).rename(folder / name)
        footage = load_clip(str(folder), AS_THEY_ARE)
        assert np.array_equal(levels(footage), np.stack([expected[number] for number in pair]))
        assert [each.orientation for each in footage.transforms] == [number + 1 for number in pair]
        assert {each.size for each in footage.transforms} == {(48, 64)}


MALFORMED = {
    "a description that is a float": struct.pack(">HHIf", 0x010E, 11, 1, 1.5),
    "a description out of the file": struct.pack(">HHII", 0x010E, 2, 900, 1 << 30),
    "an unknown type": struct.pack(">HHII", 0x010F, 77, 1, 1),
    "a directory that is itself": struct.pack(">HHII", 0x8769, 4, 1, 8),
    "a count of 4 billion": struct.pack(">HHII", 0x8298, 5, 0xFFFFFFFF, 20),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("tag", MALFORMED)
def test_the_orientation_is_read_beside_a_malformed_tag(
    tmp_path: Path, tag: str, suffix: str
) -> None:
    picture = Image.fromarray(frames_of(3, 1)[0])
    plain = io.BytesIO()
    picture.save(plain, {"jpg": "JPEG"}.get(suffix, suffix))
    for number in range(2):
        picture.save(tmp_path / f"{number}.{suffix}", exif=exif(6, MALFORMED[tag]))
    footage = load_clip(str(tmp_path), AS_THEY_ARE)
    expected = np.rot90(np.asarray(Image.open(plain)), k=-1)
    assert np.array_equal(levels(footage), np.stack([expected, expected]))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(tmp_path: Path, orientation: int) -> None:
    frames = frames_of(3, 2)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png", exif=exif(orientation))
    assert np.array_equal(levels(load_clip(str(tmp_path), AS_THEY_ARE)), frames)


def damaged_jpeg(data: bytearray) -> None:
    start = data.index(b"\xff\xda") + 200
    data[start : start + 20] = b"\xff\xd9" * 10


def damaged_checksum(data: bytearray) -> None:
    data[data.index(b"IEND") - 6] ^= 1


def without_lengths(data: bytearray) -> None:
    data[data.index(b"\x17\x01\x04\x00")] = 0x18


def with_a_short_length(data: bytearray) -> None:
    data[data.index(b"\x17\x01\x04\x00") + 9] -= 1


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("jpg", damaged_jpeg),
        ("png", damaged_checksum),
        ("tif", without_lengths),
        ("tif", with_a_short_length),
    ],
)
def test_damage_that_pillow_draws_is_found(
    tmp_path: Path, suffix: str, damage: Callable[[bytearray], None]
) -> None:
    write_images(tmp_path, frames_of(3, 3, 128, 128), f"{{}}.{suffix}")
    data = bytearray((tmp_path / f"1.{suffix}").read_bytes())
    damage(data)
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as opened:
        warnings.simplefilter("ignore")
        opened.load()
    (tmp_path / f"1.{suffix}").write_bytes(data)
    with pytest.raises(ClipError, match=f"1.{suffix} cannot be read"):
        load_clip(str(tmp_path), AS_THEY_ARE)
    footage = load_clip(str(tmp_path), AS_THEY_ARE, skip_bad=True)
    assert footage.frames == (f"0.{suffix}", f"2.{suffix}")


def test_whole_images_of_every_kind_are_read(tmp_path: Path) -> None:
    picture = Image.fromarray(frames_of(3, 1, 61, 83)[0])
    kinds: list[tuple[str, dict[str, object]]] = [
        *((f"s{i}.jpg", {"subsampling": i}) for i in range(3)),
        ("progressive.jpg", {"progressive": True}),
        ("restart.jpg", {"restart_marker_rows": 1}),
        ("lossless.webp", {"lossless": True}),
        ("packed.tif", {"compression": "tiff_lzw"}),
        ("jpeg.tif", {"compression": "jpeg"}),
        ("plain.bmp", {}),
        ("plain.ppm", {}),
    ]
    for name, options in kinds:
        picture.save(tmp_path / name, **options)
    for name, mode in (("gray.jpg", "L"), ("cmyk.jpg", "CMYK"), ("palette.png", "P")):
        picture.convert(mode).save(tmp_path / name)
    with (tmp_path / "trailing.jpg").open("wb") as file:
        picture.save(file, "JPEG")
        file.write(b"what a camera adds" * 50)
    two = io.BytesIO()
    picture.save(two, "MPO", save_all=True, append_images=[picture.resize((20, 20))])
    (tmp_path / "two.jpg").write_bytes(two.getvalue())
    footage = load_clip(str(tmp_path), AS_THEY_ARE)
    assert len(footage.frames) == len(list(tmp_path.iterdir()))
    for name, frame in zip(footage.frames, levels(footage), strict=True):
        with Image.open(tmp_path / name) as opened:
            assert np.array_equal(frame, np.asarray(opened.convert("RGB"))), name


def test_what_looks_like_an_image_and_is_not_read_is_recorded(tmp_path: Path) -> None:
    write_images(tmp_path, frames_of(3, 2))
    for name in ("IMG_2.HEIC", "IMG_10.heic", "x.avif", "y.jp2", "notes.txt", ".hidden.heic"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder.png").mkdir()
    expected = ["folder.png: not a file", "IMG_2.HEIC: HEIC files are not read"]
    expected += ["IMG_10.heic: HEIC files are not read", "x.avif: AVIF files are not read"]
    expected += ["y.jp2: JP2 files are not read"]
    if os.name == "posix":
        (tmp_path / "lost.jpg").symlink_to(tmp_path / "nowhere.jpg")
        expected.insert(3, "lost.jpg: a link to nothing")
    footage = load_clip(str(tmp_path), AS_THEY_ARE)
    assert footage.frames == ("frame_0.png", "frame_1.png")
    assert list(footage.passed_over) == expected
    assert footage.skipped == ()


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_a_folder_of_dangling_links_says_so(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ClipError, match=r"holds no image \(3 links to nothing\), expected"):
        load_clip(str(tmp_path), AS_THEY_ARE)


@pytest.mark.parametrize(
    "names",
    [
        ["frame_1.png", "frame_2.png", "frame_10.png", "frame_10b.png"],
        ["photo.jpg", "photo (2).jpg", "photo (10).jpg"],
        ["a1b2.png", "a1b10.png", "a2b1.png"],
        ["IMG_9.jpg", "img_10.JPG"],
        ["x٣.png", "x١٢.png"],  # Arabic 3 and 12
        ["n²", "n³", "n¹⁰"],
        ["bild②.png", "bild⑩.png"],
        ["９.png", "１０.png"],
        ["፩.png", "፪.png"],  # digits, but no decimals
        ["frame_01.png", "frame_1.png", "frame_001x.png"],
    ],
)
def test_names_sort_as_a_person_would(names: list[str]) -> None:
    for seed in range(5):
        mixed = random.Random(seed).sample(names, len(names))
        assert sorted(mixed, key=natural_key) == names


def test_every_character_that_a_name_can_have_is_sorted() -> None:
    every = [chr(code) for code in range(0x110000) if chr(code) not in "/\0"]
    digits = [each for each in every if unicodedata.digit(each, None) is not None]
    assert len(digits) > 700
    keys = [natural_key(f"a{each}") for each in (*digits, *every[:: 0x110000 // 5000])]
    assert len(sorted(keys)) == len(keys)
    assert sorted((b"a\xff2", b"a\xff10"), key=lambda raw: natural_key(os.fsdecode(raw))) == [
        b"a\xff2",
        b"a\xff10",
    ]


def test_without_pyav_images_are_read_and_a_warning_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = frames_of(3, 2)
    write_images(tmp_path, frames)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Spark3rWarning, match="images are not checked for damage, because PyAV"):
            load_clip(str(tmp_path), AS_THEY_ARE)
    with pytest.warns(Spark3rWarning):
        footage = load_clip(str(tmp_path), AS_THEY_ARE)
    assert np.array_equal(levels(footage), frames)
