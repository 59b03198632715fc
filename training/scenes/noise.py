"""Fields with the power spectra of natural images."""

from __future__ import annotations

import random

import torch
from torch import Tensor

# Power falls with frequency to these powers; natural images are near 2.
SMOOTH, NATURAL, ROUGH = 3.0, 2.0, 1.2
STRETCH = 10.0  # of the grain of wood, along its columns


class Noise:
    """Periodic random fields of one scene.

    Args:
        size: Side in texels.
        generator: CPU generator.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size = size
        self._smooth = _fields(size, (3, SMOOTH, 1.0), generator)
        self._natural = _fields(size, (5, NATURAL, 1.0), generator)
        self._rough = _fields(size, (3, ROUGH, 1.0), generator)
        self._grain = _fields(size, (3, ROUGH, STRETCH), generator)

    def smooth(self, rng: random.Random) -> Tensor:
        """Draw a cloudy field `[size, size]` of mean 0 and deviation 1."""
        return _drawn(self._smooth, rng)

    def natural(self, rng: random.Random) -> Tensor:
        """Draw a field with detail at all scales; as `smooth`."""
        return _drawn(self._natural, rng)

    def rough(self, rng: random.Random) -> Tensor:
        """Draw a field that is mostly fine detail; as `smooth`."""
        return _drawn(self._rough, rng)

    def grain(self, rng: random.Random) -> Tensor:
        """Draw a field that is drawn out along the rows' axis x; as `smooth`."""
        field = self._grain[rng.randrange(len(self._grain))]
        return field.roll((rng.randrange(self.size), rng.randrange(self.size)), (0, 1))


def _drawn(fields: Tensor, rng: random.Random) -> Tensor:
    """Choose a field, move it, and perhaps transpose it and turn its sign."""
    size = fields.shape[1]
    field = fields[rng.randrange(len(fields))]
    field = field.roll((rng.randrange(size), rng.randrange(size)), (0, 1))
    field = field.T if rng.random() < 0.5 else field
    return -field if rng.random() < 0.5 else field


def _fields(size: int, kind: tuple[int, float, float], generator: torch.Generator) -> Tensor:
    """Filter white noise; kind is the number of fields, the power's exponent and the stretch."""
    count, exponent, stretch = kind
    frequency = (
        torch.fft.fftfreq(size)[:, None].square()
        + (torch.fft.rfftfreq(size)[None] * stretch).square()
    )
    frequency[0, 0] = 1.0
    amplitude = frequency ** (-exponent / 4)
    amplitude[0, 0] = 0.0
    white = torch.randn(count, size, size, generator=generator)
    fields = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(size, size))
    return fields / fields.std(dim=(1, 2), keepdim=True)
