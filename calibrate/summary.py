"""The result of a calibration on stdout: a table for people, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spark3r.tables import print_table

from .budget import number_text
from .quality import mean_figures
from .result import Calibration
from .verify import Verified

FIGURES: Mapping[str, str] = {
    "error.depth": "depth error",
    "error.rotation_deg": "rotation error °",
    "error.translation_deg": "direction error °",
    "consistency.log_ratio": "consistency",
    "deviation.depth_log": "depth deviation",
    "deviation.rotation_deg": "rotation deviation °",
}
"""Figures of the summary table, and what they are called there."""


def rows(result: Calibration) -> list[dict[str, Any]]:
    """Return what every treatment measured, as plain values.

    Args:
        result: The calibration.
    """
    found = []
    for each in result.verified:
        figures = mean_figures(each.qualities) if each.qualities else {}
        latency_ms = None if each.latency is None else each.latency.median_ms
        found.append(
            {
                "schedule": each.name,
                "exported": each.name == result.chosen.name,
                "predicted_ms": each.predicted_ms,
                "measured_ms": latency_ms,
                "of_budget": None if latency_ms is None else latency_ms / result.budget.clip_ms,
                "speed_up": None if latency_ms is None else result.latency.dense_ms / latency_ms,
                "score": each.score,
                "figures": figures,
            }
        )
    return found


def holds(result: Calibration) -> bool:
    """Whether the exported schedule was measured within 5 % of its budget."""
    latency = result.chosen.latency
    return latency is not None and latency.median_ms <= 1.05 * result.budget.clip_ms


def print_summary(result: Calibration, output: Path, report: Sequence[Path]) -> None:
    """Print the table, what does not hold, and how the profile is used."""
    table = rows(result)
    shown = [name for name in FIGURES if any(name in row["figures"] for row in table)]
    heads = ["schedule", "predicted ms", "measured ms", "of budget", "speed-up", "score"]
    print_table(
        [*heads, *(FIGURES[name] for name in shown)],
        [
            [
                f"{row['schedule']}{' (exported)' if row['exported'] else ''}",
                _ms(row["predicted_ms"]),
                _ms(row["measured_ms"]),
                "-" if row["of_budget"] is None else f"{100 * row['of_budget']:.0f}%",
                "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}",
                "-" if row["score"] is None else f"{row['score']:.4f}",
                *(
                    f"{row['figures'][name]:.4f}" if name in row["figures"] else "-"
                    for name in shown
                ),
            ]
            for row in table
        ],
    )
    print(
        f"\nlatency per clip of {result.budget.frames} frames; quality on held-out clips, judged "
        f"by {result.source} (score 0 is dense, smaller is better)"
    )
    for reason in () if result.decision is None else result.decision.reasons:
        print(reason)
    if result.gaps:
        gaps = ", ".join(f"{name} {value:.4f}" for name, value in result.gaps.items())
        print(f"score of the exported schedule on the three sets of clips: {gaps}")
    if not result.budget.binds:
        print(f"nothing is reduced: {result.budget.text}")
    elif not holds(result):
        print(f"the budget does not hold as measured: {_over(result.chosen, result)}")
    for path in (output, *report):
        print(f"wrote {path}")
    print(f'use it with spark3r.apply(model, "{output}")')


def print_json(result: Calibration, output: Path, report: Sequence[Path]) -> None:
    """Print the result as one JSON object."""
    budget = result.budget
    document = {
        "profile": str(output),
        "report": [str(path) for path in report],
        "exported": result.chosen.name,
        "interrupted": result.interrupted,
        "holds": holds(result),
        "budget": {
            "asked": budget.budget.text,
            "frames": budget.frames,
            "clip_ms": budget.clip_ms,
            "frame_ms": budget.frame_ms,
            "speed_up": budget.speed_up,
            "binds": budget.binds,
            "suggestion": budget.suggestion,
        },
        "judged_by": result.source,
        "latency_model": {
            "median_error": result.latency.report.median_error,
            "largest_error": result.latency.report.largest_error,
        },
        "schedules": rows(result),
        "decision": [] if result.decision is None else list(result.decision.reasons),
        "score_by_clips": result.gaps,
        "trials": 0 if result.found is None else len(result.found.trials),
        "failed_trials": 0
        if result.found is None
        else sum(trial.score is None for trial in result.found.trials),
    }
    print(json.dumps(document, indent=2))


def _ms(value: float | None) -> str:
    return "-" if value is None else number_text(value)


def _over(chosen: Verified, result: Calibration) -> str:
    if chosen.latency is None:
        return "the exported schedule does not fit into memory at the target length"
    return (
        f"{number_text(chosen.latency.median_ms)} ms per clip where "
        f"{number_text(result.budget.clip_ms)} ms are allowed"
    )
