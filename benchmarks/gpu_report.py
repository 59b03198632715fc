"""Tables of the lines that `benchmarks/gpu.py` wrote, what they must reach, and what is missing.

    python benchmarks/gpu_report.py FIRST/gpu.jsonl SECOND/gpu.jsonl COUNT/gpu.jsonl

The files are those of one model on one machine, in any order. Damaged lines, failed figures and
stages that did not end are listed last. Tables are Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from acceptance import Criterion, print_criteria
from gpu_lines import Row, read_lines
from results_io import print_markdown

FRAMES = 1000
KERNELS = ("default", "cudnn", "flash", "efficient")
LEAST_SHARE, MOST_S, MOST_OFF = 0.95, 9.0, 0.10
"""What must be reached at 1,000 frames: wall ÷ measured, seconds of the paper's schedule, and how
far the peak of memory may be from the count."""

EXPECTED: dict[str, tuple[dict[str, Any], ...]] = {
    "env": tuple({"figure": name} for name in ("environment", "kernels", "product", "copy")),
    "sdpa": (
        *({"figure": "attention", "mass": mass} for mass in ("joined", "masked", None)),
        {"figure": "dense layer"},
    ),
    "ops": (
        {"figure": "twins", "operation": "norm and rotary embedding"},
        {"figure": "twins", "operation": "matching"},
        {"figure": "same places"},
        {"figure": "operation", "operation": "merging"},
    ),
    "exact": (
        {"figure": "guard"},
        *({"figure": "ones", "kernel": name} for name in KERNELS),
        *({"figure": "passes", "schedule": name} for name in ("paper", "mass")),
        *({"figure": "waits", "schedule": name} for name in ("paper", "mass")),
        *({"figure": "saver", "schedule": name} for name in ("paper", "mass")),
        {"figure": "plain twin", "schedule": "mass"},
        {"figure": "profile"},
    ),
    "speed": tuple(
        {"figure": "pass", "what": name, "frames": FRAMES} for name in ("paper", "wall", "mass")
    ),
    "dense": tuple(
        {"figure": "pass", "what": "dense", "frames": frames} for frames in (100, 300, 500)
    ),
    "past": tuple({"figure": "past", "step": name} for name in ("as it is", "head", "compiled")),
    "long": (
        {"figure": "card"},
        *({"figure": "pass", "what": "paper", "frames": frames} for frames in (1500, 2000)),
    ),
    "count": ({"figure": "count", "what": "paper", "frames": FRAMES},),
}
"""Figures of every stage, by some of their values. A run in small has other lengths."""


def chosen(rows: Iterable[Row], figure: str, **values: Any) -> list[Row]:
    """Return the figures of one kind and with these values that were measured."""
    wanted = {"figure": figure, **values}
    return [row for row in rows if fits(row, wanted) and not _failed(row)]


def fits(row: Row, wanted: dict[str, Any]) -> bool:
    return all(name in row and row[name] == value for name, value in wanted.items())


def _failed(row: Row) -> bool:
    return any(name in row for name in ("error", "left_out", "missing"))


def pass_ms(rows: Sequence[Row], what: str, frames: int, **values: Any) -> float | None:
    """Return the median milliseconds of a pass. The first of several samples does not count."""
    found = [row["ms"] for row in chosen(rows, "pass", what=what, frames=frames, **values)]
    return statistics.median(found[1:] or found) if found else None


def criteria(rows: Sequence[Row]) -> list[Criterion]:
    """Return what must be reached, and whether it is."""
    found = []
    for kernel in KERNELS:
        ones = chosen(rows, "ones", kernel=kernel)
        worst = max((_worst(row["difference"]) for row in ones), default=None)
        requirement = f"factors of 1 change no bit, kernel {kernel}"
        found.append(_judged(requirement, worst, "{:.1e}", lambda value: value == 0))
    wall = pass_ms(rows, "wall", FRAMES)
    for what in ("paper", "mass"):
        ms = pass_ms(rows, what, FRAMES)
        share = None if wall is None or ms is None else wall / ms
        requirement = f"{what}, {FRAMES} frames: wall ÷ measured at least {LEAST_SHARE}"
        found.append(_judged(requirement, share, "{:.3f}", lambda value: value >= LEAST_SHARE))
    ms = pass_ms(rows, "paper", FRAMES)
    seconds = None if ms is None else ms / 1000
    requirement = f"paper, {FRAMES} frames, depth head: at most {MOST_S:g} s"
    found.append(_judged(requirement, seconds, "{:.2f} s", lambda value: value <= MOST_S))
    share = peak_share(rows, "paper", FRAMES)
    requirement = f"paper, {FRAMES} frames: peak within {MOST_OFF:.0%} of the count"
    found.append(_judged(requirement, share, "{:.3f}", lambda value: abs(value - 1) <= MOST_OFF))
    dense = chosen(rows, "pass", what="dense")
    named = all(row.get("ran") for row in dense) if dense else None
    names = ", ".join(dict.fromkeys(str(row["ran"]) for row in dense if row.get("ran")))
    found.append(Criterion("dense is named with its kernel", names, named))
    return found


def _judged(
    requirement: str, value: float | None, form: str, meets: Callable[[float], bool]
) -> Criterion:
    if value is None:
        return Criterion(requirement, "", None)
    return Criterion(requirement, form.format(value), meets(value))


def _worst(difference: dict[str, float]) -> float:
    """Return the largest difference; NaN counts as the largest."""
    return max(
        (float("inf") if value != value else value for value in difference.values()), default=0.0
    )


def peak_share(rows: Sequence[Row], what: str, frames: int) -> float | None:
    """Return the measured peak of a pass divided by the counted one."""
    peaks = [row.get("peak_gb") for row in chosen(rows, "pass", what=what, frames=frames)]
    counts = chosen(rows, "count", what=what, frames=frames)
    measured = [peak for peak in peaks if peak is not None]
    return max(measured) / counts[-1]["total_gb"] if measured and counts else None


def missing(rows: Sequence[Row]) -> list[str]:
    """Return the expected figures that were not measured, stage by stage."""
    found = []
    for stage, figures in EXPECTED.items():
        own = [row for row in rows if row["stage"] == stage]
        for wanted in figures:
            if not any(fits(row, wanted) and not _failed(row) for row in own):
                found.append(f"{stage}: {', '.join(f'{k} {v}' for k, v in wanted.items())}")
    return found


def failures(rows: Sequence[Row]) -> list[str]:
    """Return what failed, was left out, or ended early."""
    found = []
    for row in rows:
        if row["figure"] == "end":
            if row.get("status") != "done":
                found.append(f"{row['stage']}: {row.get('status')} after {row.get('seconds')} s")
        elif _failed(row):
            said = next(row[name] for name in ("error", "left_out", "missing") if name in row)
            skip = {"stage", "at_s", "error", "left_out", "missing"}
            which = ", ".join(str(v) for k, v in row.items() if k not in skip and v is not None)
            found.append(f"{row['stage']}: {which}: {said}")
    begun = {row["stage"] for row in rows} - {"run"}
    ended = {row["stage"] for row in rows if row["figure"] == "end"}
    return found + [f"{stage}: no line says how it ended" for stage in sorted(begun - ended)]


def report(rows: Sequence[Row], damaged: int) -> None:
    """Print everything."""
    tiny = any(row.get("tiny") for row in chosen(rows, "run"))
    _print_machine(rows)
    if tiny:
        print("\n**Tiny sizes. These figures show that the script runs, and nothing else.**")
    _print_attention(rows)
    _print_operations(rows)
    _print_exactness(rows)
    _print_passes(rows)
    _print_past(rows)
    if not tiny:
        print("\n## What must be reached")
        print_criteria(criteria(rows))
    problems = {"Failed": failures(rows), "Missing": [] if tiny else missing(rows)}
    if damaged:
        problems["Failed"].append(f"{damaged} damaged lines were left out")
    for title, found in problems.items():
        if found:
            print(f"\n## {title}\n")
            print("\n".join(f"- {each}" for each in found))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with its title, if it has rows. None is a dash."""
    if rows:
        print(f"\n{title}\n")
        print_markdown(columns, [["-" if cell is None else cell for cell in row] for row in rows])


