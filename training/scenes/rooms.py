"""Furnished rooms."""

from __future__ import annotations

import math
import random

from .colours import hsv, scaled, wall_colour
from .furniture import MIDDLE_FURNITURE, WALL_FURNITURE
from .materials import Material, Palette
from .places import LightPlan, Opening, Place, at_wall, pack_walls, wall_frame
from .shapes import Assembly, Top, Triple, moved
from .theme import Theme
from .things import FLOOR_THINGS, SHELF_THINGS, strew

KINDS = ("living", "kitchen", "office", "bedroom", "hall", "store")
WALL_M = 0.15  # thickness
FLOORS = ("planks", "planks", "planks", "tiles", "tiles", "fabric", "stone", "wood")
# A wall's tile and the metres that it covers.
WALLS = (
    ("plaster", 2.0, 5.0),
    ("plaster", 2.0, 5.0),
    ("plaster", 2.0, 5.0),
    ("wallpaper", 0.6, 2.0),
    ("wallpaper", 0.6, 2.0),
    ("tiles", 0.6, 1.6),
    ("bricks", 0.7, 1.2),
    ("wood", 1.0, 2.5),
    ("stone", 1.0, 3.0),
    ("fabric", 0.8, 2.0),
)


def random_room(palette: Palette) -> Place:
    """Put together a furnished room with its lights.

    Args:
        palette: Where materials are collected; its `rng` is the source of every choice.

    Returns:
        The room.
    """
    rng, theme = palette.rng, Theme(palette)
    kind = rng.choice(KINDS)
    narrow = kind == "hall"
    width = rng.uniform(1.8, 3.0) if narrow else rng.uniform(3.0, 6.5)
    depth, height = rng.uniform(3.2, 7.0), rng.uniform(2.3, 3.1)
    sky = palette.add(Material(palette.tile("sky"), 0.0, (1, 1, 1), glow=0.6 * 10 ** rng.random()))
    margin, below = rng.uniform(4.0, 9.0), rng.choice((0.3, 3.0, 6.0))
    place = Place(
        width,
        depth,
        height,
        indoors=True,
        shell=((-margin, -below, -margin), (width + margin, height + 6.0, depth + margin)),
    )
    openings = {side: _openings(rng, wall_frame(place, side)[0], height, side) for side in range(4)}
    _build_walls(place, theme, openings, sky)
    pieces = rng.randrange(6, 15)
    makers = rng.choices(WALL_FURNITURE[kind], k=pieces)
    pack_walls(place, rng, [make(theme) for make in makers], openings)
    if not narrow:
        for make in rng.choices(MIDDLE_FURNITURE[kind], k=rng.randrange(0, 5)):
            _somewhere(place, rng, make(theme), 0.25)
    if rng.random() < 0.6:
        _rug(place, theme)
    for make in rng.choices(FLOOR_THINGS, k=rng.randrange(0, 9)):
        _somewhere(place, rng, make(theme), 0.05)
    for side in range(4):
        _hang(place, theme, side, openings[side])
    _light(place, palette, openings)
    return place


def _openings(rng: random.Random, length: float, height: float, side: int) -> list[Opening]:
    """Draw a wall's windows and doors, from left to right."""
    openings: list[Opening] = []
    draw = rng.random()
    if side < 2 and draw < 0.75:
        wide = min(length * 0.8, rng.uniform(0.7, 2.6))
        left = rng.uniform(0.1, length - wide - 0.1)
        bottom = rng.choice((0.05, 0.5, 0.9, 0.9, 1.1))
        top = min(height - 0.15, bottom + rng.uniform(0.9, 1.6))
        openings.append(Opening(left, left + wide, bottom, top, True))
    elif draw < 0.7:
        wide = rng.uniform(0.75, 1.0)
        left = rng.uniform(0.1, length - wide - 0.1)
        openings.append(Opening(left, left + wide, 0.0, min(2.05, height - 0.2), False))
    return openings


