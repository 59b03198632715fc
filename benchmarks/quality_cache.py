"""Quality of schedules on rendered clips, kept on disk so that nothing is measured twice.

A folder holds one model (all its parameters and the operators' revision) at one clip length; in it
each clip has its dense prediction and a JSON file with the quality of every schedule that ran on
it. Scripts that are stopped, or ask for further clips and schedules, go on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from calibrate.measure.evaluator import DenseRuns, evaluate, run_dense
from calibrate.measure.quality import Distances, Quality, assess
from spark3r import Operators, Prediction, Schedule
from spark3r.env import environment
from spark3r.errors import Spark3rWarning
from spark3r.families.base import Family
from spark3r.families.registry import detect
from spark3r.identity import fingerprint
from spark3r.layout import TokenLayout
from spark3r.metrics import ConsistencyMetrics
from spark3r.reduction.resolve import clamp
from spark3r.reference import load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.runner import layout_of
from spark3r.schedule import OPERATORS_REVISION

SAVE_EVERY = 10
"""Schedules after which a clip's file is written."""


KEPT = ("depth", "confidence", "extrinsics", "intrinsics")
"""What is kept of a dense prediction: its points follow."""


class OutOfTimeError(Exception):
    """The time that a script was given is over; what was measured is kept."""


@dataclass
class QualityCache:
    """A model and where the qualities of its schedules are kept.

    Attributes:
        model: The unpatched model.
        frames: Length of all clips.
        root: Folder of all models and lengths.
        deadline: Of `time.monotonic`; nothing further is measured after it.
    """

    model: nn.Module
    frames: int
    root: Path
    deadline: float = float("inf")
    family: Family = field(init=False)
    folder: Path = field(init=False)
    layout: TokenLayout = field(init=False)

    def __post_init__(self) -> None:
        self.family = detect(self.model)
        whole = fingerprint({"model": self.model}) or "none"
        name = f"{whole[:16]}-{OPERATORS_REVISION}"
        self.folder = self.root / name / str(self.frames)
        self.folder.mkdir(parents=True, exist_ok=True)
        images = rendered_clip(0, 1).images.expand(self.frames, -1, -1, -1)
        self.layout = layout_of(self.model, images, self.family)

    @property
    def depth(self) -> int:
        """Global layers of the model."""
        return len(self.family.attention(self.model))

    def dense(self, seed: int) -> DenseRuns:
        """Return a rendered clip and its dense run."""
        clip = rendered_clip(seed, self.frames)
        path = self.folder / f"{seed}.safetensors"
        if not path.exists():
            runs = run_dense(self.model, [clip], self.family)
            tensors = {name: getattr(runs.predictions[0], name).contiguous() for name in KEPT}
            replace_file(path, lambda temporary: save_file(tensors, temporary))
            return runs
        kept = load_file(path)
        dense = Prediction.from_depth(*(kept[name] for name in KEPT))
        return DenseRuns((clip,), (dense,), (assess(dense, clip, dense),))

    def dense_of(self, seeds: Iterable[int]) -> DenseRuns:
        """Return rendered clips and their dense runs together."""
        runs = [self.dense(seed) for seed in seeds]
        return DenseRuns(
            tuple(each.clips[0] for each in runs),
            tuple(each.predictions[0] for each in runs),
            tuple(each.qualities[0] for each in runs),
        )

    def qualities(self, seed: int, schedules: Iterable[Schedule]) -> tuple[Quality, list[Quality]]:
        """Return the quality of the dense run and of schedules on one clip, in their order.

        Raises:
            OutOfTimeError: If it was not all measured in the time given.
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
                    _write(path, known)
                    if time.monotonic() > self.deadline:
                        raise OutOfTimeError
                known[key] = asdict(evaluate(self.model, schedule, runs, self.family)[0])
            _write(path, known)
        return _quality(known["dense"]), [_quality(known[key]) for key, _ in wanted]

    def complete(
        self, seeds: Sequence[int], schedules: Mapping[str, Schedule]
    ) -> dict[int, dict[str, Quality]]:
        """Return qualities by clip and schedule name, dense first; clips not done are left out."""
        found = {}
        for seed in seeds:
            try:
                dense, others = self.qualities(seed, schedules.values())
            except OutOfTimeError:
                continue
            found[seed] = {"dense": dense, **dict(zip(schedules, others, strict=True))}
        return found

    def record(self) -> dict[str, Any]:
        """Return what a document of results says of the model and its surroundings."""
        return {
            "fingerprint": fingerprint(self.family.attention(self.model)),
            "operators_revision": OPERATORS_REVISION,
            "frames": self.frames,
            "environment": environment(),
        }


def effect(schedule: Schedule, layout: TokenLayout) -> str:
    """Return what a schedule does to clips of a layout; equal texts are equal runs."""
    rules = [clamp(resolved, layout) for resolved in schedule.resolve(layout.frames)]
    return json.dumps([rule.effect(Operators()) for rule in rules])


def factors(schedule: Schedule) -> str:
    """Return a schedule's factors in one line: query/key-value, ~ where patches are thinned."""
    return " ".join(
        f"{rule.query}/{rule.key_value}"
        + "~" * ((rule.operators or schedule.operators).key_value == "token_stride")
        for rule in schedule.layers
    )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file as a whole or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}")
    write(temporary)
    temporary.replace(path)


def add_arguments(parser: argparse.ArgumentParser, frames: int, output: str | None = None) -> None:
    """Add the options that all scripts on measured qualities have.

    Args:
        parser: Of the script.
        frames: Default length of the clips.
        output: Name of the file in ``results`` that the figures go to by default; None adds no
            ``--output``.
    """
    parser.add_argument("--weights", default="shipped", help="as for spark3r.reference.load")
    parser.add_argument("--frames", type=int, default=frames, help="length of the clips")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="measure nothing new after so long"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs") / "measured", help="folder of raw figures"
    )
    if output is not None:
        results = Path(__file__).with_name("results")
        parser.add_argument("--output", type=Path, default=results / output)


def open_cache(options: argparse.Namespace) -> QualityCache:
    """Return the bench that the options ask for."""
    # Some schedules ask for more than short clips allow; the runtime brings their factors down.
    warnings.simplefilter("ignore", Spark3rWarning)
    deadline = time.monotonic() + 60 * options.minutes
    return QualityCache(load(weights=options.weights), options.frames, options.runs, deadline)


def _quality(stored: Mapping[str, Any]) -> Quality:
    return Quality(
        stored["clip"],
        None if stored["error"] is None else Distances(**stored["error"]),
        ConsistencyMetrics(**stored["consistency"]),
        Distances(**stored["deviation"]),
    )


def _write(path: Path, known: Mapping[str, Any]) -> None:
    text = json.dumps(known)
    replace_file(path, lambda temporary: temporary.write_text(text))
