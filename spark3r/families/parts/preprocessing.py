"""Preprocessing: a family's input from images of any size, equal to that of the model's own loader.

The loaders are reimplemented with Pillow and torch, so that footage is read without the model's own
package. `crop_width` is VGGT's ``load_and_preprocess_images``, `first_image_area` is π³'s
``load_images_as_tensor``, `longest_side` is Depth-Anything-3's ``InputProcessor``, `balanced` is
VGGT-Ω's ``load_and_preprocess_images``, `closest_shape` is MapAnything's ``load_images``, and
`panorama` is PanoVGGT's ``load_images_fixed``, each with its defaults. Images stay in [0, 1]. A
family whose model expects normalised images applies `imagenet_normalised` in its ``call``.

Every function takes an iterable, so that a long video is never held at its full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ClipError
from ...transform import Transform

if TYPE_CHECKING:
    from PIL.Image import Image


class Preprocessed(NamedTuple):
    """A model's input.

    Attributes:
        images: Images ``[S, 3, H, W]``, float32 in [0, 1].
        transforms: Map from the pixels of each original to those of its frame.
    """

    images: Tensor
    transforms: tuple[Transform, ...]


WHITE = 255


class UnfitImageError(ClipError):
    """An image from which no whole patch can be made."""


def crop_width(images: Iterable[Image], *, width: int = 518, patch: int = 14) -> Preprocessed:
    """Return frames resized to a width, with whole patches in height and at most square.

    Transparent pixels become white. Images of different heights are padded with white.

    Args:
        images: Images of the frames.
        width: Width of all frames and largest height, in pixels.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: If an image is smaller than a patch before or after resizing.
    """
    from PIL.Image import Resampling

    made = []
    for image in images:
        _check_side(image, patch)
        height = round(image.height * (width / image.width) / patch) * patch
        _check_result(image, (width, height), patch)
        tensor = _levels(_on_white(image).resize((width, height), Resampling.BICUBIC))
        top = max(0, (height - width) // 2)
        transform = _resized(image, (width, height)).moved(0, -top)
        made.append((tensor[:, top : top + width], transform))
    return _padded(made)


def first_image_area(
    images: Iterable[Image], *, area: int = 255_000, patch: int = 14
) -> Preprocessed:
    """Return all frames at one size: the aspect ratio of the first one, within an area.

    Args:
        images: Images of the frames.
        area: Largest area of a frame in pixels.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: If an image is smaller than a patch.
    """
    from PIL.Image import Resampling

    size = None
    made = []
    for image in images:
        _check_side(image, patch)
        size = size or _size_within(image.size, area, patch)
        tensor = _levels(image.convert("RGB").resize(size, Resampling.LANCZOS))
        made.append((tensor, _resized(image, size)))
    return _stacked(made)


def _size_within(size: tuple[int, int], area: int, patch: int) -> tuple[int, int]:
    scale = math.sqrt(area / (size[0] * size[1]))
    width, height = size[0] * scale, size[1] * scale
    columns, rows = round(width / patch), round(height / patch)
    while columns * patch * rows * patch > area:
        if columns / rows > width / height:
            columns -= 1
        else:
            rows -= 1
    return max(1, columns) * patch, max(1, rows) * patch


def longest_side(images: Iterable[Image], *, side: int = 504, patch: int = 14) -> Preprocessed:
    """Return frames of a longest side, with both sides rounded to the nearest whole patches.

    Frames of different sizes are cropped around their centre to the smallest height and width.

    Args:
        images: Images of the frames.
        side: Longest side in pixels.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: If an image is smaller than a patch before or after resizing.
    """
    made = []
    for image in images:
        _check_side(image, patch)
        pixels = np.array(image.convert("RGB"))
        scale = side / max(image.size)
        near = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
        height, width = (_nearest_multiple(length, patch) for length in near)
        _check_result(image, (width, height), patch)
        tensor = _by_channels(_resize_levels(_resize_levels(pixels, near), (height, width)))
        made.append((tensor, _resized(image, (width, height))))
    height = min(tensor.shape[1] for tensor, _ in made)
    width = min(tensor.shape[2] for tensor, _ in made)
    return _stacked([_centre(*each, height, width) for each in made])


def balanced(images: Iterable[Image], *, resolution: int = 512, patch: int = 16) -> Preprocessed:
    """Return frames with about the same number of patches at any aspect ratio.

    Transparent pixels become white. Images more than twice as high as wide, or as wide as high, are
    cropped around the centre. Images of different sizes are padded with white.

    Args:
        images: Images of the frames.
        resolution: Side in pixels of the square with that number of patches.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: If an image is smaller than a patch.
    """
    from PIL.Image import Resampling

    made = []
    for image in images:
        _check_side(image, patch)
        left, top, right, bottom = _box_within(image.size, 0.5, 2.0)
        cut = _on_white(image).crop((left, top, right, bottom))
        patches = (resolution // patch) ** 2
        columns = math.sqrt(patches / (cut.height / cut.width))
        rows = patches / columns
        size = (max(1, round(columns)) * patch, max(1, round(rows)) * patch)
        tensor = _levels(cut.resize(size, Resampling.BICUBIC))
        scale = (size[0] / cut.width, size[1] / cut.height)
        transform = Transform((image.height, image.width), scale)
        made.append((tensor, transform.moved(-left * scale[0], -top * scale[1])))
    return _padded(made)


SHAPES = {
    0.486: (252, 518),
    0.567: (294, 518),
    0.649: (336, 518),
    0.757: (392, 518),
    1.000: (518, 518),
    1.321: (518, 392),
    1.542: (518, 336),
    1.762: (518, 294),
    2.056: (518, 252),
    3.083: (518, 168),
}
"""Width and height that MapAnything was trained at, by the aspect ratio as upstream rounds it."""


def closest_shape(images: Iterable[Image]) -> Preprocessed:
    """Return all frames at the one of `SHAPES` that is closest to the first one's aspect ratio.

    Frames are resized until they cover it, and cropped around their centre. Upstream takes the mean
    aspect ratio of all images; that is the same unless images differ in shape, and would have to
    hold a long video at its full resolution.

    Args:
        images: Images of the frames.

    Raises:
        UnfitImageError: If an image is smaller than a patch.
    """
    from PIL.Image import Resampling

    size = None
    made = []
    for image in images:
        _check_side(image, 14)
        aspect = image.width / image.height
        size = size or SHAPES[min(SHAPES, key=lambda each: abs(each - aspect))]
        scale = max(size[0] / image.width, size[1] / image.height) + 1e-8
        near = (math.floor(image.width * scale), math.floor(image.height * scale))
        how = Resampling.LANCZOS if scale < 1 else Resampling.BICUBIC
        left, top = (near[0] - size[0]) // 2, (near[1] - size[1]) // 2
        cut = image.convert("RGB").resize(near, how)
        cut = cut.crop((left, top, left + size[0], top + size[1]))
        made.append((_levels(cut), _resized(image, near).moved(-left, -top)))
    return _stacked(made)


PANORAMA = (1036, 518)
"""Width and height that PanoVGGT was trained at."""


def panorama(images: Iterable[Image]) -> Preprocessed:
    """Return equirectangular panoramas at the size `PANORAMA`.

    Args:
        images: Images of the frames, twice as wide as high.

    Raises:
        UnfitImageError: If an image is not twice as wide as high, to a twentieth.
    """
    made = []
    for image in images:
        if abs(image.width / image.height - 2) > 0.1:
            raise UnfitImageError(
                f"it has {image.width}x{image.height} pixels, expected an equirectangular panorama "
                "of the whole sphere, twice as wide as high"
            )
        pixels = np.array(image.convert("RGB"))
        tensor = _by_channels(_resize_levels(pixels, PANORAMA[::-1]))
        made.append((tensor, _resized(image, PANORAMA)))
    return _stacked(made)


def imagenet_normalised(images: Tensor) -> Tensor:
    """Return images ``[..., 3, H, W]`` minus ImageNet's mean, divided by its deviation."""
    return (images - _by_channel(images, 0.485, 0.456, 0.406)) / _by_channel(
        images, 0.229, 0.224, 0.225
    )


