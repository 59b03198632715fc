"""Streets, yards and gardens."""

from __future__ import annotations

import math

from .colours import hsv
from .furniture import chair, table
from .materials import Material, Palette
from .places import LightPlan, Place, at_wall, wall_frame
from .shapes import Assembly
from .theme import Theme
from .things import Maker, bin_, crate, pot_plant
from .tracing import SURROUNDINGS


def random_open_place(palette: Palette) -> Place:
    """Put together an open place with its lights; arguments and result as of `random_room`."""
    rng, theme = palette.rng, Theme(palette)
    width, depth = rng.uniform(6.0, 16.0), rng.uniform(6.0, 16.0)
    far = rng.uniform(12.0, 30.0)
    bright = rng.uniform(0.8, 1.8)
    sky = palette.add(Material(palette.tile("sky"), 0.0, (1, 1, 1), glow=bright))
    place = Place(
        width,
        depth,
        height=20.0,
        indoors=False,
        shell=((-far, -far, -far), (width + far, far, depth + far)),
        surroundings=[sky] * SURROUNDINGS,
    )
    earth = Assembly(width, 0.1, depth)
    size = (width + 2 * far, 1.0, depth + 2 * far)
    earth.box(theme.pick("ground", "paving", "ground"), size, (width / 2, -1.0, depth / 2))
    if rng.random() < 0.6:
        path = (rng.uniform(1.2, 3.5), 0.03, depth + far)
        earth.box(theme.pick("paving", "ground"), path, (rng.uniform(0, width), -0.01, depth / 2))
    place.shapes += earth.shapes
    for side in range(4):
        if rng.random() < 0.75:
            _edge(place, theme, side)
    makers: tuple[Maker, ...] = (
        tree, tree, bush, bush, car, bench, post, planter, bin_, crate, table, chair, pot_plant,
        hut, steps,
    )  # fmt: skip
    for make in rng.choices(makers, k=rng.randrange(5, 14)):
        thing = make(theme)
        for _ in range(8):
            x, z = rng.uniform(0, width), rng.uniform(0, depth)
            if place.stand(thing, x, z, rng.uniform(0, 2 * math.pi), 0.15):
                break
    sunny = rng.random() < 0.6
    angle = rng.uniform(0, 2 * math.pi)
    towards = (math.sin(angle), rng.uniform(0.35, 2.0), math.cos(angle))
    strength = rng.uniform(1.0, 3.0) if sunny else 0.15
    place.suns.append(LightPlan(towards, (strength, strength * 0.95, strength * 0.85)))
    tint = hsv(rng, (0.55, 0.62), (0.0, 0.25), (1.0, 1.0))
    level = rng.uniform(0.4, 0.7) if sunny else rng.uniform(0.8, 1.2)
    place.ambient = (tint[0] * level, tint[1] * level, tint[2] * level)
    return place


def _edge(place: Place, theme: Theme, side: int) -> None:
    """Close one side of a place with houses, a wall, a fence or a hedge."""
    rng = theme.rng
    length, yaw = wall_frame(place, side)
    draw, along = rng.random(), 0.0
    while along < length:
        if draw < 0.55:
            thing = house(theme)
        else:
            high, deep = rng.uniform(0.8, 2.2), 0.5 if draw < 0.7 else 0.15
            thing = Assembly(rng.uniform(2.0, 5.0), high, deep)
            kind = "leaf" if draw < 0.7 else rng.choice(("brick", "wood", "slats", "wall"))
            thing.box(theme.pick(kind), (thing.width * 0.99, high, deep))
        x, z = at_wall(place, side, along + thing.width / 2, -thing.depth / 2 - rng.uniform(0, 0.5))
        standing = Assembly(0, 0, 0)
        standing.put(thing, x, 0.0, z, yaw)
        place.shapes += standing.shapes
        place.sights.append((x, min(1.5, thing.height), z))
        along += thing.width + rng.choice((0.0, 0.0, rng.uniform(0.0, 4.0)))


