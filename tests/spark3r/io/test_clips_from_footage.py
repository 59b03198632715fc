"""Folders, videos and rendered scenes as clips, and all that can be wrong with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from footage_files import (
    AS_THEY_ARE,
    frames_of,
    turn_clockwise,
    write_images,
    write_video,
)
from PIL import Image
from torch import Tensor

from spark3r import ClipError, FamilyError
from spark3r.families import Family, generic
from spark3r.families.registry import FAMILIES
from spark3r.io.clips import clip_size, load_clip
from spark3r.io.frames import FrameSelection, Stretch
from spark3r.reference.scenes.render import rendered_clip
from spark3r.transform import Transform


def pixels(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return frames_of(3, 12)


@pytest.fixture(scope="module")
def video(frames: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "tour.mp4", frames)


def test_a_folder_is_read_in_natural_order(frames: np.ndarray, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "tour", frames)
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame_0.png").write_text("what one system leaves beside every file")
    footage = load_clip(str(folder), AS_THEY_ARE)
    assert footage.frames == tuple(f"frame_{i}.png" for i in range(12))
    assert footage.times == tuple(map(float, range(12)))
    assert footage.skipped == ()
    assert footage.clip.name == f"{tmp_path.name}/tour"
    assert torch.equal(footage.clip.images, pixels(frames))


def test_a_video_is_read_to_its_end(frames: np.ndarray, video: Path) -> None:
    footage = load_clip(str(video), AS_THEY_ARE)
    assert footage.clip.name == "tour.mp4"
    assert footage.frames[-1] == "frame 11"
    assert footage.times == pytest.approx([i / 10 for i in range(12)])
    assert torch.equal(footage.clip.images, pixels(frames))


@pytest.mark.parametrize("count", [2, 3, 5, 11, 12])
def test_frames_are_spread_evenly(
    frames: np.ndarray, video: Path, tmp_path: Path, count: int
) -> None:
    folder = write_images(tmp_path, frames)
    expected = [int(i * 11 / (count - 1) + 0.5) for i in range(count)]
    for source in (video, folder):
        footage = load_clip(str(source), AS_THEY_ARE, frames=count)
        assert torch.equal(footage.clip.images, pixels(frames[expected]))


def test_picked_frames_are_distinct_and_keep_both_ends() -> None:
    for available in range(2, 40):
        for count in range(2, available + 1):
            picked = FrameSelection("", count, False).pick(range(available))
            assert len(set(picked)) == count
            assert picked == sorted(picked)
            assert (picked[0], picked[-1]) == (0, available - 1)
            steps = np.diff(picked)
            assert steps.max() - steps.min() <= 1


STRETCHES = [
    (Stretch(), range(12)),
    (Stretch(start=3), range(3, 12)),
    (Stretch(end=9), range(9)),
    (Stretch(2, 10, 3), (2, 5, 8)),
    (Stretch(every=5), (0, 5, 10)),
    (Stretch(end=1000.0, every=11), (0, 11)),
]


@pytest.mark.parametrize(("stretch", "numbers"), STRETCHES)
def test_frames_come_from_a_stretch(
    frames: np.ndarray, video: Path, tmp_path: Path, stretch: Stretch, numbers: Sequence[int]
) -> None:
    folder = write_images(tmp_path, frames)
    whole = load_clip(str(video), AS_THEY_ARE)
    a_frame = whole.times[1] - whole.times[0]  # seconds, where a folder counts images
    end = None if stretch.end is None else (stretch.end - 0.5) * a_frame
    seconds = Stretch(max(0.0, (stretch.start - 0.5) * a_frame), end, stretch.every)
    for source, part in ((folder, stretch), (video, seconds)):
        footage = load_clip(str(source), AS_THEY_ARE, stretch=part)
        assert torch.equal(footage.clip.images, pixels(frames[list(numbers)]))
        two = load_clip(str(source), AS_THEY_ARE, frames=2, stretch=part)
        assert torch.equal(two.clip.images, pixels(frames[[numbers[0], numbers[-1]]]))
        assert clip_size(str(source), AS_THEY_ARE, stretch=part)[0] == len(numbers)


def test_a_stretch_without_frames_is_refused_by_name(frames: np.ndarray, tmp_path: Path) -> None:
    folder = str(write_images(tmp_path, frames))
    for stretch, message in (
        (Stretch(5, 5), "the stretch from 5 to 5 is empty"),
        (Stretch(20), "has no frame in the stretch: its frames are from 0 to 11"),
        (Stretch(11), "1 frame is there, expected at least 2"),
    ):
        with pytest.raises(ClipError, match=message):
            load_clip(folder, AS_THEY_ARE, stretch=stretch)
    with pytest.raises(ClipError, match="has 3 frames in the stretch, fewer than the 4 asked"):
        load_clip(folder, AS_THEY_ARE, frames=4, stretch=Stretch(every=4))
    with pytest.raises(ClipError, match="a rendered scene has no stretches"):
        load_clip("rendered:7", AS_THEY_ARE, stretch=Stretch(1))


def test_a_turned_video_is_upright(frames: np.ndarray, video: Path, tmp_path: Path) -> None:
    turned = tmp_path / "phone.mp4"
    turned.write_bytes(video.read_bytes())
    turn_clockwise(turned)
    footage = load_clip(str(turned), AS_THEY_ARE)
    assert torch.equal(footage.clip.images, pixels(np.rot90(frames, k=-1, axes=(1, 2)).copy()))
    assert set(footage.transforms) == {Transform((48, 64), orientation=6)}


def test_a_turned_photograph_is_upright(frames: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    for number in range(2):
        Image.fromarray(frames[number]).save(tmp_path / f"{number}.png", exif=exif)
    footage = load_clip(str(tmp_path), AS_THEY_ARE)
    assert torch.equal(footage.clip.images, pixels(np.rot90(frames[:2], k=-1, axes=(1, 2)).copy()))
    assert footage.transforms == (Transform((48, 64), orientation=6),) * 2


def test_a_rendered_scene_keeps_its_ground_truth() -> None:
    footage = load_clip("rendered:7", AS_THEY_ARE, frames=3, rendered_size=16)
    assert footage.clip.has_ground_truth
    assert torch.equal(footage.clip.images, rendered_clip(7, 3, 16, 16).images)
    assert len(footage.frames) == len(footage.times) == 3
    assert footage.transforms == (Transform((16, 16)),) * 3


TAKES_ANY = [family for family in FAMILIES.values() if family.name != "panovggt"]


@pytest.mark.parametrize("family", TAKES_ANY, ids=lambda family: family.name)
def test_every_family_takes_mixed_sizes(family: Family, frames: np.ndarray, tmp_path: Path) -> None:
    write_images(tmp_path, frames[:2])
    Image.fromarray(frames[2].transpose(1, 0, 2)).save(tmp_path / "frame_2.png")
    images = load_clip(str(tmp_path), family).clip.images
    patch = {"reference": 8, "omega": 16}.get(family.name, 14)
    assert images.shape[0] == 3
    assert images.shape[2] % patch == images.shape[3] % patch == 0


def test_panoramas_are_told_from_other_images(tmp_path: Path) -> None:
    for number in range(2):
        grey = np.full((64, 128, 3), 100, dtype=np.uint8)
        Image.fromarray(grey).save(tmp_path / f"frame_{number}.png")
    clip = load_clip(str(tmp_path), FAMILIES["panovggt"]).clip
    assert clip.images.shape == (2, 3, 518, 1036)
    Image.fromarray(np.full((72, 128, 3), 100, dtype=np.uint8)).save(tmp_path / "frame_2.png")
    with pytest.raises(ClipError, match=r"128x72 pixels, expected an equirectangular panorama"):
        load_clip(str(tmp_path), FAMILIES["panovggt"])


def broken_folder(folder: Path, frames: np.ndarray) -> None:
    write_images(folder, frames)
    whole = (folder / "frame_1.png").read_bytes()
    (folder / "frame_1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "frame_4.png").write_text("no picture")
    depth = Image.fromarray(np.full((48, 64), 3000, dtype=np.uint16))
    depth.save(folder / "frame_6.png")


def test_unreadable_images_are_named_and_skipped_on_request(
    frames: np.ndarray, tmp_path: Path
) -> None:
    broken_folder(tmp_path, frames)
    with pytest.raises(ClipError, match=r"frame_1.png cannot be read \(.*\); repair it, remove"):
        load_clip(str(tmp_path), AS_THEY_ARE)
    footage = load_clip(str(tmp_path), AS_THEY_ARE, skip_bad=True)
    kept = [i for i in range(12) if i not in (1, 4, 6)]
    assert torch.equal(footage.clip.images, pixels(frames[kept]))
    assert footage.frames == tuple(f"frame_{i}.png" for i in kept)
    assert [text.partition(":")[0] for text in footage.skipped] == [
        "frame_1.png",
        "frame_4.png",
        "frame_6.png",
    ]
    assert footage.skipped[1:] == (
        "frame_4.png: not an image",
        "frame_6.png: one channel of more than 8 bits, as depth maps have",
    )


def test_a_video_that_ends_early_is_an_error(
    frames: np.ndarray, video: Path, tmp_path: Path
) -> None:
    data = video.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(data[: len(data) * 7 // 10])
    said = r"(the part from frame \d on|the last 0.\d+ s of 1.20 s) cannot be read"
    with pytest.raises(ClipError, match=said):
        load_clip(str(cut), AS_THEY_ARE)
    footage = load_clip(str(cut), AS_THEY_ARE, skip_bad=True)
    read = footage.clip.frames
    assert 4 < read < 10
    assert torch.equal(footage.clip.images, pixels(frames[:read]))
    assert footage.skipped[-1].endswith("s of 1.20 s: the file ends early")
    thinned = load_clip(str(cut), AS_THEY_ARE, frames=3, skip_bad=True)
    assert thinned.frames[-1] == f"frame {read - 1}"
    assert thinned.skipped == footage.skipped


def test_a_damaged_video_is_an_error(video: Path, tmp_path: Path) -> None:
    data = bytearray(video.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8000] = bytes(8000)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    with pytest.raises(ClipError, match=r"frames from frame \d+ on cannot be read"):
        load_clip(str(damaged), AS_THEY_ARE)
    footage = load_clip(str(damaged), AS_THEY_ARE, skip_bad=True)
    assert 2 <= footage.clip.frames < 12
    assert footage.skipped


def no_video_stream(folder: Path) -> Path:
    path = folder / "speech.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return path


def text_file(folder: Path) -> Path:
    (folder / "text.mp4").write_text("hello" * 100)
    return folder / "text.mp4"


def only_subfolders(folder: Path) -> Path:
    write_images(folder / "images", frames_of(1, 2, 8, 8))
    (folder / "sparse").mkdir()
    return folder


def only_heic(folder: Path) -> Path:
    for number in range(3):
        (folder / f"{number}.HEIC").write_text("")
    return folder


def one_image(folder: Path) -> Path:
    return write_images(folder, frames_of(1, 1, 48, 64))


def tiny_images(folder: Path) -> Path:
    return write_images(folder, frames_of(1, 2, 8, 8))


@pytest.mark.parametrize("source", ["https://a.example/tour.mp4", "rtsp://camera/1", "s3://b/c"])
def test_an_address_is_refused_by_name(source: str) -> None:
    with pytest.raises(ClipError, match="is an address, and nothing is downloaded") as caught:
        load_clip(source, "vggt")
    assert source in str(caught.value)


def narrow_images(folder: Path) -> Path:
    return write_images(folder, np.zeros((2, 14, 2000, 3), np.uint8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nowhere", "there is no such file or folder; expected a folder"),
        (lambda folder: folder, "the folder holds no image (it is empty), expected bmp, jpeg"),
        (only_heic, "the folder holds no image (3 .heic), expected"),
        (only_subfolders, "the folder holds no image, but its folder images does: name that"),
        (one_image, "1 frame is there, expected at least 2"),
        (lambda folder: one_image(folder) / "frame_0.png", "is one image, and one frame alone"),
        (text_file, "is not a video that FFmpeg can read (Invalid data found when processing in"),
        (no_video_stream, "has no video stream, only audio"),
        (tiny_images, "frame_0.png: it has 8x8 pixels, expected sides of at least one patch of"),
        (narrow_images, "frame_0.png: it has 2000x14 pixels, which the model would see as 518x0"),
    ],
)
def test_sources_that_are_not_footage(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    source = str(make(tmp_path))
    with pytest.raises(ClipError) as caught:
        load_clip(source, "vggt")
    assert message in str(caught.value)
    assert source in str(caught.value)


@pytest.mark.parametrize(
    ("source", "frames", "message"),
    [
        ("rendered:", None, "clip 'rendered:', expected rendered:SEED such as rendered:7"),
        ("rendered:-1", None, "clip 'rendered:-1', expected rendered:SEED"),
        ("rendered:1", 1, "clip 'rendered:1': asked for 1 frame, expected at least 2"),
        ("/dev/null", None, "clip '/dev/null' is neither a file nor a folder"),
    ],
)
def test_wrong_requests(source: str, frames: int | None, message: str) -> None:
    with pytest.raises(ClipError) as caught:
        load_clip(source, AS_THEY_ARE, frames=frames)
    assert str(caught.value).startswith(message)


def test_families_that_read_no_images(video: Path) -> None:
    with pytest.raises(FamilyError, match=r"'generic' does not say how images become .* preproc"):
        load_clip(str(video), generic("*.attn", patch_size=8))
    with pytest.raises(FamilyError, match="no family is named 'vgg', expected one of"):
        load_clip(str(video), "vgg")
    assert load_clip("rendered:1", generic("*.attn", patch_size=8), frames=2).clip.frames == 2


def test_more_frames_than_there_are(frames: np.ndarray, video: Path, tmp_path: Path) -> None:
    for source in (video, write_images(tmp_path, frames)):
        with pytest.raises(ClipError, match="has 12 frames, fewer than the 13 asked for"):
            load_clip(str(source), AS_THEY_ARE, frames=13)


def test_nothing_is_left_after_skipping(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").write_text("no picture")
    with pytest.raises(ClipError, match="no frame is left after 3 that cannot be read, expected"):
        load_clip(str(tmp_path), AS_THEY_ARE, skip_bad=True)


@pytest.mark.parametrize(
    ("package", "message"),
    [("av", "videos are read with PyAV, which is missing"), ("PIL", "Pillow, which is missing")],
)
def test_a_missing_package_is_named_with_its_remedy(
    package: str, message: str, video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ClipError, match=message) as caught:
        load_clip(str(video), AS_THEY_ARE)
    assert "pip install 'spark3r[video]'" in str(caught.value)
