"""Furniture that stands on a floor; each function makes one piece, with what lies on it."""

from __future__ import annotations

import math

from .shapes import Assembly, Top
from .theme import Theme
from .things import (
    DESK_THINGS,
    KITCHEN_THINGS,
    LIVING_THINGS,
    SHELF_THINGS,
    Maker,
    laptop,
    monitor,
    pot_plant,
    strew,
    table_lamp,
)


def table(theme: Theme) -> Assembly:
    """Make a dining or work table with things on it."""
    rng = theme.rng
    wide, deep = rng.uniform(0.9, 2.2), rng.uniform(0.6, 1.0)
    result = _table(theme, wide, deep, rng.uniform(0.68, 0.78))
    kinds = rng.choice((DESK_THINGS, KITCHEN_THINGS, LIVING_THINGS))
    strew(theme, result, result.tops[0], kinds, rng.randrange(2, 14))
    return result


def coffee_table(theme: Theme) -> Assembly:
    """Make a low table with things on it."""
    rng = theme.rng
    result = _table(theme, rng.uniform(0.5, 1.2), rng.uniform(0.45, 0.7), rng.uniform(0.32, 0.48))
    strew(theme, result, result.tops[0], LIVING_THINGS, rng.randrange(1, 8))
    return result


def desk(theme: Theme) -> Assembly:
    """Make a desk with a display or laptop and the things around it."""
    rng = theme.rng
    wide, deep, high = rng.uniform(1.0, 1.8), rng.uniform(0.6, 0.8), rng.uniform(0.7, 0.78)
    result = _table(theme, wide, deep, high)
    if rng.random() < 0.6:
        size = (rng.uniform(0.35, 0.5), high - 0.06, deep * 0.9)
        side = rng.choice((-1, 1)) * (wide - size[0]) * 0.48
        result.box(theme.pick("front"), size, (side, 0.0, 0.0))
    shown = monitor(theme) if rng.random() < 0.7 else laptop(theme)
    result.put(shown, rng.uniform(-0.2, 0.2), high, deep * 0.2, rng.uniform(-0.3, 0.3))
    free = Top(rng.choice((-0.3, 0.3)) * wide, high, 0.0, wide * 0.4, deep, 1.0)
    strew(theme, result, free, DESK_THINGS, rng.randrange(2, 10))
    if rng.random() < 0.4:
        result.put(table_lamp(theme), -wide * 0.4, high, deep * 0.3)
    return result


def _table(theme: Theme, wide: float, deep: float, high: float) -> Assembly:
    """Make a table: a round one on a column, one with four legs, or one on two boards."""
    rng = theme.rng
    result = Assembly(wide, high, deep)
    top, leg = theme.pick("wood", "wood", "board", "white"), theme.pick("wood", "metal", "black")
    thick, draw = rng.uniform(0.02, 0.06), rng.random()
    if draw < 0.2:
        round_ = min(wide, deep * 1.3)
        result.width = result.depth = round_
        result.tube(top, (round_, thick, round_), (0, high - thick, 0))
        result.tube(leg, (0.08, high - thick, 0.08))
        result.tube(leg, (round_ * 0.5, 0.03, round_ * 0.5))
        result.tops.append(Top(0, high, 0, round_ * 0.7, round_ * 0.7, 1.0))
        return result
    result.box(top, (wide, thick, deep), (0, high - thick, 0))
    if draw < 0.85:
        wide_leg = rng.uniform(0.03, 0.1)
        x, z = wide / 2 - wide_leg, deep / 2 - wide_leg
        for side, end in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            result.box(leg, (wide_leg, high - thick, wide_leg), (side * x, 0, end * z))
        if rng.random() < 0.6:
            frame = (wide - 2 * wide_leg, 0.08, deep - 2 * wide_leg)
            result.box(leg, frame, (0, high - thick - 0.08, 0))
    else:
        for side in (-1, 1):
            result.box(leg, (0.05, high - thick, deep * 0.9), (side * wide * 0.42, 0, 0))
    result.tops.append(Top(0, high, 0, wide * 0.95, deep * 0.95, 1.2))
    return result


