"""From images of any size to what a family's model takes, as its own loader does it.

Reimplemented with Pillow and torch, so that footage can be read without the model's own package:
`crop_width` as VGGT's ``load_and_preprocess_images``, `first_image_area` as π³'s
``load_images_as_tensor``, `longest_side` as Depth-Anything-3's ``InputProcessor``, `balanced` as
VGGT-Ω's ``load_and_preprocess_images``, each with its defaults. Images stay in [0, 1]: where the
caller of a model normalises them (`imagenet_normalised`), that is done for the call.

Every function takes an iterable, so that a long video is never held at its full resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ClipError

if TYPE_CHECKING:
    from PIL.Image import Image

Preprocess = Callable[[Iterable["Image"]], Tensor]
"""From Pillow images to one tensor of images, ``[S, 3, H, W]``, float32 in [0, 1]."""

WHITE = 1.0


class UnfitImageError(ClipError):
    """An image from which no whole patch can be made."""


def crop_width(images: Iterable[Image], *, width: int = 518, patch: int = 14) -> Tensor:
    """Resize to a width, round the height to patches and cut off what is taller than wide.

    Transparent pixels become white. Images of different heights are padded with white.

    Args:
        images: The frames.
        width: Of all frames, in pixels; also the largest height.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: An image is smaller than a patch, or would be after resizing.
    """
    from PIL.Image import Resampling

    made = []
    for image in images:
        _check_side(image, patch)
        height = round(image.height * (width / image.width) / patch) * patch
        _check_result(image, (width, height), patch)
        tensor = to_tensor(_on_white(image).resize((width, height), Resampling.BICUBIC))
        top = max(0, (height - width) // 2)
        made.append(tensor[:, top : top + width])
    return _padded(made)


def first_image_area(images: Iterable[Image], *, area: int = 255_000, patch: int = 14) -> Tensor:
    """Resize all frames to one size: the first one's aspect ratio within an area.

    Args:
        images: The frames.
        area: Largest number of pixels of a frame.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: An image is smaller than a patch.
    """
    from PIL.Image import Resampling

    size = None
    made = []
    for image in images:
        _check_side(image, patch)
        size = size or _size_within(image.size, area, patch)
        made.append(to_tensor(image.convert("RGB").resize(size, Resampling.LANCZOS)))
    return torch.stack(made)


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


def longest_side(images: Iterable[Image], *, side: int = 504, patch: int = 14) -> Tensor:
    """Resize the longest side, then both sides to their nearest multiple of a patch.

    Frames of different sizes are cut to the smallest height and width around their centre.

    Args:
        images: The frames.
        side: Of the longest side, in pixels.
        patch: Side of a patch in pixels.

    Raises:
        UnfitImageError: An image is smaller than a patch, or would be after resizing.
    """
    made = []
    for image in images:
        _check_side(image, patch)
        pixels = np.array(image.convert("RGB"))
        scale = side / max(image.size)
        near = (max(1, round(image.height * scale)), max(1, round(image.width * scale)))
        height, width = (_nearest_multiple(length, patch) for length in near)
        _check_result(image, (width, height), patch)
        made.append(_from_levels(_resize_levels(_resize_levels(pixels, near), (height, width))))
    height = min(tensor.shape[1] for tensor in made)
    width = min(tensor.shape[2] for tensor in made)
    return torch.stack([_centre(tensor, height, width) for tensor in made])


def balanced(
    images: Iterable[Image],
    *,
    resolution: int = 512,
    patch: int = 16,
    aspects: tuple[float, float] = (0.5, 2.0),
) -> Tensor:
    """Resize to about the same number of patches whatever the aspect ratio.

    Transparent pixels become white, extreme aspect ratios are cut around the centre, and images of
    different sizes are padded with white.

    Args:
        images: The frames.
        resolution: Side in pixels of the square that has as many patches.
        patch: Side of a patch in pixels.
        aspects: Least and largest height ÷ width.

    Raises:
        UnfitImageError: An image is smaller than a patch.
    """
    from PIL.Image import Resampling

    made = []
    for image in images:
        _check_side(image, patch)
        cut = _cut_to_aspect(_on_white(image), *aspects)
        patches = (resolution // patch) ** 2
        columns = math.sqrt(patches / (cut.height / cut.width))
        rows = patches / columns
        size = (max(1, round(columns)) * patch, max(1, round(rows)) * patch)
        made.append(to_tensor(cut.resize(size, Resampling.BICUBIC)))
    return _padded(made)


def imagenet_normalised(images: Tensor) -> Tensor:
    """Return images ``[..., 3, H, W]`` less ImageNet's mean, in units of its deviation."""
    mean = images.new_tensor([0.485, 0.456, 0.406])[:, None, None]
    deviation = images.new_tensor([0.229, 0.224, 0.225])[:, None, None]
    return (images - mean) / deviation


def to_tensor(image: Image) -> Tensor:
    """Return an RGB image as ``[3, H, W]``, float32 in [0, 1]."""
    return _from_levels(np.array(image))


def _from_levels(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float().div(255)


def _on_white(image: Image) -> Image:
    from PIL import Image as pillow

    if image.mode == "RGBA":
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        image = pillow.alpha_composite(white, image)
    return image.convert("RGB")


def _cut_to_aspect(image: Image, least: float, largest: float) -> Image:
    width, height = image.size
    if height / width < least:
        width = min(width, max(1, round(height / least)))
    elif height / width > largest:
        height = min(height, max(1, round(width * largest)))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _nearest_multiple(length: int, patch: int) -> int:
    return (length + patch // 2) // patch * patch


def _resize_levels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize 8-bit ``[H, W, 3]`` as OpenCV does: cubic where a side grows, else area means."""
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
    """Return each old pixel's share in each new one, ``[after, before]``; rows sum to 1."""
    edges = torch.arange(after + 1, dtype=torch.float64) * (before / after)
    begin, end = edges[:-1, None], edges[1:, None]
    pixel = torch.arange(before, dtype=torch.float64)
    overlap = (torch.minimum(end, pixel + 1) - torch.maximum(begin, pixel)).clamp(min=0)
    return (overlap * (after / before)).float()


def _centre(tensor: Tensor, height: int, width: int) -> Tensor:
    top, left = (tensor.shape[1] - height) // 2, (tensor.shape[2] - width) // 2
    return tensor[:, top : top + height, left : left + width]


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Stack ``[3, H, W]``, with white around the smaller ones."""
    height = max(tensor.shape[1] for tensor in tensors)
    width = max(tensor.shape[2] for tensor in tensors)
    padded = []
    for tensor in tensors:
        below, beside = height - tensor.shape[1], width - tensor.shape[2]
        margins = (beside // 2, beside - beside // 2, below // 2, below - below // 2)
        padded.append(F.pad(tensor, margins, value=WHITE) if any(margins) else tensor)
    return torch.stack(padded)


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
            f"{size[0]}x{size[1]}, less than a patch of {patch}: cut it to a moderate aspect ratio"
        )
