"""Videos show the frames that ffmpeg extracts, and are refused where ffmpeg finds damage."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from ffmpeg_program import H264, TEST_PICTURE, ffmpeg, frames_by_ffmpeg, refused_by_ffmpeg
from footage_files import AS_THEY_ARE, levels, write_matrix

from spark3r import ClipError
from spark3r.io.clips import Footage, load_clip

SIZE = (64, 96)


def load(path: Path, **options: bool) -> Footage:
    return load_clip(str(path), AS_THEY_ARE, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def h264(folder: Path) -> Path:
    """An MP4 of 30 frames in three groups, with sound that is longer."""
    path = folder / "h264.mp4"
    ffmpeg(*TEST_PICTURE, "-f", "lavfi", "-i", "sine=d=3.4", *H264, "-c:a", "aac", path)
    return path


@pytest.fixture(scope="module")
def whole(h264: Path) -> np.ndarray:
    (frames,) = frames_by_ffmpeg([h264], [SIZE])
    assert len(frames) == 30
    return frames


def copied(source: Path, name: str, *options: object) -> Path:
    """Return a copy of a video in another container, made without encoding it anew."""
    path = source.parent / name
    ffmpeg("-i", source, "-map", "0:v:0", "-c", "copy", *options, path)
    return path


# Codec, pixel format, colour space and range, and container.
COLOURS = [
    ("libx264", "yuv420p", "bt709", "tv", "mp4"),
    ("libx264", "yuv420p", "bt709", "pc", "mp4"),
    ("libx264", "yuv444p", "smpte170m", "pc", "mkv"),
    ("libx264", "yuv422p10le", "bt2020nc", "tv", "mov"),
    ("libx264", "yuv420p", None, None, "mp4"),
    ("libvpx-vp9", "yuv420p", "bt709", "tv", "webm"),
    ("mpeg4", "yuv420p", "bt709", None, "avi"),
    ("mpeg2video", "yuv420p", "bt709", "tv", "ts"),
    ("mjpeg", "yuvj422p", None, "pc", "avi"),
    ("prores_ks", "yuv422p10le", "bt709", "tv", "mov"),
    ("rawvideo", "nv12", None, None, "nut"),
    ("ffv1", "gray", None, None, "mkv"),
    ("ffv1", "gbrp", None, None, "mkv"),
    ("qtrle", "argb", None, None, "mov"),
    ("gif", "rgb8", None, None, "gif"),
]


def test_colours_are_those_of_ffmpeg(folder: Path) -> None:
    outputs: list[object] = []
    paths = []
    for number, (codec, pixels, space, extent, suffix) in enumerate(COLOURS):
        paths.append(folder / f"colours{number}.{suffix}")
        if pixels.startswith("yuv"):
            matrix = {"bt2020nc": "bt2020", None: "bt709"}.get(space, space)
            picture = f"scale=out_color_matrix={matrix}:out_range={extent or 'tv'},format={pixels}"
            outputs += ["-vf", picture]
        else:
            outputs += ["-pix_fmt", pixels]
        outputs += ["-colorspace", space] if space else []
        outputs += ["-color_range", extent] if extent else []
        outputs += ["-c:v", codec, "-frames:v", "3", "-threads", "1", "-strict", "-1", paths[-1]]
    ffmpeg(*TEST_PICTURE, *outputs)
    expected = frames_by_ffmpeg(paths, [SIZE] * len(paths))
    for colours, path, frames in zip(COLOURS, paths, expected, strict=True):
        ours = levels(load(path)).astype(int)
        assert ours.shape == frames.shape, colours
        assert abs(ours - frames).max() <= 2, colours


TURNS = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def test_every_display_matrix_is_followed(h264: Path, folder: Path) -> None:
    paths = []
    for orientation, turn in TURNS.items():
        paths.append(folder / f"turned{orientation}.mp4")
        paths[-1].write_bytes(h264.read_bytes())
        write_matrix(paths[-1], turn)
    sizes = [SIZE if orientation < 5 else SIZE[::-1] for orientation in TURNS]
    expected = frames_by_ffmpeg(paths, sizes)
    assert len({frames.tobytes() for frames in expected}) == 8
    for orientation, path, frames in zip(TURNS, paths, expected, strict=True):
        footage = load(path)
        assert np.array_equal(levels(footage), frames), orientation
        assert {each.orientation for each in footage.transforms} == {orientation}
        assert {each.size for each in footage.transforms} == {SIZE}


@pytest.mark.parametrize("turn", [(0.9, 0.4, -0.4, 0.9), (1, 1, -1, 1), (1, 0, 1, 1)])
def test_a_picture_that_stands_askew_is_refused(
    h264: Path, tmp_path: Path, turn: tuple[float, ...]
) -> None:
    path = tmp_path / "askew.mp4"
    path.write_bytes(h264.read_bytes())
    write_matrix(path, turn)
    with pytest.raises(ClipError, match="its display matrix turns the picture by other than quart"):
        load(path)


def trimmed(source: Path, path: Path, start: float, seconds: float) -> Path:
    """Write an MP4 whose edit list shows a part of it, as a phone trims without encoding anew."""
    raw = bytearray(source.read_bytes())
    movie, media = (
        struct.unpack_from(">I", raw, raw.find(name) + skip)[0]
        for name, skip in ((b"mvhd", 16), (b"mdhd", 16))
    )
    edit = raw.find(b"elst")
    first = struct.unpack_from(">i", raw, edit + 16)[0] + int(start * media)
    struct.pack_into(">Ii", raw, edit + 12, int(seconds * movie), first)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(("start", "seconds"), [(1.5, 1.0), (0.0, 1.0), (2.0, 1.0), (0.33, 1.77)])
def test_an_edit_list_shows_a_part(
    h264: Path, tmp_path: Path, start: float, seconds: float
) -> None:
    path = trimmed(h264, tmp_path / "trim.mp4", start, seconds)
    (expected,) = frames_by_ffmpeg([path], [SIZE])
    footage = load(path)
    assert 10 <= len(expected) < 30
    assert np.array_equal(levels(footage), expected)
    assert footage.times == pytest.approx([i / 10 for i in range(len(expected))])


@pytest.mark.parametrize(
    ("name", "in_seconds"),
    [
        ("copy.avi", False),
        ("copy.h264", False),
        ("copy.ts", True),
        ("copy.mkv", True),
        ("copy.flv", True),
    ],
)
def test_times_are_seconds_or_numbers_and_ascend(
    h264: Path, whole: np.ndarray, name: str, in_seconds: bool
) -> None:
    footage = load(copied(h264, name))
    assert np.array_equal(levels(footage), whole)
    expected = [i / 10 if in_seconds else float(i) for i in range(30)]
    assert footage.times == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.3, 0.5])
@pytest.mark.parametrize("suffix", ["mkv", "avi", "ts", "flv", "mp4"])
def test_a_video_that_was_cut_is_refused(
    h264: Path, whole: np.ndarray, tmp_path: Path, suffix: str, share: float
) -> None:
    fast = ("-movflags", "faststart") if suffix == "mp4" else ()
    data = copied(h264, f"uncut.{suffix}", *fast).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: round(len(data) * share)])
    if suffix != "ts" or refused_by_ffmpeg(path):  # a transport stream states no duration
        with pytest.raises(ClipError, match="cannot be read"):
            load(path)
        assert load(path, skip_bad=True).skipped
    left = [frame.tobytes() for frame in levels(load(path, skip_bad=True))]
    assert 2 < len(left) < 28
    numbers = [[frame.tobytes() for frame in whole].index(each) for each in left]
    assert numbers == sorted(set(numbers))


def test_frames_drawn_from_a_damaged_key_frame_are_left_out(
    h264: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    for suffix in ("mp4", "mkv"):
        data = bytearray(copied(h264, f"sound.{suffix}").read_bytes())
        start = data.index(b"\x65\x88")  # the first slice of the first key frame
        data[start + 200 : start + 700] = bytes(500)
        path = tmp_path / f"damaged.{suffix}"
        path.write_bytes(data)
        assert refused_by_ffmpeg(path)
        with pytest.raises(ClipError, match=r"\d+ frames from frame 0 on cannot be read \(Invalid"):
            load(path)
        footage = load(path, skip_bad=True)
        assert len(footage.frames) == 20
        assert np.array_equal(levels(footage), whole[10:])
        assert footage.times == pytest.approx([1 + i / 10 for i in range(20)])
        assert len(footage.skipped) == 1


def test_a_video_that_begins_without_a_key_frame(tmp_path: Path, folder: Path) -> None:
    path, headless = folder / "whole.m4v", tmp_path / "headless.m4v"
    ffmpeg(*TEST_PICTURE, "-c:v", "mpeg4", "-bf", "2", "-g", "10", path)
    (frames,) = frames_by_ffmpeg([path], [SIZE])
    data = path.read_bytes()
    headless.write_bytes(data[len(data) // 10 :])
    with pytest.raises(ClipError, match=r"frames from frame 0 on cannot be read \(no key frame is"):
        load(headless)
    kept = levels(load(headless, skip_bad=True))
    assert len(kept) > 10
    assert np.array_equal(kept, frames[-len(kept) :])


def test_the_default_stream_is_read_and_never_a_cover(
    h264: Path, whole: np.ndarray, folder: Path, tmp_path: Path
) -> None:
    cover, alone, second = folder / "cover.png", folder / "alone.mp4", folder / "second.mkv"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=200x200:d=0.1", "-frames:v", "1", cover)
    with_cover = tmp_path / "cover.mp4"
    streams = ("-map", "0", "-map", "1", "-c", "copy")
    ffmpeg("-i", cover, "-i", h264, *streams, "-disposition:v:0", "attached_pic", with_cover)
    assert np.array_equal(levels(load(with_cover)), whole)
    small = ("-f", "lavfi", "-i", "color=blue:s=320x240:r=10:d=3")
    default = ("-disposition:v:0", "0", "-disposition:v:1", "default")
    ffmpeg(*small, "-i", h264, "-map", "0:v", "-map", "1:v", *H264, *default, second)
    assert load(second).clip.images.shape[2:] == SIZE
    sound = ("-map", "0", "-map", "1:a", "-c", "copy", "-disposition:v:0", "attached_pic")
    ffmpeg("-i", cover, "-i", h264, *sound, alone)
    with pytest.raises(ClipError, match="has no video stream, only a cover picture"):
        load(alone)


ON_WINDOWS = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")


@ON_WINDOWS
@pytest.mark.parametrize(
    "name",
    [
        b"-x.mp4",
        b"a:b.mp4",
        b"http:x.mp4",
        b"%03d.mp4",
        b"two\nlines.mp4",
        b"~nobody.mp4",
        b"#?&=*.mp4",
        "é 日本 ①.mp4".encode(),
        b"\xff\xfe.mp4",
    ],
)
def test_a_file_may_have_any_name(
    h264: Path, whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    try:
        (tmp_path / os.fsdecode(name)).write_bytes(h264.read_bytes())
    except OSError:
        pytest.skip("this file system has no such name")
    monkeypatch.chdir(tmp_path)
    footage = load_clip(os.fsdecode(name), AS_THEY_ARE)
    assert np.array_equal(levels(footage), whole)
    assert footage.clip.name == os.fsdecode(name)


@ON_WINDOWS
@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "a\0b.mp4"])
def test_a_name_that_no_file_can_have_is_an_error(name: str) -> None:
    with pytest.raises(ClipError, match=r"cannot be opened|there is no such file"):
        load_clip(name, AS_THEY_ARE)