def chair(theme: Theme) -> Assembly:
    """Make a chair with a back of slats or of one piece."""
    rng = theme.rng
    wide, deep, seat = rng.uniform(0.38, 0.48), rng.uniform(0.4, 0.5), rng.uniform(0.42, 0.48)
    high = rng.uniform(0.8, 1.0)
    result = Assembly(wide, high, deep)
    frame = theme.pick("wood", "wood", "metal", "black", "paint")
    cushion = theme.pick("wood", "cloth", "black", "paint")
    leg = rng.uniform(0.025, 0.045)
    result.box(cushion, (wide, rng.uniform(0.03, 0.07), deep), (0, seat - 0.04, 0))
    x, z = wide / 2 - leg / 2, deep / 2 - leg / 2
    lean = rng.uniform(0.0, 0.2)
    if rng.random() < 0.2:  # an office chair
        result.tube(frame, (0.06, seat - 0.1, 0.06), (0, 0.06, 0))
        result.box(frame, (wide * 1.1, 0.04, 0.06), (0, 0.04, 0), (0.5, 0, 0))
        result.box(frame, (wide * 1.1, 0.04, 0.06), (0, 0.04, 0), (2.07, 0, 0))
    else:
        for side, end in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
            result.box(frame, (leg, seat, leg), (side * x, 0, end * z))
    back, above = high - seat, z + 0.5 * lean * (high - seat)
    for side in (-1, 1):
        result.box(frame, (leg, back, leg), (side * x, seat, above), (0, lean, 0))
    if rng.random() < 0.5:
        for index in range(rng.randrange(2, 5)):
            up = seat + back * (0.3 + 0.2 * index)
            if up + 0.06 < high:
                result.box(frame, (wide, 0.06, 0.02), (0, up, z + lean * (up - seat)), (0, lean, 0))
    else:
        size = (wide * 0.9, back * rng.uniform(0.5, 0.8), 0.03)
        result.box(
            cushion, size, (0, high - size[1], z + lean * (back - size[1] / 2)), (0, lean, 0)
        )
    if rng.random() < 0.15:  # clothes over the back
        result.box(
            theme.pick("cloth"), (wide * 1.05, 0.4, 0.08), (0, high - 0.38, above), (0, lean, 0)
        )
    return result


def stool(theme: Theme) -> Assembly:
    """Make a stool or pouffe."""
    rng = theme.rng
    wide, high = rng.uniform(0.3, 0.55), rng.uniform(0.38, 0.75)
    result = Assembly(wide, high, wide)
    if rng.random() < 0.4:
        result.tube(theme.pick("cloth", "cover"), (wide, high * 0.6, wide))
        return result
    result.tube(theme.pick("wood", "cloth", "black"), (wide, 0.05, wide), (0, high - 0.05, 0))
    for side in (-1, 1):
        for end in (-1, 1):
            place = (side * wide * 0.33, 0, end * wide * 0.33)
            result.tube(theme.pick("wood", "metal"), (0.03, high - 0.04, 0.03), place)
    return result


def sofa(theme: Theme) -> Assembly:
    """Make a sofa with cushions."""
    return _seat(theme, theme.rng.uniform(1.4, 2.3))


def armchair(theme: Theme) -> Assembly:
    """Make an armchair."""
    return _seat(theme, theme.rng.uniform(0.75, 1.0))


