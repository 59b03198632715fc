"""Each family's preprocessing against the model's own loader, and against figures and loops."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import upstream_loaders
from PIL import Image

from spark3r.families.base import Preprocess
from spark3r.families.parts.preprocessing import (
    UnfitImageError,
    balanced,
    closest_shape,
    crop_width,
    first_image_area,
    imagenet_normalised,
    longest_side,
)
from spark3r.families.registry import FAMILIES

DEVIATION = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
SIZES = {  # width and height of the frames of a clip
    "16:9": [(1280, 720)],
    "portrait": [(720, 1280)],
    "wide": [(1001, 333)],
    "square": [(800, 800)],
    "odd": [(689, 517)],
    "small": [(120, 100)],
    "very small": [(40, 30)],
    "very tall": [(150, 1000)],
    "mixed": [(640, 360), (360, 640), (480, 500)],
}


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Return smooth structure with noise on it, so that every way of resampling shows."""
    random = np.random.default_rng((seed, width, height))
    channels = len(mode)
    coarse = random.integers(0, 256, (height // 9 + 2, width // 9 + 2, channels), dtype=np.uint8)
    smooth = np.array(Image.fromarray(coarse, mode).resize((width, height), Image.BICUBIC))
    noisy = smooth.astype(int) + random.integers(-30, 31, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), mode)


def saved(images: list[Image.Image], folder: Path) -> list[Path]:
    files = [folder / f"{number}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


def preprocess_of(family: str) -> Preprocess:
    preprocess = FAMILIES[family].preprocess
    assert preprocess is not None
    return preprocess


LOADERS = [family for family in upstream_loaders.NEEDS if family != "panovggt"]


@pytest.mark.parametrize("family", LOADERS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_as_the_model_itself_loads_images(
    family: str, sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    absent = upstream_loaders.missing(family)
    if absent:
        what = f"NOT VERIFIED: preprocessing of {family} ({', '.join(absent)} missing)"
        if family in os.environ.get("SPARK3R_REQUIRE", "").split(","):
            pytest.fail(f"{what}, but SPARK3R_REQUIRE asks for it")
        pytest.skip(what)
    if family == "mapanything" and len(sizes) > 1:
        pytest.skip("upstream takes the mean shape of images, and we take that of the first one")
    images = [picture(*size, seed=number) for number, size in enumerate(sizes)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream says when it pads
        expected = upstream_loaders.load(family, saved(images, tmp_path))
    found = preprocess_of(family)(images).images
    if family == "mapanything":  # it normalises while loading
        assert torch.equal(imagenet_normalised(found), expected)
        return
    if family != "da3":
        assert torch.equal(found, expected)
        return
    # Depth-Anything-3 resizes with OpenCV in fixed-point numbers: now and then one level of 255
    # apart. It normalises while loading; our images stay in [0, 1] until the call.
    levels = (imagenet_normalised(found) - expected) * DEVIATION * 255
    assert found.shape == expected.shape
    assert float(levels.abs().max()) < 1.01
    assert float((levels.abs() > 0.5).float().mean()) < 0.01


@pytest.mark.parametrize("size", [(2500, 1250), (4096, 2048), (1500, 752)], ids=str)
def test_panoramas_as_the_model_itself_loads_them(size: tuple[int, int], tmp_path: Path) -> None:
    if upstream_loaders.missing("panovggt"):
        pytest.skip("NOT VERIFIED: preprocessing of panovggt")
    image = picture(*size)
    expected = upstream_loaders.load("panovggt", saved([image], tmp_path))
    found = preprocess_of("panovggt")([image]).images
    assert found.shape == expected.shape == (1, 3, 518, 1036)
    assert float((found - expected).abs().max()) * 255 < 1.01
    assert float((found - expected).abs().mul(255).gt(0.5).float().mean()) < 0.01


@pytest.mark.parametrize("family", ["vggt", "omega"])
def test_transparency_as_the_model_itself_loads_it(family: str, tmp_path: Path) -> None:
    image = picture(90, 60, mode="RGBA")
    found = preprocess_of(family)([image, image]).images
    on_white = np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))
    opaque = [Image.fromarray(on_white[..., :3])] * 2
    assert torch.equal(found, preprocess_of(family)(opaque).images)
    if not upstream_loaders.missing(family):
        assert torch.equal(found, upstream_loaders.load(family, saved([image, image], tmp_path)))


@pytest.mark.parametrize(
    ("preprocess", "size", "expected"),
    [  # height and width, measured on upstream's code
        (crop_width, (1280, 720), (294, 518)),
        (crop_width, (720, 1280), (518, 518)),
        (crop_width, (1001, 333), (168, 518)),
        (first_image_area, (1280, 720), (378, 672)),
        (first_image_area, (800, 800), (504, 504)),
        (longest_side, (1280, 720), (280, 504)),
        (balanced, (1280, 720), (384, 688)),
        (closest_shape, (1280, 720), (294, 518)),
        (closest_shape, (720, 1280), (518, 294)),
        (closest_shape, (800, 600), (392, 518)),
        (closest_shape, (3000, 700), (168, 518)),
    ],
)
def test_sizes(preprocess: Preprocess, size: tuple[int, int], expected: tuple[int, int]) -> None:
    images = preprocess([Image.new("RGB", size, (255, 0, 51))]).images
    assert images.shape == (1, 3, *expected)
    assert torch.allclose(images.mean(dim=(0, 2, 3)), torch.tensor([1.0, 0.0, 0.2]), atol=1e-6)


def test_smaller_frames_are_framed_in_white() -> None:
    images = crop_width([Image.new("RGB", (518, 140)), Image.new("RGB", (518, 70))]).images
    assert images.shape == (2, 3, 140, 518)
    assert float(images[0].max()) == float(images[1, :, 35:105].max()) == 0.0
    assert float(images[1, :, :35].min()) == float(images[1, :, 105:].min()) == 1.0


@pytest.mark.parametrize(("width", "height"), [(53, 53), (56, 28), (61, 35)])
def test_area_means_against_a_loop_over_pixels(width: int, height: int) -> None:
    image = picture(width, height)
    found = longest_side([image], side=28).images[0].permute(1, 2, 0).numpy() * 255
    near = _area_means(np.array(image).astype(float), round(height * 28 / width), 28).round()
    expected = _area_means(near, found.shape[0], 28)
    assert found.shape in ((14, 28, 3), (28, 28, 3))
    assert np.abs(found - expected).max() <= 0.5 + 1e-3  # rounded to a level


def _area_means(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Mean of every new pixel's area, row by row and pixel by pixel."""
    means = np.zeros((height, width, 3))
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    for row in range(height):
        for column in range(width):
            total = weight = 0.0
            for y in range(pixels.shape[0]):
                tall = min(y + 1, (row + 1) * down) - max(y, row * down)
                if tall <= 0:
                    continue
                for x in range(pixels.shape[1]):
                    wide = min(x + 1, (column + 1) * across) - max(x, column * across)
                    if wide > 0:
                        total = total + tall * wide * pixels[y, x]
                        weight += tall * wide
            means[row, column] = total / weight
    return means


@pytest.mark.parametrize(
    "preprocess", [crop_width, first_image_area, longest_side, balanced, closest_shape]
)
def test_an_image_smaller_than_a_patch(preprocess: Preprocess) -> None:
    with pytest.raises(UnfitImageError, match=r"it has 40x9 pixels, expected sides of at least"):
        preprocess([Image.new("RGB", (40, 9))])


@pytest.mark.parametrize(("preprocess", "seen"), [(crop_width, "518x0"), (longest_side, "504x0")])
def test_an_image_that_would_shrink_below_a_patch(preprocess: Preprocess, seen: str) -> None:
    with pytest.raises(UnfitImageError, match=f"which the model would see as {seen}, less than"):
        preprocess([Image.new("RGB", (3000, 20))])
