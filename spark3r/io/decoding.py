"""Decoding with FFmpeg through PyAV: which stream, which frames, which colours, which damage.

Pictures equal those that the command ``ffmpeg`` extracts. A file is refused where
``ffmpeg -xerror -err_detect explode`` refuses it: decoders report damage instead of hiding it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import av.filter
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition

from ..errors import ClipError
from ..transform import UPRIGHT

if TYPE_CHECKING:
    from PIL.Image import Image

_STRICT = {"err_detect": "crccheck+explode"}

# Up to FFmpeg 8.0 a strict demuxer crashes, even on whole files of FLV and MPEG-PS.
_STRICT_DEMUXER = _STRICT if av.library_versions["libavformat"] >= (62, 12, 0) else {}

_MODERN = ("h264", "hevc", "vp9", "av1", "libdav1d")
"""Decoders that show nothing before a first key frame. Older ones show grey frames."""

_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails

_STATES_WHOLE = ("matroska", "flv", "asf")
"""Containers that state the duration of all streams together; FFmpeg estimates that of others."""

_LONGEST_LAST = 1.0
"""Longest duration in seconds that a last frame is believed to have, if the file does not say."""


class Decoded(NamedTuple):
    """One step of decoding.

    Attributes:
        frame: PyAV's frame; None where a part of the data gave none.
        damage: What is wrong with the frame or the part; None for a whole frame.
    """

    frame: Any
    damage: str | None


class Video:
    """An open video.

    Attributes:
        start: Time of its beginning in seconds.
        duration: Seconds that the file states, None if it states none.
    """

    def __init__(self, container: Any, stream: Any) -> None:
        self._container, self._stream = container, stream
        self._is_modern = stream.codec_context.name in _MODERN
        self.start = (container.start_time or 0) / av.time_base
        self.duration: float | None = None
        self._measured = (stream,)  # the streams that the duration is about
        if container.format.name.startswith("mov,mp4") and stream.duration:
            self.duration = float(stream.duration * stream.time_base)
        elif container.format.name == "avi" and stream.frames:  # FFmpeg cuts the stated duration
            self.duration = float(stream.frames * stream.time_base)
        elif container.format.name.startswith(_STATES_WHOLE) and container.duration:
            self.duration = container.duration / av.time_base
            self._measured = tuple(container.streams)
        self._ends = [0.0]
        self._times: list[float] = []

    def decode(self) -> Iterator[Decoded]:
        """Yield every frame in the order of its display, and every damage."""
        packets = iter(self._container.demux())
        headless = None  # True until the first key frame, in a file that begins without one
        while True:
            try:
                packet = next(packets, None)
            except Exception as error:  # from reading: the rest of the file is lost
                _pass_on(error)
                yield from _frames_of(lambda: self._stream.decode(None))
                yield Decoded(None, reason(error))
                return
            if packet is None:
                return
            if packet.stream in self._measured:
                self._note_end(packet)
            if packet.stream != self._stream:
                continue
            if packet.is_corrupt:
                yield Decoded(None, "its data are cut off or damaged")
                continue
            if headless is None and packet.size > 0:
                headless = not packet.is_keyframe and not self._is_modern
            for decoded in _frames_of(packet.decode):
                if headless and decoded.damage is None:
                    headless = not decoded.frame.key_frame
                    if headless:
                        decoded = decoded._replace(damage="no key frame is before it")
                yield decoded

    def _note_end(self, packet: Any) -> None:
        ticks = packet.dts if packet.pts is None else packet.pts
        if ticks is None:
            return
        self._ends.append(float((ticks + (packet.duration or 0)) * packet.time_base))
        if packet.stream == self._stream:
            self._times.append(float(ticks * packet.time_base))

    def missing_seconds(self) -> float:
        """Return by how much the packets that were read end before the stated duration."""
        times = sorted(self._times)
        if self.duration is None or len(times) < 2:
            return 0.0
        longest = max(late - early for early, late in pairwise(times))
        mean = (times[-1] - times[0]) / (len(times) - 1)
        end = max(*self._ends, times[-1] + min(longest, _LONGEST_LAST)) - min(self.start, 0.0)
        missing = self.duration - end
        return missing if missing > 0.75 * mean else 0.0  # durations are rounded to parts of frames


@contextmanager
def open_video(path: Path, source: str, *, threads: bool) -> Iterator[Video]:
    """Open the video stream that a player shows: the default one, and never a cover picture.

    Args:
        path: The file.
        source: The footage as the user named it.
        threads: True decodes in parallel, and then misses damage at some times and not at others.

    Raises:
        ClipError: If the file is not a video, or has no stream that can be decoded.
    """
    try:
        # The prefix keeps FFmpeg from reading a protocol in a name such as "a:b.mp4".
        container = av.open(f"file:{path}", options=_STRICT_DEMUXER, metadata_errors="replace")
    except Exception as error:
        _pass_on(error)
        raise ClipError(
            f"clip '{source}' is not a video that FFmpeg can read ({reason(error)}): "
            "expected a video, a folder of images or rendered:SEED; an interrupted recording or "
            "download also gives this error"
        ) from error
    with container:
        stream = _shown(container, source)
        stream.codec_context.options = _STRICT
        stream.thread_type = "AUTO" if threads else "NONE"
        stream.codec_context.thread_count = 0 if threads else 1
        yield Video(container, stream)


def _shown(container: Any, source: str) -> Any:
    streams = [each for each in container.streams.video if not each.disposition & _NO_VIDEO]
    if not streams:
        kinds = "a cover picture" if container.streams.video else ""
        kinds = kinds or ", ".join(stream.type for stream in container.streams) or "nothing"
        raise ClipError(f"clip '{source}' has no video stream, only {kinds}")
    stream = max(streams, key=lambda each: bool(each.disposition & Disposition.default))
    if stream.codec_context is None:
        raise ClipError(
            f"clip '{source}': PyAV has no decoder for its video stream; convert it, for example "
            "with ffmpeg, to H.264"
        )
    return stream


def _frames_of(decode: Callable[[], list[Any]]) -> Iterator[Decoded]:
    try:
        frames = decode()
    except Exception as error:
        _pass_on(error)
        yield Decoded(None, reason(error))
        return
    for frame in frames:
        yield Decoded(frame, "it is drawn from damaged data" if frame.is_corrupt else None)


def check_image(data: bytes, decoder: str) -> None:
    """Decode an image, to find damage of its pixels. Metadata are not looked at.

    Args:
        data: Content of the file.
        decoder: FFmpeg's name of the decoder, ``mjpeg`` or ``png``.

    Raises:
        ValueError: If the data are damaged.
    """
    context: Any = av.CodecContext.create(decoder, "r")
    context.options = _STRICT
    context.thread_count = 1
    pixels = _jpeg_pixels(data) if decoder == "mjpeg" else _png_pixels(data)
    try:
        frames = [*context.decode(av.Packet(pixels)), *context.decode(None)]
    except NotImplementedError:  # FFmpeg knows fewer variants of JPEG than Pillow
        return
    except av.FFmpegError as error:
        raise ValueError(f"damaged: {reason(error)}") from error
    if not frames or frames[0].is_corrupt:
        raise ValueError("damaged: FFmpeg makes no whole picture of it")


def _jpeg_pixels(data: bytes) -> bytes:
    """Return a JPEG file without its metadata: application segments and comments."""
    kept, place = [data[:2]], 2
    while data[place : place + 1] == b"\xff" and len(data) >= place + 4:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:  # the scan begins
            break
        # The first and the fourteenth application segment say how colours are coded.
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return b"".join((*kept, data[place:]))


def _png_pixels(data: bytes) -> bytes:
    """Return a PNG file without its metadata: chunks that a reader may leave out."""
    kept, place = [data[:8]], 8
    while (end := place + 12 + int.from_bytes(data[place : place + 4], "big")) <= len(data):
        name = data[place + 4 : place + 8]
        if name[:1].isupper() or name == b"tRNS":
            kept.append(data[place:end])
        place = end
    return b"".join((*kept, data[place:]))


class ToImages:
    """Converter of frames to RGB images, by FFmpeg's own rules for colour spaces and ranges."""

    def __init__(self) -> None:
        self._graphs: dict[tuple[object, ...], Any] = {}

    def __call__(self, frame: Any) -> Image:
        """Return a frame as an RGB image, as it is stored."""
        # A filter graph takes the colour space from its first frame.
        layout = (frame.width, frame.height, frame.format.name)
        kind = (*layout, frame.colorspace, frame.color_range)
        if kind not in self._graphs:
            self._graphs[kind] = _conversion(frame)
        graph = self._graphs[kind]
        graph.push(frame)
        image: Image = graph.pull().to_image()
        return image


