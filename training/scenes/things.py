"""Small things that stand and lie on tables, shelves and floors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .shapes import Assembly, Top
from .theme import Theme

Maker = Callable[[Theme], Assembly]


def cup(theme: Theme) -> Assembly:
    """Make a cup or mug, perhaps with a handle."""
    rng = theme.rng
    wide, high = rng.uniform(0.07, 0.1), rng.uniform(0.07, 0.12)
    result = Assembly(wide, high, wide)
    material = theme.pick("ceramic", "ceramic", "strong", "thing")
    result.tube(material, (wide, high, wide))
    if rng.random() < 0.6:
        result.box(material, (0.03, high * 0.6, 0.012), (wide / 2 + 0.01, high * 0.2, 0))
    return result


def bottle(theme: Theme) -> Assembly:
    """Make a bottle, can or jar."""
    rng = theme.rng
    wide, high = rng.uniform(0.06, 0.11), rng.uniform(0.12, 0.32)
    result = Assembly(wide, high, wide)
    result.tube(theme.pick("thing", "strong", "metal"), (wide, high * 0.7, wide))
    neck = wide * rng.uniform(0.3, 0.9)
    result.tube(theme.pick("thing", "metal", "white"), (neck, high * 0.3, neck), (0, high * 0.7, 0))
    if rng.random() < 0.5:
        label = wide * 1.03
        result.tube(theme.pick("poster", "white"), (label, high * 0.3, label), (0, high * 0.2, 0))
    return result


def bowl(theme: Theme) -> Assembly:
    """Make a bowl, with fruit now and then."""
    rng = theme.rng
    wide, high = rng.uniform(0.16, 0.32), rng.uniform(0.05, 0.1)
    result = Assembly(wide, high, wide)
    result.tube(theme.pick("ceramic", "wood", "thing"), (wide * 0.6, high * 0.3, wide * 0.6))
    result.ball(theme.pick("ceramic", "wood", "thing"), (wide, high, wide), (0, high * 0.2, 0))
    for _ in range(rng.choice((0, 0, 3, 4))):
        size, angle = rng.uniform(0.06, 0.09), rng.uniform(0, 6.3)
        place = (wide * 0.22 * math.cos(angle), high * 0.8, wide * 0.22 * math.sin(angle))
        result.ball(theme.pick("strong"), (size, size, size), place)
    return result


def papers(theme: Theme) -> Assembly:
    """Make a loose pile of sheets and magazines."""
    rng = theme.rng
    result = Assembly(0.35, 0.02, 0.35)
    up = 0.0
    for _ in range(rng.randrange(1, 5)):
        thick = rng.choice((0.002, 0.002, 0.006, 0.015))
        size = rng.choice(((0.21, thick, 0.3), (0.3, thick, 0.21), (0.15, thick, 0.21)))
        place = (rng.uniform(-0.12, 0.12), up, rng.uniform(-0.1, 0.1))
        result.box(theme.pick("page", "page", "poster"), size, place, (rng.uniform(-3, 3), 0, 0))
        up += thick + 0.001
    return result


def book_pile(theme: Theme) -> Assembly:
    """Make a pile of lying books or boxes."""
    rng = theme.rng
    result = Assembly(0.28, 0.2, 0.28)
    up = 0.0
    for _ in range(rng.randrange(1, 6)):
        size = (rng.uniform(0.16, 0.28), rng.uniform(0.015, 0.05), rng.uniform(0.12, 0.22))
        result.box(theme.pick("thing", "poster"), size, (0, up, 0), (rng.uniform(-0.4, 0.4), 0, 0))
        up += size[1]
    return result


def standing_books(theme: Theme) -> Assembly:
    """Make a short row of standing books, the last one leaning."""
    rng = theme.rng
    long, high = rng.uniform(0.12, 0.5), rng.uniform(0.18, 0.3)
    result = Assembly(long + 0.08, high, 0.2)
    result.box(theme.pick("books"), (long, high, rng.uniform(0.13, 0.2)))
    lean = rng.uniform(0.1, 0.35)
    result.box(
        theme.pick("thing"),
        (0.025, high * 0.95, 0.15),
        (long / 2 + 0.02 + math.sin(lean) * high / 2, 0.0, 0),
        (0, 0, -lean),
    )
    return result


def package(theme: Theme) -> Assembly:
    """Make a box: a packet, carton or crate, printed or plain."""
    rng = theme.rng
    size = tuple(rng.uniform(0.06, 0.3) for _ in range(3))
    result = Assembly(size[0], size[1], size[2])
    kind = theme.pick("carton", "poster", "thing", "strong", "picture", "white")
    result.box(kind, (size[0], size[1], size[2]))
    return result


def crate(theme: Theme) -> Assembly:
    """Make a large carton or storage box for the floor, perhaps two."""
    rng = theme.rng
    wide, high, deep = rng.uniform(0.3, 0.6), rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.5)
    result = Assembly(wide, high, deep)
    result.box(theme.pick("carton", "carton", "thing", "wood"), (wide, high, deep))
    if rng.random() < 0.4:
        size = (wide * rng.uniform(0.5, 0.9), high * rng.uniform(0.4, 0.9), deep * 0.8)
        turn = (rng.uniform(-0.4, 0.4), 0.0, 0.0)
        result.box(theme.pick("carton", "poster", "thing"), size, (0, high, 0), turn)
    return result


def table_lamp(theme: Theme) -> Assembly:
    """Make a lamp with foot and shade."""
    rng = theme.rng
    high, wide = rng.uniform(0.3, 0.55), rng.uniform(0.18, 0.32)
    result = Assembly(wide, high, wide)
    foot = theme.pick("metal", "ceramic", "wood", "thing")
    result.tube(foot, (wide * 0.5, 0.03, wide * 0.5))
    if rng.random() < 0.5:
        result.tube(foot, (0.025, high * 0.7, 0.025))
    else:
        result.ball(foot, (wide * 0.6, high * 0.6, wide * 0.6), (0, 0.02, 0))
    result.tube(theme.pick("light", "white", "cloth"), (wide, high * 0.4, wide), (0, high * 0.6, 0))
    return result


def pot_plant(theme: Theme) -> Assembly:
    """Make a plant in a pot, of any size."""
    rng = theme.rng
    high = rng.choice((rng.uniform(0.2, 0.45), rng.uniform(0.6, 1.7)))
    wide = high * rng.uniform(0.3, 0.5)
    result = Assembly(wide, high, wide)
    pot = min(0.4, wide * 0.8)
    result.tube(theme.pick("ceramic", "thing", "carton"), (pot, pot * 0.9, pot))
    leaf = theme.pick("leaf")
    if rng.random() < 0.5:
        result.tube(theme.pick("bark"), (high * 0.05, high * 0.5, high * 0.05), (0, pot * 0.8, 0))
    for _ in range(rng.randrange(3, 8)):
        size = [high * rng.uniform(0.15, 0.45) for _ in range(3)]
        place = (
            rng.uniform(-0.3, 0.3) * wide,
            min(high - size[1], rng.uniform(pot * 0.8, high * 0.85)),
            rng.uniform(-0.3, 0.3) * wide,
        )
        turn = (rng.uniform(0, 3), rng.uniform(-0.6, 0.6), 0.0)
        result.ball(leaf, (size[0], size[1], size[2] * 0.5), place, turn)
    return result


def monitor(theme: Theme) -> Assembly:
    """Make a display on a foot, with a keyboard in front now and then."""
    rng = theme.rng
    wide = rng.uniform(0.4, 0.7)
    high, lift = wide * rng.uniform(0.56, 0.7), rng.uniform(0.06, 0.15)
    result = Assembly(wide, high + lift, 0.25)
    black = theme.pick("black", "black", "metal", "white")
    result.box(black, (wide * 0.4, 0.015, 0.2))
    result.box(black, (0.06, lift, 0.04))
    result.box(black, (wide, high, 0.04), (0, lift, 0), (0, rng.uniform(-0.1, 0.1), 0))
    front = theme.pick("screen", "screen", "black")
    result.box(front, (wide - 0.03, high - 0.03, 0.006), (0, lift + 0.015, -0.022))
    if rng.random() < 0.6:
        result.box(theme.pick("black", "white"), (0.42, 0.02, 0.14), (0, 0, -0.3), (0.1, 0, 0))
    return result


def laptop(theme: Theme) -> Assembly:
    """Make an open laptop."""
    rng = theme.rng
    wide, lean = rng.uniform(0.3, 0.38), rng.uniform(0.1, 0.5)
    result = Assembly(wide, 0.24, 0.25)
    body = theme.pick("metal", "black")
    result.box(body, (wide, 0.018, 0.23))
    result.box(theme.pick("black"), (wide * 0.9, 0.004, 0.11), (0, 0.018, 0.04))
    place = (0, 0.01 + 0.11 * (math.cos(lean) - 1), 0.12 + 0.11 * math.sin(lean))
    result.box(body, (wide, 0.22, 0.012), place, (0, lean, 0))
    shown = (0, 0.025 + 0.1 * (math.cos(lean) - 1), 0.11 + 0.1 * math.sin(lean))
    result.box(theme.pick("screen"), (wide * 0.94, 0.195, 0.004), shown, (0, lean, 0))
    return result


def appliance(theme: Theme) -> Assembly:
    """Make a kettle, toaster, coffee machine or microwave oven."""
    rng = theme.rng
    wide, high, deep = rng.uniform(0.18, 0.5), rng.uniform(0.2, 0.4), rng.uniform(0.2, 0.36)
    result = Assembly(wide, high, deep)
    body = theme.pick("metal", "black", "white", "strong")
    if rng.random() < 0.3:
        result.tube(body, (wide * 0.6, high * 0.8, wide * 0.6))
        result.ball(
            theme.pick("black", "metal"), (wide * 0.5, 0.08, wide * 0.5), (0, high * 0.75, 0)
        )
        result.box(theme.pick("black"), (0.03, high * 0.6, 0.03), (wide * 0.36, high * 0.2, 0))
        return result
    result.box(body, (wide, high, deep))
    result.box(
        theme.pick("black", "metal"),
        (wide * 0.65, high * rng.uniform(0.4, 0.8), 0.01),
        (-wide * 0.1, high * 0.12, -deep / 2),
    )
    return result


def figure(theme: Theme) -> Assembly:
    """Make an ornament or toy of balls and boxes."""
    rng = theme.rng
    result = Assembly(0.2, 0.3, 0.2)
    up = 0.0
    for _ in range(rng.randrange(1, 4)):
        size = [rng.uniform(0.05, 0.2) for _ in range(3)]
        kind = rng.randrange(3)
        turn = (rng.uniform(0, 3), 0.0, 0.0)
        result.add(kind, theme.pick("thing", "strong", "cloth"), (size[0], size[1], size[2]),
                   (rng.uniform(-0.04, 0.04), up, rng.uniform(-0.04, 0.04)), turn)  # fmt: skip
        up += size[1] * 0.9
    return result


def leaning_frame(theme: Theme) -> Assembly:
    """Make a picture frame or tablet that leans backwards."""
    rng = theme.rng
    wide, high, lean = rng.uniform(0.12, 0.35), rng.uniform(0.12, 0.35), rng.uniform(0.1, 0.35)
    result = Assembly(wide, high, 0.12)
    frame = theme.pick("wood", "black", "white", "metal")
    result.box(frame, (wide, high, 0.015), (0, 0, 0.01), (0, lean, 0))
    shown = theme.pick("picture", "page", "poster")
    result.box(shown, (wide * 0.8, high * 0.8, 0.004), (0, high * 0.1, 0), (0, lean, 0))
    return result


def bag(theme: Theme) -> Assembly:
    """Make a bag, cushion or heap of cloth."""
    rng = theme.rng
    size = (rng.uniform(0.25, 0.5), rng.uniform(0.15, 0.45), rng.uniform(0.2, 0.35))
    result = Assembly(*size)
    material = theme.pick("cloth", "black", "thing")
    result.ball(material, size)
    result.box(material, (size[0] * 0.8, size[1] * 0.6, size[2] * 0.7))
    return result


def bin_(theme: Theme) -> Assembly:
    """Make a waste bin or basket."""
    rng = theme.rng
    wide, high = rng.uniform(0.2, 0.4), rng.uniform(0.25, 0.7)
    result = Assembly(wide, high, wide)
    kind = rng.choice((0, 2))
    result.add(kind, theme.pick("metal", "thing", "slats", "black"), (wide, high, wide))
    lid = (wide * 1.04, 0.03, wide * 1.04)
    result.add(kind, theme.pick("black", "thing"), lid, (0, high, 0))
    return result


DESK_THINGS = (papers, papers, book_pile, cup, bottle, package, leaning_frame, standing_books)
KITCHEN_THINGS = (cup, cup, bottle, bottle, bowl, package, appliance, papers, figure)
SHELF_THINGS = (standing_books, standing_books, book_pile, package, figure, bottle, leaning_frame)
LIVING_THINGS = (papers, book_pile, cup, bowl, figure, leaning_frame, bottle, package)
FLOOR_THINGS = (crate, bag, bin_, pot_plant, package, book_pile)


def strew(theme: Theme, assembly: Assembly, top: Top, kinds: Sequence[Maker], count: int) -> None:
    """Put small things on a top, at random places, as far as they fit.

    Args:
        theme: The place's materials.
        assembly: What the top belongs to; it gets the things' shapes.
        top: The rectangle.
        kinds: Functions that make things.
        count: How many to try.
    """
    rng = theme.rng
    taken: list[tuple[float, float, float]] = []
    for _ in range(count):
        thing = rng.choice(kinds)(theme)
        reach = math.hypot(thing.width, thing.depth) / 2
        free_x, free_z = top.width / 2 - thing.width / 2, top.depth / 2 - thing.depth / 2
        if free_x < 0 or free_z < 0 or thing.height > top.headroom:
            continue
        x, z = top.x + rng.uniform(-free_x, free_x), top.z + rng.uniform(-free_z, free_z)
        if any(math.hypot(x - a, z - b) < 0.75 * (reach + r) for a, b, r in taken):
            continue
        taken.append((x, z, reach))
        yaw = rng.gauss(0, 0.25) if rng.random() < 0.6 else rng.uniform(-math.pi, math.pi)
        assembly.put(thing, x, top.up, z, yaw)
