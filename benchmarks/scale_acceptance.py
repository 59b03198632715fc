"""The bars of speed at scale, as `benchmarks/scale.py` judges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spark3r.benchmark.result import Row, growth_exponent

PEER = "fastvggt"
OURS = "token_stride:2:8"
"""Ours where faithfulness counts: every eighth patch among keys and values, mass corrected."""
DA3_SCHEDULE = "uniform:4:16"

Bar = tuple[str, bool, str]


def find(rows: Sequence[Row], frames: int, schedule: str) -> Row:
    return next(row for row in rows if (row.frames, row.schedule) == (frames, schedule))


def reference_bars(rows: Sequence[Row]) -> list[Bar]:
    """Bars on the reference model, those whose lengths were measured."""
    lengths = sorted({row.frames for row in rows})
    bars: list[Bar] = []
    if 512 in lengths:
        paper, wall, dense = (find(rows, 512, name) for name in ("paper", "wall", "dense"))
        assert paper.bare_ms is not None
        assert paper.parts_ms is not None
        allowed = 1.3 * paper.bare_ms + 0.05 * wall.ms
        over = paper.ms - wall.ms
        told = f"{over:.0f} ms, allowed {allowed:.0f} ms"
        bars.append(("512 frames, paper: above the wall by 1.3 bare + 5 %", over <= allowed, told))
        share = (paper.parts_ms["matching"] + paper.parts_ms["merging"]) / sum(
            paper.parts_ms.values()
        )
        bars.append(("512 frames, paper: matching and merging", share <= 0.05, f"{share:.1%}"))
        bars.append(("512 frames, paper: selection 0 within noise", *selection(paper, wall)))
        if paper.peak_mb is not None and dense.peak_mb is not None:
            told = f"{paper.peak_mb:.0f} MB, dense {dense.peak_mb:.0f} MB"
            bars.append(
                ("512 frames, paper: peak memory below dense", paper.peak_mb < dense.peak_mb, told)
            )
    if {128, 1024} <= set(lengths):
        exponent = growth_exponent(
            [(row.frames, row.ms) for row in rows if row.schedule == "paper"]
        )
        bars.append(("paper: growth exponent at most 1.10", exponent <= 1.10, f"{exponent:.3f}"))
    for length in lengths:
        for ours in ("paper", OURS):
            ratio = times_as_fast(rows, length, ours)
            if length >= 128 and ratio is not None:
                name = f"{length} frames, {ours}: faster than {PEER}"
                bars.append((name, ratio > 1, f"{ratio:.2f} times as fast"))
    return bars


def times_as_fast(rows: Sequence[Row], frames: int, schedule: str) -> float | None:
    """Return how much faster than the peer a schedule is, None if one of them was not timed."""
    ms = {row.schedule: row.ms for row in rows if row.frames == frames}
    return ms[PEER] / ms[schedule] if {PEER, schedule} <= ms.keys() else None


def peer_bars(timed: Sequence[Sequence[Row]], deviations: Sequence[dict[str, Any]]) -> list[Bar]:
    """Judge at each length whether any of our schedules beats the peer in both respects.

    Args:
        timed: Rows of runs; a ratio is of one run, the first that has both.
        deviations: Rows of the record that ``deviation`` writes.
    """
    bars = []
    for frames in sorted({row["frames"] for row in deviations}):
        found, told = False, []
        for row in deviations:
            if row["frames"] != frames or row["schedule"] == PEER:
                continue
            ratios = (times_as_fast(rows, frames, row["schedule"]) for rows in timed)
            ratio = next((each for each in ratios if each is not None), None)
            if ratio is None:
                continue
            difference = row["log_depth_minus_peer"][0]
            found |= ratio > 1 and difference <= 0
            told.append(
                f"{row['schedule']} {ratio:.2f} times as fast, log depth {100 * difference:+.2f} "
                "points"
            )
        if told:
            name = f"{frames} frames: faster than {PEER} at equal or lower deviation"
            bars.append((name, found, "; ".join(told)))
    return bars


def selection(paper: Row, wall: Row) -> tuple[bool, str]:
    """Judge what selecting keys and values adds to the projections that the wall has as well.

    Parts are of a single pass; the noise is their share of the spreads of whole passes.
    """
    assert paper.parts_ms is not None
    assert wall.parts_ms is not None
    ours, least = (row.parts_ms["global projections"] for row in (paper, wall))
    noise = least * sum((row.spread_ms or 0.0) / row.ms for row in (paper, wall))
    told = f"{ours - least:+.0f} ms of {least:.0f} ms, noise {noise:.0f} ms"
    return ours - least <= noise, told


def da3_bars(rows: Sequence[Row]) -> list[Bar]:
    """Speed-up over dense as a share of the largest there can be."""
    bars = []
    for length in sorted({row.frames for row in rows}):
        share = find(rows, length, "wall").ms / find(rows, length, DA3_SCHEDULE).ms
        name = f"da3-small, {length} frames: speed-up at least 85 % of dense ÷ wall"
        bars.append((name, share >= 0.85, f"{share:.1%}"))
    return bars


def print_bars(bars: Sequence[Bar]) -> None:
    print()
    for name, met, told in bars:
        print(f"{'met    ' if met else 'NOT MET'}  {name}: {told}")