def _conversion(frame: Any) -> Any:
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format=frame.format,
        time_base=frame.time_base or Fraction(1),
    )
    to_rgb, sink = graph.add("format", "rgb24"), graph.add("buffersink")
    source.link_to(to_rgb)
    to_rgb.link_to(sink)
    graph.configure()
    return graph


# Display matrices by EXIF orientation: where a step to the right and a step down lead.
_ORIENTATIONS = {
    (1, 0, 0, 1): 1,
    (-1, 0, 0, 1): 2,
    (-1, 0, 0, -1): 3,
    (1, 0, 0, -1): 4,
    (0, 1, 1, 0): 5,
    (0, 1, -1, 0): 6,
    (0, -1, -1, 0): 7,
    (0, -1, 1, 0): 8,
}

_LEVEL = math.sin(math.radians(1))  # FFmpeg also takes a turn by less than a degree for none


def orientation_of(frame: Any) -> int:
    """Return the EXIF orientation that equals a frame's display matrix.

    Raises:
        ValueError: If the matrix turns by other than quarter turns.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    lengths = math.hypot(a, b), math.hypot(c, d)
    if 0 in lengths:
        return UPRIGHT
    steps = (a / lengths[0], b / lengths[0], c / lengths[1], d / lengths[1])
    near = tuple(round(part) for part in steps)
    off = max(abs(part - whole) for part, whole in zip(steps, near, strict=True))
    if near not in _ORIENTATIONS or off > _LEVEL:
        raise ValueError("its display matrix turns the picture by other than quarter turns")
    return _ORIENTATIONS[near]


def _pass_on(error: Exception) -> None:
    """Raise an error of a machine that is out of memory, and none that a lying header causes."""
    if isinstance(error, MemoryError) and not isinstance(error, av.FFmpegError):
        raise error


def reason(error: Exception) -> str:
    """Return what FFmpeg says of an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
