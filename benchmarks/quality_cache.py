"""Qualities of schedules on rendered clips, cached on disk so that nothing is measured twice.

A folder belongs to one model, with all its parameters and the operators' revision, and to one clip
length. For each clip it holds the dense prediction and a JSON file with the qualities of all
schedules that ran on the clip. A script that was stopped, or that needs more clips or schedules,
continues from these files.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from results_io import RESULTS, replace_file, store_json
from safetensors.torch import load_file, save

from calibrate.measure.evaluator import DenseRuns, evaluate, run_dense
from calibrate.measure.quality import Distances, Quality, assess
from spark3r import Prediction, Schedule, Spark3rWarning, TokenLayout
from spark3r.identity import fingerprint
from spark3r.metrics import ConsistencyMetrics
from spark3r.reduction.operators import OPERATORS_REVISION
from spark3r.reduction.rule import clamp
from spark3r.reference import load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.runner import Runner

SAVE_EVERY = 10
"""Number of schedules after which a clip's file is written."""

STORED = ("depth", "confidence", "extrinsics", "intrinsics")
"""Stored parts of a dense prediction. Its points follow from them."""


class OutOfTimeError(Exception):
    """The time limit of a script is over. Everything measured so far is stored."""


@dataclass
class QualityCache:
    """A model, and the stored qualities of its schedules.

    Attributes:
        runner: The unpatched model.
        frames: Frames per clip.
        root: Folder of all models and lengths.
        deadline: Time, by `time.monotonic`, after which nothing more is measured.
        folder: Folder of this model and length.
        layout: Token layout of the clips.
    """

    runner: Runner
    frames: int
    root: Path
    deadline: float = float("inf")
    folder: Path = field(init=False)
    layout: TokenLayout = field(init=False)

    def __post_init__(self) -> None:
        whole = fingerprint({"model": self.runner.root}) or "none"
        name = f"{whole[:16]}-{OPERATORS_REVISION}"
        self.folder = self.root / name / str(self.frames)
        self.folder.mkdir(parents=True, exist_ok=True)
        images = rendered_clip(0, 1).images.expand(self.frames, -1, -1, -1)
        self.layout = self.runner.layout(images)

    def dense(self, seed: int) -> DenseRuns:
        """Return a rendered clip and its dense run."""
        clip = rendered_clip(seed, self.frames)
        path = self.folder / f"{seed}.safetensors"
        if not path.exists():
            runs = run_dense(self.runner, [clip])
            tensors = {name: getattr(runs.predictions[0], name).contiguous() for name in STORED}
            replace_file(path, save(tensors))
            return runs
        stored = load_file(path)
        dense = Prediction.from_depth(*(stored[name] for name in STORED))
        return DenseRuns((clip,), (dense,), (assess(dense, clip, dense),))

    def dense_of(self, seeds: Iterable[int]) -> DenseRuns:
        """Return rendered clips and their dense runs as one object."""
        runs = [self.dense(seed) for seed in seeds]
        return DenseRuns(
            tuple(each.clips[0] for each in runs),
            tuple(each.predictions[0] for each in runs),
            tuple(each.qualities[0] for each in runs),
        )

    def qualities(self, seed: int, schedules: Iterable[Schedule]) -> tuple[Quality, list[Quality]]:
        """Return the quality of the dense run and of each schedule on one clip.

        Raises:
            OutOfTimeError: If the deadline passes before everything is measured.
        """
        path = self.folder / f"{seed}.json"
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        wanted = [(effect(schedule, self.layout), schedule) for schedule in schedules]
        missing = {key: schedule for key, schedule in wanted if key not in known}
        if missing or "dense" not in known:
            if time.monotonic() > self.deadline:
                raise OutOfTimeError
            runs = self.dense(seed)
            known["dense"] = asdict(runs.qualities[0])
            for number, (key, schedule) in enumerate(missing.items()):
                if number % SAVE_EVERY == 0:
                    store_json(path, known)
                    if time.monotonic() > self.deadline:
                        raise OutOfTimeError
                known[key] = asdict(evaluate(self.runner, schedule, runs)[0])
            store_json(path, known)
        return _quality(known["dense"]), [_quality(known[key]) for key, _ in wanted]

    def complete(
        self, seeds: Sequence[int], schedules: Mapping[str, Schedule]
    ) -> dict[int, dict[str, Quality]]:
        """Return qualities by clip (seed) and schedule name, ``dense`` first.

        Clips that are not finished before the deadline are left out.
        """
        found = {}
        for seed in seeds:
            try:
                dense, others = self.qualities(seed, schedules.values())
            except OutOfTimeError:
                continue
            found[seed] = {"dense": dense, **dict(zip(schedules, others, strict=True))}
        return found

    def record(self) -> dict[str, Any]:
        """Return what a result records about the model and the clips."""
        return {
            "fingerprint": fingerprint(self.runner.attention),
            "operators_revision": OPERATORS_REVISION,
            "frames": self.frames,
        }


def effect(schedule: Schedule, layout: TokenLayout) -> str:
    """Return the effect of a schedule on clips of a layout as text. Equal texts are equal runs."""
    rules = [clamp(resolved, layout) for resolved in schedule.resolve(layout.frames)]
    return json.dumps([[rule.query, rule.key_value, rule.operators.to_dict()] for rule in rules])


def factors(schedule: Schedule) -> str:
    """Return the factors of each layer in one line: query/key-value, with ~ for thinned patches."""
    return " ".join(
        f"{rule.query}/{rule.key_value}"
        + "~" * (not (rule.operators or schedule.operators).key_value.whole_frames)
        for rule in schedule.layers
    )


def add_arguments(parser: argparse.ArgumentParser, frames: int, output: str) -> None:
    """Add the options of all scripts that use a quality cache.

    Args:
        parser: Parser of the script.
        frames: Default number of frames per clip.
        output: Name of the script's file in `RESULTS`, the default of ``--output``.
    """
    parser.add_argument("--weights", default="shipped", help="as for spark3r.reference.load")
    parser.add_argument(
        "--frames", type=int, default=frames, help=f"frames per clip (default: {frames})"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="measure nothing more after this time"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs") / "measured", help="folder of the cache"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / output, help="JSON file to write")


def open_cache(options: argparse.Namespace) -> QualityCache:
    """Return the quality cache of the options that `add_arguments` adds."""
    # On short clips the runtime lowers the factors of some schedules, and warns.
    warnings.simplefilter("ignore", Spark3rWarning)
    deadline = time.monotonic() + 60 * options.minutes
    return QualityCache(
        Runner.of(load(weights=options.weights)), options.frames, options.runs, deadline
    )


def _quality(stored: Mapping[str, Any]) -> Quality:
    return Quality(
        stored["clip"],
        None if stored["error"] is None else Distances(**stored["error"]),
        ConsistencyMetrics(**stored["consistency"]),
        Distances(**stored["deviation"]),
    )