def _print_machine(rows: Sequence[Row]) -> None:
    print("## Machine")
    for row in chosen(rows, "run"):
        print(f"\n`{row.get('command')}`, {row.get('date')}, {row.get('model')}")
    for row in chosen(rows, "environment"):
        packages = row.get("packages") or {}
        facts = {
            "GPU": ", ".join(row.get("gpus") or ()) or "none",
            "torch": packages.get("torch"),
            "triton": packages.get("triton"),
            **{name: row.get(name) for name in ("cuda", "cudnn", "driver", "sdpa_order")},
        }
        print("\n" + "; ".join(f"{name} {value}" for name, value in facts.items()))
    ceilings = [
        (name, row.get(unit), unit.replace("_per_", "/"))
        for name, unit in (("product", "tflops"), ("copy", "tb_per_s"), ("launch", "us"))
        for row in chosen(rows, name)
    ]
    _table("Ceilings:", ("", "measured", "unit"), ceilings)
    kernels = [
        (
            each["operation"],
            each["dtype"],
            each["implementation"],
            "; ".join(f"{name}: {why}" for name, why in each["refused"].items()) or None,
        )
        for row in chosen(rows, "kernels")
        for each in row["kernels"]
    ]
    _table("Chosen kernels:", ("operation", "precision", "kernel", "refused"), kernels)


