"""The bars of calibration: what `calibrate` reaches on the reference model, each met or not.

    python benchmarks/calibration.py [--only STAGE ...] [--clips 96] [--minutes 10]

``table`` times the target length once and fits the latency model of all searches. ``schedules``
calibrates for each mode and budget (``--predicted`` without timing anything). ``quality`` runs what
was found, and its rivals, on held-out clips of the length that schedules are searched at, ``long``
on fewer clips of the target length. ``timing`` times all of it in turns with dense and the wall,
``accuracy`` checks the latency model on 20 schedules, ``default`` runs the plain command, ``twice``
searches twice with one seed.

Everything raw is kept under `runs/`, so that stopping loses nothing and stages can be run in parts;
stages that are left out count as far as they are there. ``table``, ``schedules``, ``timing``,
``accuracy`` and ``default`` want the machine to themselves. What is kept belongs to the model's
weights, not to the code: after changing the search, remove the folder `runs/calibration`. A search
that is done stays as it is, whatever ``--trials`` says later.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import bars
import stages
from bars import Bar, Found, Runs, name_of
from measured import Bench, OutOfTimeError, add_arguments, bench, factors
from stages import Plan
from written import write_result

from calibrate.defaults import FRAMES, TRIALS, Source
from calibrate.measure.timing import Treatment
from spark3r import Schedule
from spark3r.reference.scenes.seeds import EVALUATION

HEATS = (8, 24)
"""Held-out clips after which rivals that are behind run on no more; see `bars.contenders`."""

STAGES = ("table", "schedules", "quality", "long", "timing", "accuracy", "default", "twice")
FIRST_CLIP = 3000  # among the evaluation seeds: none of the evaluation table's or other scripts'
SHOWN = (
    *("score.error", "error.depth", "error.rotation_deg", "error.translation_deg"),
    *("error.points", "error.auc_3", "error.auc_30", "error.delta_125", "error.trajectory_step"),
    *("consistency.log_ratio", "score.deviation", "deviation.depth_log", "deviation.rotation_deg"),
    *("deviation.translation_deg", "deviation.points", "deviation.auc_30"),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    parser.add_argument("--clips", type=int, default=96, help="held-out clips")
    parser.add_argument("--long-clips", type=int, default=8, help="those of the target length")
    parser.add_argument("--target-frames", type=int, default=256)
    parser.add_argument("--budgets", type=float, nargs="+", default=[50, 25, 10], metavar="PERCENT")
    modes: list[Source] = ["error", "deviation"]
    parser.add_argument("--mode", nargs="+", choices=get_args(Source), default=modes)
    parser.add_argument("--trials", type=int, default=TRIALS, help="trials of each search")
    parser.add_argument("--predicted", action="store_true", help="search without timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--rounds", type=int, default=50, help="samples of exported latencies, five a run"
    )
    parser.add_argument("--rival-rounds", type=int, default=5, help="samples of their rivals'")
    parser.add_argument("--checks", type=int, default=3, help="samples of the 20 schedules")
    parser.add_argument("--table-seconds", type=float, default=60.0)
    parser.add_argument("--budget", default="40%", help="budget of the default run")
    add_arguments(parser, frames=FRAMES)
    default = Path(__file__).with_name("results") / "calibration.json"
    parser.add_argument("--output", type=Path, default=default)
    return parser.parse_args()


def main() -> None:
    options = parse()
    measured = bench(options)
    folder = stages.folder_of(measured)
    folder.mkdir(parents=True, exist_ok=True)
    limit_s = options.table_seconds if "table" in options.only else None
    plan = Plan(
        bench=measured,
        folder=folder,
        target_frames=options.target_frames,
        shares=tuple(percent / 100 for percent in options.budgets),
        modes=tuple(options.mode),
        trials=options.trials,
        seed=options.seed,
        predicted=options.predicted,
        table=stages.latency_table(measured, folder, options.target_frames, limit_s),
    )
    write_result(run(plan, options), options.output)


def run(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Run the stages asked for, show all there is, and return it as a document."""

    def at(stage: str, frames: int | None = None) -> Plan:
        """Return the plan of a stage; one that was not asked for is out of time at once."""
        deadline = plan.bench.deadline if stage in options.only else float("-inf")
        length = plan.bench.frames if frames is None else frames
        return replace(plan, bench=Bench(plan.bench.model, length, plan.bench.root, deadline))

    found = search_all(at("schedules"))
    schedules = {
        name_of(mode, share, kind): schedule
        for (mode, share), document in found.items()
        for kind, schedule in document["schedules"].items()
    }
    seeds = EVALUATION[FIRST_CLIP : FIRST_CLIP + options.clips]
    left = schedules
    for count in HEATS:
        heat = at("quality").bench.complete(seeds[:count], left)
        contenders = bars.contenders(found, heat)
        left = {name: each for name, each in left.items() if name in contenders}
    runs = at("quality").bench.complete(seeds, left)
    seeds = seeds[: options.long_clips]
    long = at("long", plan.target_frames).bench.complete(seeds, left)
    exported = {name_of(*key, each["exported"]) for key, each in found.items()}
    treatments: dict[str, Treatment] = {"dense": "dense", "wall": "wall"}
    treatments |= {name: schedules[name] for name in schedules if name in exported}
    rivals: dict[str, Treatment] = {"wall": "wall"}
    rivals |= {name: schedules[name] for name in schedules if name in exported}
    best = {
        bars.best_of(found, runs, *key, kind, figure)
        for key in found
        for kind in bars.RIVALS
        for figure in bars.FIGURES
    }
    rivals |= {name: left[name] for name in left if name in best - exported}
    path = plan.folder / f"timing-{plan.target_frames}.json"
    rounds = stages.timing_rounds(at("timing"), path, treatments, options.rounds)
    path = plan.folder / f"timing-rivals-{plan.target_frames}.json"
    rival_rounds = stages.timing_rounds(at("timing"), path, rivals, options.rival_rounds)
    table = plan.table
    predicted = {name: table.model.predict_ms(each, table.layout) for name, each in left.items()}
    slower = bars.slower(found, predicted, rival_rounds)
    runs = bars.without(runs, slower)
    report = stages.accuracy(at("accuracy"), options.checks)
    default = stages.default_run(at("default"), options.budget)
    same = stages.twice(at("twice"))

    ms = medians_ms(rounds) | medians_ms(rival_rounds, as_in=rounds)
    judged = [
        *bars.latency_bars(found, rounds, options.rounds),
        bars.accuracy_bar(report),
        *bars.error_bars(found, runs),
        *bars.deviation_bars(found, runs),
        *bars.default_bars(default),
        Bar("same seed and latency table: the same trials and schedule, twice", str(same), same),
    ]
    print(f"latency model at {plan.target_frames} frames: {plan.table.report}")
    for (mode, share), each in found.items():
        print(
            f"\n{mode}, wall + {share:.0%}: exported {each['exported']}; mean scores {each['gaps']}"
        )
        print("\n".join(each["reasons"]))
    show_figures(f"{len(runs)} held-out clips of {plan.bench.frames} frames", runs, schedules, ms)
    show_figures(f"{len(long)} held-out clips of {plan.target_frames} frames", long, schedules, ms)
    for name, ratios in slower.items():
        print(f"out, as it takes longer than ours: {name} ({ratios})")
    show_bars(judged)
    return {
        **plan.bench.record(),
        "target_frames": plan.target_frames,
        "clips": len(runs),
        "long_clips": len(long),
        "bars": [asdict(each) for each in judged],
        "searches": [
            {"mode": mode, "share": share, **{k: v for k, v in each.items() if k != "schedules"}}
            for (mode, share), each in found.items()
        ],
        "figures": bars.mean_figures(runs),
        "comparisons": bars.comparisons(found, runs),
        "long_figures": bars.mean_figures(long),
        "long_comparisons": bars.comparisons(found, long),
        "rounds_ms": rounds,
        "rival_rounds_ms": rival_rounds,
        "slower_rivals": slower,
        "latency_model": {**plan.table.model.to_dict(), "report": str(plan.table.report)},
        "accuracy": None if report is None else asdict(report),
        "default": default,
    }


