"""Stages of `benchmarks/calibration.py`. Each stores its result on disk and can be resumed.

Stages that time something need an otherwise idle machine. All searches share one latency table,
which also predicts what a calibration would time.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
from baselines import comparable_baselines
from quality_cache import OutOfTimeError, QualityCache, effect
from results_io import replace_file, store_json
from stratified import stratified_schedules
from torch import Tensor

from calibrate import Calibration, Settings, run
from calibrate.budget import parse_budget
from calibrate.cli.main import DONE, MISSED
from calibrate.clips import Split
from calibrate.defaults import (
    FRAMES,
    KEY_VALUE_FACTORS,
    OPERATORS,
    QUERY_FACTORS,
    SEARCH_CLIPS,
    VALIDATION_CLIPS,
    Source,
)
from calibrate.measure.latency_model import FitReport, PassSample, check_fit
from calibrate.measure.measurements import LatencyTable, measure_latencies
from calibrate.measure.sensitivity import sensitivities
from calibrate.measure.target_length import clip_of_length, longest_short
from calibrate.measure.timing import LayerTiming, Pass, PassTiming, apply_pass
from calibrate.search.storage import decode, encode
from calibrate.settings import Job
from spark3r import Schedule, remove
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import CALIBRATION
from spark3r.timing import Call, Latency, Timer, Treatment, interleaved, measure

CHECKED = 20
"""Number of schedules on which the latency model is checked."""

QUERY_RANGE, KEY_VALUE_RANGE = (1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""Factors of these schedules."""

FIRST_CLIP = 100
"""First clip among the calibration seeds, beyond those that `calibrate` uses by default."""


@dataclass(frozen=True)
class Plan:
    """Settings of all stages.

    Attributes:
        cache: The model, and its qualities at the calibration length.
        folder: Folder of all results except qualities.
        target_frames: Frames that budgets hold for.
        shares: Budgets, as shares of the way from the wall to dense.
        modes: Quality sources, with one search each.
        trials: Trials of each search after the initial schedules.
        seed: Seed of the searches.
        table: Latency table of all searches.
    """

    cache: QualityCache
    folder: Path
    target_frames: int
    shares: tuple[float, ...]
    modes: tuple[Source, ...]
    trials: int
    seed: int
    table: LatencyTable


def folder_of(cache: QualityCache) -> Path:
    """Return the folder of a model's results except qualities."""
    return cache.root.parent / "calibration" / cache.folder.parent.name


def add_target_frames(parser: argparse.ArgumentParser) -> None:
    """Add the option for the length that budgets hold for."""
    parser.add_argument(
        "--target-frames", type=int, default=256, help="frames that budgets hold for (default: 256)"
    )


def add_budgets(parser: argparse.ArgumentParser, default: list[float]) -> None:
    """Add the option for the budgets."""
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=default,
        metavar="PERCENT",
        help=f"of the way from wall to dense (default: {' '.join(map(str, default))})",
    )


def footage(frames: int) -> Tensor:
    """Return the images that latencies are measured on, ``[S, 3, H, W]``."""
    return clip_of_length(rendered_clip(CALIBRATION[FIRST_CLIP], 48).images, frames)


def latency_table(
    cache: QualityCache, folder: Path, target_frames: int, limit_s: float | None = None
) -> LatencyTable:
    """Return the latencies at the target length as `calibrate` takes them, which happens once.

    The latency model is fitted at a short length and extended to the target.

    Args:
        cache: The model.
        folder: Folder from `folder_of`.
        target_frames: Frames of the target length.
        limit_s: Approximate seconds for the layers, and again for the passes; None measures
            nothing.

    Raises:
        SystemExit: If they do not exist and must not be measured.
    """
    path = folder / f"extended-table-{target_frames}.pickle"
    if not path.exists():
        if limit_s is None:
            raise SystemExit(
                f"latencies at {target_frames} frames were not measured yet: run "
                f"python benchmarks/calibration.py --only table --target-frames {target_frames}"
            )
        settings = Settings(parse_budget("50%"), timing_s=limit_s)
        job = Job(replace(cache.runner, dtype=settings.dtype), settings, "deviation")
        clip = rendered_clip(CALIBRATION[FIRST_CLIP], 48)
        short = longest_short(job, clip.images, target_frames)
        latencies = measure_latencies(job, Split((clip,), (), ()), target_frames, short)
        replace_file(path, pickle.dumps(latencies.table))
    found: LatencyTable = pickle.loads(path.read_bytes())  # a file that this program wrote
    return found


def sensitivity_table(
    cache: QualityCache,
    source: Source,
    seeds: Sequence[int],
    query_factors: Sequence[int] = QUERY_FACTORS,
    key_value_factors: Sequence[int] = KEY_VALUE_FACTORS,
) -> pd.DataFrame:
    """Return the sensitivities on rendered clips, which are measured once.

    Args:
        cache: The model.
        source: The quality source.
        seeds: Seeds of the clips.
        query_factors: Query factors of drift, by default those of `calibrate`.
        key_value_factors: Key-value factors of drift, by default those of `calibrate`.
    """
    # Sensitivities do not depend on the budget, which a job needs.
    settings = Settings(parse_budget("50%"), cache=folder_of(cache) / "sensitivities")
    job = Job(replace(cache.runner, dtype=settings.dtype), settings, source)
    dense = cache.dense_of(seeds)
    return sensitivities(
        job, dense, query_factors=query_factors, key_value_factors=key_value_factors
    )


