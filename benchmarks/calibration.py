"""Check what `calibrate` reaches on the reference model against its acceptance criteria.

    python benchmarks/calibration.py [--only STAGE ...] [--clips 96] [--minutes 10]

The stages are:

- ``table`` times the target length and fits the latency model that all searches share.
- ``schedules`` calibrates for each mode and budget, with latencies that the table predicts.
- ``quality`` runs the schedules found and their baselines on held-out clips of the length that
  schedules are searched at, and ``long`` on fewer clips of the target length.
- ``timing`` times them in turns with dense and the wall.
- ``accuracy`` checks the latency model on 20 schedules.
- ``default`` runs the command with its default settings.
- ``twice`` searches twice with one seed.

All raw figures are kept under `runs/`. A run that was stopped loses nothing, and stages can run one
at a time: the others count as far as they are done. ``table``, ``schedules``, ``timing``,
``accuracy`` and ``default`` need an otherwise idle machine. Raw figures belong to the model's
weights and not to the code: remove the folder `runs/calibration` after a change of the search. A
finished search does not run again when ``--trials`` changes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, get_args

import stages
from acceptance import Criterion, print_criteria
from calibration_acceptance import (
    BASELINES,
    FIGURES,
    Found,
    Runs,
    accuracy_criterion,
    best_of,
    comparisons,
    default_criteria,
    deviation_criteria,
    error_criteria,
    latency_criteria,
    mean_figures,
    name_of,
    remaining_candidates,
    slower_baselines,
    without,
)
from quality_cache import OutOfTimeError, QualityCache, add_arguments, factors, open_cache
from results_io import print_markdown, write_result
from stages import Plan

from calibrate.defaults import FRAMES, TIMING_S, TRIALS, Source
from calibrate.measure.timing import Pass
from spark3r import Schedule
from spark3r.reference.scenes.seeds import EVALUATION

ELIMINATION_ROUNDS = (8, 24)
"""Numbers of held-out clips after which baselines that are clearly behind are left out."""

STAGES = ("table", "schedules", "quality", "long", "timing", "accuracy", "default", "twice")
FIRST_CLIP = 3000  # among the evaluation seeds, beyond those of training.evaluate and other scripts
SHOWN = (
    *("score.error", "error.depth", "error.rotation_deg", "error.translation_deg"),
    *("error.points", "error.auc_3", "error.auc_30", "error.delta_125", "error.trajectory_step"),
    *("consistency.log_ratio", "score.deviation", "deviation.depth_log", "deviation.rotation_deg"),
    *("deviation.translation_deg", "deviation.points", "deviation.auc_30"),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=STAGES,
        default=STAGES,
        metavar="STAGE",
        help=f"stages to run: {', '.join(STAGES)} (default: all)",
    )
    parser.add_argument("--clips", type=int, default=96, help="held-out clips (default: 96)")
    parser.add_argument(
        "--long-clips", type=int, default=8, help="of the target length (default: 8)"
    )
    stages.add_target_frames(parser)
    stages.add_budgets(parser, [50, 25, 10])
    modes: list[Source] = ["error", "deviation"]
    parser.add_argument(
        "--mode", nargs="+", choices=get_args(Source), default=modes, help="sources"
    )
    parser.add_argument("--trials", type=int, default=TRIALS, help="of each search")
    parser.add_argument("--seed", type=int, default=0, help="of the searches (default: 0)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=50,
        help="samples of exported schedules, five per run (default: 50)",
    )
    parser.add_argument(
        "--baseline-rounds", type=int, default=5, help="samples of baselines (default: 5)"
    )
    parser.add_argument(
        "--checks", type=int, default=3, help="samples of the 20 schedules (default: 3)"
    )
    parser.add_argument(
        "--table-seconds",
        type=float,
        default=TIMING_S,
        help=f"for the table (default: {TIMING_S:g})",
    )
    parser.add_argument("--budget", default="40%", help="of the default run (default: 40%%)")
    add_arguments(parser, frames=FRAMES, output="calibration.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    cache = open_cache(options)
    folder = stages.folder_of(cache)
    folder.mkdir(parents=True, exist_ok=True)
    limit_s = options.table_seconds if "table" in options.only else None
    plan = Plan(
        cache=cache,
        folder=folder,
        target_frames=options.target_frames,
        shares=tuple(percent / 100 for percent in options.budgets),
        modes=tuple(options.mode),
        trials=options.trials,
        seed=options.seed,
        table=stages.latency_table(cache, folder, options.target_frames, limit_s),
    )
    write_result(run(plan, options), options.output)


def run(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen stages, print all results there are, and return them as a document."""

    def at(stage: str, frames: int | None = None) -> Plan:
        """Return the plan of a stage. The deadline of a stage not chosen lies in the past."""
        deadline = plan.cache.deadline if stage in options.only else float("-inf")
        length = plan.cache.frames if frames is None else frames
        return replace(
            plan, cache=QualityCache(plan.cache.runner, length, plan.cache.root, deadline)
        )

    found = search_all(at("schedules"))
    schedules = {
        name_of(mode, share, kind): schedule
        for (mode, share), document in found.items()
        for kind, schedule in document["schedules"].items()
    }
    seeds = EVALUATION[FIRST_CLIP : FIRST_CLIP + options.clips]
    left = schedules
    for count in ELIMINATION_ROUNDS:
        runs = at("quality").cache.complete(seeds[:count], left)
        remaining = remaining_candidates(found, runs)
        left = {name: each for name, each in left.items() if name in remaining}
    runs = at("quality").cache.complete(seeds, left)
    seeds = seeds[: options.long_clips]
    long = at("long", plan.target_frames).cache.complete(seeds, left)
    exported = {name_of(*key, each["exported"]) for key, each in found.items()}
    treatments: dict[str, Pass] = {"dense": "dense", "wall": "wall"}
    treatments |= {name: schedules[name] for name in schedules if name in exported}
    baselines: dict[str, Pass] = {"wall": "wall"}
    baselines |= {name: schedules[name] for name in schedules if name in exported}
    best = {
        best_of(found, runs, *key, kind, figure)
        for key in found
        for kind in BASELINES
        for figure in FIGURES
    }
    baselines |= {name: left[name] for name in left if name in best - exported}
    path = plan.folder / f"timing-{plan.target_frames}.json"
    rounds = stages.timing_rounds(at("timing"), path, treatments, options.rounds)
    path = plan.folder / f"timing-baselines-{plan.target_frames}.json"
    baseline_rounds = stages.timing_rounds(at("timing"), path, baselines, options.baseline_rounds)
    table = plan.table
    predicted = {name: table.model.predict_ms(each, table.layout) for name, each in left.items()}
    slower = slower_baselines(found, predicted, baseline_rounds)
    runs = without(runs, slower)
    report = stages.accuracy(at("accuracy"), options.checks)
    default = stages.default_run(at("default"), options.budget)
    same = stages.twice(at("twice"))

    ms = medians_ms(rounds) | medians_ms(baseline_rounds, as_in=rounds)
    judged = [
        *latency_criteria(found, rounds, options.rounds),
        accuracy_criterion(report),
        *error_criteria(found, runs),
        *deviation_criteria(found, runs),
        *default_criteria(default),
        Criterion(
            "same seed and latency table: the same trials and schedule, twice", str(same), same
        ),
    ]
    print(f"latency model at {plan.target_frames} frames: {plan.table.text}")
    for (mode, share), each in found.items():
        print(
            f"\n{mode}, wall + {share:.0%}: exported {each['exported']}; mean scores {each['gaps']}"
        )
        print("\n".join(each["reasons"]))
    show_figures(f"{len(runs)} held-out clips of {plan.cache.frames} frames", runs, schedules, ms)
    show_figures(f"{len(long)} held-out clips of {plan.target_frames} frames", long, schedules, ms)
    for name, ratios in slower.items():
        print(f"excluded, slower than ours: {name} ({ratios})")
    print_criteria(judged)
    return {
        **plan.cache.record(),
        "target_frames": plan.target_frames,
        "clips": len(runs),
        "long_clips": len(long),
        "criteria": [asdict(each) for each in judged],
        "searches": [
            {"mode": mode, "share": share, **{k: v for k, v in each.items() if k != "schedules"}}
            for (mode, share), each in found.items()
        ],
        "figures": mean_figures(runs),
        "comparisons": comparisons(found, runs),
        "long_figures": mean_figures(long),
        "long_comparisons": comparisons(found, long),
        "rounds_ms": rounds,
        "baseline_rounds_ms": baseline_rounds,
        "slower_baselines": slower,
        "latency_model": {**plan.table.model.to_dict(), "report": plan.table.text},
        "accuracy": None if report is None else asdict(report),
        "default": default,
    }


