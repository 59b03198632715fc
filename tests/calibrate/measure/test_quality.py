from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from faulty_runs import altered, frozen_cameras, make_clip, noisy, perfect, turn

from calibrate.defaults import Source
from calibrate.measure.evaluator import DenseRuns, Evaluator, is_failure
from calibrate.measure.quality import assess, mean_figures
from calibrate.measure.score import (
    COLLAPSED,
    DEVIATION_TOLERANCE,
    DEVIATION_WEIGHT,
    ERROR_TOLERANCE,
    score,
)
from calibrate.report.profile import figure_records
from spark3r import Clip, ClipError
from spark3r.families.registry import FAMILIES
from spark3r.geometry import invert_pose
from spark3r.prediction import Prediction, PredictionError
from spark3r.profile.evidence import Figures
from spark3r.runner import Runner

CLIP = make_clip()
TRUTH = perfect(CLIP)
DENSE = noisy(TRUTH, 0.02, seed=1)
OF_DENSE = assess(DENSE, CLIP, DENSE)


def test_the_truth_has_no_error_and_dense_no_deviation() -> None:
    of_truth = assess(TRUTH, CLIP, TRUTH, clouds=True)
    for name, value in of_truth.figures().items():
        if name.startswith("consistency") or name.endswith(("auc_3", "auc_30", "delta_125")):
            continue
        assert value == pytest.approx(0, abs=1e-4), name
    assert of_truth.error is not None
    assert of_truth.error.auc_3 == of_truth.error.auc_30 == of_truth.error.delta_125 == 1
    assert of_truth.consistency.log_ratio == pytest.approx(0, abs=1e-3)
    deviation = OF_DENSE.deviation
    assert deviation.depth == deviation.depth_log == 0
    assert deviation.rotation_deg == pytest.approx(0, abs=1e-4)  # float32 rotations
    assert deviation.translation_deg == pytest.approx(0, abs=1e-4)


def test_scale_and_placement_of_the_world_do_not_matter() -> None:
    turned = TRUTH.extrinsics.clone()
    turned[:, :, :3] = turned[:, :, :3] @ turn(40).T
    turned[:, :, 3] *= 3
    moved = altered(TRUTH, depth=3 * TRUTH.depth, extrinsics=turned)
    error = assess(moved, CLIP, TRUTH).error
    assert error is not None
    assert error.depth == pytest.approx(0, abs=1e-5)
    assert error.depth_raw == pytest.approx(2, abs=1e-4)
    assert error.rotation_deg == pytest.approx(0, abs=1e-2)
    assert error.points == pytest.approx(0, abs=1e-4)
    assert error.trajectory_points == pytest.approx(0, abs=1e-4)
    assert error.trajectory == pytest.approx(0, abs=1e-4)


def test_a_clip_without_ground_truth_has_no_error() -> None:
    bare = Clip(CLIP.name, CLIP.images)
    quality = assess(DENSE, bare, DENSE)
    assert quality.error is None
    assert quality.deviation == OF_DENSE.deviation
    assert not any(name.startswith("error") for name in quality.figures())
    with pytest.raises(ClipError, match="'curved wall' has no ground truth"):
        score(quality, quality, "error")


def test_accuracy_and_completeness_are_computed_when_asked_for() -> None:
    assert OF_DENSE.error is not None
    assert OF_DENSE.error.accuracy is None
    assert "error.accuracy" not in OF_DENSE.figures()
    assert "error.is_pan" not in OF_DENSE.figures()
    with_clouds = assess(DENSE, CLIP, DENSE, clouds=True)
    assert 0 < with_clouds.figures()["error.accuracy"] < 0.3


