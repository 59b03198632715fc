import random

import pytest
import torch
from torch import Tensor

from training.scenes.geometry import make_geometry
from training.scenes.materials import Palette, look_up, make_surfaces
from training.scenes.noise import Noise
from training.scenes.shapes import BOX, Shape
from training.scenes.textures import PAINTERS, PERIODIC, SIZE
from training.scenes.tracing import SURROUNDINGS, Enclosure, trace


@pytest.fixture(scope="module")
def noise() -> Noise:
    return Noise(SIZE, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(PAINTERS))
def test_tiles_have_the_range_of_images_and_follow_the_seed(name: str, noise: Noise) -> None:
    tile = PAINTERS[name](random.Random(3), noise)
    assert tile.shape == (3, SIZE, SIZE)
    assert torch.isfinite(tile).all()
    # Light and grain are multiplied onto a colour, so that a few texels lie outside.
    assert tile.quantile(0.01) > -0.3
    assert tile.quantile(0.99) < 1.5
    assert torch.equal(tile, PAINTERS[name](random.Random(3), noise))


@pytest.mark.parametrize("name", ["plaster", "wood", "stone", "fabric", "ground"])
def test_periodic_tiles_have_no_seam(name: str, noise: Noise) -> None:
    assert name in PERIODIC
    for seed in range(4):
        tile = PERIODIC[name](random.Random(seed), noise)
        inner = (tile[:, :, 1:] - tile[:, :, :-1]).abs().mean()
        seam = (tile[:, :, 0] - tile[:, :, -1]).abs().mean()
        assert seam < 2 * inner + 1e-3


def test_noise_falls_with_frequency_as_natural_images_do(noise: Noise) -> None:
    field = noise.natural(random.Random(0))
    power = torch.fft.rfft2(field).abs().square()
    y, x = torch.fft.fftfreq(SIZE)[:, None], torch.fft.rfftfreq(SIZE)
    frequency = (y * y + x * x).sqrt()
    low = power[(frequency > 0.04) & (frequency < 0.06)].mean()
    high = power[(frequency > 0.35) & (frequency < 0.45)].mean()
    assert (low / high).log2() / torch.tensor(8.0).log2() == pytest.approx(2.0, abs=0.5)


def seen_at(tile: Tensor, extent: float, points: Tensor, footprint: float) -> Tensor:
    """Colours `[3, n]` of a wall, 2 metres wide and high, at points given as (x, y) in metres."""
    rng = random.Random(0)
    palette = Palette(rng, Noise(SIZE, torch.Generator().manual_seed(0)))
    material = palette.cover("plain", extent)
    palette.tiles[0] = tile
    geometry = make_geometry([Shape(BOX, 0.0, 0.0, 3.0, 1.0, 1.0, 0.5, 0, 0, 0, material)])
    room = torch.tensor([[-5.0, -5, -5], [5, 5, 5]])
    enclosure = Enclosure(room, torch.empty(0, 2, 3), 0.0, room)
    surfaces = make_surfaces(palette, geometry, enclosure, [material] * SURROUNDINGS)
    directions = torch.cat([points / 2.5, torch.ones(1, points.shape[1])])
    hits = trace(geometry, enclosure, torch.zeros_like(directions), directions)
    assert (hits.shape == 0).all()
    return look_up(surfaces, hits, torch.full((points.shape[1],), footprint)).colour


def ramp() -> Tensor:
    tile = torch.zeros(3, SIZE, SIZE)
    tile[0] = (0.1 + 0.8 * (torch.arange(SIZE) + 0.5) / SIZE).sqrt()
    tile[1] = (0.1 + 0.8 * (torch.arange(SIZE)[:, None] + 0.5) / SIZE).sqrt()
    return tile


def test_a_fitted_tile_covers_the_face_once() -> None:
    points = torch.tensor([[-0.9, 0.0, 0.5, 0.9], [0.2, -0.9, 0.0, 0.9]])
    colour = seen_at(ramp(), 0.0, points, 1e-4)
    torch.testing.assert_close(colour[:2], 0.1 + 0.8 * (points + 1) / 2, atol=2e-3, rtol=0)


def test_a_repeated_tile_repeats() -> None:
    points = torch.tensor([[-0.7, -0.2, 0.3], [0.1, 0.1, 0.1]])
    colour = seen_at(ramp(), 0.5, points, 1e-4)
    torch.testing.assert_close(colour, colour[:, :1].expand(3, 3), atol=2e-3, rtol=0)


def test_a_far_surface_shows_its_mean_reflectance() -> None:
    tile = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    points = 1.6 * torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) - 0.8
    near, far = (seen_at(tile, 0.0, points, footprint) for footprint in (1e-4, 2.0))
    mean = tile.square().clamp(0.02, 0.92).mean(dim=(1, 2))
    torch.testing.assert_close(far, mean[:, None].expand(3, 50), atol=0.03, rtol=0)
    assert near.std(dim=1).min() > 0.1
