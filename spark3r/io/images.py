"""Folders of images."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ClipError
from .frames import INSTALL, Frame, FrameSelection

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = 1

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})


def read_folder(folder: Path, selection: FrameSelection) -> Iterator[Frame]:
    """Yield the selected images of a folder in natural order of their names.

    Raises:
        ClipError: If the folder has no images or too few, or one cannot be read.
    """
    files = image_files(folder, selection.source)
    for number in selection.pick(len(files)):
        try:
            image, orientation = open_image(files[number])
        except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all of these
            selection.unreadable(files[number].name, _reason(error))
            continue
        yield Frame(files[number].name, float(number), image, orientation)


def image_files(folder: Path, source: str) -> list[Path]:
    """Return a folder's image files in natural order: ``frame_2`` before ``frame_10``.

    Hidden files and files of other kinds are ignored.

    Raises:
        ClipError: If the folder cannot be listed, or holds no image.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
        files = [entry for entry in entries if _is_image(entry)]
    except OSError as error:
        raise ClipError(
            f"clip '{source}': the folder cannot be listed ({error.strerror})"
        ) from error
    if not files:
        raise ClipError(f"clip '{source}': {_what_is_there(entries)}")
    return files


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key by which numbers inside names count as numbers."""
    return [
        (0, int(part)) if part.isdigit() else (1, part)
        for part in re.split(r"([0-9]+)", name.casefold())
        if part
    ]


def open_image(path: Path) -> tuple[Image, int]:
    """Read an image, turned upright, and the EXIF orientation in which it is stored.

    Raises:
        OSError: If it is not an image, or damaged.
        ValueError: If it is not a picture of 8 bits per colour, or has too many pixels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ClipError(f"images are read with Pillow, which is missing: {INSTALL}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as opened:
                opened.load()
                if opened.mode.startswith(("I", "F")):
                    raise ValueError("one channel of more than 8 bits, as depth maps have")
                orientation = opened.getexif().get(_ORIENTATION, UPRIGHT)
                upright = ImageOps.exif_transpose(opened)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError("too many pixels to be a frame") from error
    return upright, orientation if orientation in range(1, 9) else UPRIGHT


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _what_is_there(entries: list[Path]) -> str:
    for entry in entries:
        if entry.is_dir() and any(map(_is_image, entry.iterdir())):
            return f"the folder holds no image, but its folder {entry.name} does: name that one"
    kinds = Counter(path.suffix.lower() or path.name for path in entries if path.is_file())
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(3))
    expected = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"the folder holds no image ({found or 'it is empty'}), expected {expected}"


def _reason(error: Exception) -> str:
    text = str(error) if not isinstance(error, OSError) or error.errno is None else error.strerror
    return "not an image" if "cannot identify image file" in (text or "") else text or "damaged"