def test_on_a_pan_trajectories_are_not_judged_and_points_do_not_follow_them() -> None:
    pan = make_clip(step=1e-4, name="pan")
    truth = perfect(pan)
    disturbed = truth.extrinsics.clone()
    jitter = torch.randn(len(disturbed), 3, generator=torch.Generator().manual_seed(0))
    disturbed[:, :, 3] += 1e-3 * jitter
    error = assess(altered(truth, extrinsics=disturbed), pan, truth).error
    assert error is not None
    assert error.is_pan
    assert error.trajectory is None
    assert error.trajectory_points is None
    assert error.points < 0.005
    assert error.rotation_deg == pytest.approx(0, abs=1e-3)
    assert OF_DENSE.error is not None
    assert not OF_DENSE.error.is_pan


def test_one_frame() -> None:
    one = CLIP.select(slice(0, 1))
    run = noisy(perfect(one), 0.02)
    quality = assess(run, one, run)
    assert quality.consistency.log_ratio is None
    for source in ("error", "consistency", "deviation"):
        assert score(quality, quality, source) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]


def test_a_prediction_of_another_size_is_refused() -> None:
    with pytest.raises(ClipError, match=r"\[6, 16, 16\] frames and pixels"):
        assess(DENSE.select(slice(0, 5)), CLIP, DENSE)


def test_a_depth_that_is_not_positive_is_a_failed_run() -> None:
    clip = make_clip()
    dense = perfect(clip)
    depth = dense.depth.clone()
    depth[1, 2, 3] = 0.0
    behind = Prediction.from_depth(depth, dense.confidence, dense.extrinsics, dense.intrinsics)
    with pytest.raises(PredictionError, match="depths are not positive") as raised:
        assess(behind, clip, dense)
    assert is_failure(raised.value)


def test_mean_figures_are_those_that_all_clips_have() -> None:
    bare = assess(DENSE, Clip("bare", CLIP.images), DENSE)
    mean = mean_figures([OF_DENSE, bare])
    assert not any(name.startswith("error") for name in mean)
    assert mean["deviation.depth_log"] == 0
    assert mean_figures([OF_DENSE])["error.depth"] == OF_DENSE.figures()["error.depth"]
    with pytest.raises(ValueError, match="no clip"):
        mean_figures([])


@pytest.mark.parametrize("source", ["error", "consistency", "deviation"])
def test_dense_scores_zero_and_more_noise_scores_more(source: Source) -> None:
    assert score(OF_DENSE, OF_DENSE, source) == pytest.approx(0, abs=1e-6)
    scores = [
        score(assess(noisy(DENSE, amount), CLIP, DENSE), OF_DENSE, source)
        for amount in (0.01, 0.04, 0.16)
    ]
    assert scores == sorted(scores)
    assert scores[-1] > 0.02


def test_a_run_better_than_dense_scores_below_zero() -> None:
    of_truth = assess(TRUTH, CLIP, DENSE)
    assert score(of_truth, OF_DENSE, "error") < -1
    assert score(of_truth, OF_DENSE, "consistency") < 0
    assert score(of_truth, OF_DENSE, "deviation") > 0


def test_error_is_a_mean_log_ratio_with_tolerances() -> None:
    assert OF_DENSE.error is not None
    worse = replace(
        OF_DENSE,
        error=replace(
            OF_DENSE.error,
            depth=1.1 * (OF_DENSE.error.depth + ERROR_TOLERANCE["depth"])
            - ERROR_TOLERANCE["depth"],
        ),
    )
    assert score(worse, OF_DENSE, "error", "depth") == pytest.approx(math.log(1.1))
    assert score(worse, OF_DENSE, "error") == pytest.approx(math.log(1.1) / 3)
    assert score(worse, OF_DENSE, "error", "pose") == 0
    assert score(worse, OF_DENSE, "error", "points") == 0


def test_deviation_is_one_percent_where_each_metric_is_at_its_tolerance() -> None:
    quality = replace(OF_DENSE, deviation=replace(OF_DENSE.deviation, **DEVIATION_TOLERANCE))
    for objective in ("balanced", "depth", "pose", "points"):
        assert score(quality, OF_DENSE, "deviation", objective) == pytest.approx(0.01)  # type: ignore[arg-type]


