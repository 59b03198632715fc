"""Rooms put together from models, photographed surfaces and synthesised ones."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import bpy

from ..scenes.colours import any_colour, wall_colour
from ..scenes.places import Footprint, Opening, Place, at_wall, wall_frame
from .catalogue import Catalogue, Model
from .stage import SKIES, Corner, Stage

WALL_THINGS = (
    ("^sofa", "couch"),
    ("bookcase", "shelves"),
    ("cabinet", "cupboard", "dresser", "drawers"),
    ("wardrobe", "fireplace"),
    ("bed$",),
    ("desk$", "piano$"),
    ("armchair",),
    ("plant", "ficus", "yucca", "bamboo"),
    ("television", "vanity", "TV stand"),
    ("crate", "barrel", "box", "chest", "trunk"),
    ("chair",),
    ("fridge", "refrigerator", "oven", "washing machine", "stove"),
    ("sink", "island", "counter", "washbasin"),
    ("lamp$",),
    ("radiator", "heater"),
)
LOOSE_THINGS = (
    ("chair$",),
    ("stool", "puff", "bench"),
    ("box", "crate", "basket", "bag", "suitcase", "briefcase", "bin", "trash"),
    ("plant", "tree"),
    ("toy", "ball", "dog", "cat", "bear", "guitar", "scooter"),
    ("coffee table", "^table$"),
)
FLOORS = ("planks", "tiles", "stone", "fabric")
WALLS = ("plaster", "plaster", "wallpaper", "bricks", "tiles", "wood", "stone")


def furnish(stage: Stage, catalogue: Catalogue) -> tuple[Place, list[Model]]:
    """Fill a stage with a room.

    Args:
        stage: An empty stage.
        catalogue: The models and surfaces.

    Returns:
        The place that cameras move in, with x and z of `Place` for Blender's x and y, and the
        models that were used.
    """
    rng = stage.rng
    width, depth = rng.uniform(3.0, 6.2), rng.uniform(3.0, 6.0)
    height = rng.uniform(2.4, 3.0)
    place = Place(width, depth, height, indoors=True, shell=((0, 0, 0), (width, height, depth)))
    window = _surfaces(stage, catalogue, place)
    used: list[Model] = []
    _along_walls(stage, catalogue, place, window, used)
    _table(stage, catalogue, place, used)
    for words in rng.choices(LOOSE_THINGS, k=rng.randrange(2, 11)):
        _loose(stage, catalogue, place, words, used)
    _rug(stage, catalogue, place)
    for side in range(4):
        _hang(stage, catalogue, place, side, window)
    _light(stage, place, window[0])
    return place, used


def _surface(stage: Stage, catalogue: Catalogue, tiles: tuple[str, ...]) -> bpy.types.Material:
    """Return a photographed or synthesised surface, or plain paint."""
    rng = stage.rng
    draw, rough = rng.random(), rng.uniform(0.3, 0.9)
    if draw < 0.35:
        return stage.photograph(rng.choice(catalogue.surfaces), rough)
    if draw < 0.75:
        return stage.painted(rng.choice(tiles), rough)
    return stage.plain([c * c for c in wall_colour(rng)], rough)


def _surfaces(stage: Stage, catalogue: Catalogue, place: Place) -> tuple[int, Opening]:
    """Build floor, ceiling and walls; return the side with the window, and the window."""
    rng = stage.rng
    x, y, z = place.width, place.depth, place.height
    stage.thing()
    floor = _surface(stage, catalogue, FLOORS)
    stage.quad([(0, 0, 0), (x, 0, 0), (x, y, 0), (0, y, 0)], floor, rng.uniform(0.8, 2.0))
    stage.thing()
    ceiling = stage.plain((0.82, 0.82, 0.8))
    stage.quad([(0, 0, z), (0, y, z), (x, y, z), (x, 0, z)], ceiling, 1.0)
    common = _surface(stage, catalogue, WALLS)
    side = rng.randrange(4)
    length = wall_frame(place, side)[0]
    wide = rng.uniform(0.3, 0.6) * length
    left = rng.uniform(0.1, length - wide - 0.1)
    window = Opening(left, left + wide, rng.choice((0.1, 0.8, 1.0)), rng.uniform(1.9, 2.25), True)
    for wall in range(4):
        stage.thing()
        material = common if rng.random() < 0.6 else _surface(stage, catalogue, WALLS)
        whole = wall_frame(place, wall)[0]
        tile = rng.uniform(0.8, 2.5)
        parts = [(0.0, whole, 0.0, z)]
        if wall == side:
            parts = [
                (0.0, window.left, 0.0, z),
                (window.right, whole, 0.0, z),
                (window.left, window.right, 0.0, window.bottom),
                (window.left, window.right, window.top, z),
            ]
        for a, b, low, high in parts:
            stage.quad(_on_wall(place, wall, a, b, low, high, 0.0), material, tile)
    _window(stage, place, side, window)
    return side, window


def _on_wall(
    place: Place, side: int, left: float, right: float, low: float, high: float, away: float
) -> list[Corner]:
    """Return the corners of a rectangle on a wall, from its lower left as seen from inside."""
    (x0, y0), (x1, y1) = (at_wall(place, side, along, away) for along in (left, right))
    return [(x0, y0, low), (x1, y1, low), (x1, y1, high), (x0, y0, high)]


def _window(stage: Stage, place: Place, side: int, window: Opening) -> None:
    """Give the window a frame, and perhaps curtains."""
    rng = stage.rng
    frame = stage.plain((0.8, 0.8, 0.78) if rng.random() < 0.7 else (0.25, 0.14, 0.07))
    stage.thing()
    width = window.right - window.left
    bars = [window.left, window.right - 0.06, window.left + width * rng.choice((0.33, 0.5))]
    for left in bars:
        corners = _on_wall(place, side, left, left + 0.06, window.bottom, window.top, -0.03)
        stage.quad(corners, frame, 1.0)
    for low in (window.bottom, window.top - 0.06):
        corners = _on_wall(place, side, window.left, window.right, low, low + 0.06, -0.03)
        stage.quad(corners, frame, 1.0)
    if rng.random() < 0.5:
        curtain = stage.painted("folds", 0.9)
        for left, right in ((-0.25, 0.15), (0.85, 1.25)):
            stage.thing()
            ends = (window.left + left * width, window.left + right * width)
            stage.quad(_on_wall(place, side, *ends, 0.05, window.top + 0.15, 0.06), curtain, 0.0)


def _stand(
    stage: Stage, place: Place, model: Model, x: float, y: float, yaw: float, gap: float
) -> bool:
    """Set a model down if there is room for it; its front looks away from the wall of that yaw."""
    width, depth, height = model.size
    cos, sin = abs(math.cos(yaw)), abs(math.sin(yaw))
    half_x, half_y = (cos * width + sin * depth) / 2, (sin * width + cos * depth) / 2
    print_ = Footprint((x - half_x, x + half_x), (y - half_y, y + half_y), height)
    inside = min(print_.x[0], print_.z[0]) > -0.01 and print_.x[1] < place.width + 0.01
    if not inside or print_.z[1] > place.depth + 0.01 or height > place.height - 0.05:
        return False
    if any(print_.overlaps(other, gap) for other in place.taken):
        return False
    place.taken.append(print_)
    place.sights.append((x, min(max(height, 0.5), 1.3), y))
    # Walls are numbered clockwise as seen from above, and Blender turns the other way.
    stage.place(model, x, y, 0.0, -yaw)
    return True


def _along_walls(
    stage: Stage,
    catalogue: Catalogue,
    place: Place,
    window: tuple[int, Opening],
    used: list[Model],
) -> None:
    """Set furniture along the walls, with small things on it."""
    rng = stage.rng
    wanted = [*rng.sample(WALL_THINGS, len(WALL_THINGS)), *rng.choices(WALL_THINGS, k=12)]
    wanted = wanted[: rng.randrange(8, len(wanted))]
    for words in wanted:
        model = catalogue.pick(rng, words, 2.6)
        for _ in range(60 if model else 0):
            assert model is not None
            side = rng.randrange(4)
            length, yaw = wall_frame(place, side)
            half = model.size[0] / 2
            if length < 2 * half:
                continue
            along = rng.uniform(half, length - half)
            opening = window[1]
            before = along - half < opening.right and along + half > opening.left
            if side == window[0] and before and model.size[2] > opening.bottom + 0.1:
                continue
            x, y = at_wall(place, side, along, model.size[1] / 2 + 0.03)
            if _stand(stage, place, model, x, y, yaw, 0.05):
                used.append(model)
                if 0.35 < model.top < 1.5 and rng.random() < 0.8:
                    _strew(stage, catalogue, place, model, (x, y, yaw), rng.randrange(2, 9), used)
                break


def _strew(
    stage: Stage,
    catalogue: Catalogue,
    place: Place,
    model: Model,
    at: Corner,
    count: int,
    used: list[Model],
) -> None:
    """Put small things on the top of the model that was set down last; they may touch.

    Args:
        stage: The stage.
        catalogue: The models.
        place: The place, where the model gets as high as what stands on it.
        model: The model.
        at: Its x, y and yaw.
        count: Number of things.
        used: Models that were used, to which the things are added.
    """
    rng, (x, y, yaw) = stage.rng, at
    cos, sin = math.cos(yaw), math.sin(yaw)
    highest = model.size[2]
    for _ in range(count):
        small = catalogue.small(rng)
        free_x = (model.size[0] - small.broad) / 2
        free_y = (model.size[1] - small.broad) / 2
        if free_x <= 0 or free_y <= 0:
            continue
        u, v = rng.uniform(-free_x, free_x), rng.uniform(-free_y, free_y)
        where = (x + cos * u + sin * v, y - sin * u + cos * v)
        stage.place(small, *where, model.top, rng.uniform(0, 2 * math.pi))
        highest = max(highest, model.top + small.size[2])
        used.append(small)
    place.taken[-1] = replace(place.taken[-1], up=highest)


def _table(stage: Stage, catalogue: Catalogue, place: Place, used: list[Model]) -> None:
    """Set a table with chairs near the middle, with things on it."""
    rng = stage.rng
    table = catalogue.pick(rng, ("^table$", "oak table", "coffee table", "wooden.*table"), 1.8)
    chair = catalogue.pick(rng, ("chair$",), 0.7)
    if table is None or chair is None:
        return
    x = place.width / 2 + rng.uniform(-0.8, 0.8)
    y = place.depth / 2 + rng.uniform(-0.8, 0.8)
    if not _stand(stage, place, table, x, y, 0.0, 0.3):
        return
    used.append(table)
    _strew(stage, catalogue, place, table, (x, y, 0.0), rng.randrange(3, 12), used)
    for side in (-1, 1):
        if rng.random() < 0.75:
            at = x + side * (table.size[0] / 2 + rng.uniform(0.2, 0.5))
            yaw = side * math.pi / 2 + rng.uniform(-0.4, 0.4)
            if _stand(stage, place, chair, at, y, yaw, -0.2):
                used.append(chair)


def _loose(
    stage: Stage, catalogue: Catalogue, place: Place, words: tuple[str, ...], used: list[Model]
) -> None:
    """Set something down anywhere."""
    rng = stage.rng
    model = catalogue.pick(rng, words, 1.3)
    for _ in range(15 if model else 0):
        assert model is not None
        x, y = rng.uniform(0.3, place.width - 0.3), rng.uniform(0.3, place.depth - 0.3)
        if _stand(stage, place, model, x, y, rng.uniform(0, 2 * math.pi), 0.1):
            used.append(model)
            return


def _rug(stage: Stage, catalogue: Catalogue, place: Place) -> None:
    """Lay a carpet."""
    rng = stage.rng
    if rng.random() < 0.3:
        return
    half_x, half_y = rng.uniform(0.5, 1.3), rng.uniform(0.6, 1.5)
    x, y = rng.uniform(0.35, 0.65) * place.width, rng.uniform(0.35, 0.65) * place.depth
    half_x, half_y = min(half_x, place.width * 0.3), min(half_y, place.depth * 0.3)
    material = stage.painted("rug", 0.9)
    low, high = (x - half_x, y - half_y), (x + half_x, y + half_y)
    corners = [(low[0], low[1]), (high[0], low[1]), (high[0], high[1]), (low[0], high[1])]
    stage.thing()
    stage.quad([(a, b, 0.008) for a, b in corners], material, 0.0)


def _hang(
    stage: Stage, catalogue: Catalogue, place: Place, side: int, window: tuple[int, Opening]
) -> None:
    """Hang pictures and posters where the wall is free."""
    rng = stage.rng
    length, _ = wall_frame(place, side)
    taken: list[tuple[float, float]] = []
    if side == window[0]:
        taken.append((window[1].left - 0.4, window[1].right + 0.4))
    for _ in range(rng.randrange(0, 8)):
        width, height = rng.uniform(0.3, 1.1), rng.uniform(0.3, 0.8)
        left, low = rng.uniform(0.05, length - width - 0.05), rng.uniform(1.1, 1.6)
        if any(a < left + width and left < b for a, b in taken):
            continue
        taken.append((left, left + width))
        stage.thing()
        frame = stage.plain([c * c for c in any_colour(rng)], 0.4)
        corners = _on_wall(place, side, left, left + width, low, low + height, 0.015)
        stage.quad(corners, frame, 1.0)
        if rng.random() < 0.3:
            shown = stage.photograph(rng.choice(catalogue.pictures), 0.4)
        else:
            shown = stage.painted(rng.choice(("picture", "picture", "poster", "page")), 0.5)
        edge = rng.choice((0.0, 0.02, 0.05))
        inner = (left + edge, left + width - edge, low + edge, low + height - edge)
        stage.quad(_on_wall(place, side, *inner, 0.02), shown, 0.0)
        x, y = at_wall(place, side, left + width / 2, 0.0)
        place.sights.append((x, low + height / 2, y))


def _light(stage: Stage, place: Place, window: int) -> None:
    """Let in a photographed sky and perhaps the sun, and hang lamps below the ceiling."""
    rng = stage.rng
    stage.sky(rng.choice(SKIES), 10 ** rng.uniform(-0.4, 0.6))
    if rng.random() < 0.4:
        angle = wall_frame(place, window)[1] + rng.uniform(-0.8, 0.8)
        towards = (math.sin(angle), math.cos(angle), rng.uniform(0.3, 1.0))
        stage.sun(towards, rng.uniform(2.0, 8.0))
    for index in range(rng.choice((0, 1, 1, 2))):
        warm = rng.uniform(0.6, 1.0)
        at = (
            place.width * (0.3 + 0.4 * index) + rng.uniform(-0.3, 0.3),
            place.depth * rng.uniform(0.35, 0.65),
            place.height - rng.uniform(0.05, 0.5),
        )
        watts, size = 10 ** rng.uniform(1.0, 2.0), rng.uniform(0.1, 1.0)
        stage.lamp(at, watts, size, (1.0, 0.5 + 0.5 * warm, warm))


def rng_of(seed: int) -> random.Random:
    """Return the source of every choice of a room."""
    return random.Random(f"path:{seed}")
