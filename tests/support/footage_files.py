"""Videos and folders of images made for tests."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from spark3r.reference.scenes.render import rendered_clip


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


def turn_clockwise(video: Path) -> None:
    """Write into an MP4's track header that its picture is to be shown a quarter turn clockwise."""
    data = bytearray(video.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 0x00010000
    turned = (0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    video.write_bytes(data)
