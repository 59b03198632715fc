"""Colours that things have: random within the ranges of real materials."""

from __future__ import annotations

import colorsys
import random

Colour = tuple[float, float, float]  # as encoded in an image, [0, 1]

NEUTRAL_WALL_SHARE = 0.7
# Reds, oranges and blues come oftener than greens and purples.
HUES = ((-0.05, 0.05), (-0.05, 0.05), (0.05, 0.15), (0.52, 0.7), (0.52, 0.7), (0.0, 1.0))


def hsv(
    rng: random.Random,
    hue: tuple[float, float],
    saturation: tuple[float, float],
    value: tuple[float, float],
) -> Colour:
    """Draw a colour from ranges; hues may exceed 1 and wrap."""
    return colorsys.hsv_to_rgb(
        rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value)
    )


def wall_colour(rng: random.Random) -> Colour:
    """Draw a wall's colour: mostly pale and nearly grey, seldom strong."""
    if rng.random() < NEUTRAL_WALL_SHARE:
        return hsv(rng, (0.05, 0.18), (0.0, 0.18), (0.6, 0.95))
    return hsv(rng, rng.choice(HUES), (0.1, 0.5), (0.4, 0.9))


def wood_colour(rng: random.Random) -> Colour:
    """Draw a wood's colour, from pale birch to dark walnut."""
    value = rng.uniform(0.25, 0.85)
    return colorsys.hsv_to_rgb(rng.uniform(0.04, 0.11), rng.uniform(0.3, 0.7), value)


def any_colour(rng: random.Random) -> Colour:
    """Draw the colour of a thing: black, white and grey as often as strong colours."""
    draw = rng.random()
    if draw < 0.2:
        return hsv(rng, (0.0, 1.0), (0.0, 0.2), (0.04, 0.2))
    if draw < 0.45:
        return hsv(rng, (0.05, 0.2), (0.0, 0.12), (0.75, 0.97))
    if draw < 0.6:
        return hsv(rng, (0.0, 1.0), (0.0, 0.15), (0.3, 0.7))
    if draw < 0.8:
        return hsv(rng, (0.02, 0.16), (0.2, 0.6), (0.25, 0.8))  # brown and beige
    return hsv(rng, rng.choice(HUES), (0.3, 0.9), (0.25, 0.85))


def strong_colour(rng: random.Random) -> Colour:
    """Draw a saturated colour."""
    return hsv(rng, rng.choice(HUES), (0.55, 0.98), (0.35, 0.85))


def mixed(first: Colour, second: Colour, share: float) -> Colour:
    """Return a blend that has this share of the second colour."""
    a, b, c = (x + share * (y - x) for x, y in zip(first, second, strict=True))
    return a, b, c


def scaled(colour: Colour, factor: float) -> Colour:
    """Return a colour that is brighter or darker, at most white."""
    a, b, c = (min(1.0, x * factor) for x in colour)
    return a, b, c
