"""The program ``ffmpeg`` of the wheel imageio-ffmpeg, with which footage is made and compared."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np

TEST_PICTURE = ("-f", "lavfi", "-i", "testsrc2=s=96x64:r=10:d=3")
"""Input of 30 frames with sharp edges in all colours."""

H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-g", "10", "-bf", "3", "-threads", "1")
"""Encoder with three key frames in the 30 frames, and B frames between them."""


def program() -> str:
    """Return the path of the program."""
    path: str = imageio_ffmpeg.get_ffmpeg_exe()
    return path


def ffmpeg(*arguments: object) -> None:
    """Run the program.

    Raises:
        subprocess.CalledProcessError: If it fails.
    """
    command = [program(), "-y", "-nostdin", "-v", "error"]
    subprocess.run([*command, *map(str, arguments)], check=True, capture_output=True)


def frames_by_ffmpeg(
    paths: Sequence[Path], sizes: Sequence[tuple[int, int]], *options: str
) -> list[np.ndarray]:
    """Return the frames that ffmpeg extracts of videos, 8-bit ``[S, H, W, 3]`` each.

    Args:
        paths: The videos.
        sizes: Height and width of each as it is shown.
        options: More options of every input.
    """
    with tempfile.TemporaryDirectory() as folder:
        raw = [Path(folder, str(number)) for number in range(len(paths))]
        inputs: list[object] = []
        outputs: list[object] = []
        for number, path in enumerate(paths):
            inputs += [*options, "-i", f"file:{path}"]
            outputs += ["-map", f"{number}:v:0", "-fps_mode", "passthrough", "-f", "rawvideo"]
            outputs += ["-pix_fmt", "rgb24", raw[number]]
        ffmpeg(*inputs, *outputs)
        return [
            np.fromfile(each, np.uint8).reshape(-1, *size, 3)
            for each, size in zip(raw, sizes, strict=True)
        ]


def refused_by_ffmpeg(path: Path) -> bool:
    """Return True if ffmpeg finds damage in a video's first stream, in its strictest mode."""
    try:
        strict = ("-xerror", "-err_detect", "explode")
        ffmpeg(*strict, "-i", f"file:{path}", "-map", "0:v:0", "-f", "null", "-")
    except subprocess.CalledProcessError:
        return True
    return False
