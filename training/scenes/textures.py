"""Surfaces of real materials, synthesised as square tiles.

A painter takes the random source and the scene's noise and returns a tile `[3, size, size]` of
colours as an image encodes them, in [0, 1]; rows go down. Tiles of `PERIODIC` materials repeat
without seams. Tiles of the others are shown once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import torch
from torch import Tensor

from .colours import Colour, any_colour, hsv, mixed, scaled, strong_colour, wall_colour, wood_colour
from .noise import Noise

SIZE = 128
Painter = Callable[[random.Random, Noise], Tensor]


def _flat(colour: Colour) -> Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, SIZE, SIZE)


def _blend(first: Colour, second: Colour, share: Tensor) -> Tensor:
    """Mix two colours by a field of shares."""
    return torch.lerp(_flat(first), _flat(second), share.clamp(0.0, 1.0))


def _cells(count: int) -> Tensor:
    """Index of the cell that each texel of a line lies in, of `count` equal cells, int64."""
    return (torch.arange(SIZE) * count) // SIZE


def _joints(count: int, texels: int) -> Tensor:
    """Mark the last texels of each of `count` equal cells of a line."""
    return ((torch.arange(SIZE) * count) % SIZE) >= SIZE - texels * count


def _values(rng: random.Random, count: int, spread: float) -> Tensor:
    """Draw factors around 1, `[count]`."""
    return torch.tensor([1.0 + rng.uniform(-spread, spread) for _ in range(count)])


def plain(rng: random.Random, noise: Noise) -> Tensor:
    """Paint white that is almost even; what is plainly coloured tints it."""
    return (0.97 + 0.02 * noise.natural(rng)).clamp(0.0, 1.0).expand(3, SIZE, SIZE)


def plaster(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a painted wall: one colour, cloudy, with a little grain."""
    cloud, grain = noise.smooth(rng), noise.rough(rng)
    light = 1.0 + 0.05 * rng.random() ** 2 * cloud + 0.03 * rng.random() ** 2 * grain
    return _flat(wall_colour(rng)) * light