def _by_channel(images: Tensor, *values: float) -> Tensor:
    """Return ``[3, 1, 1]``, made on the device, because a copy to a GPU waits for it."""
    return torch.stack([images.new_full((1, 1), value) for value in values])


def _levels(image: Image) -> Tensor:
    """Return an RGB image as ``[3, H, W]`` of 8 bits, a quarter of what it takes in float32."""
    return _by_channels(np.array(image))


def _by_channels(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _on_white(image: Image) -> Image:
    from PIL import Image as pillow

    if image.mode == "RGBA":
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return image.convert("RGB")


def _box_within(size: tuple[int, int], least: float, largest: float) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom of the largest centred box with an allowed aspect."""
    width, height = size
    if height / width < least:
        width = min(width, max(1, round(height / least)))
    elif height / width > largest:
        height = min(height, max(1, round(width * largest)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return left, top, left + width, top + height


def _resized(image: Image, size: tuple[int, int]) -> Transform:
    """Return the transform of an image that is resized whole to a width and height."""
    scale = (size[0] / image.width, size[1] / image.height)
    return Transform((image.height, image.width), scale)


def _nearest_multiple(length: int, patch: int) -> int:
    return (length + patch // 2) // patch * patch


def _resize_levels(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return 8-bit ``[H, W, 3]`` resized as OpenCV does: cubic if a side grows, else area means."""
    height, width = pixels.shape[:2]
    if size == (height, width):
        return pixels
    levels = torch.from_numpy(pixels).permute(2, 0, 1).float()
    if size[0] > height or size[1] > width:
        resized = F.interpolate(levels[None], size, mode="bicubic", align_corners=False)[0]
    else:
        resized = _overlaps(height, size[0]) @ levels @ _overlaps(width, size[1]).T
    return resized.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()


def _overlaps(before: int, after: int) -> Tensor:
    """Return the share of each old pixel in each new one, ``[after, before]``. Rows sum to 1."""
    edges = torch.arange(after + 1, dtype=torch.float64) * (before / after)
    begin, end = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(before, dtype=torch.float64)
    overlap = (torch.minimum(end, pixel + 1) - torch.maximum(begin, pixel)).clamp(min=0)
    return (overlap * (after / before)).float()


def _centre(
    tensor: Tensor, transform: Transform, height: int, width: int
) -> tuple[Tensor, Transform]:
    top, left = (tensor.shape[1] - height) // 2, (tensor.shape[2] - width) // 2
    cut = tensor[:, top : top + height, left : left + width]
    return cut, transform.moved(-left, -top)


def _stacked(made: Sequence[tuple[Tensor, Transform]]) -> Preprocessed:
    """Return images of 8 bits ``[3, H, W]`` as one tensor in [0, 1]."""
    images = torch.empty(len(made), *made[0][0].shape)
    for image, (levels, _) in zip(images, made, strict=True):
        torch.div(levels, 255, out=image)
    return Preprocessed(images, tuple(transform for _, transform in made))


def _padded(made: Sequence[tuple[Tensor, Transform]]) -> Preprocessed:
    """Return images ``[3, H, W]`` stacked, with white around the smaller ones."""
    height = max(tensor.shape[1] for tensor, _ in made)
    width = max(tensor.shape[2] for tensor, _ in made)
    padded = []
    for tensor, transform in made:
        below, beside = height - tensor.shape[1], width - tensor.shape[2]
        left, top = beside // 2, below // 2
        margins = (left, beside - left, top, below - top)
        if any(margins):
            tensor = F.pad(tensor, margins, value=WHITE)
        padded.append((tensor, transform.moved(left, top)))
    return _stacked(padded)


def _check_side(image: Image, patch: int) -> None:
    if min(image.size) < patch:
        raise UnfitImageError(
            f"it has {image.width}x{image.height} pixels, expected sides of at least one patch "
            f"of the model, {patch} pixels"
        )


def _check_result(image: Image, size: tuple[int, int], patch: int) -> None:
    if min(size) < patch:
        raise UnfitImageError(
            f"it has {image.width}x{image.height} pixels, which the model would see as "
            f"{size[0]}x{size[1]}, less than a patch of {patch}: crop it to a moderate aspect ratio"
        )
