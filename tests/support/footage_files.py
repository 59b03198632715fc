"""Videos and folders of images made for tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from spark3r.families.parts.preprocessing import Preprocessed
from spark3r.families.registry import FAMILIES
from spark3r.io.clips import Footage
from spark3r.reference.scenes.render import rendered_clip
from spark3r.transform import Transform


def keep(images: Iterable[Image.Image]) -> Preprocessed:
    pixels = [torch.from_numpy(np.array(image.convert("RGB"))) for image in images]
    tensors = [each.permute(2, 0, 1).float().div(255) for each in pixels]
    return Preprocessed(
        torch.stack(tensors), tuple(Transform((each.shape[1], each.shape[2])) for each in tensors)
    )


AS_THEY_ARE = replace(FAMILIES["reference"], preprocess=keep)
"""A family whose preprocessing changes nothing."""


def levels(footage: Footage) -> np.ndarray:
    """Return the pixels of footage that was read as it is, 8-bit ``[S, H, W, 3]``."""
    return (footage.clip.images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def frames_of(seed: int, count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Return rendered frames, 8-bit ``[S, H, W, 3]``."""
    images = rendered_clip(seed, count, height, width).images
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def write_images(folder: Path, frames: np.ndarray, name: str = "frame_{}.png") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(number))
    return folder


def write_video(path: Path, frames: np.ndarray, rate: int = 10) -> Path:
    """Encode frames without loss, index first, so that a cut file still opens."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264rgb", rate=rate, options={"crf": "0", "g": "4"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def write_matrix(video: Path, turn: Sequence[float]) -> None:
    """Write a display matrix into an MP4's track header.

    Args:
        video: The file.
        turn: Where a step to the right and a step down lead: (right, down) and (right, down).
    """
    data = bytearray(video.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(part * 0x10000) for part in turn)
    matrix = (a, b, 0, c, d, 0, 0, 0, 0x40000000)
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    video.write_bytes(data)


def turn_clockwise(video: Path) -> None:
    """Write into an MP4's track header that its picture is to be shown a quarter turn clockwise."""
    write_matrix(video, (0, 1, -1, 0))