def _build_walls(place: Place, theme: Theme, openings: dict[int, list[Opening]], sky: int) -> None:
    """Choose the room's surfaces, cut holes into its walls, and put windows and doors in."""
    palette, rng = theme.palette, theme.rng
    gloss = rng.choice((0.0, 0.15, 0.4))
    floor = palette.cover(rng.choice(FLOORS), rng.uniform(1.0, 2.5), gloss, variants=1)
    ceiling = palette.paint(scaled(wall_colour(rng), 1.2) if rng.random() < 0.3 else (0.92,) * 3)
    common = _wall(palette)
    walls = [common if rng.random() < 0.7 else _wall(palette) for _ in range(4)]
    # Sides of `tracing` from walls as `wall_frame` numbers them.
    sides = [walls[3], walls[1], ceiling, floor, walls[2], walls[0]]
    place.surroundings = [*sides, theme.pick("white", "wood", "white", "black"), sky]
    place.skirting = rng.choice((0.0, 0.06, 0.09, 0.12))
    for side in range(4):
        length, yaw = wall_frame(place, side)
        for opening in openings[side]:
            ends = [at_wall(place, side, a, away) for a, away in
                    ((opening.left, -WALL_M), (opening.right, WALL_M))]  # fmt: skip
            (x0, x1), (z0, z1) = (sorted(pair) for pair in zip(*ends, strict=True))
            filled = Assembly(0, 0, 0)
            if _fill(theme, filled, opening, length):
                place.holes.append(((x0, opening.bottom, z0), (x1, opening.top, z1)))
            x, z = at_wall(place, side, length / 2, -WALL_M / 2)
            place.shapes += moved(filled.shapes, x, 0.0, z, yaw)
    if rng.random() < 0.25:  # a pillar or chimney breast
        block = Assembly(rng.uniform(0.3, 1.2), place.height, rng.uniform(0.2, 0.5))
        block.box(common, (block.width, block.height, block.depth))
        side = rng.randrange(4)
        length, yaw = wall_frame(place, side)
        x, z = at_wall(place, side, rng.uniform(0.7, length - 0.7), block.depth / 2)
        if not openings[side]:
            place.stand(block, x, z, yaw)


def _wall(palette: Palette) -> int:
    """Make a wall's surface."""
    name, low, high = palette.rng.choice(WALLS)
    return palette.cover(name, palette.rng.uniform(low, high), palette.rng.choice((0.0, 0.0, 0.2)))


def _fill(theme: Theme, panel: Assembly, opening: Opening, length: float) -> bool:
    """Put a window or a door into its opening; return whether one can look through it."""
    rng = theme.rng
    wide, high = opening.right - opening.left, opening.top - opening.bottom
    x, front = (opening.left + opening.right) / 2 - length / 2, -WALL_M / 2
    frame = theme.pick("white", "white", "wood", "metal")
    if opening.window:
        for side in (-1, 1):
            at = (x + side * (wide / 2 - 0.03), opening.bottom, 0.0)
            panel.box(frame, (0.06, high, WALL_M), at)
        for up in (opening.bottom, opening.top - 0.06):
            panel.box(frame, (wide, 0.06, WALL_M), (x, up, 0.0))
        for index in range(1, rng.randrange(1, 4)):
            panel.box(
                frame, (0.05, high, 0.05), (x - wide / 2 + wide * index / 3, opening.bottom, 0.02)
            )
        if rng.random() < 0.5:
            panel.box(frame, (wide + 0.1, 0.03, 0.22), (x, opening.bottom - 0.03, front))
        _dress(theme, panel, opening, x)
        return True
    for side in (-1, 1):
        panel.box(
            frame, (0.08, high + 0.08, 0.03), (x + side * (wide / 2 + 0.03), 0.0, front - 0.01)
        )
    panel.box(frame, (wide, 0.08, 0.03), (x, opening.top, front - 0.01))
    leaf, handle = theme.pick("panel", "wood", "white", "front"), theme.pick("metal", "black")
    if rng.random() < 0.75:
        panel.box(leaf, (wide, high, 0.04), (x, 0.0, front))
        panel.box(
            handle, (0.12, 0.03, 0.05), (x + rng.choice((-1, 1)) * wide * 0.4, 1.0, front - 0.03)
        )
        return False
    angle = rng.uniform(0.5, 1.5)  # open, with a wall behind
    turn = (angle, 0.0, 0.0)
    place = (x - wide / 2 + wide / 2 * math.cos(angle), 0.0, 0.1 + wide / 2 * math.sin(angle))
    panel.box(leaf, (wide, high, 0.04), place, (-turn[0], 0.0, 0.0))
    behind = rng.uniform(1.2, 2.4)
    panel.box(theme.pick("wall"), (5.0, 3.2, 0.1), (x, 0.0, behind))
    panel.box(theme.pick("wood", "board", "cloth"), (5.0, 0.1, behind), (x, -0.1, behind / 2))
    if rng.random() < 0.6:
        at = (x, rng.choice((0.0, 1.0)), behind - 0.1)
        panel.box(theme.pick("picture", "wood", "front"), (0.7, 0.9, 0.1), at)
    return True


