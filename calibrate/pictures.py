"""Pictures of a calibration: sensitivities, schedules by layer, and the trade-off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spark3r.schedule import Schedule

from .search import Trial
from .selection import kind_of
from .verify import Verified

COLOURS: Mapping[str, str] = {
    "search": "#c1272d",
    "knapsack": "#e08214",
    "paper": "#2166ac",
    "uniform": "#1b7837",
    "dense": "#222222",
    "wall": "#888888",
}
"""Colour of each kind of schedule, the same in all pictures."""

_AXES = {"query": "queries", "key_value": "keys and values"}


@dataclass(frozen=True)
class TradeOff:
    """What the picture of the trade-off shows.

    Attributes:
        trials: All trials.
        verified: What was measured at the end.
        budget_ms: The budget.
        dense_ms: Dense latency.
        wall_ms: The wall.
        chosen: Name of the exported schedule.
        source: What schedules were judged by.
    """

    trials: Sequence[Trial]
    verified: Sequence[Verified]
    budget_ms: float
    dense_ms: float
    wall_ms: float
    chosen: str
    source: str


def sensitivity_picture(table: pd.DataFrame, metric: str, names: Mapping[str, str]) -> Figure:
    """Draw what each factor does, layers down and factors across, a panel per axis and operators.

    Args:
        table: Sensitivities around dense.
        metric: Which metric, such as ``score.error``.
        names: What to call operators, by their text in the table.
    """
    part = table[table["metric"] == metric]
    panels = [
        (axis, operators, rows)
        for axis in _AXES
        for operators, rows in part[part["axis"] == axis].groupby("operators", sort=True)
    ]
    grids = [
        rows.pivot_table(index="layer", columns="factor", values="mean") for _, _, rows in panels
    ]
    bound = max([float(np.nanmax(np.abs(grid.to_numpy()))) for grid in grids] + [1e-9])
    layers = max(len(grid) for grid in grids)
    figure = Figure(figsize=(1.2 + 2.6 * len(panels), 1.6 + 0.32 * layers), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    image = None
    for axis, (kind, operators, _), grid in zip(axes, panels, grids, strict=True):
        image = axis.imshow(
            grid.to_numpy(), cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -bound, bound), aspect="auto"
        )
        axis.set_xticks(range(len(grid.columns)), [str(factor) for factor in grid.columns])
        axis.set_yticks(range(len(grid.index)), [str(layer) for layer in grid.index])
        axis.set_title(f"{_AXES[kind]}\n{names.get(str(operators), '')}", fontsize=9)
        axis.set_xlabel("factor")
    axes[0].set_ylabel("global layer")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label=f"{metric} (dense is 0)", shrink=0.9)
    figure.suptitle("One layer reduced, all others dense", fontsize=10)
    return figure


def schedules_picture(schedules: Mapping[str, Schedule], chosen: str) -> Figure:
    """Draw the factors of schedules by layer, queries above, keys and values below."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for number, (name, schedule) in enumerate(schedules.items()):
        layers = np.arange(len(schedule.layers))
        style = {
            "color": COLOURS.get(name, "#555555"),
            "linewidth": 2.4 if name == chosen else 1.2,
            "linestyle": "-" if name == chosen else "--",
            "marker": "osD^v"[number % 5],
            "markersize": 4,
            "label": f"{name} (exported)" if name == chosen else name,
        }
        above.plot(layers, [rule.query for rule in schedule.layers], **style)
        below.plot(layers, [rule.key_value for rule in schedule.layers], **style)
    for axis, title in ((above, "queries"), (below, "keys and values")):
        axis.set_ylabel(f"factor, {title}")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylim(bottom=0.85)
        axis.grid(alpha=0.3)
    below.set_xlabel("global layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.legend(fontsize=8, ncols=2)
    return figure


def trade_off_picture(shown: TradeOff) -> Figure:
    """Draw score against predicted latency of all trials, and the measured finalists."""
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axis = figure.subplots()
    succeeded = [trial for trial in shown.trials if trial.score is not None]
    for kind in ("search", "knapsack", "paper", "uniform"):
        points = [
            (trial.latency_ms, trial.score.value)
            for trial in succeeded
            if kind_of(trial) == kind and trial.score is not None
        ]
        if points:
            latency, score = zip(*points, strict=True)
            label = f"{kind}: trials (predicted, search clips)"
            axis.scatter(latency, score, s=14, alpha=0.45, color=COLOURS[kind], label=label)
    for each in shown.verified:
        if each.schedule is None or each.latency is None or each.score is None:
            continue
        axis.scatter(
            each.latency.median_ms,
            each.score,
            s=150 if each.name == shown.chosen else 80,
            marker="*" if each.name == shown.chosen else "D",
            color=COLOURS.get(each.name, "#555555"),
            edgecolor="black",
            zorder=3,
            label=f"{each.name}: measured, held-out{' (exported)' * (each.name == shown.chosen)}",
        )
    axis.scatter(shown.dense_ms, 0.0, marker="s", color=COLOURS["dense"], label="dense", zorder=3)
    axis.axvline(shown.wall_ms, color=COLOURS["wall"], linestyle=":", label="wall")
    axis.axvline(shown.budget_ms, color="black", linestyle="--", linewidth=1, label="budget")
    axis.axhline(0.0, color="black", linewidth=0.5)
    axis.set_xlabel("latency per clip, ms")
    axis.set_ylabel(f"score by {shown.source} (0 is dense, smaller is better)")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
    return figure
