"""The materials that the things of one place share, so that they look as if bought together."""

from __future__ import annotations

import random
from collections.abc import Callable

from .colours import any_colour, hsv, strong_colour, wall_colour
from .materials import Material, Palette

WHITE = (0.93, 0.92, 0.9)


def _print(palette: Palette, name: str, variants: int, gloss: float = 0.1) -> int:
    return palette.cover(name, 0.0, gloss, variants=variants)


def _tinted(palette: Palette, name: str, gloss: float) -> int:
    rng = palette.rng
    draw = rng.random()
    colour = wall_colour(rng) if draw < 0.5 else strong_colour(rng) if draw < 0.8 else WHITE
    return palette.cover(name, 0.0, gloss, variants=3, tint=colour)


def _shining(palette: Palette) -> int:
    rng = palette.rng
    tile = palette.tile("screen", 2)
    return palette.add(Material(tile, 0.0, (1, 1, 1), 0.3, 60.0, glow=rng.uniform(0.3, 1.2)))


# How many materials of a kind a place has at most, and how one is made.
KINDS: dict[str, tuple[int, Callable[[Palette], int]]] = {
    "wood": (2, lambda p: p.cover("wood", p.rng.uniform(0.6, 1.4), p.rng.uniform(0.0, 0.5))),
    "cloth": (3, lambda p: p.cover("fabric", p.rng.uniform(0.3, 1.2), variants=3)),
    "cover": (2, lambda p: p.cover("fabric", p.rng.uniform(0.5, 1.5), variants=3)),
    "paint": (3, lambda p: p.paint(any_colour(p.rng), p.rng.uniform(0.0, 0.5), 30.0)),
    "strong": (3, lambda p: p.paint(strong_colour(p.rng), p.rng.uniform(0.0, 0.6), 30.0)),
    "thing": (8, lambda p: p.paint(any_colour(p.rng), p.rng.uniform(0.0, 0.7), 40.0)),
    "metal": (2, lambda p: p.paint(hsv(p.rng, (0, 1), (0, 0.08), (0.3, 0.8)), 0.8, 60.0)),
    "black": (1, lambda p: p.paint(hsv(p.rng, (0, 1), (0, 0.2), (0.05, 0.16)), 0.5, 50.0)),
    "white": (1, lambda p: p.paint(WHITE, 0.2)),
    "ceramic": (2, lambda p: p.paint(hsv(p.rng, (0, 1), (0, 0.2), (0.8, 0.97)), 0.8, 80.0)),
    "board": (2, lambda p: p.cover("stone", p.rng.uniform(0.6, 1.5), 0.5)),
    "front": (2, lambda p: _tinted(p, "fronts", p.rng.uniform(0.0, 0.5))),
    "panel": (2, lambda p: _tinted(p, "panels", p.rng.uniform(0.0, 0.4))),
    "books": (3, lambda p: p.cover("spines", p.rng.uniform(0.4, 0.9), variants=3)),
    "clutter": (2, lambda p: p.cover("clutter", p.rng.uniform(0.6, 1.4))),
    "picture": (4, lambda p: _print(p, "picture", 4, p.rng.choice((0.0, 0.6)))),
    "poster": (2, lambda p: _print(p, "poster", 2)),
    "page": (3, lambda p: _print(p, "page", 2)),
    "screen": (2, _shining),
    "leaf": (2, lambda p: p.cover("foliage", p.rng.uniform(0.3, 0.8))),
    "rug": (2, lambda p: _print(p, "rug", 2, 0.0)),
    "curtain": (1, lambda p: p.cover("folds", p.rng.uniform(0.6, 1.3))),
    "slats": (2, lambda p: p.cover("slats", p.rng.uniform(0.5, 1.0))),
    "carton": (2, lambda p: p.paint(hsv(p.rng, (0.06, 0.1), (0.3, 0.5), (0.5, 0.75)))),
    "bark": (1, lambda p: p.cover("wood", 0.7, tint=hsv(p.rng, (0.05, 0.1), (0, 0.3), (0.5, 1.0)))),
    "brick": (2, lambda p: p.cover("bricks", p.rng.uniform(0.8, 1.4))),
    "wall": (2, lambda p: p.cover("plaster", p.rng.uniform(2.0, 5.0), variants=3)),
    "facade": (3, lambda p: p.cover("facade", p.rng.uniform(4.0, 9.0), 0.2, variants=3)),
    "paving": (2, lambda p: p.cover("paving", p.rng.uniform(0.8, 2.5))),
    "ground": (2, lambda p: p.cover("ground", p.rng.uniform(1.5, 4.0))),
    "light": (1, lambda p: p.lamp(hsv(p.rng, (0.08, 0.15), (0, 0.3), (1, 1)), 1.6)),
}


class Theme:
    """Makes materials on demand, few of a kind.

    Args:
        palette: Where materials are collected.
    """

    def __init__(self, palette: Palette) -> None:
        self.palette = palette
        self._made: dict[str, list[int]] = {}

    @property
    def rng(self) -> random.Random:
        """The source of every choice."""
        return self.palette.rng

    def pick(self, *kinds: str) -> int:
        """Return a material of one of some kinds of `KINDS`, the kind drawn at random."""
        kind = self.rng.choice(kinds)
        most, make = KINDS[kind]
        made = self._made.setdefault(kind, [])
        if len(made) < most and (not made or self.rng.random() < 0.6):
            made.append(make(self.palette))
            return made[-1]
        return self.rng.choice(made)
