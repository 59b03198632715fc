"""Pictures of a calibration: sensitivities, schedules by layer, and the trade-off."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from spark3r.schedule import Schedule

from ..search.optimizer import Found
from .result import Calibration

COLOURS: Mapping[str, str] = {
    "search": "#c1272d",
    "knapsack": "#e08214",
    "paper": "#2166ac",
    "uniform": "#1b7837",
    "dense": "#222222",
    "wall": "#888888",
}
"""Colour of each kind of schedule in all pictures."""

CEILING = 2.0
"""Ratio to the worst verified score above which scores are drawn at the edge. A ruined schedule of
the search would squeeze all others together."""

_AXES = {"query": "queries", "key_value": "keys and values"}


def sensitivity_picture(
    table: pd.DataFrame, metric: str, names: Mapping[tuple[str, str], str]
) -> Figure:
    """Draw the sensitivities, layers down and factors across, in a panel per axis and operators.

    Operators that do the same on an axis share a panel.

    Args:
        table: Sensitivities around the dense model.
        metric: The metric, such as ``score.error``.
        names: Names of operators, by axis and their text in the table.
    """
    part = table[(table["metric"] == metric) & (table["factor"] > 1)]
    panels: list[tuple[str, pd.DataFrame]] = []
    for axis, what in _AXES.items():
        for operators, rows in part[part["axis"] == axis].groupby("operators", sort=True):
            grid = 100 * rows.pivot_table(index="layer", columns="factor", values="mean")
            name = names.get((axis, str(operators)), "")
            if not any(grid.equals(other) for title, other in panels if title.startswith(what)):
                panels.append((f"{what}\n{name}", grid))
    bound = max([float(np.nanmax(np.abs(grid.to_numpy()))) for _, grid in panels] + [1e-9])
    has_gains = any(float(np.nanmin(grid.to_numpy())) < 0 for _, grid in panels)
    norm = Normalize(-bound if has_gains else 0.0, bound)
    layers = max(len(grid) for _, grid in panels)
    columns = [len(grid.columns) for _, grid in panels]
    figure = Figure(figsize=(1.6 + 0.48 * sum(columns), 1.5 + 0.3 * layers), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True, width_ratios=columns)[0]
    image = None
    for axis, (title, grid) in zip(axes, panels, strict=True):
        values = grid.to_numpy()
        image = axis.imshow(
            values, cmap="RdBu_r" if has_gains else "Reds", norm=norm, aspect="auto"
        )
        for row, column in np.ndindex(values.shape):
            value = values[row, column]
            colour = "white" if abs(value) > 0.6 * bound else "#222222"
            text = "" if np.isnan(value) else f"{value:+.1f}"
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(grid.columns)), [str(factor) for factor in grid.columns])
        axis.set_yticks(range(len(grid.index)), [str(layer) for layer in grid.index])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("factor")
        axis.tick_params(length=0)
    axes[0].set_ylabel("global layer")
    if image is not None:
        label = f"{metric.removeprefix('score.')}, % (dense is 0)"
        figure.colorbar(image, ax=list(axes), label=label, shrink=0.9)
    figure.suptitle("One layer reduced, all others dense", fontsize=10)
    return figure


def schedules_picture(schedules: Mapping[str, Schedule], chosen: str) -> Figure:
    """Draw the factors of schedules by layer, queries above, keys and values below.

    Open marks stand for keys and values that are thinned inside frames, filled ones for whole
    frames.
    """
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    ordered = sorted(schedules, key=lambda name: name == chosen)  # draws the chosen one on top
    for number, name in enumerate(ordered):
        schedule = schedules[name]
        # Schedules are side by side within a layer, so that equal factors do not hide each other.
        layers = np.arange(len(schedule.layers)) + 0.12 * (number - (len(ordered) - 1) / 2)
        colour = _colour(name)
        label = f"{name} (exported)" if name == chosen else name
        width = 2.0 if name == chosen else 0.8
        for axis, factors in (
            (above, [rule.query for rule in schedule.layers]),
            (below, [rule.key_value for rule in schedule.layers]),
        ):
            axis.plot(layers, factors, color=colour, linewidth=width, alpha=0.5, label=label)
            for place, factor, rule in zip(layers, factors, schedule.layers, strict=True):
                operators = rule.operators or schedule.operators
                inside = axis is below and not operators.key_value.whole_frames
                face = "white" if inside else colour
                axis.plot(place, factor, "o", color=colour, markerfacecolor=face, markersize=6)
    for axis, title in ((above, "queries"), (below, "keys and values")):
        axis.set_ylabel(f"factor, {title}")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        most = max(
            factor
            for each in schedules.values()
            for rule in each.layers
            for factor in [rule.query if axis is above else rule.key_value]
        )
        axis.set_ylim(0.8, max(2, 1.25 * most))
        axis.grid(alpha=0.25)
    below.set_xlabel("global layer (open: patches of every frame, filled: whole frames)")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles, labels = above.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=8)
    return figure


def trade_off_picture(result: Calibration, found: Found) -> Figure:
    """Draw score against latency of the trials and the verified schedules.

    The latencies of trials and of rivals that were not timed are predicted.

    Args:
        result: The calibration.
        found: Its search.
    """
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axis = figure.subplots()
    verified = [
        (each.name, each.latency.median_ms if each.latency else each.predicted_ms, each.score)
        for each in result.verification.schedules
        if each.score is not None
    ]
    worst = max((score for _, _, score in verified), default=0.0)
    ceiling = CEILING * worst if worst > 0 else np.inf
    beyond, best = 0, np.inf
    front: list[tuple[float, float]] = []
    scored = [(trial.latency_ms, trial.score.mean, trial) for trial in found.trials if trial.score]
    for latency_ms, score, trial in sorted(scored, key=lambda each: each[:2]):
        place = (latency_ms, 100 * min(score, ceiling))
        marker = "^" if score > ceiling else "o"
        axis.scatter(*place, s=16, marker=marker, alpha=0.5, color=_colour(trial.name))
        beyond += score > ceiling
        if score < best:
            best = score
            front.append((place[0], 100 * score))
    if front:
        places = zip(*front, strict=True)
        axis.step(*places, where="post", color="#999999", lw=1, label="best of the trials")
    for name, latency_ms, score in verified:
        chosen = name == result.chosen.name
        axis.scatter(
            latency_ms,
            100 * score,
            s=260 if chosen else 80,
            marker="*" if chosen else "D",
            color=_colour(name),
            edgecolor="black",
            zorder=5 if chosen else 4,
            label=f"{name}{' (exported)' * chosen}",
        )
    axis.scatter(result.dense_ms, 0.0, marker="s", color=COLOURS["dense"], label="dense", zorder=3)
    axis.axvline(result.wall_ms, color=COLOURS["wall"], linestyle=":", label="wall")
    axis.axvline(result.allowed_ms, color="black", linestyle="--", linewidth=1, label="budget")
    axis.axhline(0.0, color="black", linewidth=0.5)
    if beyond:
        axis.set_ylim(top=105 * ceiling)
        axis.plot([], [], "^", color="#999999", markersize=4, label=f"beyond the axis: {beyond}")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("latency per clip, ms")
    axis.set_ylabel(f"{result.source}, % (dense is 0, smaller is better)")
    axis.set_title(
        "Dots: trials, predicted latency, search clips.\n"
        "Large: held-out clips; the latency of the exported schedule is measured",
        fontsize=9,
    )
    figure.legend(loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def _colour(name: str) -> str:
    return COLOURS.get(name.partition(" ")[0], "#555555")