def budget_ms(table: LatencyTable, share: float) -> float:
    """Return the budget in milliseconds per clip of a share of the way from the wall to dense."""
    wall_ms = table.wall.median_ms
    return wall_ms + share * (table.dense_ms - wall_ms)


def timing_rounds(
    plan: Plan, path: Path, treatments: Mapping[str, Pass], rounds: int
) -> list[dict[str, float]]:
    """Return latencies in milliseconds by name of treatments timed in turns, by round.

    A round times each treatment once, so that all its figures are from the same minutes. Every
    other round goes backwards. Treatments with the same effect are timed once. Stored rounds that
    lack a treatment do not count.
    """
    layout = plan.table.layout
    keys = {
        name: effect(each, layout) if isinstance(each, Schedule) else each
        for name, each in treatments.items()
    }
    different = dict(zip(keys.values(), treatments.values(), strict=True))
    kept: list[dict[str, float]] = json.loads(path.read_text()) if path.exists() else []
    done = [each for each in kept if different.keys() <= each.keys()]
    if len(done) < rounds:
        images, runner = footage(plan.target_frames), plan.cache.runner

        def before(key: str) -> None:
            apply_pass(runner, different[key])

        calls: dict[str, Call] = {key: lambda: runner.run(images) for key in different}
        try:
            before("wall")
            calls["wall"]()  # warm-up
            while len(done) < rounds and time.monotonic() < plan.cache.deadline:
                order = list(calls) if len(done) % 2 == 0 else list(reversed(calls))
                timed = interleaved(
                    {name: calls[name] for name in order}, before=before, rounds=1, warm_up_s=0
                )
                done.append({name: latency.median_ms for name, latency in timed.items()})
                kept.append(done[-1])
                store_json(path, kept)
        finally:
            remove(runner.model)
    return [{name: each[key] for name, key in keys.items()} for each in done[:rounds]]


def accuracy(plan: Plan, rounds: int) -> FitReport | None:
    """Return how well the latency model predicts stratified schedules; None if they are not timed.

    The speed of the machine may have changed since the table was timed. Latencies are scaled so
    that the wall takes as long as then.
    """
    table = plan.table
    depth = plan.cache.runner.depth
    schedules = stratified_schedules(
        CHECKED, depth, OPERATORS, QUERY_RANGE, KEY_VALUE_RANGE, table.model, table.layout
    )
    treatments: dict[str, Pass] = {"dense": "dense", "wall": "wall"}
    treatments |= {f"{number}": schedule for number, schedule in enumerate(schedules)}
    path = plan.folder / f"accuracy-{plan.target_frames}.json"
    done = timing_rounds(plan, path, treatments, rounds)
    if not done:
        return None
    timed = {name: Latency(tuple(each[name] for each in done)) for name in treatments}
    slower = timed["wall"].median_ms / table.wall.median_ms
    samples = []
    for name, schedule in zip(list(treatments)[2:], schedules, strict=True):
        ms = timed[name].median_ms / slower
        samples.append(PassSample(name, schedule.resolve_within(table.layout), ms))
    return check_fit(table.model, samples, table.layout)


@dataclass(frozen=True)
class TableTimer(Timer):
    """Gives the latencies that a table predicts, so that all searches have the same latency model.

    Attributes:
        table: The latency table.
        depth: Number of global attention layers.
    """

    table: LatencyTable = field(kw_only=True)
    depth: int = field(kw_only=True)

    def time_in_turns(self, treatments: Sequence[Treatment], **options: Any) -> dict[str, Latency]:
        """Return the latencies of treatments."""
        return {each.name: Latency((self._ms(each.subject),)) for each in treatments}

    def _ms(self, subject: object) -> float:
        model = self.table.model
        if isinstance(subject, LayerTiming):  # the layer that returns zeros takes a millisecond
            return 1.0 + (model.layer_ms(subject.rule, subject.layout) if subject.rule else 0.0)
        assert isinstance(subject, PassTiming)
        if subject.what == "wall":
            return model.wall_ms(subject.layout)
        dense = Schedule.dense(self.depth)
        what = dense if subject.what == "dense" else subject.what
        return model.predict_ms(what, subject.layout)