def _dress(theme: Theme, panel: Assembly, opening: Opening, x: float) -> None:
    """Give a window curtains or blinds."""
    rng = theme.rng
    wide, high = opening.right - opening.left, opening.top - opening.bottom
    front, draw = -WALL_M / 2, rng.random()
    if draw < 0.4:
        curtain = theme.pick("curtain", "curtain", "cloth")
        low = rng.choice((0.03, opening.bottom - 0.1))
        for side in (-1, 1):
            size = (wide * rng.uniform(0.15, 0.45), opening.top + 0.12 - low, 0.08)
            panel.box(curtain, size, (x + side * (wide / 2 + 0.1 - size[0] / 4), low, front - 0.06))
        rod = (wide * 1.4, 0.03, 0.03)
        panel.box(theme.pick("metal", "wood"), rod, (x, opening.top + 0.12, front - 0.07))
    elif draw < 0.7:
        share = rng.uniform(0.1, 1.0)
        place = (x, opening.top - high * share, front + 0.02)
        panel.box(theme.pick("slats", "cloth", "white"), (wide, high * share, 0.02), place)


def _somewhere(place: Place, rng: random.Random, thing: Assembly, gap: float) -> None:
    """Set something down anywhere, if it fits at one of some random places."""
    for _ in range(12):
        x, z = rng.uniform(0, place.width), rng.uniform(0, place.depth)
        yaw = rng.choice((0, 1, 2, 3)) * math.pi / 2 + rng.gauss(0, 0.15)
        if place.stand(thing, x, z, yaw, gap):
            return


def _rug(place: Place, theme: Theme) -> None:
    """Lay a carpet; it may lie under things."""
    rng = theme.rng
    size = (rng.uniform(0.9, 2.6), 0.012, rng.uniform(1.2, 3.2))
    rug = Assembly(*size)
    rug.box(theme.pick("rug", "rug", "cloth"), size)
    at = (rng.uniform(0.3, 0.7) * place.width, 0.0, rng.uniform(0.3, 0.7) * place.depth)
    carpet = Assembly(0, 0, 0)
    carpet.put(rug, *at, rng.choice((0.0, math.pi / 2)) + rng.gauss(0, 0.05))
    place.shapes += carpet.shapes


def _hang(place: Place, theme: Theme, side: int, openings: list[Opening]) -> None:
    """Hang pictures, boards, shelves, clocks and screens where the wall is free."""
    rng = theme.rng
    length, yaw = wall_frame(place, side)
    taken = [(o.left - 0.2, o.right + 0.2) for o in openings]
    for _ in range(rng.randrange(0, 9)):
        thing = _hanging(theme)
        if length < thing.width + 0.2:
            continue
        along = rng.uniform(thing.width / 2 + 0.1, length - thing.width / 2 - 0.1)
        left, right = along - thing.width / 2, along + thing.width / 2
        low = rng.uniform(1.0, 1.7)
        up = min(low, place.height - thing.height - 0.1)
        x, z = at_wall(place, side, along, thing.depth / 2)
        behind = any(
            t.x[0] - 0.1 < x < t.x[1] + 0.1 and t.z[0] - 0.1 < z < t.z[1] + 0.1 and t.up > up
            for t in place.taken
        )
        if behind or any(a < right and left < b for a, b in taken):
            continue
        taken.append((left - 0.05, right + 0.05))
        hung = Assembly(0, 0, 0)
        hung.put(thing, x, up, z, yaw)
        place.shapes += hung.shapes
        place.sights.append((x, up, z))