def test_collapsed_cameras_are_consistent_and_the_guard_sees_it() -> None:
    run = frozen_cameras(DENSE, keep=0.0)
    quality = assess(run, CLIP, DENSE)
    assert quality.consistency.log_ratio is not None
    assert OF_DENSE.consistency.log_ratio is not None
    assert quality.consistency.log_ratio < 0.2 * OF_DENSE.consistency.log_ratio  # the temptation
    assert score(quality, OF_DENSE, "consistency") == COLLAPSED
    assert score(quality, OF_DENSE, "error") > 0.2


def test_flat_depth_is_a_collapse_too() -> None:
    flat = altered(DENSE, depth=torch.full_like(DENSE.depth, 4.0))
    assert score(assess(flat, CLIP, DENSE), OF_DENSE, "consistency") == COLLAPSED


def test_a_collapse_scores_worse_than_any_sound_run() -> None:
    ruined = assess(noisy(DENSE, 0.3), CLIP, DENSE)
    assert score(ruined, OF_DENSE, "consistency") <= COLLAPSED < math.inf


def test_cameras_that_look_away_from_each_other_count_as_collapsed() -> None:
    away = TRUTH.extrinsics.clone()
    for frame in range(len(away)):
        away[frame] = invert_pose(torch.cat((turn(120.0 * frame), torch.zeros(3, 1)), dim=1)[None])
    quality = assess(altered(TRUTH, extrinsics=away), CLIP, DENSE)
    assert score(quality, OF_DENSE, "consistency") == COLLAPSED


def test_runs_on_different_clips_are_not_compared() -> None:
    with pytest.raises(ValueError, match="'other' is compared with one on 'curved wall'"):
        score(replace(OF_DENSE, clip="other"), OF_DENSE, "error")


@pytest.mark.parametrize("source", ["error", "consistency", "deviation"])
def test_only_a_search_for_error_minimises_deviation_as_well(source: Source) -> None:
    dense = DenseRuns((CLIP,), (DENSE,), (OF_DENSE,))
    worse = assess(noisy(DENSE, 0.1), CLIP, DENSE)
    evaluator = Evaluator(Runner(torch.nn.Identity(), FAMILIES["reference"]), source, "balanced")
    value, mean = evaluator.search_value((worse,), dense)
    assert mean == score(worse, OF_DENSE, source)
    deviation = score(worse, OF_DENSE, "deviation")
    assert value == pytest.approx(mean + DEVIATION_WEIGHT * deviation * (source == "error"))


def test_a_search_for_deviation_minimises_its_geometric_mean() -> None:
    dense = DenseRuns((CLIP, CLIP), (DENSE, DENSE), (OF_DENSE, OF_DENSE))
    near, far = (assess(noisy(DENSE, noise), CLIP, DENSE) for noise in (0.01, 0.2))
    runner = Runner(torch.nn.Identity(), FAMILIES["reference"])
    evaluator = Evaluator(runner, "deviation", "balanced")
    names = {"near": near, "far": far}
    each = {name: score(run, OF_DENSE, "deviation") for name, run in names.items()}
    assert 5 * each["near"] < each["far"]
    runs = tuple(replace(run, clip=name) for name, run in names.items())
    dense = replace(dense, qualities=tuple(replace(OF_DENSE, clip=name) for name in names))
    value, mean = evaluator.search_value(runs, dense)
    assert mean == pytest.approx((each["near"] + each["far"]) / 2)
    assert value == pytest.approx(math.sqrt(each["near"] * each["far"]), rel=0.02)


@pytest.mark.parametrize("clip", [CLIP, Clip(CLIP.name, CLIP.images)], ids=["truth", "bare"])
def test_a_profile_keeps_every_figure(clip: Clip) -> None:
    quality = assess(noisy(TRUTH, 0.05, seed=2), clip, DENSE)
    (record,) = figure_records([quality])
    again = Figures.model_validate_json(record.model_dump_json())
    kept = {
        f"{source}.{name}": value
        for source in ("error", "consistency", "deviation")
        for name, value in (getattr(again, source) or {}).items()
    }
    assert kept == quality.figures()
    assert (again.error is None) == (clip.depth is None)
