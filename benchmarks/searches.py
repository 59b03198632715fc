"""Comparison of search designs and samplers, with the knapsack's own schedule as their start.

    python benchmarks/searches.py [--mode deviation] [--budget 10] [--minutes 5]

Each design searches with several seeds under one budget, on the same clips and with the same
latency table (from `benchmarks/calibration.py --only table`). In the *direct* design the parameters
are two factors and the operators of each layer, and latency is a constraint. In the *weights*
design the parameters are weights on the sensitivities, from which the knapsack makes a schedule
within the budget (`calibrate.search`). The table shows the best schedule within the budget after
several numbers of trials, with its score on the clips of the search and on clips that no search
saw.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_args

import optuna
import stages
from quality_cache import OutOfTimeError, QualityCache, add_arguments, open_cache
from results_io import print_markdown, provenance, store_json

from calibrate.defaults import (
    KEY_VALUE_FACTORS,
    LOG_WEIGHT,
    OFFERED,
    OPERATORS,
    QUERY_FACTORS,
    Source,
)
from calibrate.measure.score import score
from calibrate.search.problem import LatencyLimit, SearchProblem, Space
from calibrate.search.storage import decode, encode
from spark3r import LayerRule, LengthRule, Schedule
from spark3r.reference.scenes.seeds import CALIBRATION, EVALUATION

FIRST_SEARCHED, FIRST_OTHER = 300, 4000  # among calibration and evaluation seeds
PROFILED = CALIBRATION[FIRST_SEARCHED : FIRST_SEARCHED + 8]
STARTUP = 5  # random trials before a sampler uses its model
DESIGNS = ("weights TPE", "weights GP", "direct TPE", "direct GP", "weights random")
QUERIES = tuple(factor for factor in OFFERED if factor <= max(QUERY_FACTORS))
KEYS = tuple(factor for factor in OFFERED if factor <= max(KEY_VALUE_FACTORS))
SHOWN = (1, 10, 20, 30, 40, 80)

Propose = Callable[[optuna.Trial], Schedule]


def by_weights(space: Space, budget_ms: float) -> Propose:
    """Return a function that proposes the knapsack's schedule for weighted sensitivities."""

    def propose(trial: optuna.Trial) -> Schedule:
        names = space.parameters()
        weights = {name: trial.suggest_float(name, -LOG_WEIGHT, LOG_WEIGHT) for name in names}
        schedule = space.schedule(budget_ms, weights)
        assert schedule is not None  # the knapsack's own answer was within the budget
        return schedule

    return propose


def directly(space: Space) -> Propose:
    """Return a function that proposes factors and operators of each layer, at any latency."""

    def propose(trial: optuna.Trial) -> Schedule:
        rules = [
            LayerRule(
                QUERIES[trial.suggest_int(f"query {layer}", 0, len(QUERIES) - 1)],
                KEYS[trial.suggest_int(f"key value {layer}", 0, len(KEYS) - 1)],
                OPERATORS[trial.suggest_categorical(f"operators {layer}", range(len(OPERATORS)))],
            )
            for layer in range(len(space.layers))
        ]
        return Schedule(tuple(rules), OPERATORS[0], space.length)

    return propose


def as_direct(schedule: Schedule) -> dict[str, int]:
    """Return the parameters with which `directly` proposes a schedule."""
    found: dict[str, int] = {}
    for layer, rule in enumerate(schedule.layers):
        found[f"query {layer}"] = QUERIES.index(rule.query)
        found[f"key value {layer}"] = KEYS.index(rule.key_value)
        found[f"operators {layer}"] = OPERATORS.index(rule.operators or schedule.operators)
    return found


def sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "GP":
        return optuna.samplers.GPSampler(
            seed=seed, n_startup_trials=STARTUP, deterministic_objective=True
        )
    if name == "TPE":
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
    return optuna.samplers.RandomSampler(seed=seed)