def house(theme: Theme) -> Assembly:
    """Make a house or a shop with a door."""
    rng = theme.rng
    wide, high, deep = rng.uniform(4.0, 9.0), rng.uniform(3.0, 9.0), rng.uniform(4.0, 7.0)
    result = Assembly(wide, high, deep)
    result.box(theme.pick("facade", "facade", "brick", "wall"), (wide, high, deep))
    front = -deep / 2
    result.box(theme.pick("paint", "wall"), (wide * 1.02, 0.25, 0.1), (0, high * 0.4, front))
    result.box(
        theme.pick("panel", "front"), (1.0, 2.1, 0.1), (rng.uniform(-0.4, 0.4) * wide, 0, front)
    )
    for index in range(rng.randrange(0, 4)):
        at = ((index - 1.2) * wide / 4, 0.9, front)
        result.box(theme.pick("black", "white"), (1.2, 1.3, 0.12), at)
        result.box(
            theme.pick("screen", "black", "clutter"), (1.05, 1.15, 0.14), (at[0], 0.97, front)
        )
    if rng.random() < 0.5:
        ridge = (wide * 1.04, deep * 0.72, deep * 0.72)
        turn = (0.0, math.pi / 4, 0.0)
        result.box(theme.pick("slats", "brick", "paint"), ridge, (0, high - ridge[1] / 2, 0), turn)
    return result


def tree(theme: Theme) -> Assembly:
    """Make a tree: a trunk, some branches and a crown."""
    rng = theme.rng
    high, thick = rng.uniform(2.5, 6.0), rng.uniform(0.12, 0.4)
    result = Assembly(thick * 1.5, high, thick * 1.5)
    bark, leaf = theme.pick("bark"), theme.pick("leaf")
    result.tube(bark, (thick, high * 0.6, thick), turn=(0, 0, rng.gauss(0, 0.05)))
    for _ in range(rng.randrange(2, 4)):
        turn = (rng.uniform(0, 6.3), rng.uniform(0.3, 0.8), 0.0)
        result.tube(bark, (thick * 0.4, high * 0.4, thick * 0.4), (0, high * 0.4, 0), turn)
    for _ in range(rng.randrange(4, 8)):
        size = [high * rng.uniform(0.2, 0.45) for _ in range(3)]
        place = (rng.gauss(0, 0.15) * high, high * rng.uniform(0.5, 0.8), rng.gauss(0, 0.15) * high)
        result.ball(leaf, (size[0], size[1], size[2]), place, (rng.uniform(0, 3), 0, 0))
    return result


def bush(theme: Theme) -> Assembly:
    """Make a bush of some balls of leaves."""
    rng = theme.rng
    wide, high = rng.uniform(0.6, 1.8), rng.uniform(0.4, 1.6)
    result = Assembly(wide, high, wide)
    leaf = theme.pick("leaf")
    for _ in range(rng.randrange(3, 7)):
        size = (wide * rng.uniform(0.4, 0.8), high * rng.uniform(0.5, 1.0), wide * 0.6)
        place = (rng.uniform(-0.25, 0.25) * wide, 0.0, rng.uniform(-0.25, 0.25) * wide)
        result.ball(leaf, size, place, (rng.uniform(0, 3), 0, 0))
    return result


def car(theme: Theme) -> Assembly:
    """Make a parked car."""
    rng = theme.rng
    wide, long, high = 1.75, rng.uniform(3.6, 4.7), rng.uniform(1.4, 1.7)
    result = Assembly(wide, high, long)
    body, glass, tyre = theme.pick("thing", "strong"), theme.pick("black"), theme.pick("black")
    result.box(body, (wide, high * 0.42, long), (0, 0.25, 0))
    result.box(glass, (wide * 0.88, high * 0.3, long * 0.55), (0, 0.25 + high * 0.42, 0.1))
    result.box(body, (wide * 0.86, 0.06, long * 0.45), (0, high - 0.06, 0.1))
    for side in (-1, 1):
        for end in (-1, 1):
            place = (side * wide * 0.46, 0.22, end * long * 0.31)
            result.tube(tyre, (0.62, 0.2, 0.62), place, (0, 0, math.pi / 2))
        lamp = (side * wide * 0.36, 0.55, -long / 2)
        result.box(theme.pick("white"), (0.3, 0.14, 0.03), lamp)
        result.box(theme.pick("strong"), (0.3, 0.14, 0.03), (lamp[0], 0.6, long / 2))
    return result


