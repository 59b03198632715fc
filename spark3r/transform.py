"""The map from the pixels of an original image to those of the image that a model is given.

Points are ``(x, y)`` in pixels, x to the right and y down, with ``(0, 0)`` at the upper left corner
of the image, so that the centre of its first pixel is ``(0.5, 0.5)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

UPRIGHT = 1
"""EXIF orientation of an image that is stored upright."""


@dataclass(frozen=True)
class Transform:
    """How one frame was brought to the model's size: turned upright, scaled, cropped or padded.

    ``point in the model's image = scale * point in the upright original + offset``.

    Attributes:
        size: Height and width of the original as it is stored, in pixels.
        scale: Horizontal and vertical factor, pixels of the model's image per original pixel.
        offset: Horizontal and vertical position of the upright original's upper left corner in the
            model's image, in its pixels; negative where the image was cropped.
        orientation: EXIF orientation of the stored original, 1 to 8; 1 is upright.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)
    orientation: int = UPRIGHT

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the original after it is turned upright."""
        height, width = self.size
        return (width, height) if self.orientation in _SIDEWAYS else (height, width)

    def to_model(self, points: Tensor) -> Tensor:
        """Return the place of points of the stored original in the model's image, ``[..., 2]``."""
        x, y = points.unbind(-1)
        height, width = self.size
        if self.orientation in _FROM_RIGHT:
            x = width - x
        if self.orientation in _FROM_BOTTOM:
            y = height - y
        if self.orientation in _SIDEWAYS:
            x, y = y, x
        return torch.stack((x, y), -1) * points.new_tensor(self.scale) + points.new_tensor(
            self.offset
        )

    def to_original(self, points: Tensor) -> Tensor:
        """Return the place of points of the model's image in the stored original, ``[..., 2]``."""
        upright = (points - points.new_tensor(self.offset)) / points.new_tensor(self.scale)
        x, y = upright.unbind(-1)
        height, width = self.size
        if self.orientation in _SIDEWAYS:
            x, y = y, x
        if self.orientation in _FROM_RIGHT:
            x = width - x
        if self.orientation in _FROM_BOTTOM:
            y = height - y
        return torch.stack((x, y), -1)

    def crop(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom of what the model's image shows of the original.

        They are in pixels of the upright original.

        Args:
            height: Height of the model's image in pixels.
            width: Its width.
        """
        whole_height, whole_width = self.upright_size
        (right_scale, down_scale), (right, down) = self.scale, self.offset
        return (
            max(0.0, -right / right_scale),
            max(0.0, -down / down_scale),
            min(float(whole_width), (width - right) / right_scale),
            min(float(whole_height), (height - down) / down_scale),
        )

    def moved(self, right: float, down: float) -> Transform:
        """Return the transform after padding on the left and at the top; negative crops there."""
        return replace(self, offset=(self.offset[0] + right, self.offset[1] + down))

    def stored(self, orientation: int) -> Transform:
        """Return the transform of an upright image that is stored in this orientation."""
        height, width = self.size
        stored = (width, height) if orientation in _SIDEWAYS else (height, width)
        return replace(self, size=stored, orientation=orientation)


# EXIF orientations in which the stored image's x axis runs from the right, its y axis from the
# bottom, and in which its rows become columns, in this order.
_FROM_RIGHT, _FROM_BOTTOM, _SIDEWAYS = {2, 3, 7, 8}, {3, 4, 6, 7}, {5, 6, 7, 8}