def calibration(
    plan: Plan,
    mode: Source,
    share: float,
    storage: Path | None,
    *,
    search_clips: int = SEARCH_CLIPS,
    validation_clips: int = VALIDATION_CLIPS,
    trials: int | None = None,
) -> Calibration:
    """Return a calibration for a budget that is a share of the way from the wall to dense."""
    table, first = plan.table, FIRST_CLIP + 1
    seeds = CALIBRATION[first : first + search_clips + validation_clips + 1]
    footage = [rendered_clip(seed, plan.cache.frames) for seed in seeds]
    settings = Settings(
        # A share of dense follows the present speed of the machine.
        budget=parse_budget(f"{100 * budget_ms(table, share) / table.dense_ms:.6f}%"),
        target_frames=plan.target_frames,
        trials=plan.trials if trials is None else trials,
        source=mode,
        seed=plan.seed,
        storage=storage,
        resume=storage is not None and storage.exists(),
        cache=plan.folder / "sensitivities",
    )
    # The held-out clip is not used: the quality stage has clips of its own.
    split = Split(
        tuple(footage[:search_clips]), tuple(footage[search_clips:-1]), tuple(footage[-1:])
    )
    runner = plan.cache.runner
    timer = TableTimer(table=table, depth=runner.depth)
    return run(runner.model, split, settings, family=runner.family, timer=timer)


def searched(plan: Plan, mode: Source, share: float) -> dict[str, Any]:
    """Return the result of the search for a mode and budget, with its baselines by name.

    Raises:
        OutOfTimeError: If the search is not done and the deadline has passed.
    """
    length = f"{plan.cache.frames}-{plan.target_frames}"
    stem = f"{mode}-{share:g}-{length}-{plan.seed}"
    path = plan.folder / f"{stem}.json"
    if not path.exists():
        if time.monotonic() > plan.cache.deadline:
            raise OutOfTimeError
        journal = plan.folder / f"{stem}.journal"
        found = calibration(plan, mode, share, journal)
        assert found.decision is not None
        at_ours = comparable_baselines(found, plan.cache.layout)
        document = {
            "budget_ms": found.budget.clip_ms,
            "trials": plan.trials,
            "exported": found.decision.chosen.kind,
            "reasons": list(found.decision.reasons),
            "gaps": found.gaps,
            "finalists": {
                each.kind: {
                    "name": each.trial.name,
                    "schedule": encode(each.trial.schedule),
                    "predicted_ms": each.trial.latency_ms,
                    "search_score": each.trial.score.value if each.trial.score else None,
                    "validation_score": each.validation_score,
                }
                for each in found.decision.finalists
            },
            "baselines": {name: encode(each) for name, each in at_ours.items()},
        }
        store_json(path, document)
    document = json.loads(path.read_text())
    # Paper and uniform finalists may be slower than ours; the baselines of these kinds are not.
    document["schedules"] = {
        kind: decode(each["schedule"])
        for kind, each in document["finalists"].items()
        if kind in ("knapsack", "search", document["exported"])
    } | {name: decode(each) for name, each in document["baselines"].items()}
    return document


def twice(plan: Plan) -> bool | None:
    """Return whether two small searches with one seed and table have the same trials and choice.

    None if they did not run and the deadline has passed.
    """
    path = plan.folder / f"twice-{plan.cache.frames}-{plan.target_frames}-{plan.seed}.json"
    if not path.exists():
        if time.monotonic() > plan.cache.deadline:
            return None
        tried = []
        for _ in range(2):
            found = calibration(
                plan,
                plan.modes[0],
                plan.shares[-1],
                None,
                search_clips=4,
                validation_clips=2,
                trials=8,
            )
            assert found.found is not None
            assert found.decision is not None
            schedules = [encode(trial.schedule) for trial in found.found.trials]
            tried.append([*schedules, encode(found.decision.chosen.trial.schedule)])
        store_json(path, {"trials": len(tried[0]), "same": tried[0] == tried[1]})
    return bool(json.loads(path.read_text())["same"])


def default_run(plan: Plan, budget: str) -> dict[str, Any] | None:
    """Return the time of the command `calibrate --budget`, with its JSON summary.

    The profile is stored beside it. None if it did not run and the deadline has passed.
    """
    path = plan.folder / f"default-{budget}.json".replace("%", "pct")
    if not path.exists():
        if time.monotonic() > plan.cache.deadline:
            return None
        with tempfile.TemporaryDirectory() as folder:
            output = path.with_suffix(".profile.json")
            for earlier in (output, output.with_suffix(".journal")):
                earlier.unlink(missing_ok=True)
            command = [sys.executable, "-m", "calibrate", "--budget", budget, "--json"]
            begin = time.monotonic()
            printed = subprocess.run(
                [*command, "--output", str(output)],
                env={**os.environ, "XDG_CACHE_HOME": folder},  # without earlier sensitivities
                stdout=subprocess.PIPE,
            )
            total_s = time.monotonic() - begin
        if printed.returncode not in (DONE, MISSED):
            raise SystemExit(f"{' '.join(command)} ended with status {printed.returncode}")
        clip = rendered_clip(CALIBRATION[0], FRAMES)
        dense = measure(lambda: plan.cache.runner.predict(clip), rounds=5)
        document = {
            "budget": budget,
            "total_s": total_s,
            "dense_forward_s": dense.median_ms / 1000,
            "summary": json.loads(printed.stdout),
        }
        store_json(path, document)
    found: dict[str, Any] = json.loads(path.read_text())
    return found
