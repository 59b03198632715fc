"""Videos, decoded with PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ClipError
from .frames import INSTALL, Frame, FrameSelection
from .images import SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image


def read_video(path: Path, selection: FrameSelection) -> Iterator[Frame]:
    """Yield the selected frames of a video, turned as its metadata says.

    A selection of frames decodes the video twice, because the number of frames that a container
    announces is often wrong.

    Raises:
        ClipError: If the file is not a video, has too few frames, or cannot be decoded whole.
    """
    if path.suffix.lower() in SUFFIXES:
        raise ClipError(
            f"clip '{selection.source}' is one image, and one frame alone has nothing to attend "
            "to: give the folder of images, or a video"
        )
    if selection.frames is None:
        wanted = None
    else:
        wanted = frozenset(selection.pick(sum(1 for _ in _decode(path, selection))))
        selection.skipped.clear()  # the second pass finds them again
    for number, frame in enumerate(_decode(path, selection)):
        if wanted is None or number in wanted:
            time = float(number) if frame.time is None else float(frame.time)
            yield Frame(f"frame {number}", time, *_upright(frame))


def _decode(path: Path, selection: FrameSelection) -> Iterator[Any]:
    """Yield every frame that can be decoded, and record the others."""
    try:
        import av
    except ImportError as error:
        raise ClipError(
            f"clip '{selection.source}': videos are read with PyAV, which is missing: {INSTALL}; "
            "or give a folder of images"
        ) from error
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ClipError(
            f"clip '{selection.source}' is not a video that FFmpeg can read ({_reason(error)}): "
            "expected a video, a folder of images or rendered:SEED; an interrupted recording or "
            "download also gives this error"
        ) from error
    with container:
        if not container.streams.video:
            kinds = ", ".join(stream.type for stream in container.streams) or "nothing"
            raise ClipError(f"clip '{selection.source}' has no video stream, only {kinds}")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        packets = 0
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
                try:
                    yield from packet.decode()
                except av.FFmpegError as error:
                    selection.unreadable(f"the part after frame {packets - 1}", _reason(error))
        except av.FFmpegError as error:  # from reading, not from decoding
            selection.unreadable(f"the part after frame {packets - 1}", _reason(error))
        if packets < stream.frames:
            selection.unreadable(
                f"the end from frame {packets} of {stream.frames}", "the file ends early"
            )


def _upright(frame: Any) -> tuple[Image, int]:
    """Return a decoded frame turned upright, and its orientation as EXIF counts it."""
    try:
        image: Image = frame.to_image()
    except ImportError as error:
        raise ClipError(f"frames are made with Pillow, which is missing: {INSTALL}") from error
    from PIL.Image import Transpose

    # Displays turn by quarters only; the metadata counts degrees counter-clockwise.
    turn, orientation = {
        0: (None, 1),
        1: (Transpose.ROTATE_90, 8),
        2: (Transpose.ROTATE_180, 3),
        3: (Transpose.ROTATE_270, 6),
    }[round(frame.rotation / 90) % 4]
    return image if turn is None else image.transpose(turn), orientation


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
