"""The guard of consistency at work on a trained model."""

from __future__ import annotations

import warnings

import pytest

from calibrate.measure.evaluator import DenseRuns, evaluate, run_dense
from calibrate.measure.score import COLLAPSED, score
from spark3r import Operators, Schedule
from spark3r.errors import Spark3rWarning
from spark3r.metrics import collapsed
from spark3r.reduction.operators import QueryMerging
from spark3r.reference import ReferenceModel, load
from spark3r.reference.scenes.render import rendered_clip
from spark3r.reference.scenes.seeds import EVALUATION
from spark3r.runner import Runner

FRAMES, CLIPS, LAYERS = 8, 3, 8
ONE_QUERY = Schedule.uniform(LAYERS, query=64, operators=Operators(QueryMerging(group=1)))
"""All patches of a frame ask one question, so that its depth flattens and cameras stop moving."""
SOUND = Schedule.uniform(LAYERS, key_value=2)


@pytest.fixture(scope="module")
def model() -> ReferenceModel:
    return load()


@pytest.fixture(scope="module")
def dense(model: ReferenceModel) -> DenseRuns:
    seeds = EVALUATION[2000 : 2000 + CLIPS]
    return run_dense(Runner.of(model), [rendered_clip(seed, FRAMES) for seed in seeds])


def test_a_schedule_that_ruins_the_model_collapses(model: ReferenceModel, dense: DenseRuns) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Spark3rWarning)
        runs = evaluate(Runner.of(model), ONE_QUERY, dense)
    seen = [
        (run, reference)
        for run, reference in zip(runs, dense.qualities, strict=True)
        if collapsed(run.consistency, reference.consistency)
    ]
    assert len(seen) >= CLIPS / 2
    for run, reference in seen:
        assert score(run, reference, "consistency") == COLLAPSED
        assert score(run, reference, "deviation") > 0.02  # it is far from dense indeed


def test_a_sound_schedule_does_not_collapse(model: ReferenceModel, dense: DenseRuns) -> None:
    for run, reference in zip(
        evaluate(Runner.of(model), SOUND, dense), dense.qualities, strict=True
    ):
        assert not collapsed(run.consistency, reference.consistency)
        assert score(run, reference, "consistency") < COLLAPSED