def _hanging(theme: Theme) -> Assembly:
    """Make something that hangs on a wall."""
    rng = theme.rng
    draw = rng.random()
    if draw < 0.5:
        size = (rng.uniform(0.25, 1.2), rng.uniform(0.25, 0.9), 0.03)
        result = Assembly(*size)
        result.box(theme.pick("black", "wood", "white", "metal"), size)
        edge = rng.choice((0.01, 0.03, 0.06))
        shown = (size[0] - 2 * edge, size[1] - 2 * edge, 0.006)
        result.box(theme.pick("picture", "picture", "poster"), shown, (0, edge, -0.015))
    elif draw < 0.62:
        size = (rng.uniform(0.3, 0.9), rng.uniform(0.4, 1.2), 0.004)
        result = Assembly(*size)
        result.box(theme.pick("poster", "page", "cloth", "white"), size)
    elif draw < 0.8:
        result = Assembly(rng.uniform(0.4, 1.2), 0.35, 0.22)
        board = theme.pick("wood", "white", "strong")
        result.box(board, (result.width, 0.025, result.depth))
        top = Top(0, 0.025, 0, result.width, result.depth, 0.4)
        strew(theme, result, top, SHELF_THINGS, rng.randrange(2, 8))
    elif draw < 0.88:
        wide = rng.uniform(0.6, 1.3)
        result = Assembly(wide, wide * 0.57, 0.08)
        result.box(theme.pick("black"), (wide, wide * 0.57, 0.07))
        shown = (wide * 0.96, wide * 0.53, 0.006)
        result.box(theme.pick("screen", "screen", "black"), shown, (0, wide * 0.02, -0.036))
    elif draw < 0.94:
        result = Assembly(0.6, 0.9, 0.15)
        for index in range(rng.randrange(2, 5)):
            size = (rng.uniform(0.15, 0.35), rng.uniform(0.5, 0.9), 0.1)
            place = (0.15 * index - 0.3, 0.0, 0.02)
            result.box(theme.pick("cloth", "thing"), size, place, (0.0, 0.0, rng.gauss(0, 0.05)))
    else:
        wide = rng.uniform(0.2, 0.35)
        result = Assembly(wide, wide, 0.04)
        turn = (0.0, math.pi / 2, 0.0)
        result.tube(
            theme.pick("black", "white", "wood"), (wide, 0.04, wide), (0, wide / 2, 0), turn
        )
        result.tube(
            theme.pick("white"), (wide * 0.85, 0.01, wide * 0.85), (0, wide / 2, -0.022), turn
        )
    return result


def _light(place: Place, palette: Palette, openings: dict[int, list[Opening]]) -> None:
    """Plan daylight through the windows, lamps at the ceiling, and the light from everywhere."""
    rng = palette.rng
    day = rng.random() < 0.75
    warm = hsv(rng, (0.07, 0.14), (0.0, 0.45), (1.0, 1.0))
    cool = hsv(rng, (0.55, 0.62), (0.0, 0.25), (1.0, 1.0))
    tint = warm
    for side, wall in openings.items():
        for window in (o for o in wall if o.window and day):
            middle, up = (window.left + window.right) / 2, (window.bottom + window.top) / 2
            x, z = at_wall(place, side, middle, 0.35)
            area = (window.right - window.left) * (window.top - window.bottom)
            place.lamps.append(LightPlan((x, up, z), _times(cool, rng.uniform(1.0, 2.5) * area)))
            tint = cool
            if not place.suns and rng.random() < 0.45:
                _, yaw = wall_frame(place, side)
                angle = yaw + rng.uniform(-0.8, 0.8)
                towards = (math.sin(angle), rng.uniform(0.4, 1.2), math.cos(angle))
                strength = rng.uniform(1.5, 5.0)
                place.suns.append(LightPlan(towards, _times((1.0, 0.93, 0.8), strength)))
    if not place.lamps or rng.random() < 0.55:
        for _ in range(rng.choice((1, 1, 2))):
            at = (rng.uniform(0.3, 0.7) * place.width, place.height - rng.uniform(0.1, 0.5),
                  rng.uniform(0.3, 0.7) * place.depth)  # fmt: skip
            place.lamps.append(LightPlan(at, _times(warm, rng.uniform(1.0, 4.0))))
            lamp = Assembly(0.4, 0.1, 0.4)
            size = rng.uniform(0.2, 0.5)
            kind, glow = rng.randrange(3), palette.lamp(warm, rng.uniform(1.0, 3.0))
            high = 0.05 if kind == 0 else size * 0.5
            lamp.add(
                kind,
                glow,
                (size, high, size),
                (at[0], max(at[1] + 0.02, place.height - 0.1), at[2]),
            )
            place.shapes += lamp.shapes
    place.lamps = place.lamps[:3]
    place.ambient = _times(tint, rng.uniform(0.25, 0.8))


def _times(colour: Triple, factor: float) -> Triple:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
