"""The result of a calibration on stdout: a table, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from spark3r.cli.tables import print_table

from ..budget import number_text
from ..defaults import ALLOWED, OVER, SOURCES, Source
from ..measure.quality import mean_figures
from ..measure.score import score
from ..measure.statistics import Mean, mean_interval
from ..verify.held_out import Verified, VerifiedSchedule
from .result import Calibration

PROFILING = ("drift", "sensitivity", "sensitivity, all factors", "paper's probe")
SEARCHING = ("search", "search, corrected")

PARTS = {
    "clips": ("rendering", "reading"),
    "timing": ("length to time", "latency", "present pace"),
    "dense runs": ("dense",),
    "sensitivities": PROFILING,
    "search": ("search",),
    "selection": ("selection",),
    "verification": ("verification",),
    "trade-off": ("trade-off",),
}
"""Parts of a calibration, with the beginnings of the names of their steps."""


def rows(result: Calibration) -> list[dict[str, Any]]:
    """Return the measurements of every treatment as plain values.

    ``scores`` holds the mean over held-out clips with its 95 % interval, by source.
    """
    found = []
    for each in result.verification.treatments:
        latency_ms = None if each.latency is None else each.latency.median_ms
        found.append(
            {
                "schedule": each.name,
                "exported": each.name == result.chosen.name,
                "predicted_ms": each.predicted_ms if isinstance(each, VerifiedSchedule) else None,
                "measured_ms": latency_ms,
                "spread_ms": None if each.latency is None else each.latency.spread_ms,
                "samples_ms": [] if each.latency is None else list(each.latency.samples_ms),
                "of_budget": None if latency_ms is None else latency_ms / result.allowed_ms,
                "speed_up": None if latency_ms is None else result.dense_ms / latency_ms,
                "scores": {
                    source: mean._asdict() for source, mean in _scores(each, result).items()
                },
                "figures": mean_figures(each.qualities) if each.qualities else {},
            }
        )
    return found


def missed(result: Calibration) -> str | None:
    """Return how the measurements miss the budget or deviation, None if they meet it."""
    chosen = result.chosen
    if not result.budget.binds:
        return None
    most = result.settings.max_deviation
    if most is not None:
        score = chosen.score
        if score is None or score <= ALLOWED * most:
            return None
        return (
            f"the exported schedule deviates by {score:.2%} on the held-out clips, and "
            f"{most:.2%} are allowed"
        )
    if chosen.latency is None:
        return "the exported schedule does not fit into memory at the target length"
    if chosen.latency.median_ms <= (1 + OVER) * result.allowed_ms:
        return None
    return (
        f"the exported schedule takes {number_text(chosen.latency.median_ms)} ms per clip, and "
        f"{number_text(result.allowed_ms)} ms are allowed"
    )


def latency_text(result: Calibration) -> str:
    """Return the pace, the errors of the latency model and how dense was timed, in one line."""
    lines = [f"latencies hold at the pace at which {result.pace.text}"]
    changed = [each for each in result.slowdowns if each != 1]
    if changed:
        lines.append(
            f"the machine later took {min(changed):.2f} to {max(changed):.2f} times as long, and "
            "the timings are divided by that"
        )
    lines.append(result.latency.text)
    if not result.latency.dense_fits:
        lines.append(
            f"dense does not fit at {result.budget.frames} frames: the latency model extrapolates "
            "its latency"
        )
    elif result.latency.dense is None:
        lines.append("dense was not timed there: its latency is predicted")
    return "; ".join(lines)


def percent_text(mean: Mapping[str, float] | None, source: str) -> str:
    """Return a mean score with its interval in percent, a dash if there is none."""
    if mean is None:
        return "-"
    sign = "" if source == "deviation" else "+"
    value, low, high = (100 * mean[key] for key in ("mean", "low", "high"))
    if high - low < 0.005:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} ({low:{sign}.2f} to {high:{sign}.2f})"


def seconds_by_part(result: Calibration) -> dict[str, float]:
    """Return where the time went, in seconds by part; ``other`` is loading and whatever is left."""
    parts = dict.fromkeys((*PARTS, "other"), 0.0)
    for step, seconds in result.seconds.items():
        part = next((part for part, starts in PARTS.items() if step.startswith(starts)), "other")
        parts[part] += seconds
    named = sum(seconds for part, seconds in parts.items() if part != "other")
    parts["other"] = max(0.0, result.elapsed_s - named)
    return {part: seconds for part, seconds in parts.items() if seconds >= 0.05}


def work_text(result: Calibration) -> str:
    """Return where the time went, in one line."""
    parts = ", ".join(f"{part} {taken:.1f}" for part, taken in seconds_by_part(result).items())
    return f"{result.elapsed_s:.0f} s in all: {parts}"


def print_summary(result: Calibration, output: Path | None, report: Sequence[Path]) -> None:
    """Print the table, warnings, and how to use the profile.

    Args:
        result: The calibration.
        output: File of the profile; None if it could not be written.
        report: Files of the pictures and the page.
    """
    table = rows(result)
    sources = [name for name in SOURCES if any(name in row["scores"] for row in table)]
    heads = ["schedule", "predicted ms", "measured ms", "of budget", "speed-up"]
    print_table(
        [*heads, *(f"{name} %" for name in sources)],
        [
            [
                f"{row['schedule']}{' (exported)' if row['exported'] else ''}",
                _number(row["predicted_ms"]),
                _number(row["measured_ms"]),
                "-" if row["of_budget"] is None else f"{100 * row['of_budget']:.0f}%",
                "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}",
                *(percent_text(row["scores"].get(name), name) for name in sources),
            ]
            for row in table
        ],
    )
    print()
    if sources:
        clips = len(result.verification.dense.qualities)
        print(
            f"latency per clip of {result.budget.frames} frames; quality on {clips} held-out "
            f"clip{'s, with 95 % intervals' * (clips > 1)}: error and consistency against dense "
            "(0 is as good), deviation from dense (1 if every metric is at its tolerance); "
            "smaller is better"
        )
        print(f"judged by {result.source}")
    for reason in () if result.decision is None else result.decision.reasons:
        print(reason)
    if result.gaps:
        gaps = ", ".join(f"{name} {100 * value:+.2f} %" for name, value in result.gaps.items())
        print(f"{result.source} of the exported schedule on each set of clips: {gaps}")
    if result.split.skipped:
        print(f"{len(result.split.skipped)} images could not be read and were left out")
    print(latency_text(result))
    print(work_text(result))
    if not result.budget.binds:
        print(f"nothing is reduced: {result.budget.text}")
    elif (why := missed(result)) is not None:
        print(f"the goal is missed: {why}; what comes nearest is exported")
    names = result.profile.schedule_names()
    if len(names) > 1:
        print(f"schedules in the profile: {', '.join(names)}")
    if output is None:
        return
    for path in (output, *report):
        print(f"wrote {path}")
    print(f'use it with spark3r.apply(model, "{output}")')


def print_json(
    result: Calibration, output: Path | None, report: Sequence[Path], status: int
) -> None:
    """Print the result as one JSON object, with the exit status.

    The other arguments are those of `print_summary`.
    """
    budget, fit = result.budget, result.latency.fit
    trials = () if result.found is None else result.found.trials
    document = {
        "status": status,
        "profile": None if output is None else str(output),
        "report": [str(path) for path in report],
        "from": None if result.origin is None else str(result.origin),
        "exported": result.chosen.name,
        "interrupted": result.interrupted,
        "holds": missed(result) is None,
        "missed": missed(result),
        "budget": {
            "text": budget.budget.text,
            "frames": budget.frames,
            "clip_ms": budget.clip_ms,
            "frame_ms": budget.frame_ms,
            "speed_up": budget.speed_up,
            "binds": budget.binds,
            "suggestion": budget.suggestion,
        },
        "judged_by": result.source,
        "latency_model": {
            "fitted_frames": result.latency.model.frames,
            "extension": result.latency.extension,
            "measured_over_predicted": dict(result.latency.errors),
            "layers": [
                {"rule": None if rule is None else asdict(rule), "samples_ms": each.samples_ms}
                for rule, each in (() if fit is None else fit.layers)
            ],
            "passes": {}
            if fit is None
            else {name: each.samples_ms for name, each in fit.passes.items()},
        },
        "pace": {
            "frames": int(result.pace.images.shape[0]),
            "wall_ms": result.pace.wall_ms,
            "dense_ms": result.pace.dense_ms,
            "slowdowns": list(result.slowdowns),
        },
        "dense_fits": result.latency.dense_fits,
        "dense_timed": result.latency.dense is not None,
        "skipped": list(result.split.skipped),
        "schedules": rows(result),
        "decision": [] if result.decision is None else list(result.decision.reasons),
        "score_by_clips": result.gaps,
        "trials": len(trials),
        "failed_trials": sum(trial.score is None for trial in trials),
        "seconds": result.seconds,
        "seconds_by_part": seconds_by_part(result),
        "elapsed_s": result.elapsed_s,
        "dense_runs": {
            "profiling": result.dense_runs(*PROFILING),
            "search": result.dense_runs(*SEARCHING),
        },
    }
    print(json.dumps(document, indent=2))


def _scores(each: Verified, result: Calibration) -> dict[Source, Mean]:
    dense, objective = result.verification.dense.qualities, result.settings.objective
    if not each.qualities or not dense:
        return {}
    found: dict[Source, Mean] = {}
    for source in SOURCES:
        if source != "error" or all(quality.error is not None for quality in dense):
            pairs = zip(each.qualities, dense, strict=True)
            values = [score(quality, before, source, objective) for quality, before in pairs]
            found[source] = mean_interval(values)
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else number_text(value)