def _print_attention(rows: Sequence[Row]) -> None:
    columns = ("queries", "keys", "mass correction", "kernel", "ms", "TFLOP/s", "error", "ran")
    cells = [
        (
            row["queries"],
            row["keys"],
            row["mass"],
            row["kernel"],
            row["ms"],
            row["tflops"],
            f"{row['largest_error']:.1e}",
            row["ran"],
        )
        for figure in ("attention", "dense layer")
        for row in chosen(rows, figure)
    ]
    _table("## Attention", columns, cells)


def _print_operations(rows: Sequence[Row]) -> None:
    _table(
        "## Steps of a layer",
        ("step", "precision", "ms", "repeats"),
        [
            (row["operation"], row.get("dtype"), row["ms"], row.get("repeats"))
            for row in chosen(rows, "operation")
        ],
    )
    _table(
        "Fused beside plain (difference: of norm and rotary embedding the largest one; of matching "
        "the share of other choices):",
        ("operation", "plain ms", "fused ms", "plain ÷ fused", "difference"),
        [
            (
                row["operation"],
                row["plain_ms"],
                row["fused_ms"],
                f"{row['plain_ms'] / row['fused_ms']:.2f}",
                f"{row['difference']:.1e}",
            )
            for row in chosen(rows, "twins")
        ],
    )
    for row in chosen(rows, "same places"):
        print(f"\nMatching chose as a CPU did for {row['share']:.4%} of the tokens.")


def _print_exactness(rows: Sequence[Row]) -> None:
    """Print differences, and the places at which passes wait. A guard that refuses is a failure."""
    _table(
        "## Exactness\n\nFactors of 1 against the model itself, largest relative difference:",
        ("kernel", "how", "difference"),
        [
            (row["kernel"], row["how"], f"{_worst(row['difference']):.1e}")
            for row in chosen(rows, "ones")
        ],
    )
    _table(
        "The same pass twice, without the memory saver, and with a plain twin of one kernel:",
        ("schedule", "what", "difference", "finite"),
        [
            (row["schedule"], "twice", f"{_worst(row['twice']):.1e}", row["finite"])
            for row in chosen(rows, "passes")
        ]
        + [
            (row["schedule"], "without saver", f"{_worst(row['difference']):.1e}", None)
            for row in chosen(rows, "saver")
        ]
        + [
            (row["schedule"], row["operation"], f"{_worst(row['difference']):.1e}", None)
            for row in chosen(rows, "plain twin")
        ],
    )
    for row in chosen(rows, "waits"):
        if row["places"] is not None:
            print(f"\nA pass under {row['schedule']} waits for the device at:\n")
            print("\n".join(f"- {place}" for place in row["places"] or ["no place"]))
    for row in chosen(rows, "profile"):
        cells = [(each["kernel"], each["ms"], each["calls"]) for each in row["kernels"][:20]]
        title = f"The longest kernels of a pass of {row['frames']} frames under paper:"
        _table(title, ("kernel", "ms", "calls"), cells)