def wallpaper(rng: random.Random, noise: Noise) -> Tensor:
    """Paint stripes or a repeated motif in two near colours."""
    ground = wall_colour(rng)
    motif = scaled(mixed(ground, any_colour(rng), rng.uniform(0.1, 0.6)), rng.uniform(0.8, 1.15))
    repeats = rng.choice((2, 4, 8))
    if rng.random() < 0.4:
        line = torch.sin(torch.arange(SIZE) * (2 * math.pi * repeats / SIZE))
        share = torch.sigmoid(8 * (line - rng.uniform(-0.5, 0.8)))[None].expand(SIZE, SIZE)
    else:
        part = noise.smooth(rng)[: SIZE // repeats, : SIZE // repeats]
        part = part + part.flip(1)
        share = torch.sigmoid(6 * (part / part.std() - rng.uniform(0.0, 0.8)))
        share = share.repeat(repeats, repeats)
    return _blend(ground, motif, share) + 0.015 * noise.natural(rng)


def wood(rng: random.Random, noise: Noise) -> Tensor:
    """Paint wood whose grain runs along the rows."""
    return _wood(rng, noise, wood_colour(rng))


def _wood(rng: random.Random, noise: Noise, colour: Colour) -> Tensor:
    rings = torch.sin(rng.uniform(1.5, 5.0) * noise.grain(rng) + noise.smooth(rng))
    share = 0.5 + 0.35 * rings + 0.2 * noise.grain(rng)
    dark = scaled(colour, rng.uniform(0.55, 0.85))
    return _blend(dark, scaled(colour, 1.1), share)


def planks(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a floor of boards along the rows, with joints and a tone for each board."""
    rows, columns = rng.choice((4, 6, 8)), rng.choice((1, 2))
    tile = _wood(rng, noise, wood_colour(rng))
    tone = _values(rng, rows * columns, rng.uniform(0.05, 0.25)).view(rows, columns)
    row, column = _cells(rows), _cells(columns)
    shift = torch.tensor([rng.randrange(SIZE) for _ in range(rows)])[row]
    place = (torch.arange(SIZE)[None] + shift[:, None]) % SIZE
    tile = tile.gather(2, place.expand(3, SIZE, SIZE)) * tone[row[:, None], column[place]]
    joint = _joints(rows, 1)[:, None] | _joints(columns, 1)[place]
    return torch.where(joint, tile * rng.uniform(0.3, 0.8), tile)


def tiles(rng: random.Random, noise: Noise) -> Tensor:
    """Paint square tiles with grout; some are a chequerboard or have a mixed palette."""
    count = rng.choice((2, 4, 8))
    ground = any_colour(rng) if rng.random() < 0.4 else wall_colour(rng)
    draw = rng.random()
    other = any_colour(rng) if draw < 0.4 else scaled(ground, rng.uniform(0.85, 1.0))
    cell = _cells(count)
    if draw < 0.2:
        share = ((cell[:, None] + cell[None]) % 2).float()
    else:
        share = torch.tensor([rng.random() ** 2 for _ in range(count * count)]).view(count, count)
        share = share[cell[:, None], cell[None]]
    tile = _blend(ground, other, share) * (1.0 + 0.03 * noise.natural(rng))
    grout = hsv(rng, (0.05, 0.15), (0.0, 0.1), (0.25, 0.9))
    width = rng.choice((1, 1, 2))
    joint = _joints(count, width)[:, None] | _joints(count, width)[None]
    return torch.where(joint, _flat(grout), tile)


def bricks(rng: random.Random, noise: Noise) -> Tensor:
    """Paint bricks in running bond."""
    rows, columns = rng.choice(((8, 4), (8, 3), (16, 6)))
    colour = hsv(rng, (0.0, 0.1), (0.15, 0.65), (0.35, 0.85))
    tone = _values(rng, rows * columns, rng.uniform(0.08, 0.3)).view(rows, columns)
    row = _cells(rows)
    place = (torch.arange(SIZE)[None] + (row % 2)[:, None] * (SIZE // (2 * columns))) % SIZE
    tile = _flat(colour) * tone[row[:, None], _cells(columns)[place]]
    tile = tile * (1.0 + 0.08 * noise.rough(rng))
    mortar = hsv(rng, (0.08, 0.12), (0.0, 0.1), (0.55, 0.85))
    joint = _joints(rows, 2)[:, None] | _joints(columns, 2)[place]
    return torch.where(joint, _flat(mortar) * (1.0 + 0.03 * noise.rough(rng)), tile)


def fabric(rng: random.Random, noise: Noise) -> Tensor:
    """Paint cloth: plain, striped, checked or with a pattern."""
    ground, other = any_colour(rng), any_colour(rng)
    draw, repeats = rng.random(), rng.choice((4, 8, 16))
    line = torch.sin(torch.arange(SIZE) * (2 * math.pi * repeats / SIZE) + rng.uniform(0, 6))
    line = torch.sigmoid(rng.choice((1.5, 8.0)) * line)
    if draw < 0.45:
        share = 0.15 + 0.1 * noise.natural(rng)
    elif draw < 0.6:
        share = line[:, None].expand(SIZE, SIZE)
    elif draw < 0.8:
        share = 0.5 * (line[:, None] + line[None])
    else:
        share = torch.sigmoid(5.0 * (noise.smooth(rng) + noise.natural(rng)))
    shade = 1.0 + 0.06 * noise.rough(rng) + 0.05 * noise.natural(rng)
    return _blend(ground, other, share) * shade


def rug(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a carpet: a symmetric pattern in a few colours, with a border."""
    quarter = (
        noise.smooth(rng)[: SIZE // 2, : SIZE // 2]
        + 0.6 * noise.natural(rng)[: SIZE // 2, : SIZE // 2]
    )
    half = torch.cat([quarter, quarter.flip(1)], dim=1)
    pattern = torch.cat([half, half.flip(0)])
    first, second, third = (any_colour(rng) for _ in range(3))
    tile = _blend(first, second, torch.sigmoid(8 * pattern))
    tile = torch.where(pattern > rng.uniform(0.8, 1.6), _flat(third), tile)
    edge = (torch.arange(SIZE) - (SIZE - 1) / 2).abs()
    edge = torch.maximum(edge[:, None], edge[None])
    for width in sorted((rng.uniform(0.7, 0.98) for _ in range(2)), reverse=True):
        inside = edge < width * SIZE / 2
        tile = torch.where(inside, tile, _flat(any_colour(rng)))
    return tile * (1.0 + 0.06 * noise.rough(rng))


def stone(rng: random.Random, noise: Noise) -> Tensor:
    """Paint marble, granite or concrete."""
    colour = hsv(rng, (0.05, 0.2), (0.0, 0.2), (0.15, 0.9))
    draw = rng.random()
    if draw < 0.35:
        vein = (noise.natural(rng) + 0.6 * noise.smooth(rng)).abs()
        share = torch.exp(-6.0 * vein) + 0.15 * noise.smooth(rng)
    elif draw < 0.7:
        share = 0.5 + 0.35 * noise.rough(rng)
    else:
        share = 0.3 + 0.12 * noise.natural(rng)
    return _blend(colour, scaled(colour, rng.choice((0.5, 0.7, 1.4))), share)


def ground(rng: random.Random, noise: Noise) -> Tensor:
    """Paint grass, earth, gravel or asphalt."""
    colour = rng.choice(
        (
            hsv(rng, (0.2, 0.32), (0.25, 0.6), (0.25, 0.5)),
            hsv(rng, (0.06, 0.12), (0.2, 0.5), (0.3, 0.6)),
            hsv(rng, (0.05, 0.15), (0.0, 0.15), (0.3, 0.65)),
        )
    )
    share = 0.5 + 0.25 * noise.rough(rng) + 0.2 * noise.natural(rng)
    return _blend(scaled(colour, 0.55), scaled(colour, 1.25), share)


def paving(rng: random.Random, noise: Noise) -> Tensor:
    """Paint paving stones or slabs of concrete."""
    rows, columns = rng.choice(((4, 4), (8, 4), (4, 2), (8, 8)))
    tone = _values(rng, rows * columns, 0.12).view(rows, columns)
    row = _cells(rows)
    shift = rng.choice((0, SIZE // (2 * columns)))
    place = (torch.arange(SIZE)[None] + (row % 2)[:, None] * shift) % SIZE
    tile = stone(rng, noise) * tone[row[:, None], _cells(columns)[place]]
    joint = _joints(rows, 1)[:, None] | _joints(columns, 1)[place]
    return torch.where(joint, tile * rng.uniform(0.4, 0.8), tile)


def foliage(rng: random.Random, noise: Noise) -> Tensor:
    """Paint leaves with gaps of shade between them."""
    colour = hsv(rng, (0.18, 0.38), (0.3, 0.75), (0.3, 0.65))
    light = noise.rough(rng) + 0.7 * noise.natural(rng)
    tile = _blend(scaled(colour, 0.3), scaled(colour, 1.3), 0.5 + 0.35 * light)
    flowers = noise.rough(rng) > (2.2 if rng.random() < 0.3 else 9.0)
    return torch.where(flowers, _flat(strong_colour(rng)), tile)


def slats(rng: random.Random, noise: Noise) -> Tensor:
    """Paint level lamellae: blinds, vents, radiators, cladding."""
    count = rng.choice((8, 12, 16, 24))
    phase = ((torch.arange(SIZE) * count) % SIZE).float() / SIZE
    light = torch.where(phase < 0.8, 0.75 + 0.3 * phase, rng.uniform(0.25, 0.7))
    return _flat(any_colour(rng)) * light[:, None] * (1.0 + 0.02 * noise.natural(rng))


def folds(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a curtain: cloth whose folds run down."""
    bend = noise.grain(rng).T[:1].roll(rng.randrange(SIZE), 1) + 0.15 * noise.smooth(rng)
    count = rng.choice((4, 6, 9))
    wave = torch.sin(torch.arange(SIZE) * (2 * math.pi * count / SIZE) + 0.9 * bend)
    return fabric(rng, noise) * (0.8 + 0.22 * wave)


def facade(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a house front: rows of windows with frames in a wall."""
    wall = bricks(rng, noise) if rng.random() < 0.3 else plaster(rng, noise)
    wall = wall.clone()
    rows, columns = rng.choice((2, 3, 4)), rng.choice((2, 3, 4))
    frame = any_colour(rng)
    height, width = SIZE // rows, SIZE // columns
    top, left = int(height * rng.uniform(0.15, 0.3)), int(width * rng.uniform(0.15, 0.3))
    pane = scaled(hsv(rng, (0.5, 0.65), (0.05, 0.4), (0.3, 0.9)), 0.6)
    for row in range(rows):
        for column in range(columns):
            a, b = row * height + top, (row + 1) * height - top
            c, d = column * width + left, (column + 1) * width - left
            wall[:, a:b, c:d] = torch.tensor(frame)[:, None, None]
            glass = torch.tensor(scaled(pane, rng.uniform(0.4, 1.3)))[:, None, None]
            middle = (c + d) // 2
            wall[:, a + 2 : b - 2, c + 2 : middle] = glass
            wall[:, a + 2 : b - 2, middle + 1 : d - 2] = glass
    return wall


def picture(rng: random.Random, noise: Noise) -> Tensor:
    """Paint what could be a photograph or painting: overlapping patches on a landscape."""
    horizon = rng.uniform(0.3, 0.8)
    line = torch.arange(SIZE)[:, None] / SIZE + 0.08 * noise.smooth(rng)
    tile = torch.where(
        line < horizon,
        _blend(any_colour(rng), any_colour(rng), line / horizon + 0.15 * noise.smooth(rng)),
        _blend(any_colour(rng), any_colour(rng), 0.5 + 0.35 * noise.natural(rng)),
    ).clone()
    _leaves(tile, rng, rng.choice((0, 6, 15, 40)))
    return tile * (1.0 + 0.12 * noise.natural(rng))


def clutter(rng: random.Random, noise: Noise) -> Tensor:
    """Paint many things side by side and in front of each other, as on a full shelf."""
    tile = _flat(any_colour(rng)).clone()
    _leaves(tile, rng, 70)
    return tile * (1.0 + 0.1 * noise.natural(rng))


def _leaves(tile: Tensor, rng: random.Random, count: int) -> None:
    """Paint patches over each other whose sizes follow the power law of natural images."""
    palette = [any_colour(rng) for _ in range(6)] + [strong_colour(rng)]
    for _ in range(count):
        # Areas with density ~ size^-3 make the image scale invariant.
        half = min(SIZE / 3, 3.0 / math.sqrt(max(rng.random(), 0.004)))
        wide = half * rng.uniform(0.5, 1.6)
        y, x = rng.randrange(SIZE), rng.randrange(SIZE)
        rows = slice(max(0, int(y - half)), int(y + half) + 1)
        columns = slice(max(0, int(x - wide)), int(x + wide) + 1)
        colour = torch.tensor(scaled(rng.choice(palette), rng.uniform(0.6, 1.2)))[:, None, None]
        patch = tile[:, rows, columns]
        if rng.random() < 0.3:
            v = (torch.arange(rows.start, rows.start + patch.shape[1]) - y) / half
            u = (torch.arange(columns.start, columns.start + patch.shape[2]) - x) / wide
            patch[:] = torch.where(v[:, None].square() + u.square() < 1, colour, patch)
        else:
            patch[:] = colour


def poster(rng: random.Random, noise: Noise) -> Tensor:
    """Paint print: a ground, a picture, a title and lines of text."""
    tile = _flat(any_colour(rng)).clone()
    if rng.random() < 0.8:
        a, b = sorted(rng.sample(range(4, SIZE - 4), 2))
        c, d = rng.choice(((0, SIZE), (10, SIZE - 10), (SIZE // 2, SIZE - 8)))
        tile[:, a:b, c:d] = picture(rng, noise)[:, a:b, c:d]
    ink = any_colour(rng)
    a = rng.randrange(SIZE - 30)
    _text(tile, rng, noise, ink, (a, a + rng.randrange(10, 26)), rng.randrange(6, 14))
    a = rng.randrange(SIZE // 2)
    _text(tile, rng, noise, ink, (a, rng.randrange(a + 10, SIZE)), 4)
    return tile


def page(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a printed page, magazine or sheet of notes."""
    tile = _flat(hsv(rng, (0.1, 0.15), (0.0, 0.06), (0.85, 0.98))).clone()
    if rng.random() < 0.5:
        a = rng.randrange(SIZE - 50)
        tile[:, a : a + 40, 12:-12] = picture(rng, noise)[:, a : a + 40, 12:-12]
    ink = hsv(rng, (0.0, 1.0), (0.0, 0.3), (0.05, 0.3))
    _text(
        tile,
        rng,
        noise,
        ink,
        (rng.randrange(6, 30), rng.randrange(60, SIZE - 6)),
        rng.choice((4, 6)),
    )
    return tile


def _text(
    tile: Tensor,
    rng: random.Random,
    noise: Noise,
    ink: Colour,
    rows: tuple[int, int],
    leading: int,
) -> None:
    """Write lines of words into rows of a tile."""
    y, x = torch.arange(*rows), torch.arange(SIZE)
    line, margin = (y - rows[0]) // leading, rng.randrange(6, 24)
    # Words and gaps come from a field that is sampled once for every line and every few columns.
    letters = noise.rough(rng)[5 * line % SIZE][:, x // max(1, leading // 2)]
    ragged = torch.tensor([rng.random() ** 2 * SIZE / 2 for _ in range(int(line[-1]) + 1)])[line]
    inked = ((y - rows[0]) % leading < leading // 2)[:, None] & (letters > -0.7)
    inked &= (x >= margin) & (x < SIZE - margin - ragged[:, None])
    part = tile[:, rows[0] : rows[1]]
    part[:] = torch.where(inked, torch.tensor(ink)[:, None, None], part)


def spines(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a row of books, files or boxes that stand on a shelf."""
    tile = torch.empty(3, SIZE, SIZE)
    palette = [any_colour(rng) for _ in range(rng.choice((2, 4, 9)))]
    x, widest = 0, rng.choice((8, 14, 26))
    while x < SIZE:
        width = rng.randrange(4, widest)
        book, end = scaled(rng.choice(palette), rng.uniform(0.6, 1.2)), min(x + width, SIZE)
        tile[:, :, x:end] = torch.tensor(book)[:, None, None]
        tile[:, :, end - 1] *= 0.4
        if rng.random() < 0.6:
            y, label = rng.randrange(10, 80), torch.tensor(any_colour(rng))[:, None, None]
            tile[:, y : y + rng.randrange(6, 40), x + 1 : end - 1] = label
        if rng.random() < 0.5:
            tile[:, : rng.randrange(4, 30), x:end] *= 0.3  # a lower book: the shelf's shade
        x += width
    return tile * (1.0 + 0.04 * noise.natural(rng))


def screen(rng: random.Random, noise: Noise) -> Tensor:
    """Paint what a display shows: windows with text, or a film."""
    if rng.random() < 0.5:
        return picture(rng, noise)
    tile = _flat(hsv(rng, (0.5, 0.7), (0.0, 0.6), (0.05, 0.9))).clone()
    for _ in range(rng.randrange(1, 4)):
        a, c = rng.randrange(70), rng.randrange(70)
        b, d = rng.randrange(a + 30, SIZE), rng.randrange(c + 30, SIZE)
        tile[:, a:b, c:d] = torch.tensor(any_colour(rng))[:, None, None]
        _text(tile, rng, noise, any_colour(rng), (a + 4, b - 4), rng.choice((4, 6)))
    return tile


def panels(rng: random.Random, noise: Noise) -> Tensor:
    """Paint a door or cupboard front in white: bevelled panels; a colour tints it."""
    tile = plain(rng, noise).clone()
    rows, columns = rng.choice(((1, 1), (2, 1), (3, 2), (2, 2)))
    height, width = SIZE // rows, SIZE // columns
    for row in range(rows):
        for column in range(columns):
            a, b = row * height + 14, (row + 1) * height - 14
            c, d = column * width + 12, (column + 1) * width - 12
            tile[:, a : a + 2, c:d] *= 0.6
            tile[:, a:b, c : c + 2] *= 0.7
            tile[:, b - 2 : b, c:d] *= 1.15
            tile[:, a:b, d - 2 : d] *= 1.1
    return tile


def fronts(rng: random.Random, noise: Noise) -> Tensor:
    """Paint drawers or doors of a cupboard in white, with gaps and handles; a colour tints it."""
    tile = plain(rng, noise).clone()
    rows, columns = rng.choice(((1, 1), (1, 2), (3, 1), (4, 1), (2, 2), (5, 2), (1, 3)))
    tile[:, _joints(rows, 2)] *= 0.35
    tile[:, :, _joints(columns, 2)] *= 0.35
    shade = rng.choice((0.15, 0.4, 1.3))
    height, width = SIZE // rows, SIZE // columns
    for row in range(rows):
        for column in range(columns):
            y, x = row * height + height // 4, column * width + width // 2
            long = max(3, width // 8)
            tile[:, y : y + 3, x - long : x + long] *= shade
    return tile


def sky(rng: random.Random, noise: Noise) -> Tensor:
    """Paint the far distance all around: sky, clouds, and what stands at the horizon (mid-tile)."""
    clear = hsv(rng, (0.54, 0.62), (0.1, 0.6), (0.6, 1.0))
    pale = hsv(rng, (0.1, 0.6), (0.0, 0.1), (0.8, 1.0))
    line = torch.arange(SIZE)[:, None] / SIZE
    cloud = torch.sigmoid(3 * noise.natural(rng) + rng.uniform(-4, 3))
    tile = _blend(clear, pale, (1.6 * line + cloud).clamp(0, 1))
    edge = 0.5 - 0.04 * noise.natural(rng)[:1].abs() - rng.uniform(0.0, 0.1)
    trees = _blend((0.2, 0.25, 0.18), (0.5, 0.55, 0.45), 0.5 + 0.3 * noise.rough(rng))
    trees = torch.lerp(trees, _flat(pale), rng.uniform(0.0, 0.6))  # haze
    return torch.where(line > edge, trees, tile)


PERIODIC: dict[str, Painter] = {
    painter.__name__: painter
    for painter in (
        plain,
        plaster,
        wallpaper,
        wood,
        planks,
        tiles,
        bricks,
        fabric,
        stone,
        ground,
        paving,
        foliage,
        slats,
        folds,
        facade,
        clutter,
        spines,
    )
}
SINGLE: dict[str, Painter] = {
    painter.__name__: painter
    for painter in (rug, picture, poster, page, screen, panels, fronts, sky)
}
PAINTERS = PERIODIC | SINGLE