def _seat(theme: Theme, wide: float) -> Assembly:
    rng = theme.rng
    deep, seat, high = rng.uniform(0.8, 1.0), rng.uniform(0.38, 0.46), rng.uniform(0.7, 0.95)
    result = Assembly(wide, high, deep)
    cover = theme.pick("cover", "cover", "paint", "black")
    arm, back = rng.uniform(0.1, 0.24), rng.uniform(0.15, 0.28)
    result.box(cover, (wide, seat - 0.16, deep), (0, 0.06, 0))
    result.box(cover, (wide, high - 0.06, back), (0, 0.06, deep / 2 - back / 2))
    for side in (-1, 1):
        height = rng.uniform(0.52, 0.68)
        result.box(cover, (arm, height, deep), (side * (wide - arm) / 2, 0.02, 0))
    places = max(1, round((wide - 2 * arm) / 0.65))
    each = (wide - 2 * arm) / places
    for index in range(places):
        x = -wide / 2 + arm + each * (index + 0.5)
        size = (each * 0.97, 0.16, deep - back)
        result.box(cover, size, (x, seat - 0.12, -back / 2), (0, 0, 0))
        place = (x, seat, deep / 2 - back - 0.08)
        result.box(cover, (each * 0.95, high - seat, 0.16), place, (0, 0.15, 0))
        if rng.random() < 0.45:
            turn = (rng.uniform(-0.5, 0.5), 0.4, rng.uniform(-0.4, 0.4))
            place = (x, seat + 0.02, deep / 2 - back - 0.22)
            result.ball(theme.pick("cloth", "strong"), (0.42, 0.4, 0.18), place, turn)
    if rng.random() < 0.3:
        result.box(theme.pick("cloth"), (0.5, 0.03, deep * 0.9), (wide * 0.2, seat + 0.04, 0))
    return result


def bed(theme: Theme) -> Assembly:
    """Make a bed with pillows and a blanket."""
    rng = theme.rng
    wide, long, high = rng.uniform(0.9, 1.9), rng.uniform(1.95, 2.15), rng.uniform(0.4, 0.6)
    result = Assembly(wide, rng.uniform(0.7, 1.2), long)
    frame = theme.pick("wood", "wood", "metal", "cover")
    result.box(frame, (wide, high * 0.5, long), (0, 0.08, 0))
    result.box(
        theme.pick("white", "cloth"), (wide * 0.97, high * 0.5, long * 0.97), (0, high * 0.5, 0)
    )
    blanket = (wide * 1.04, high * 0.55, long * rng.uniform(0.55, 0.75))
    result.box(theme.pick("cover", "cloth"), blanket, (0, high * 0.52, -long * 0.15))
    result.box(frame, (wide, result.height, 0.06), (0, 0, long / 2))
    for side in (-1, 1) if wide > 1.3 else (0,):
        turn = (rng.uniform(-0.2, 0.2), -0.3, 0.0)
        place = (side * wide * 0.24, high * 0.95, long * 0.4)
        result.ball(theme.pick("white", "cloth"), (0.65, 0.2, 0.42), place, turn)
    return result


def bookshelf(theme: Theme) -> Assembly:
    """Make an open shelf filled with books and other things."""
    rng = theme.rng
    wide, high, deep = rng.uniform(0.6, 1.2), rng.uniform(0.8, 2.2), rng.uniform(0.25, 0.4)
    result = Assembly(wide, high, deep)
    board = theme.pick("wood", "white", "wood", "black", "metal")
    thick, rows = 0.025, max(2, round(high / rng.uniform(0.3, 0.42)))
    for side in (-1, 1):
        result.box(board, (thick, high, deep), (side * (wide - thick) / 2, 0, 0))
    if rng.random() < 0.7:
        back = theme.pick("wood", "white", "wall")
        result.box(back, (wide, high, 0.01), (0, 0, deep / 2 - 0.005))
    each = high / rows
    for row in range(rows + 1):
        result.box(board, (wide, thick, deep), (0, min(row * each, high - thick), 0))
        if row < rows:
            _shelf_row(theme, result, (wide - 2 * thick, each - thick, deep), row * each + thick)
    if high < 1.6:
        strew(theme, result, Top(0, high, 0, wide, deep, 1.0), SHELF_THINGS, rng.randrange(1, 7))
    return result