def medians_ms(
    rounds: Sequence[Mapping[str, float]], as_in: Sequence[Mapping[str, float]] = ()
) -> dict[str, float]:
    """Return medians over rounds by name, none of no rounds.

    With ``as_in`` they are what would have been measured in those rounds, whose wall differs as the
    machine's speed does; the wall itself is left out.
    """
    names = rounds[0].keys() if rounds else ()
    if not as_in:
        return {name: statistics.median(each[name] for each in rounds) for name in names}
    wall_ms = statistics.median(each["wall"] for each in as_in)
    return {
        name: wall_ms * statistics.median(each[name] / each["wall"] for each in rounds)
        for name in names
        if name != "wall"
    }


def search_all(plan: Plan) -> Found:
    """Return what the searches found, as far as they are done."""
    found: dict[tuple[Source, float], dict[str, Any]] = {}
    for share in plan.shares:
        for mode in plan.modes:
            try:
                found[mode, share] = stages.searched(plan, mode, share)
            except OutOfTimeError:
                print(f"{mode}, wall + {share:.0%}: not searched yet")
    return found


def show_figures(
    title: str, runs: Runs, schedules: Mapping[str, Schedule], ms: Mapping[str, float]
) -> None:
    """Print every metric as Markdown."""
    means = bars.mean_figures(runs)
    print(f"\n{title}\n\n| | median ms | " + " | ".join(SHOWN) + " | factors |")
    print("|---" * (3 + len(SHOWN)) + "|")
    for name, row in means.items():
        cells = [f"{row[column]:.4g}" if column in row else "" for column in SHOWN]
        timed = f"{ms[name]:.0f}" if name in ms else ""
        each = factors(schedules[name]) if name in schedules else ""
        print(f"| {name} | {timed} | {' | '.join(cells)} | {each} |")


def show_bars(judged: Sequence[Bar]) -> None:
    """Print the bars as Markdown."""
    print("\n| bar | measured | |\n|---|---|---|")
    for bar in judged:
        verdict = {True: "met", False: "**not met**", None: "not measured"}[bar.met]
        print(f"| {bar.asked} | {bar.measured} | {verdict} |")


if __name__ == "__main__":
    main()