def bench(theme: Theme) -> Assembly:
    """Make a bench with a back."""
    rng = theme.rng
    wide = rng.uniform(1.2, 2.0)
    result = Assembly(wide, 0.85, 0.55)
    wood, leg = theme.pick("wood", "paint"), theme.pick("metal", "black", "wood")
    for index in range(3):
        result.box(wood, (wide, 0.03, 0.12), (0, 0.42, -0.18 + 0.15 * index))
        result.box(wood, (wide, 0.1, 0.03), (0, 0.5 + 0.13 * index, 0.25 + 0.02 * index))
    for side in (-1, 1):
        result.box(leg, (0.06, 0.44, 0.5), (side * wide * 0.42, 0, 0))
        result.box(leg, (0.05, 0.45, 0.04), (side * wide * 0.42, 0.42, 0.29))
    return result


def post(theme: Theme) -> Assembly:
    """Make a post: a street lamp, a sign or a bollard."""
    rng = theme.rng
    high = rng.choice((rng.uniform(0.7, 1.1), rng.uniform(2.2, 4.5)))
    result = Assembly(0.2, high, 0.2)
    pole = theme.pick("metal", "black", "wood")
    result.tube(pole, (0.1, high, 0.1))
    if high > 2:
        size = (rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.8), 0.03)
        result.box(theme.pick("poster", "strong", "white"), size, (0, high - size[1], -0.07))
    else:
        result.ball(pole, (0.16, 0.12, 0.16), (0, high - 0.06, 0))
    return result


def planter(theme: Theme) -> Assembly:
    """Make a trough with plants."""
    rng = theme.rng
    wide, high, deep = rng.uniform(0.6, 2.0), rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.7)
    result = Assembly(wide, high, deep)
    result.box(theme.pick("brick", "wood", "board", "thing"), (wide, high, deep))
    leaf = theme.pick("leaf")
    for _ in range(rng.randrange(3, 7)):
        size = (rng.uniform(0.3, 0.6), rng.uniform(0.3, 0.8), 0.45)
        result.ball(leaf, size, (rng.uniform(-0.4, 0.4) * wide, high - 0.15, 0))
    return result


def hut(theme: Theme) -> Assembly:
    """Make a hut, kiosk or container."""
    rng = theme.rng
    wide, high, deep = rng.uniform(1.2, 3.0), rng.uniform(1.2, 2.6), rng.uniform(1.0, 2.5)
    result = Assembly(wide, high, deep)
    result.box(theme.pick("wood", "slats", "strong", "brick"), (wide, high, deep))
    result.box(theme.pick("panel", "poster"), (0.8, high * 0.8, 0.04), (0, 0, -deep / 2))
    result.box(theme.pick("black", "wood"), (wide * 1.1, 0.1, deep * 1.1), (0, high, 0))
    return result


def steps(theme: Theme) -> Assembly:
    """Make a flight of steps with a rail."""
    rng = theme.rng
    wide, count = rng.uniform(1.0, 2.5), rng.randrange(3, 8)
    result = Assembly(wide, count * 0.17, count * 0.3)
    stone = theme.pick("board", "paving", "wood")
    for index in range(count):
        at = (0, 0, (index / 2) * 0.3)
        result.box(stone, (wide, 0.17 * (index + 1), 0.3 * (count - index)), at)
    for side in (-1, 1):
        result.tube(
            theme.pick("metal"),
            (0.05, 1.0 + result.height, 0.05),
            (side * wide / 2, 0, result.depth / 2),
        )
    return result