class Task:
    """Search space and scores for one budget and one mode."""

    def __init__(self, options: argparse.Namespace, cache: QualityCache) -> None:
        self.cache, self.mode = cache, options.mode
        folder = stages.folder_of(cache)
        self.folder = folder / "searches"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.table = stages.latency_table(cache, folder, options.target_frames)
        self.budget_ms = stages.budget_ms(self.table, options.budget / 100)
        self.searched = CALIBRATION[FIRST_SEARCHED : FIRST_SEARCHED + options.search_clips]
        self.others = EVALUATION[FIRST_OTHER : FIRST_OTHER + options.clips]
        problem = SearchProblem(
            sensitivity=stages.sensitivity_table(cache, self.mode, PROFILED),
            latency=self.table.model,
            layout=self.table.layout,
            short=cache.layout,
            length=LengthRule("constant", options.target_frames, cache.frames),
            sensitive=(),
            goal=LatencyLimit(self.budget_ms),
        )
        knapsack = problem.knapsack()
        assert knapsack is not None  # the budget lies above the least latency
        self.space, self.knapsack, self.predict_ms = problem.space, knapsack, problem.predict_ms

    def scores(self, schedule: Schedule, seeds: Sequence[int]) -> list[float]:
        """Return the score of a schedule on each clip."""
        found = []
        for seed in seeds:
            dense, (run,) = self.cache.qualities(seed, [schedule])
            found.append(score(run, dense, self.mode))
        return found

    def search(self, name: str, seed: int, trials: int) -> dict[str, Any]:
        """Return the trials of a search: latency as a share of the budget, score and schedule."""
        design, by = name.split()
        key = f"{self.mode}-{self.budget_ms:.3f}-{self.cache.frames}-{len(self.searched)}"
        path = self.folder / f"{key}-{design}-{by}-{seed}-{trials}.json"
        if path.exists():
            stored: dict[str, Any] = json.loads(path.read_text())
            return stored
        study = optuna.create_study(sampler=sampler(by, seed))
        if design == "weights":
            propose = by_weights(self.space, self.budget_ms)
            study.enqueue_trial(dict.fromkeys(self.space.parameters(), 0.0))
        else:
            propose = directly(self.space)
            study.enqueue_trial(as_direct(self.knapsack))
        rows, sampling_s = [], 0.0
        for _ in range(trials):
            begin = time.process_time()
            trial = study.ask()
            schedule = propose(trial)
            sampling_s += time.process_time() - begin
            part = self.predict_ms(schedule) / self.budget_ms
            trial.set_constraint("over budget", part - 1 - 1e-9)
            value = statistics.fmean(self.scores(schedule, self.searched))
            study.tell(trial, value)
            rows.append({"part": part, "score": value, "schedule": encode(schedule)})
        document = {"trials": rows, "sampling_s": sampling_s}
        store_json(path, document)
        return document


def summary(
    task: Task, design: str, seed: int, found: dict[str, Any], known: Sequence[float]
) -> list[dict[str, Any]]:
    """Return the best schedules of a search by number of trials, on its clips and on others."""
    rows = []
    trials = found["trials"]
    for count in [count for count in SHOWN if count <= len(trials)]:
        fitting = [row for row in trials[:count] if row["part"] <= 1 + 1e-6]
        best = min(fitting, key=lambda row: row["score"])
        other = task.scores(decode(best["schedule"]), task.others)
        gaps = [mine - theirs for mine, theirs in zip(other, known, strict=True)]
        rows.append(
            {
                "design": design,
                "seed": seed,
                "trials": count,
                "feasible": len(fitting),
                "searched": best["score"],
                "others": statistics.fmean(other),
                "change": statistics.fmean(gaps),
                "change_se": statistics.stdev(gaps) / math.sqrt(len(gaps)),
                "sampling_s": found["sampling_s"] / len(trials),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], task: Task, known: Sequence[float]) -> None:
    """Print means over seeds and their ranges as a Markdown table."""
    print(
        f"knapsack: {statistics.fmean(task.scores(task.knapsack, task.searched)):.4f} on "
        f"{len(task.searched)} clips of the search, {statistics.fmean(known):.4f} on "
        f"{len(known)} others\n"
    )
    cells = []
    for design in dict.fromkeys(row["design"] for row in rows):
        for count in sorted({row["trials"] for row in rows}):
            some = [r for r in rows if r["design"] == design and r["trials"] == count]
            row = [design, count, f"{statistics.fmean(r['feasible'] for r in some):.1f}"]
            for name in ("searched", "others"):
                values = [each[name] for each in some]
                row.append(
                    f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"
                )
            cells.append([*row, f"{statistics.fmean(r['sampling_s'] for r in some):.2f}"])
    columns = ("design", "trials", "within the budget", "on its clips", "on others")
    print_markdown((*columns, "sampler s/trial"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--mode", choices=get_args(Source), default="deviation", help="quality source"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=10,
        help="percent of the way from wall to dense (default: 10)",
    )
    stages.add_target_frames(parser)
    parser.add_argument("--trials", type=int, default=40, help="per search (default: 40)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    parser.add_argument("--search-clips", type=int, default=4, help="per search (default: 4)")
    parser.add_argument("--clips", type=int, default=12, help="unseen clips (default: 12)")
    parser.add_argument("--designs", nargs="+", choices=DESIGNS, default=DESIGNS)
    add_arguments(parser, frames=24, output="searches.json")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    task = Task(options, open_cache(options))
    rows = []
    try:
        known = task.scores(task.knapsack, task.others)
        for design in options.designs:
            for seed in range(options.seeds):
                found = task.search(design, seed, options.trials)
                rows += summary(task, design, seed, found, known)
    except OutOfTimeError:
        raise SystemExit("the time is over before all searches are done: run again") from None
    show(rows, task, known)
    document = {
        **provenance(),
        **task.cache.record(),
        "target_frames": options.target_frames,
        "search_clips": len(task.searched),
        "other_clips": len(task.others),
        "rows": rows,
    }
    kept = json.loads(options.output.read_text()) if options.output.exists() else {}
    kept[f"{options.mode}, wall + {options.budget:g} %"] = document
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