def _shelf_row(
    theme: Theme, assembly: Assembly, space: tuple[float, float, float], up: float
) -> None:
    """Fill one board: a row of books, one textured box of many things, or single things."""
    rng, (wide, high, deep) = theme.rng, space
    draw = rng.random()
    if draw < 0.45:
        long = wide * rng.uniform(0.4, 1.0)
        size = (long, high * rng.uniform(0.65, 0.95), deep * rng.uniform(0.5, 0.85))
        x = rng.choice((-1, 1)) * (wide - long) / 2
        assembly.box(theme.pick("books"), size, (x, up, deep * 0.05))
        if long < wide * 0.6:
            top = Top(-x / abs(x) * long / 2 if x else 0, up, 0, wide - long - 0.04, deep, high)
            strew(theme, assembly, top, SHELF_THINGS, 1)
    elif draw < 0.6:
        size = (wide * 0.95, high * rng.uniform(0.6, 0.9), deep * 0.6)
        assembly.box(theme.pick("clutter"), size, (0, up, deep * 0.1))
    elif draw < 0.85:
        strew(theme, assembly, Top(0, up, 0, wide, deep, high), SHELF_THINGS, rng.randrange(1, 5))


def cabinet(theme: Theme) -> Assembly:
    """Make a chest of drawers or sideboard with things on it."""
    rng = theme.rng
    wide, high, deep = rng.uniform(0.5, 1.8), rng.uniform(0.45, 1.2), rng.uniform(0.35, 0.55)
    result = Assembly(wide, high, deep)
    body, front = theme.pick("wood", "white", "paint", "strong"), theme.pick("front", "panel")
    foot = rng.choice((0.0, 0.08, 0.15))
    if foot:
        for side in (-1, 1):
            result.box(body, (0.05, foot, deep * 0.9), (side * wide * 0.45, 0, 0))
    result.box(body, (wide, high - foot, deep), (0, foot, 0))
    columns = max(1, round(wide / rng.uniform(0.4, 0.8)))
    for index in range(columns):
        x = (index + 0.5) * wide / columns - wide / 2
        size = (wide / columns - 0.02, high - foot - 0.04, 0.02)
        result.box(front, size, (x, foot + 0.02, -deep / 2))
    kinds: tuple[Maker, ...] = (*LIVING_THINGS, table_lamp, pot_plant)
    top = Top(0, high, 0, wide, deep, 1.2)
    strew(theme, result, top, kinds, rng.randrange(1, 9))
    return result


def wardrobe(theme: Theme) -> Assembly:
    """Make a wardrobe or tall cupboard."""
    rng = theme.rng
    wide, high, deep = rng.uniform(0.8, 2.2), rng.uniform(1.7, 2.3), rng.uniform(0.45, 0.65)
    result = Assembly(wide, high, deep)
    result.box(theme.pick("wood", "white", "paint"), (wide, high, deep))
    doors = max(2, round(wide / 0.5))
    front, handle = theme.pick("panel", "front", "wood"), theme.pick("metal", "black")
    for index in range(doors):
        x = (index + 0.5) * wide / doors - wide / 2
        result.box(front, (wide / doors - 0.015, high - 0.1, 0.02), (x, 0.05, -deep / 2))
        place = (x + (0.4 if index % 2 == 0 else -0.4) * wide / doors, high * 0.5, -deep / 2 - 0.02)
        result.box(handle, (0.02, 0.15, 0.02), place)
    if rng.random() < 0.3:
        strew(theme, result, Top(0, high, 0, wide, deep, 0.4), SHELF_THINGS, 3)
    return result


