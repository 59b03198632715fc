"""Multi-octave solid textures, evaluated where a ray hits a surface."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

LATTICE = 32  # cells after which the noise repeats
OCTAVES = 5
COARSEST_M = 1.6  # lattice spacing of the first octave at texture scale 1
PERSISTENCE = 0.8
# Standard deviation of one trilinear octave of uniform noise, which scales fields to about N(0, 1).
NOISE_STD = 0.17


@dataclass(frozen=True)
class Textures:
    """Parameters of the textures of n surfaces, in fp32."""

    noise: Tensor  # [1, 3, L+1, L+1, L+1] in [-0.5, 0.5], periodic
    rotations: Tensor  # [OCTAVES, 3, 3], so that the lattices of the octaves do not line up
    offset: Tensor  # [n, 3] lattice cells
    scale: Tensor  # [n] finer above 1
    first: Tensor  # [n, 3] colour
    second: Tensor  # [n, 3] colour
    gain: Tensor  # [n] sharpness of the boundary between the two colours
    tint: Tensor  # [n] strength of the coloured noise
    stripes: Tensor  # [n, 3] wave vector, radians per metre
    stripe_strength: Tensor  # [n]


def random_textures(count: int, generator: torch.Generator) -> Textures:
    """Return random textures of `count` surfaces.

    Args:
        count: Number of surfaces, n.
        generator: CPU generator.
    """
    noise = torch.rand(1, 3, LATTICE, LATTICE, LATTICE, generator=generator) - 0.5
    for dim in (2, 3, 4):
        noise = torch.cat([noise, noise.narrow(dim, 0, 1)], dim=dim)
    rotations, _ = torch.linalg.qr(torch.randn(OCTAVES, 3, 3, generator=generator))
    draw = torch.rand(count, 8, generator=generator)
    first = 0.1 + 0.8 * torch.rand(count, 3, generator=generator)
    direction = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    contrast = F.normalize(torch.randn(count, 3, generator=generator), dim=1)
    return Textures(
        noise=noise,
        rotations=rotations,
        offset=torch.rand(count, 3, generator=generator) * LATTICE,
        scale=0.7 * 5.0 ** draw[:, 0],
        first=first,
        second=(first + (0.25 + 0.5 * draw[:, 1:2]) * contrast).clamp(0.03, 0.97),
        gain=0.7 * 10.0 ** draw[:, 2],
        tint=0.05 + 0.15 * draw[:, 3],
        stripes=direction * (4.0 + 26.0 * draw[:, 4:5]),
        stripe_strength=torch.where(draw[:, 5] < 0.25, 0.3 * draw[:, 6], torch.zeros(count)),
    )


def shade_texture(textures: Textures, surface: Tensor, points: Tensor, footprint: Tensor) -> Tensor:
    """Return the colours of surface points.

    Waves that are shorter than a pixel are faded out, so that colours do not alias. Apart from that
    a point has the same colour in every view.

    Args:
        textures: Textures of all surfaces.
        surface: Surface of each point, int64 `[R]`.
        points: World coordinates in metres, `[3, R]`.
        footprint: Extent in metres of a pixel on the surface, `[R]`.

    Returns:
        Colours `[3, R]`, approximately in [0, 1].
    """
    scale = textures.scale[surface]
    offset = textures.offset.T[:, surface]
    field = torch.zeros_like(points)
    spacing, weight, norm = COARSEST_M, 1.0, 0.0
    for octave in range(OCTAVES):
        cells = textures.rotations[octave].T @ points * (scale / spacing) + offset
        cells = cells.remainder(LATTICE) * (2.0 / LATTICE) - 1.0
        sample = F.grid_sample(textures.noise, cells.T.view(1, 1, 1, -1, 3), align_corners=True)
        # An octave has full strength up to 0.5 lattice cells per pixel, and none from 1 on.
        fade = (2.0 - 2.0 * footprint * scale / spacing).clamp(0.0, 1.0)
        field += (weight * fade) * sample.view(3, -1)
        norm += weight**2
        spacing, weight = spacing / 2, weight * PERSISTENCE
    field /= NOISE_STD * norm**0.5
    wave = textures.stripes.T[:, surface]
    radians_per_pixel = (wave * wave).sum(dim=0).sqrt() * footprint
    stripe = torch.sin((wave * points).sum(dim=0)) * textures.stripe_strength[surface]
    stripe = stripe * (1.5 - radians_per_pixel).clamp(0.0, 1.0)
    blend = torch.sigmoid(textures.gain[surface] * field[0])
    colour = torch.lerp(textures.first.T[:, surface], textures.second.T[:, surface], blend)
    return colour + textures.tint[surface] * field + stripe
