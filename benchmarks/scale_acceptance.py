"""Acceptance criteria of speed at scale, which `benchmarks/scale.py` checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from acceptance import Criterion

from spark3r.benchmark.result import Row, growth_exponent

PEER = "fastvggt"
OURS = "token_stride:2:8"
"""Our most faithful schedule: one patch in eight among keys and values, with mass correction."""
DA3_SCHEDULE = "uniform:4:16"


def find(rows: Sequence[Row], frames: int, schedule: str) -> Row:
    """Return the row of one schedule at one length."""
    return next(row for row in rows if (row.frames, row.schedule) == (frames, schedule))


def reference_criteria(rows: Sequence[Row]) -> list[Criterion]:
    """Judge the reference model, at the lengths that were measured."""
    lengths = sorted({row.frames for row in rows})
    criteria: list[Criterion] = []
    if 512 in lengths:
        paper, wall, dense = (find(rows, 512, name) for name in ("paper", "wall", "dense"))
        assert paper.bare_ms is not None
        assert paper.parts_ms is not None
        allowed = 1.3 * paper.bare_ms + 0.05 * wall.ms
        over = paper.ms - wall.ms
        criteria.append(
            Criterion(
                "512 frames, paper: above the wall by 1.3 bare + 5 %",
                f"{over:.0f} ms, allowed {allowed:.0f} ms",
                over <= allowed,
            )
        )
        share = (paper.parts_ms["matching"] + paper.parts_ms["merging"]) / sum(
            paper.parts_ms.values()
        )
        criteria.append(
            Criterion("512 frames, paper: matching and merging", f"{share:.1%}", share <= 0.05)
        )
        criteria.append(selection_criterion(paper, wall))
        if paper.peak_mb is not None and dense.peak_mb is not None:
            criteria.append(
                Criterion(
                    "512 frames, paper: peak memory below dense",
                    f"{paper.peak_mb:.0f} MB, dense {dense.peak_mb:.0f} MB",
                    paper.peak_mb < dense.peak_mb,
                )
            )
    if {128, 1024} <= set(lengths):
        exponent = growth_exponent(
            [(row.frames, row.ms) for row in rows if row.schedule == "paper"]
        )
        criteria.append(
            Criterion("paper: growth exponent at most 1.10", f"{exponent:.3f}", exponent <= 1.10)
        )
    for length in lengths:
        for ours in ("paper", OURS):
            ratio = times_as_fast(rows, length, ours)
            if length >= 128 and ratio is not None:
                requirement = f"{length} frames, {ours}: faster than {PEER}"
                text = f"{ratio:.2f} times as fast"
                criteria.append(Criterion(requirement, text, ratio > 1))
    return criteria


def times_as_fast(rows: Sequence[Row], frames: int, schedule: str) -> float | None:
    """Return the speed of a schedule ÷ the peer's; None if one of them was not timed."""
    ms = {row.schedule: row.ms for row in rows if row.frames == frames}
    return ms[PEER] / ms[schedule] if {PEER, schedule} <= ms.keys() else None


def peer_criteria(
    timed: Sequence[Sequence[Row]], deviations: Sequence[dict[str, Any]]
) -> list[Criterion]:
    """Judge at each length whether one of our schedules beats the peer in speed and deviation.

    Args:
        timed: Rows of several runs. A ratio comes from the first run that timed both schedules.
        deviations: Rows that ``scale.py deviation`` writes.
    """
    criteria = []
    for frames in sorted({row["frames"] for row in deviations}):
        found, texts = False, []
        for row in deviations:
            if row["frames"] != frames or row["schedule"] == PEER:
                continue
            ratios = (times_as_fast(rows, frames, row["schedule"]) for rows in timed)
            ratio = next((each for each in ratios if each is not None), None)
            if ratio is None:
                continue
            difference = row["log_depth_minus_peer"][0]
            found |= ratio > 1 and difference <= 0
            texts.append(
                f"{row['schedule']} {ratio:.2f} times as fast, log depth {100 * difference:+.2f} "
                "points"
            )
        if texts:
            requirement = f"{frames} frames: faster than {PEER} at equal or lower deviation"
            criteria.append(Criterion(requirement, "; ".join(texts), found))
    return criteria


def selection_criterion(paper: Row, wall: Row) -> Criterion:
    """Judge the time that selecting keys and values adds to the projections.

    The wall has the same projections. Parts are measured in a single pass, so the noise is their
    share of the spreads of whole passes.
    """
    assert paper.parts_ms is not None
    assert wall.parts_ms is not None
    ours, least = (parts["global projections"] for parts in (paper.parts_ms, wall.parts_ms))
    noise = least * sum((row.spread_ms or 0.0) / row.ms for row in (paper, wall))
    return Criterion(
        "512 frames, paper: selection 0 within noise",
        f"{ours - least:+.0f} ms of {least:.0f} ms, noise {noise:.0f} ms",
        ours - least <= noise,
    )


def da3_criteria(rows: Sequence[Row]) -> list[Criterion]:
    """Judge Depth-Anything-3: its speed-up as a share of the largest possible one."""
    criteria = []
    for length in sorted({row.frames for row in rows}):
        share = find(rows, length, "wall").ms / find(rows, length, DA3_SCHEDULE).ms
        requirement = f"da3-small, {length} frames: speed-up at least 85 % of dense ÷ wall"
        criteria.append(Criterion(requirement, f"{share:.1%}", share >= 0.85))
    return criteria