def medians_ms(
    rounds: Sequence[Mapping[str, float]], as_in: Sequence[Mapping[str, float]] = ()
) -> dict[str, float]:
    """Return medians over rounds by name; nothing without rounds.

    With ``as_in`` they are scaled to the speed that the machine had in those rounds, by the wall,
    and the wall itself is left out.
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
    """Return the results of the searches that are done."""
    found: dict[tuple[Source, float], dict[str, Any]] = {}
    for share in plan.shares:
        for mode in plan.modes:
            try:
                found[mode, share] = stages.searched(plan, mode, share)
            except OutOfTimeError:
                print(f"{mode}, wall + {share:.0%}: not done")
    return found


def show_figures(
    title: str, runs: Runs, schedules: Mapping[str, Schedule], ms: Mapping[str, float]
) -> None:
    """Print every metric as a Markdown table; nothing without runs."""
    if not runs:
        return
    rows = []
    for name, means in mean_figures(runs).items():
        cells = [f"{means[column]:.4g}" if column in means else "" for column in SHOWN]
        timed = f"{ms[name]:.0f}" if name in ms else ""
        rows.append((name, timed, *cells, factors(schedules[name]) if name in schedules else ""))
    print(f"\n{title}\n")
    print_markdown(("", "median ms", *SHOWN, "factors"), rows)


if __name__ == "__main__":
    main()
