"""Clips: the frames that a model is given at once, with their ground truth where it is known."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ClipError


@dataclass(frozen=True, eq=False)
class Clip:
    """S frames and, where known, their cameras and depth.

    Attributes:
        name: Name of the clip in tables and profiles.
        images: RGB, ``[S, 3, H, W]``, float32 in [0, 1].
        intrinsics: ``[S, 3, 3]`` in pixels, or None.
        depth: Distance along the optical axis, ``[S, H, W]``, in scene units, or None.
        extrinsics: World-to-camera, OpenCV axes, ``[S, 3, 4]``, or None.
    """

    name: str
    images: Tensor
    intrinsics: Tensor | None = None
    depth: Tensor | None = None
    extrinsics: Tensor | None = None

    def __post_init__(self) -> None:
        for field in ("images", "intrinsics", "depth", "extrinsics"):
            value = getattr(self, field)
            if not isinstance(value, Tensor) and (value is not None or field == "images"):
                raise ClipError(
                    f"clip '{self.name}': {field} is a {type(value).__name__}, expected a tensor"
                )
        if self.images.ndim != 4 or self.images.shape[1] != 3 or self.images.shape[0] < 1:
            raise ClipError(
                f"clip '{self.name}': images have shape {list(self.images.shape)}, "
                "expected [S, 3, H, W] with at least one frame"
            )
        if self.images.dtype != torch.float32:
            raise ClipError(f"clip '{self.name}': images are {self.images.dtype}, expected float32")
        low, high = float(self.images.min()), float(self.images.max())
        if not (low >= -0.01 and high <= 1.01):  # NaN fails too
            raise ClipError(
                f"clip '{self.name}': images range from {low:g} to {high:g}, expected 0 to 1 "
                "(8-bit images are divided by 255)"
            )
        frames, _, height, width = self.images.shape
        expected = {
            "intrinsics": (frames, 3, 3),
            "depth": (frames, height, width),
            "extrinsics": (frames, 3, 4),
        }
        for field, shape in expected.items():
            value = getattr(self, field)
            if value is not None and tuple(value.shape) != shape:
                raise ClipError(
                    f"clip '{self.name}': {field} has shape {list(value.shape)}, "
                    f"expected {list(shape)}"
                )

    @property
    def frames(self) -> int:
        """Number of frames S."""
        return self.images.shape[0]

    @property
    def has_ground_truth(self) -> bool:
        """True if depth, intrinsics and extrinsics are all known."""
        return not (self.depth is None or self.intrinsics is None or self.extrinsics is None)

    def select(self, index: Tensor | slice) -> Clip:
        """Return the clip of some frames only, in the order given."""
        return Clip(
            self.name,
            self.images[index],
            None if self.intrinsics is None else self.intrinsics[index],
            None if self.depth is None else self.depth[index],
            None if self.extrinsics is None else self.extrinsics[index],
        )

    def digest(self) -> str:
        """Return a hash of the frames as 8-bit images, the same on every machine."""
        pixels = (self.images * 255).round().to(torch.uint8).contiguous().cpu()
        sha = hashlib.sha256(str(tuple(pixels.shape)).encode())
        sha.update(pixels.numpy().tobytes())
        return sha.hexdigest()[:16]
