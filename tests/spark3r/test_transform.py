"""Where an original's pixels lie in the model's image: against Pillow, and a blob in images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from spark3r.families.registry import FAMILIES
from spark3r.io.clips import load_clip
from spark3r.transform import Transform

ORIENTATION = 0x0112  # EXIF tag

# How Pillow turns an image of each orientation upright; None leaves it as it is.
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

CLIPS = {  # width and height of the frames as they are stored, and the EXIF orientation
    "landscape": ([(320, 180), (320, 180)], 1),
    "portrait": ([(180, 320), (180, 320)], 6),
    "wide": ([(600, 150), (600, 150)], 4),  # further than VGGT-Ω's aspect ratios
    "tall": ([(150, 600), (150, 600)], 1),
    "mixed": ([(320, 180), (200, 300), (240, 240)], 7),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_every_orientation_is_as_pillow_turns_images(orientation: int) -> None:
    """Each pixel of a stored image is followed by its value."""
    width, height = 5, 3
    stored = Image.new("L", (width, height))
    stored.putdata(range(width * height))
    turn = TURNS[orientation]
    upright = stored if turn is None else stored.transpose(turn)
    transform = Transform((upright.height, upright.width)).stored(orientation)
    assert transform.size == (height, width)
    assert transform.upright_size == (upright.height, upright.width)
    for y in range(height):
        for x in range(width):
            centre = torch.tensor([x + 0.5, y + 0.5], dtype=torch.float64)
            seen = (transform.to_model(centre) - 0.5).tolist()
            assert upright.getpixel((round(seen[0]), round(seen[1]))) == stored.getpixel((x, y))
            assert seen == [round(seen[0]), round(seen[1])]


POSITIVE = st.floats(0.01, 100)
ANYWHERE = st.floats(-1e3, 1e3)


@given(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    st.tuples(POSITIVE, POSITIVE),
    st.tuples(ANYWHERE, ANYWHERE),
    st.integers(1, 8),
    st.lists(st.tuples(ANYWHERE, ANYWHERE), min_size=1, max_size=3),
)
def test_there_and_back(
    size: tuple[int, int],
    scale: tuple[float, float],
    offset: tuple[float, float],
    orientation: int,
    points: list[tuple[float, float]],
) -> None:
    transform = Transform(size, scale, offset, orientation)
    given_points = torch.tensor(points, dtype=torch.float64)
    back = transform.to_original(transform.to_model(given_points))
    assert torch.allclose(back, given_points, rtol=1e-9, atol=1e-6)


def blob(width: int, height: int, x: float, y: float) -> Image.Image:
    """A red blob on black around a point; what is padded in white is not red alone."""
    spread = min(width, height) / 14
    columns = torch.arange(width) + 0.5 - x
    rows = torch.arange(height) + 0.5 - y
    value = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * spread**2))
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    pixels[:, :, 0] = (255 * value).round().byte()
    return Image.fromarray(pixels.numpy())


def centre_of(image: Tensor) -> Tensor:
    """The red blob's centre in an image ``[3, H, W]``, (x, y)."""
    red = (image[0] - image[1]).double()
    red = red.where(red > 0.1, 0)
    rows = (torch.arange(red.shape[0]).double() + 0.5) @ red.sum(1) / red.sum()
    columns = (torch.arange(red.shape[1]).double() + 0.5) @ red.sum(0) / red.sum()
    return torch.stack((columns, rows))


@pytest.mark.parametrize("family", [name for name, each in FAMILIES.items() if each.preprocess])
@pytest.mark.parametrize(("sizes", "orientation"), CLIPS.values(), ids=CLIPS)
def test_a_point_of_the_original_is_found_in_the_models_image(
    family: str, sizes: list[tuple[int, int]], orientation: int, tmp_path: Path
) -> None:
    if not FAMILIES[family].pinhole:  # only panoramas of the whole sphere are taken
        turned = orientation >= 5  # stored on its side
        sizes = [(side, 2 * side) if turned else (2 * side, side) for side, _ in sizes]
    points = []
    for number, (width, height) in enumerate(sizes):
        # Off the centre by a sixteenth of a side and more: inside every crop.
        x, y = (0.5 + 0.07 * (number + 1) / 3) * width, (0.5 - 0.06) * height
        image = blob(width, height, x, y)
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image.save(tmp_path / f"{number}.png", exif=exif)
        points.append(torch.tensor([x, y], dtype=torch.float64))
    footage = load_clip(str(tmp_path), family)
    assert [each.size for each in footage.transforms] == [(h, w) for w, h in sizes]
    assert {each.orientation for each in footage.transforms} == {orientation}
    for image, transform, point in zip(
        footage.clip.images, footage.transforms, points, strict=True
    ):
        expected = transform.to_model(point)
        assert (centre_of(image) - expected).abs().max() < 0.15
        assert torch.allclose(transform.to_original(expected), point)
