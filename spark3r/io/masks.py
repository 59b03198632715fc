"""Masks of footage: a folder with one image per frame, black where a pixel is masked.

The convention is COLMAP's. Pixels that are not black are used; in a lossy format those are that
are brighter than middle grey.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ClipError, first_line
from .clips import Footage

__all__ = ["check_masks", "read_masks"]

LOSSY, LEAST_OF_LOSSY = ("JPEG", "MPO", "WEBP"), 128
"""Formats that blur the border between black and white, and the darkest grey of a used pixel."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def check_masks(folder: str) -> None:
    """Check that there is a folder of masks, before a model is loaded.

    Raises:
        ClipError: If there is not.
    """
    if not Path(folder).is_dir():
        raise ClipError(f"--mask {folder} is not a folder, expected one with an image per frame")


def read_masks(folder: str, footage: Footage) -> Tensor:
    """Return where the frames of footage are used, ``[S, H, W]`` bool, of the clip's size.

    The mask of ``IMG_1.jpg`` is ``IMG_1.jpg``, ``IMG_1.jpg.png`` (COLMAP's name) or an image of
    another kind called ``IMG_1``. That of frame 12 of a video is an image whose name ends in the
    number, such as ``00012.png``. It has the size of the original as it is stored, and pixels of
    the clip take the value of the nearest original pixel.

    Args:
        folder: Folder of the masks.
        footage: The footage.

    Raises:
        ClipError: If a mask is missing, cannot be read or has another size, or if all pixels of all
            frames are masked.
    """
    check_masks(folder)
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)
    by_name = {path.name: path for path in found}
    by_stem = {path.stem: path for path in reversed(found)}
    by_number = {int(n[0]): path for path in reversed(found) if (n := _NUMBER.findall(path.stem))}
    height, width = footage.clip.images.shape[2:]
    centres = torch.cartesian_prod(torch.arange(height) + 0.5, torch.arange(width) + 0.5).flip(1)
    masks = torch.empty(footage.clip.frames, height, width, dtype=torch.bool)
    for index, (name, transform) in enumerate(zip(footage.frames, footage.transforms, strict=True)):
        path = by_name.get(name) or by_stem.get(name) or by_stem.get(Path(name).stem)
        if path is None and (number := _VIDEO_FRAME.fullmatch(name)):
            path = by_number.get(int(number[1]))
        if path is None:
            raise ClipError(f"--mask {folder} has no mask of '{name}', expected one for each frame")
        used = _read(path)
        if tuple(used.shape) != transform.size:
            (rows, columns), (high, wide) = used.shape, transform.size
            raise ClipError(
                f"--mask {path} has {columns}x{rows} pixels, but its frame has {wide}x{high}"
            )
        x, y = transform.to_original(centres).long().unbind(1)
        x, y = x.clamp(0, used.shape[1] - 1), y.clamp(0, used.shape[0] - 1)
        masks[index] = used[y, x].view(height, width)
    if not masks.any():
        raise ClipError(
            f"--mask {folder} masks every pixel: black is masked, other pixels are used"
        )
    return masks


_NUMBER = re.compile(r"(\d{1,15})$")
_VIDEO_FRAME = re.compile(r"frame (\d+)")


def _read(path: Path) -> Tensor:
    """Return which pixels of an image are not black, ``[H, W]`` bool."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            grey = image.convert("L")
            values = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8)
            least = LEAST_OF_LOSSY if image.format in LOSSY else 1
            return values.view(grey.height, grey.width) >= least
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ClipError(f"--mask {path} cannot be read ({first_line(error)})") from error