def counter(theme: Theme) -> Assembly:
    """Make a kitchen's row: cupboards, a worktop with things, and shelves or cupboards above."""
    rng = theme.rng
    count = rng.randrange(2, 6)
    wide, high, deep = 0.6 * count, rng.uniform(0.86, 0.95), 0.6
    result = Assembly(wide, high, deep)
    front, top = theme.pick("front", "panel", "strong"), theme.pick("board", "wood", "black")
    handle = theme.pick("metal", "black")
    result.box(theme.pick("black", "white"), (wide, 0.1, deep - 0.08), (0, 0, 0.04))
    result.box(theme.pick("white"), (wide, high - 0.14, deep - 0.04), (0, 0.1, 0.02))
    for index in range(count):
        x = (index + 0.5) * 0.6 - wide / 2
        oven = rng.random() < 0.2
        material = theme.pick("black", "metal") if oven else front
        result.box(material, (0.59, high - 0.16, 0.02), (x, 0.11, -deep / 2 + 0.01))
        result.box(handle, (0.3, 0.015, 0.03), (x, high - 0.12, -deep / 2))
    result.box(top, (wide, 0.04, deep + 0.03), (0, high - 0.04, 0))
    if rng.random() < 0.6:
        size = (rng.uniform(0.45, 0.6), 0.01, 0.45)
        x = rng.uniform(-0.5, 0.5) * (wide - size[0])
        result.box(theme.pick("metal", "black"), size, (x, high - 0.003, 0))
        result.tube(theme.pick("metal"), (0.03, 0.28, 0.03), (x, high, 0.22))
    space = Top(0, high, 0, wide, deep, 0.42)
    strew(theme, result, space, KITCHEN_THINGS, rng.randrange(3, 9) * count // 2)
    above = rng.random()
    if above < 0.5:
        hung = theme.pick("front", "panel", "white")
        for index in range(count):
            if rng.random() < 0.85:
                x = (index + 0.5) * 0.6 - wide / 2
                result.box(hung, (0.585, 0.7, 0.35), (x, 1.4, deep / 2 - 0.175))
    elif above < 0.9:
        for level in range(rng.randrange(1, 3)):
            up = 1.3 + 0.35 * level
            result.box(theme.pick("wood", "white"), (wide, 0.025, 0.25), (0, up, deep / 2 - 0.125))
            board = Top(0, up + 0.025, deep / 2 - 0.125, wide, 0.25, 0.32)
            strew(theme, result, board, KITCHEN_THINGS, 2 * count)
    return result


def fridge(theme: Theme) -> Assembly:
    """Make a fridge, washing machine or other large appliance."""
    rng = theme.rng
    wide, high, deep = 0.6, rng.choice((0.85, 1.4, 1.85)), 0.62
    result = Assembly(wide, high, deep)
    body = theme.pick("white", "metal", "black", "strong")
    result.box(body, (wide, high, deep))
    if high > 1:
        split = high * rng.choice((0.35, 0.65))
        result.box(theme.pick("black"), (wide, 0.012, 0.01), (0, split, -deep / 2))
        result.box(theme.pick("metal"), (0.025, 0.4, 0.04), (-0.25, split + 0.08, -deep / 2))
        for _ in range(rng.choice((0, 0, 3))):
            size = (rng.uniform(0.05, 0.2), rng.uniform(0.05, 0.25), 0.004)
            place = (rng.uniform(-0.15, 0.2), rng.uniform(0.6, high - 0.3), -deep / 2)
            result.box(theme.pick("page", "picture", "strong"), size, place)
    else:
        result.tube(
            theme.pick("black"), (0.36, 0.02, 0.36), (0, 0.4, -deep / 2), (0, math.pi / 2, 0)
        )
        result.box(theme.pick("black", "metal"), (0.5, 0.08, 0.01), (0, 0.74, -deep / 2))
    return result


def television(theme: Theme) -> Assembly:
    """Make a television on a low board."""
    rng = theme.rng
    wide, high, deep = rng.uniform(1.0, 1.9), rng.uniform(0.35, 0.6), rng.uniform(0.35, 0.5)
    screen = rng.uniform(0.7, min(1.4, wide))
    result = Assembly(wide, high + screen * 0.6, deep)
    result.box(theme.pick("wood", "white", "black"), (wide, high, deep))
    result.box(
        theme.pick("front", "black"), (wide * 0.9, high * 0.7, 0.01), (0, high * 0.1, -deep / 2)
    )
    result.box(theme.pick("black"), (screen * 0.3, 0.06, 0.2), (0, high, 0))
    result.box(theme.pick("black"), (screen, screen * 0.57, 0.05), (0, high + 0.05, 0.03))
    shown = (screen * 0.96, screen * 0.52, 0.006)
    result.box(theme.pick("screen", "black"), shown, (0, high + 0.075, 0.002))
    strew(theme, result, Top(0, high, -0.1, wide, deep * 0.4, 0.3), LIVING_THINGS, 3)
    return result


def floor_lamp(theme: Theme) -> Assembly:
    """Make a standing lamp."""
    rng = theme.rng
    high, wide = rng.uniform(1.3, 1.8), rng.uniform(0.25, 0.45)
    result = Assembly(0.3, high, 0.3)
    pole = theme.pick("metal", "black", "wood")
    result.tube(pole, (0.28, 0.03, 0.28))
    result.tube(pole, (0.025, high - 0.2, 0.025))
    result.tube(theme.pick("light", "white", "cloth"), (wide, 0.28, wide), (0, high - 0.28, 0))
    return result


def radiator(theme: Theme) -> Assembly:
    """Make a radiator with ribs."""
    rng = theme.rng
    wide, high = rng.uniform(0.6, 1.6), rng.uniform(0.4, 0.6)
    result = Assembly(wide, high + 0.12, 0.1)
    result.box(theme.pick("white"), (wide, high, 0.04), (0, 0.12, 0.03))
    ribs = int(wide / 0.12)
    for index in range(ribs):
        x = (index + 0.5) * wide / ribs - wide / 2
        result.box(theme.pick("white"), (0.05, high * 0.96, 0.06), (x, 0.13, 0.0))
    return result


def clothes_rack(theme: Theme) -> Assembly:
    """Make a rail or stand with clothes and bags."""
    rng = theme.rng
    wide, high = rng.uniform(0.5, 1.3), rng.uniform(1.5, 1.8)
    result = Assembly(wide, high, 0.45)
    pole = theme.pick("metal", "black", "wood")
    for side in (-1, 1):
        result.tube(pole, (0.03, high, 0.03), (side * wide / 2, 0, 0))
        result.box(pole, (0.04, 0.04, 0.45), (side * wide / 2, 0, 0))
    result.box(pole, (wide, 0.03, 0.03), (0, high - 0.03, 0))
    x = -wide / 2 + 0.1
    while x < wide / 2 - 0.1:
        long, thick = rng.uniform(0.6, 1.1), rng.uniform(0.04, 0.12)
        turn = (rng.uniform(-0.3, 0.3), 0.0, 0.0)
        result.box(
            theme.pick("cloth", "thing"), (thick, long, 0.42), (x, high - 0.06 - long, 0), turn
        )
        x += thick + rng.uniform(0.01, 0.1)
    return result


def dining_set(theme: Theme) -> Assembly:
    """Make a table with chairs around it."""
    rng = theme.rng
    result = table(theme)
    wide, deep = result.width, result.depth
    seat = chair(theme)
    places = (-0.25, 0.25) if wide > 1.2 else (0.0,)
    for share, side in ((place, end) for place in places for end in (-1, 1)):
        if rng.random() < 0.8:
            z = side * (deep / 2 + rng.uniform(-0.1, 0.3))
            facing = math.pi if side < 0 else 0.0
            result.put(seat, share * wide, 0.0, z, facing + rng.gauss(0, 0.2))
    result.depth += 0.9
    return result


WALL_FURNITURE: dict[str, tuple[Maker, ...]] = {
    "living": (sofa, bookshelf, cabinet, television, armchair, floor_lamp, pot_plant, bookshelf),
    "kitchen": (counter, counter, fridge, cabinet, bookshelf, table, stool),
    "office": (desk, desk, bookshelf, cabinet, wardrobe, pot_plant, table, clothes_rack),
    "bedroom": (bed, wardrobe, cabinet, desk, armchair, floor_lamp, clothes_rack, bookshelf),
    "hall": (cabinet, bookshelf, clothes_rack, pot_plant, wardrobe, stool, radiator),
    "store": (bookshelf, bookshelf, wardrobe, table, counter, fridge, desk, clothes_rack),
}
MIDDLE_FURNITURE: dict[str, tuple[Maker, ...]] = {
    "living": (coffee_table, armchair, dining_set, stool, sofa),
    "kitchen": (dining_set, dining_set, table, stool, counter),
    "office": (desk, dining_set, chair, table),
    "bedroom": (bed, stool, armchair, chair),
    "hall": (stool, chair, cabinet, pot_plant),
    "store": (table, chair, bookshelf, cabinet),
}