def _print_passes(rows: Sequence[Row]) -> None:
    keys = dict.fromkeys(
        (row["frames"], row["what"], row.get("kernel")) for row in chosen(rows, "pass")
    )
    cells: list[Sequence[object]] = []
    for frames, what, kernel in sorted(keys, key=lambda key: key[0]):
        own = chosen(rows, "pass", what=what, frames=frames)
        own = [row for row in own if row.get("kernel") == kernel]
        ms = statistics.median([row["ms"] for row in own][1:] or [own[0]["ms"]])
        wall = pass_ms(rows, "wall", frames)
        peaks = [row["peak_gb"] for row in own if "peak_gb" in row]
        counts = chosen(rows, "count", what=what, frames=frames)
        share = peak_share(rows, what, frames)
        cells.append(
            (
                f"{frames:,}",
                what if kernel is None else f"{what}, {kernel} kernel",
                f"{ms / 1000:.2f}",
                max(1, len(own) - 1),
                f"{own[0]['ms'] / 1000:.2f}",
                None if wall is None else f"{wall / ms:.3f}",
                f"{max(peaks):.1f}" if peaks else None,
                f"{counts[-1]['total_gb']:.1f}" if counts else None,
                None if share is None else f"{share:.3f}",
                next((row["ran"] for row in own if row.get("ran")), None),
            )
        )
    cells += _modelled(rows)
    columns = ("frames", "pass", "s", "n", "first s", "wall ÷ s", "GB", "counted", "÷ counted")
    _table("## Passes", (*columns, "attention ran"), cells)
    for row in chosen(rows, "card"):
        used = "" if "peak_gb" not in row else f", with {row['peak_gb']:.1f} GB at the peak"
        print(
            f"\n{row['frames']} frames ran within the limit of a card of {row['card_gb']} GB, in "
            f"{row['ms'] / 1000:.1f} s{used}."
        )


def _modelled(rows: Sequence[Row]) -> list[Sequence[object]]:
    """Return dense passes of VGGT at 1,000 frames: the wall, and every layer's attention."""
    wall, models = pass_ms(rows, "wall", FRAMES), chosen(rows, "model", family="vggt")
    if wall is None or not models:
        return []
    cells: list[Sequence[object]] = []
    for row in chosen(rows, "dense layer"):
        layer = row["ms"] * row["keys"] / row["queries"]
        seconds = (wall + models[-1]["layers"] * layer) / 1000
        name = f"dense, {row['kernel']} kernel (modelled)"
        cells.append((f"{FRAMES:,}", name, f"{seconds:.0f}", 0, *[None] * 5, row["ran"]))
    return cells


def _print_past(rows: Sequence[Row]) -> None:
    steps = {row["step"]: row["ms"] for row in chosen(rows, "past") if "ms" in row}
    first = {row["step"]: row["cold_ms"] for row in chosen(rows, "past") if "cold_ms" in row}
    base = steps.get("as it is")
    _table(
        "## Past the wall",
        ("step", "s", "÷ as it is", "first s"),
        [
            (
                step,
                f"{ms / 1000:.2f}",
                None if base is None else f"{ms / base:.3f}",
                f"{first[step] / 1000:.1f}" if step in first else None,
            )
            for step, ms in steps.items()
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", type=Path, nargs="+", help="lines of benchmarks/gpu.py")
    options = parser.parse_args()
    rows: list[Row] = []
    damaged = 0
    for path in options.files:
        try:
            found, torn = read_lines(path)
        except OSError as error:
            parser.error(f"{path} cannot be read ({error.strerror}): name a file of lines")
        rows += found
        damaged += torn
    report(rows, damaged)


if __name__ == "__main__":
    main()
