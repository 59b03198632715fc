"""What ``spark3r run`` prints of its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import printable
from .tables import print_table

SHOWN = 6
"""Most suspicious frames that are named on the screen."""


def scene_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what ``scene.html`` says of a run.

    Args:
        record: Content of ``run.json``.
    """
    from ..reconstruction import LABELS, in_unit

    facts = [("model", record["model"]), ("schedule", record["schedule"])]
    if record["profile"] is not None:
        facts.append(("profile", record["profile"]))
    facts.append(("frames", str(record["frames"])))
    facts.append(("dense" if record["profile"] is None else "reduced", _cost(record)))
    if record["dense"] is not None:
        facts.append(("dense", _cost(record["dense"])))
    facts += [
        (f"{LABELS[name]} deviates", "undefined" if value is None else in_unit(name, value))
        for name, value in (record["deviation"] or {}).items()
    ]
    return facts


def print_result(record: Mapping[str, Any], output: Path) -> None:
    """Print what was run, what it took, where the files are, and the deviation from dense.

    Args:
        record: Content of ``run.json``.
        output: Folder of the files.
    """
    from ..profile import STATUS_WORDS

    licence = record["provenance"]["weights"]["licence"]
    weights = f" (weights: {licence})" if licence else ""
    if record["random_weights"]:
        weights = " (random weights)"
    schedule = record["schedule"]
    if record["profile"] is not None:
        schedule = f"'{schedule}' of profile {record['profile']} ({STATUS_WORDS[record['status']]})"
    size = f"{record['width']}x{record['height']}"
    done = "dense" if record["profile"] is None else "reduced"
    lines = [
        ("model", f"{record['model']}{weights}"),
        ("schedule", schedule),
        ("clip", f"{record['frames']} frames of {size} pixels from {record['clip']}"),
        ("device", f"{record['device']}, {record['dtype']}"),
        (done, _cost(record)),
    ]
    dense = record["dense"]
    if dense is not None:
        lines.append(("dense", _cost(dense)))
        lines.append(("speed-up", f"{dense['seconds'] / record['seconds']:.2f} times as fast"))
    lines += [
        ("written", f"{output}: depth/, confidence/, preview/, cameras.json, run.json,"),
        ("", f"trajectory.txt, points.ply ({record['points']} points), quality.csv"),
    ]
    if (output / "scene.html").exists():
        lines.append(("", "scene.html: open it in a browser, it needs no network"))
    if record["suspects"]:
        lines.append(("suspects", _suspects(record["suspects"], record["frames"])))
    for name, text in lines:
        print(f"{name:<10}{printable(text)}")
    if record["deviation"] is not None:
        _print_deviation(record["deviation"], record["expected"])


def _suspects(suspects: Sequence[Mapping[str, Any]], frames: int) -> str:
    shown = [f"{each['frame']} {', '.join(each['suspected'])}" for each in suspects[:SHOWN]]
    more = len(suspects) - len(shown)
    told = "; ".join(shown) + (f"; {more} more in quality.csv" if more else "")
    return f"{len(suspects)} of {frames} frames: {told}"


def _print_deviation(found: Mapping[str, float | None], expected: Mapping[str, Any] | None) -> None:
    """Print the deviation from dense, beside what the profile measured."""
    from ..reconstruction import LABELS, in_unit

    figures = {} if expected is None else expected["figures"]
    columns = ["deviation from dense", "this clip"]
    columns += ["mean", "largest", "÷ mean"] if figures else []
    rows = []
    for name, value in found.items():
        row = [LABELS[name], "undefined" if value is None else in_unit(name, value)]
        if figures:
            row += _beside(name, value, figures.get(name))
        rows.append(row)
    print()
    print_table(columns, rows)
    if expected is not None:
        print(f"\nmean and largest: the profile's evidence, {expected['on']}")


def _beside(name: str, value: float | None, figure: Mapping[str, float] | None) -> list[str]:
    from ..reconstruction import in_unit

    if figure is None:
        return ["-", "-", "-"]
    mean, largest = figure["mean"], figure["largest"]
    times = "-" if value is None or mean == 0 else f"{value / mean:.1f}"
    return [in_unit(name, mean), in_unit(name, largest), times]


def _cost(record: Mapping[str, Any]) -> str:
    memory = record["peak_memory_mb"]
    if memory is None:
        return f"{record['seconds']:.2f} s"
    return f"{record['seconds']:.2f} s, peak memory {_size(memory)} above model and clip"


def _size(megabytes: float) -> str:
    return f"{megabytes:.0f} MB" if megabytes < 1000 else f"{megabytes / 1000:.1f} GB"
