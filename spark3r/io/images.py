"""Folders of images."""

from __future__ import annotations

import math
import re
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ClipError, Spark3rWarning
from ..transform import UPRIGHT
from .frames import INSTALL, Frame, FrameSelection

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION, _SHORT = 0x0112, 3  # a tag and a type of EXIF

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm"})

_OTHER = re.compile(
    r"\.(arw|avif|cr2|cr3|dng|exr|gif|hdr|hei[cf]s?|hif|j2[ck]|jfif|jp[2ex]|jxl|nef|orf"
    r"|pgm|pnm|psd|qoi|raf|raw|rw2|tga)"
)
"""Suffixes of images that are not read."""

_CHECKED = {"JPEG": "mjpeg", "MPO": "mjpeg", "PNG": "png"}
"""FFmpeg's decoders of the formats in which Pillow passes over damage, by Pillow's format. The
other formats either stop Pillow or hide their damage from FFmpeg too (benchmarks/faults)."""

_Parts = list[tuple[int, int | str]]

CheckData = Callable[[bytes, str], None]
"""Function(file's content, decoder) that raises an error for damaged data."""

_COMPRESSION = 259
_STRIPS, _TILES = (273, 279), (324, 325)
"""Tags of the places and the lengths of a TIFF file's strips, and of its tiles."""

_TRUNCATED = re.compile("only got|larger than file|Truncated")  # in Pillow's warnings of a TIFF


def read_folder(folder: Path, selection: FrameSelection) -> Iterator[Frame]:
    """Yield the selected images of a folder in natural order of their names.

    Raises:
        ClipError: If the folder has no images or too few, or one cannot be read.
    """
    files = image_files(folder, selection)
    check_data = _load_check()
    for number in selection.pick(range(len(files))):
        frame = read_image(files[number], number, selection, check_data)
        if frame is not None:
            yield frame


