"""Runs of a model under schedules over the same clips, and their quality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from spark3r.clips import Clip
from spark3r.families import Family, detect
from spark3r.inference import predict
from spark3r.patching import apply
from spark3r.prediction import Prediction
from spark3r.schedule import Schedule

from .quality import Quality, assess


@dataclass(frozen=True)
class DenseRuns:
    """Clips and what the dense model says of them.

    Attributes:
        clips: The clips, with different names.
        predictions: The dense model's, in the same order.
        qualities: Their quality; all deviations are 0.
    """

    clips: tuple[Clip, ...]
    predictions: tuple[Prediction, ...]
    qualities: tuple[Quality, ...]

    def first(self, count: int) -> DenseRuns:
        """Return those of the first ``count`` clips."""
        return DenseRuns(self.clips[:count], self.predictions[:count], self.qualities[:count])


def run_dense(
    model: nn.Module,
    clips: Sequence[Clip],
    family: Family | None = None,
    dtype: torch.dtype | None = None,
) -> DenseRuns:
    """Return the dense runs of an unpatched model, in a precision as `spark3r.inference.run` takes.

    Raises:
        ValueError: If there is no clip, or two have the same name.
        PredictionError: If the model returns NaN or no prediction.
    """
    names = [clip.name for clip in clips]
    if not clips or len(set(names)) < len(names):
        raise ValueError(f"expected clips with different names, got {names}")
    predictions = tuple(predict(model, clip, family, dtype) for clip in clips)
    qualities = tuple(
        assess(dense, clip, dense) for dense, clip in zip(predictions, clips, strict=True)
    )
    return DenseRuns(tuple(clips), predictions, qualities)


def evaluate(
    model: nn.Module,
    schedule: Schedule,
    dense: DenseRuns,
    family: Family | None = None,
    *,
    clouds: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Quality, ...]:
    """Return the quality of a schedule on each clip; the model is unpatched afterwards.

    Args:
        model: The model.
        schedule: What to apply.
        dense: The clips and their dense runs.
        family: What is known of the model; None recognises it.
        clouds: Whether to compute accuracy and completeness of the points.
        dtype: Precision of the passes, as `spark3r.inference.run` takes it.

    Raises:
        PredictionError: If the model returns NaN or no prediction.
    """
    family = detect(model) if family is None else family
    with apply(model, schedule, family=family):
        return tuple(
            assess(predict(model, clip, family, dtype), clip, reference, clouds=clouds)
            for clip, reference in zip(dense.clips, dense.predictions, strict=True)
        )
