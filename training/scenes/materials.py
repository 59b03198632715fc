"""Materials: what a surface looks like, and where its colours are looked up."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .colours import Colour
from .geometry import Geometry
from .noise import Noise
from .shapes import BOX
from .textures import PAINTERS, SIZE
from .tracing import SHELL, Enclosure, Hits

LEVELS = 7  # of the pyramid: tiles of 128 down to 2 texels
BLACKEST, WHITEST = 0.02, 0.92  # reflectance


class Material(NamedTuple):
    """How a surface looks."""

    tile: int
    extent: float  # metres that a tile covers; 0 fits one tile to each face
    tint: Colour  # of the tile, as encoded in an image
    gloss: float = 0.0  # strength of highlights, 0 to 1
    sharpness: float = 20.0  # exponent of highlights
    glow: float = 0.0  # radiance that a white surface emits


class Palette:
    """Collects the tiles and materials of a scene while it is put together.

    Args:
        rng: Source of every choice.
        noise: The scene's noise.
    """

    def __init__(self, rng: random.Random, noise: Noise) -> None:
        self.rng = rng
        self.materials: list[Material] = []
        self.tiles: list[Tensor] = []
        self._noise = noise
        self._painted: dict[str, list[int]] = {}

    def tile(self, name: str, variants: int = 1) -> int:
        """Return a tile of a kind of `textures.PAINTERS`; at most so many of a kind are painted."""
        painted = self._painted.setdefault(name, [])
        if len(painted) < variants:
            painted.append(len(self.tiles))
            self.tiles.append(PAINTERS[name](self.rng, self._noise))
            return painted[-1]
        return self.rng.choice(painted)

    def add(self, material: Material) -> int:
        """Return the index of a new material."""
        self.materials.append(material)
        return len(self.materials) - 1

    def paint(self, colour: Colour, gloss: float = 0.0, sharpness: float = 20.0) -> int:
        """Return an evenly coloured material."""
        return self.add(Material(self.tile("plain"), 1.0, colour, gloss, sharpness))

    def cover(
        self,
        name: str,
        extent: float,
        gloss: float = 0.0,
        *,
        variants: int = 2,
        tint: Colour = (1.0, 1.0, 1.0),
    ) -> int:
        """Return a material that repeats a tile every `extent` metres; 0 fits it to each face."""
        sharpness = 10.0 * 4.0 ** self.rng.uniform(0.0, 2.0)
        return self.add(Material(self.tile(name, variants), extent, tint, gloss, sharpness))

    def lamp(self, colour: Colour, glow: float, name: str = "plain") -> int:
        """Return a material that shines."""
        return self.add(Material(self.tile(name, 2), 0.0, colour, glow=glow))


# Columns of a scene's table of surfaces.
TILE, EXTENT, GLOSS, SHARPNESS, GLOW, ROUND = range(6)
TINT, HALF, SHIFT, COLUMNS = slice(6, 9), slice(9, 12), slice(12, 14), 14


@dataclass(frozen=True)
class Surfaces:
    """Tiles and materials of a scene with K shapes; fp32."""

    atlas: Tensor  # [1, 3, H, W] linear reflectance, pyramids of all tiles
    # [K + SURROUNDINGS, COLUMNS]: the material's numbers, whether the shape is round, its half
    # extents in metres, and where its tiles begin, so that equal shapes differ.
    table: Tensor


@dataclass(frozen=True)
class Appearance:
    """How R points on surfaces look; fp32."""

    colour: Tensor  # [3, R] linear reflectance
    gloss: Tensor  # [R]
    sharpness: Tensor  # [R]
    glow: Tensor  # [R]


def make_surfaces(
    palette: Palette, geometry: Geometry, enclosure: Enclosure, surroundings: Sequence[int]
) -> Surfaces:
    """Build the atlas and the tables.

    Args:
        palette: Tiles and materials.
        geometry: The shapes.
        enclosure: What is around them.
        surroundings: Materials of what is around them, in the order of `tracing`.

    Returns:
        The surfaces.
    """
    count = len(geometry.kind)
    boxes = [enclosure.room] * SHELL + [enclosure.shell]
    sizes = [(box[1] - box[0]) / 2 for box in boxes]
    index = [*geometry.material.tolist(), *surroundings]
    materials = [palette.materials[i] for i in index]
    table = torch.empty(len(index), COLUMNS)
    table[:, TILE] = torch.tensor([float(m.tile) for m in materials])
    table[:, EXTENT] = torch.tensor([m.extent for m in materials])
    table[:, GLOSS] = torch.tensor([m.gloss for m in materials])
    table[:, SHARPNESS] = torch.tensor([m.sharpness for m in materials])
    table[:, GLOW] = torch.tensor([m.glow for m in materials])
    table[:, ROUND] = 0.0
    table[:count, ROUND] = (geometry.kind != BOX).float()
    table[:, TINT] = torch.tensor([m.tint for m in materials]).square()
    table[:, HALF] = torch.cat([geometry.half, torch.stack(sizes)])
    table[:, SHIFT] = torch.tensor([[palette.rng.random() for _ in range(2)] for _ in index])
    return Surfaces(_atlas(palette.tiles), table)


def _atlas(tiles: Sequence[Tensor]) -> Tensor:
    """Decode tiles, whose encoding is the square root, and lay out pyramids.

    A row holds one tile. Its levels stand side by side, each with one texel of wrapping.
    """
    level = torch.stack([tile.expand(3, SIZE, SIZE) for tile in tiles], dim=1).square()
    level = level.clamp_(BLACKEST, WHITEST)  # [3, n, SIZE, SIZE]
    atlas = torch.zeros(3, len(tiles), SIZE + 1, 2 * SIZE + LEVELS)
    start = 0
    for _ in range(LEVELS):
        size = level.shape[2]
        block = atlas[:, :, : size + 1, start : start + size + 1]
        block[:, :, :size, :size] = level
        block[:, :, size, :size] = level[:, :, 0]
        block[:, :, :, size] = block[:, :, :, 0]
        start += size + 1
        level = F.avg_pool2d(level, 2)
    return atlas.view(1, 3, -1, atlas.shape[3])


def look_up(surfaces: Surfaces, hits: Hits, footprint: Tensor) -> Appearance:
    """Look up how surfaces look where rays end, blurred to what a pixel sees.

    Args:
        surfaces: The materials.
        hits: Where rays end.
        footprint: Extent in metres of a pixel on the surface, `[R]`.

    Returns:
        The points' appearance.
    """
    columns = surfaces.table.index_select(0, hits.shape).T.contiguous()
    extent = columns[EXTENT]
    u, v, width, height = _face_coordinates(columns, hits)
    fitted = (extent == 0).float()
    repeat = 1.0 / (extent + fitted)
    # A fitted tile covers the face once; others begin at the shape's shift and repeat.
    u = u * (fitted + (1 - fitted) * width * repeat) + (1 - fitted) * columns[SHIFT][0]
    v = v * (fitted + (1 - fitted) * height * repeat) + (1 - fitted) * columns[SHIFT][1]
    metres = extent + fitted * torch.minimum(width, height)
    texels = footprint * SIZE / metres.clamp_(min=1e-3)
    level = torch.log2(texels.clamp_(min=1.0)).clamp_(max=LEVELS - 1.001)
    below = level.floor()
    fine = _sample(surfaces.atlas, columns[TILE], below, u, v)
    coarse = _sample(surfaces.atlas, columns[TILE], below + 1, u, v)
    colour = torch.lerp(fine, coarse, level - below).mul_(columns[TINT])
    return Appearance(colour, columns[GLOSS], columns[SHARPNESS], columns[GLOW])


def _face_coordinates(columns: Tensor, hits: Hits) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coordinates in [0, 1] on the face that was hit, and its width and height in metres."""
    local, half = hits.local, columns[HALF]
    sideways, level = (hits.axis == 0).float(), (hits.axis == 1).float()
    u = torch.lerp(local[0], local[2], sideways)
    v = torch.lerp(local[1], local[2], level)
    width = torch.lerp(half[0], half[2], sideways)
    height = torch.lerp(half[1], half[2], level)
    around = (columns[ROUND] * (1 - level)).nonzero()[:, 0]
    u[around] = torch.atan2(local[0, around], local[2, around]) / math.pi
    width[around] = (half[0] + half[2])[around] * (math.pi / 2)
    return (u + 1) / 2, (v + 1) / 2, 2 * width, 2 * height


def _sample(atlas: Tensor, tile: Tensor, level: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear colours `[3, R]` of one level of the pyramids."""
    size = SIZE * torch.exp2(-level)
    # Level l starts after those before it, each a texel wider than its tile.
    start = 2 * SIZE - 2 * size + level
    # Texel centres lie at halves, and one texel of wrapping follows the last.
    x = start + (u * size - 0.5).remainder(size)
    y = tile * (SIZE + 1) + (v * size - 0.5).remainder(size)
    height, width = atlas.shape[2:]
    grid = torch.stack([(x + 0.5) * (2 / width) - 1, (y + 0.5) * (2 / height) - 1], dim=-1)
    return F.grid_sample(atlas, grid[None, None], align_corners=False)[0, :, 0]
