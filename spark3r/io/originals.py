"""The original frames of a reconstruction, read again and stored upright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from ..errors import ClipError, Spark3rError
from ..transform import UPRIGHT
from .clips import check_source, footage_path, rendered_seed
from .reading import Output

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["write_originals"]

_COPIED = {
    ".jpg",
    ".jpeg",
    ".png",
}  # formats that every reader of COLMAP models and nerfstudio takes
_MODES = {"RGB", "L"}
_QUALITY = 95  # of JPEG files, with colours at full resolution
_NUMBERED = "frame "


def write_originals(output: Output, folder: Path, source: str | None = None) -> tuple[str, ...]:
    """Write the original of every frame as an upright image file: ``00000.jpg`` and so on.

    A PNG or JPEG file that is stored upright is copied. Any other frame of a folder or a video
    becomes a JPEG file of quality 95, and a frame of a rendered scene or a lossless file a PNG
    file. No file has an EXIF orientation other than upright.

    Args:
        output: The reconstruction.
        folder: An existing folder for the files.
        source: The footage; None takes the place that the reconstruction names.

    Returns:
        The files' names, in the order of the frames.

    Raises:
        ClipError: If the footage is no longer there, or is not the one that was reconstructed.
        Spark3rError: If a file cannot be written.
    """
    source = output.source if source is None else source
    try:
        check_source(source)
    except ClipError as error:
        raise ClipError(f"{error}; --clip says where the footage is now") from error
    try:
        return tuple(_written(output, folder, source))
    except OSError as error:
        raise Spark3rError(
            f"{folder}: an image cannot be written ({error.strerror or error})"
        ) from error


def _written(output: Output, folder: Path, source: str) -> Iterator[str]:
    if (seed := rendered_seed(source)) is not None:
        yield from _saved(output, folder, source, _rendered(output, seed), ".png")
    elif (path := footage_path(source)).is_dir():
        for number in range(len(output.frames)):
            yield _of_folder(output, folder, path, number)
    else:
        yield from _saved(output, folder, source, _of_video(output, path, source), ".jpg")


def _saved(
    output: Output, folder: Path, source: str, images: Iterator[Image], suffix: str
) -> Iterator[str]:
    number = -1
    for number, image in enumerate(images):
        _check_size(output, number, image)
        yield _save(image, folder, number, suffix)
    if number + 1 < len(output.frames):
        raise ClipError(
            f"clip '{source}' has no {output.frames[number + 1]}: it is not the footage that "
            f"{output.folder} was made from"
        )


def _of_folder(output: Output, folder: Path, source: Path, number: int) -> str:
    from .images import open_image

    name = output.frames[number]
    if PurePath(name).name != name:
        raise ClipError(f"{output.folder}: a frame is called '{name}', which is no file's name")
    path = source / name
    try:
        image, orientation = open_image(path, None)
    except (ClipError, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds for damaged files
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(f"{path} cannot be read again ({reason})") from error
    _check_size(output, number, image)
    suffix = path.suffix.lower()
    if suffix in _COPIED and orientation == UPRIGHT and image.mode in _MODES:
        name = f"{number:05}{'.png' if suffix == '.png' else '.jpg'}"
        shutil.copyfile(path, folder / name)
        return name
    return _save(image, folder, number, ".jpg" if suffix in {".jpg", ".jpeg"} else ".png")


def _of_video(output: Output, path: Path, source: str) -> Iterator[Image]:
    from .video import read_numbers

    numbers = []
    for name in output.frames:
        number = name.removeprefix(_NUMBERED)
        if not (name.startswith(_NUMBERED) and number.isascii() and number.isdigit()):
            raise ClipError(
                f"clip '{source}' is a video, and {output.folder} was made from something else: "
                f"its first frame is '{output.frames[0]}'"
            )
        numbers.append(int(number))
    yield from read_numbers(path, source, numbers)


def _rendered(output: Output, seed: int) -> Iterator[Image]:
    from PIL import Image

    from ..reference.scenes.render import rendered_clip

    height, width = output.sizes[0]
    for image in rendered_clip(seed, len(output.frames), height, width).images:
        yield Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def _check_size(output: Output, number: int, image: Image) -> None:
    height, width = output.sizes[number]
    if image.size != (width, height):
        raise ClipError(
            f"{output.frames[number]} has {image.width}x{image.height} pixels, and had "
            f"{width}x{height} when {output.folder} was made"
        )


def _save(image: Image, folder: Path, number: int, suffix: str) -> str:
    name = f"{number:05}{suffix}"
    # A new image holds pixels alone: neither an orientation nor a palette goes along.
    plain = image.convert("RGB")
    plain.info.clear()
    if suffix == ".png":
        plain.save(folder / name)
    else:
        plain.save(folder / name, quality=_QUALITY, subsampling=0)
    return name