def read_image(
    path: Path, number: int, selection: FrameSelection, check_data: CheckData | None
) -> Frame | None:
    """Return an image as a frame, or None if it is unreadable and the selection skips such images.

    Args:
        path: The file.
        number: Its number in the folder.
        selection: Records what is unreadable.
        check_data: Check of the formats in which Pillow passes over damage, None for no check.

    Raises:
        ClipError: If it is unreadable and not to be skipped, or Pillow is missing.
    """
    try:
        image, orientation = open_image(path, check_data)
    except (ClipError, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        selection.unreadable(path.name, _reason(error))
        return None
    return Frame(path.name, float(number), image, orientation)


def image_files(folder: Path, selection: FrameSelection) -> list[Path]:
    """Return a folder's image files in natural order: ``frame_2`` before ``frame_10``.

    Hidden files and files of other kinds are ignored. What looks like an image and is not read is
    recorded in the selection.

    Raises:
        ClipError: If the folder cannot be listed, or holds no image.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda path: natural_key(path.name))
        files = [entry for entry in entries if _is_image(entry)]
        passed_over = [(entry.name, why) for entry in entries if (why := _why_passed_over(entry))]
    except OSError as error:
        raise ClipError(
            f"clip '{selection.source}': the folder cannot be listed ({error.strerror})"
        ) from error
    if not files:
        raise ClipError(f"clip '{selection.source}': {_what_is_there(entries)}")
    selection.passed_over.extend(f"{name}: {why}" for name, why in passed_over)
    return files


def natural_key(name: str) -> tuple[_Parts, _Parts, str]:
    """Return a sort key by which numbers inside names count as numbers, in any script's digits.

    Compatible forms of a character are equal, such as ``②`` and ``2``. Names that differ in
    nothing else follow the order of their characters.
    """
    path = PurePath(name)
    return _parts(path.stem), _parts(path.suffix), name


def _parts(text: str) -> _Parts:
    plain = unicodedata.normalize("NFKC", text).casefold()
    digits = "".join(str(unicodedata.digit(each, each)) for each in plain)
    parts = re.split(r"([0-9]+)", digits)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts if part]


def open_image(path: Path, check_data: CheckData | None) -> tuple[Image, int]:
    """Read an image, turned upright, and the EXIF orientation in which it is stored.

    Args:
        path: The file.
        check_data: Check of the formats in which Pillow passes over damage, None for no check.

    Raises:
        ClipError: If Pillow is missing.
        Exception: If it is not an image, is damaged, is not a picture of 8 bits per colour, or has
            too many pixels. Pillow raises exceptions of many kinds.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ClipError(f"images are read with Pillow, which is missing: {INSTALL}") from error
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as opened:
                stored = _orientation(opened)
                opened.load()
                # Pillow turns TIFF files upright while it loads them, and none of the others.
                to_turn = _orientation(opened) if opened.format == "TIFF" else stored
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError("too many pixels to be a frame") from error
    if opened.mode.startswith(("I", "F")):
        raise ValueError("one channel of more than 8 bits, as depth maps have")
    if opened.format == "TIFF":
        _check_tiff(opened, path.stat().st_size, [str(each.message) for each in warned])
    elif opened.format == "BMP":
        _check_bmp(path)
    if check_data is not None and opened.format in _CHECKED:
        check_data(path.read_bytes(), _CHECKED[opened.format])
    return turned_upright(opened, to_turn), stored


def _check_bmp(path: Path) -> None:
    """Raise an error for a BMP file whose pixels begin inside its header."""
    with path.open("rb") as file:
        _, pixels, header = struct.unpack("<10sII", file.read(18))
    if pixels < 14 + header:
        raise ValueError("damaged: its pixels begin inside its header")


def _check_tiff(image: Any, size: int, warned: list[str]) -> None:
    """Raise an error for a TIFF file that lacks data, or whose tags contradict its data."""
    for text in warned:
        if _TRUNCATED.search(text):
            raise ValueError(f"damaged: {text}")
    tags = image.tag_v2
    if _COMPRESSION not in tags:
        raise ValueError("damaged: its compression is missing")
    for places, lengths in (_STRIPS, _TILES):
        if places in tags and lengths not in tags:
            raise ValueError("damaged: the lengths of its parts are missing")
        parts = zip(tags.get(places, ()), tags.get(lengths, ()), strict=False)
        if any(place + length > size for place, length in parts):
            raise ValueError("damaged: a part lies beyond the end of the file")
    if image.info.get("compression") == "raw" and _STRIPS[1] in tags:
        row = math.ceil(tags[256] * sum(tags.get(258, (1,))) / 8)  # width, bits of each sample
        if not 0 <= sum(tags[_STRIPS[1]]) - row * tags[257] < max(row, 2):  # height
            raise ValueError("damaged: it has more or less data than pixels")


def turned_upright(image: Image, orientation: int) -> Image:
    """Return an image that is stored in an EXIF orientation as it is to be shown."""
    from PIL.Image import Transpose

    methods = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == UPRIGHT else image.transpose(methods[orientation])


def _orientation(image: Image) -> int:
    """Return the EXIF orientation of an image. It is read alone, whatever the other tags hold."""
    found: object = _exif_orientation(image.info.get("exif", b""))
    if found is None:
        found = image.getexif().get(_ORIENTATION)  # of a TIFF file, or in XMP
    return found if isinstance(found, int) and 1 <= found <= 8 else UPRIGHT


def _exif_orientation(block: bytes) -> int | None:
    """Return the orientation in a block of EXIF data, None if it has none."""
    block = block.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if block.startswith(b"II") else "big"

    def number(place: int, size: int) -> int:
        return int.from_bytes(block[place : place + size], order)

    first = number(4, 4) + 2
    for place in range(first, first + 12 * number(first - 2, 2), 12):
        if number(place, 2) == _ORIENTATION and number(place + 2, 2) == _SHORT:
            return number(place + 8, 2)
    return None


def _load_check() -> CheckData | None:
    try:
        import av  # noqa: F401
    except ImportError:
        warnings.warn(
            f"images are not checked for damage, because PyAV is missing: {INSTALL}",
            Spark3rWarning,
            stacklevel=2,
        )
        return None
    from .decoding import check_image

    return check_image


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _why_passed_over(path: Path) -> str | None:
    suffix = path.suffix.lower()
    is_other = _OTHER.fullmatch(suffix) is not None
    if path.name.startswith(".") or not (suffix in SUFFIXES or is_other):
        return None
    if path.is_file():
        return f"{suffix[1:].upper()} files are not read" if is_other else None
    return "a link to nothing" if _is_dangling(path) else "not a file"


def _is_dangling(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _what_is_there(entries: list[Path]) -> str:
    for entry in entries:
        if entry.is_dir() and any(map(_is_image, entry.iterdir())):
            return f"the folder holds no image, but its folder {entry.name} does: name that one"
    kinds = Counter(path.suffix.lower() or path.name for path in entries if path.is_file())
    dangling = sum(map(_is_dangling, entries))
    found = [f"{count} {kind}" for kind, count in kinds.most_common(3)]
    if dangling:
        found.append(f"{dangling} link{'s' * (dangling != 1)} to nothing")
    expected = ", ".join(sorted(suffix[1:] for suffix in SUFFIXES))
    return f"the folder holds no image ({', '.join(found) or 'it is empty'}), expected {expected}"


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.errno is not None else str(error)
    if "cannot identify image file" in (text or ""):
        return "not an image"
    return text or f"damaged: {type(error).__name__}"
