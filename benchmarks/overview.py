"""The README's picture: what a reduced pass saves, and what it costs, both measured.

    python benchmarks/overview.py

It draws `docs/overview.svg` from the committed results of `benchmarks/scale.py reference` (time)
and `benchmarks/asymmetry.py` (accuracy). Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results_io import RESULTS

PICTURE = Path(__file__).parents[1] / "docs" / "overview.svg"
DENSE, REDUCED, WALL, QUERIES = "#222222", "#c1272d", "#888888", "#2166ac"


def draw_time(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Draw seconds per clip against its length."""
    for schedule, colour, style, label in (
        ("dense", DENSE, "-", "dense"),
        ("paper", REDUCED, "-", "reduced: 2 to 4 times fewer queries,\n4 to 78 times fewer keys"),
        ("wall", WALL, "--", "without global attention"),
    ):
        points = [row for row in rows if row["schedule"] == schedule]
        frames, seconds = [r["frames"] for r in points], [r["ms"] / 1e3 for r in points]
        axes.plot(frames, seconds, style, color=colour, label=label, lw=2)
        for frame, second, row in zip(frames, seconds, points, strict=True):
            filled = "white" if row["modelled"] else colour
            axes.plot(frame, second, "o", color=colour, markerfacecolor=filled)
            if schedule != "wall":
                axes.annotate(
                    f"{second:.2g} s" if second < 1 else f"{second:.3g} s",
                    (frame, second),
                    xytext=(0, 7),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(frames, [f"{frame:,}" for frame in frames])
    axes.set_yticks([1, 10, 100], ["1", "10", "100"])
    axes.set_ylim(0.4, 260)
    axes.set_xlim(105, 1250)
    axes.minorticks_off()
    axes.set_xlabel("frames in the clip (hollow: modelled)")
    axes.set_ylabel("seconds per clip, two CPU cores")
    axes.set_title("What it saves", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def draw_accuracy(axes: Axes, schedules: dict[str, dict[str, float]]) -> None:
    """Draw the accuracy of poses against the factor, for keys and values and for queries."""
    dense = schedules["dense"]["auc_30"]
    axes.axhline(dense, color=DENSE, lw=1, ls=":")
    axes.text(15.8, dense + 0.006, "dense", ha="right", fontsize=8.5, color=DENSE)
    for kind, colour, label in (
        ("keys and values, whole frames", REDUCED, "only keys and values reduced"),
        ("queries, groups of 20 frames", QUERIES, "only queries reduced"),
    ):
        found = {
            int(name.rpartition("|")[2]): row
            for name, row in schedules.items()
            if name.partition(" |")[0] == kind
        }
        factors = sorted(factor for factor in found if factor <= 16)
        axes.errorbar(
            factors,
            [found[factor]["auc_30"] for factor in factors],
            yerr=[found[factor]["auc_30_change_se"] for factor in factors],
            color=colour,
            marker="o",
            lw=2,
            capsize=3,
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(factors, [f"{factor} ×" for factor in factors])
    axes.minorticks_off()
    axes.set_xlabel("times fewer, in all eight global layers")
    axes.set_ylabel("pose accuracy, AUC@30")
    axes.set_title("What it costs", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE, help="default: docs/overview.svg")
    options = parser.parse_args()
    scale, asymmetry = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("scale_reference", "asymmetry")
    )
    mpl.rcParams["svg.hashsalt"] = "spark3r"  # the same file every time
    figure = Figure(figsize=(9.6, 3.7), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    draw_time(left, scale["rows"])
    draw_accuracy(right, asymmetry["schedules"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.output, metadata={"Date": None})


if __name__ == "__main__":
    main()
