"""The result of a benchmark: rows, the growth of time with length, and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .breakdown import PARTS
from .measure import TreatmentResult


@dataclass(frozen=True)
class Row:
    """One treatment at one length.

    Attributes:
        frames: Length of the clip.
        schedule: Name of the treatment.
        tokens: Tokens of the clip.
        ms: Median latency of a pass.
        spread_ms: Interquartile range of the samples; None for a modelled row.
        n: Number of samples, 0 for a modelled row.
        modelled: True for an extrapolation, a·S + b·S² through the two longest measured lengths.
        peak_mb: Rise of memory in a pass, MB; None where it is unknown.
        tokens_per_s: Tokens of the clip ÷ latency.
        speed_up: Dense latency ÷ this one; None without dense.
        wall_share: Wall ÷ this latency, 1 at best; None without wall.
        bare_ms: Median latency of the global layers' attention calls alone; None without any.
        over_bare: (latency - wall) ÷ ``bare_ms``; None without wall.
        parts_ms: Milliseconds by part of a profiled pass, which is not a timed one, so that they do
            not add up to ``ms`` exactly; None for a modelled row.
    """

    frames: int
    schedule: str
    tokens: int
    ms: float
    spread_ms: float | None
    n: int
    modelled: bool
    peak_mb: float | None
    tokens_per_s: float
    speed_up: float | None
    wall_share: float | None
    bare_ms: float | None
    over_bare: float | None
    parts_ms: dict[str, float] | None


@dataclass(frozen=True)
class Benchmark:
    """All rows of a benchmark, with what they depend on.

    Attributes:
        model: Name of the model.
        grid: Rows and columns of patches of a frame.
        device: Name of the device.
        dtype: Precision of the parameters, and of autocast if it is on.
        backend: Kernel of scaled dot-product attention.
        backend_ms: Milliseconds of each kernel on one dense layer; empty if none was timed.
        clock: ``wall`` for time that passes, ``process`` for time that the process computes.
        seed: Seed of the random images.
        rows: Rows by length, then in the order of the treatments.
        environment: Versions, hardware and settings.
        date: Date, ISO 8601.
    """

    model: str
    grid: tuple[int, int]
    device: str
    dtype: str
    backend: str
    backend_ms: dict[str, float]
    clock: str
    seed: int
    rows: tuple[Row, ...]
    environment: dict[str, Any]
    date: str

    def row(self, frames: int, schedule: str) -> Row | None:
        """Return the row of a treatment at a length, or None."""
        found = (r for r in self.rows if (r.frames, r.schedule) == (frames, schedule))
        return next(found, None)

    def growth(self) -> dict[str, float]:
        """Return the growth exponent of each treatment measured at two lengths or more."""
        exponents = {}
        for name in dict.fromkeys(row.schedule for row in self.rows):
            points = [
                (row.frames, row.ms)
                for row in self.rows
                if row.schedule == name and not row.modelled
            ]
            if len(points) > 1:
                exponents[name] = growth_exponent(points)
        return exponents

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return asdict(self) | {"growth_exponent": self.growth()}


def growth_exponent(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of log time over log length, by least squares.

    Args:
        points: Pairs of length and time, at two different lengths or more.
    """
    logs = [(math.log(length), math.log(ms)) for length, ms in points]
    x_mean = math.fsum(x for x, _ in logs) / len(logs)
    y_mean = math.fsum(y for _, y in logs) / len(logs)
    above = math.fsum((x - x_mean) * (y - y_mean) for x, y in logs)
    return above / math.fsum((x - x_mean) ** 2 for x, _ in logs)


def modelled_ms(points: Sequence[tuple[int, float]], frames: int) -> float:
    """Return a·S + b·S² at ``frames`` through the two longest of the measured lengths.

    Args:
        points: Pairs of frames and milliseconds, at two different lengths or more.
        frames: The length S to extrapolate to.
    """
    (s, t), (u, v) = sorted(points)[-2:]
    quadratic = (v / u - t / s) / (u - s)
    return frames * (t / s + quadratic * (frames - s))


def rows_of(frames: int, tokens: int, measured: dict[str, TreatmentResult]) -> list[Row]:
    """Return the rows of one length, with the ratios between treatments."""
    dense, wall = measured.get("dense"), measured.get("wall")
    rows = []
    for name, each in measured.items():
        ms = each.latency.median_ms
        bare = None if each.bare is None else each.bare.median_ms
        over_bare = None
        if bare is not None and wall is not None:
            over_bare = (ms - wall.latency.median_ms) / bare
        rows.append(
            Row(
                frames=frames,
                schedule=name,
                tokens=tokens,
                ms=ms,
                spread_ms=each.latency.spread_ms,
                n=each.latency.n,
                modelled=False,
                peak_mb=each.peak_mb,
                tokens_per_s=1000 * tokens / ms,
                speed_up=None if dense is None else dense.latency.median_ms / ms,
                wall_share=None if wall is None else wall.latency.median_ms / ms,
                bare_ms=bare,
                over_bare=over_bare,
                parts_ms=each.breakdown.ms,
            )
        )
    return rows


def modelled_row(frames: int, tokens: int, ms: float, others: Sequence[Row]) -> Row:
    """Return a row of dense that was modelled, not measured."""
    wall = next((row.ms for row in others if row.schedule == "wall"), None)
    return Row(
        frames=frames,
        schedule="dense",
        tokens=tokens,
        ms=ms,
        spread_ms=None,
        n=0,
        modelled=True,
        peak_mb=None,
        tokens_per_s=1000 * tokens / ms,
        speed_up=1.0,
        wall_share=None if wall is None else wall / ms,
        bare_ms=None,
        over_bare=None,
        parts_ms=None,
    )


COLUMNS = (
    "frames",
    "schedule",
    "ms",
    "spread",
    "n",
    "peak MB",
    "tokens/s",
    "speed-up",
    "wall ÷ ms",
    "over bare",
)


def cells(row: Row) -> list[str]:
    """Return the texts of a row, one for each of `COLUMNS`."""

    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        str(row.frames),
        row.schedule + (" (modelled)" if row.modelled else ""),
        number(row.ms, 1),
        number(row.spread_ms, 1),
        str(row.n),
        number(row.peak_mb, 0),
        number(row.tokens_per_s, 0),
        number(row.speed_up),
        number(row.wall_share),
        number(row.over_bare),
    ]


def part_cells(row: Row) -> list[str]:
    """Return a row's milliseconds by part, in the order of `PARTS`."""
    assert row.parts_ms is not None, "a modelled row has no parts"
    return [str(row.frames), row.schedule, *(f"{row.parts_ms[part]:.1f}" for part in PARTS)]
