from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap

from calibrate.measure.statistics import paired_ratio


def clips(values: list[float]) -> dict[str, float]:
    return {f"clip {index}": value for index, value in enumerate(values)}


def test_a_constant_factor_is_found_exactly() -> None:
    compared = paired_ratio(clips([0.8, 1.6, 8.0]), clips([1.0, 2.0, 10.0]))
    assert (compared.ratio, compared.low, compared.high) == pytest.approx((0.8, 0.8, 0.8))
    assert compared.clips == 3
    assert compared.is_lower
    assert not compared.is_higher
    assert str(compared) == "0.800 (0.800 to 0.800, 3 clips)"


def test_clips_are_paired_by_name_and_not_by_order() -> None:
    compared = paired_ratio({"a": 2.0, "b": 30.0}, {"b": 15.0, "a": 1.0})
    assert compared.ratio == pytest.approx(2)
    assert compared.low == pytest.approx(2)


def test_the_interval_covers_as_often_as_its_confidence() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        baseline = rng.lognormal(0, 1, 24)
        candidate = baseline * 0.9 * rng.lognormal(0, 0.2, 24)
        compared = paired_ratio(clips(candidate.tolist()), clips(baseline.tolist()))
        covered += compared.low <= 0.9 <= compared.high
    assert 0.93 <= covered / 1000 <= 0.97


def test_the_interval_is_about_that_of_a_bootstrap() -> None:
    rng = np.random.default_rng(1)
    baseline = rng.lognormal(0, 1, 96)
    candidate = baseline * rng.lognormal(-0.05, 0.3, 96)
    compared = paired_ratio(clips(candidate.tolist()), clips(baseline.tolist()))
    logs = np.log(candidate / baseline)
    interval = bootstrap((logs,), np.mean, random_state=rng).confidence_interval
    assert math.log(compared.low) == pytest.approx(interval.low, abs=0.015)
    assert math.log(compared.high) == pytest.approx(interval.high, abs=0.015)


def test_the_interval_of_one_clip_is_unbounded() -> None:
    compared = paired_ratio({"a": 0.5}, {"a": 1.0})
    assert (compared.ratio, compared.low, compared.high) == (0.5, 0.0, math.inf)
    assert not compared.is_lower


def test_a_tolerance_keeps_small_figures_from_deciding() -> None:
    compared = paired_ratio(clips([0.0, 1.0]), clips([1e-9, 1.0]), tolerance=0.01)
    assert compared.ratio == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("candidate", "baseline", "message"),
    [
        ({}, {}, "unpaired: all"),
        ({"a": 1.0}, {"b": 1.0}, r"unpaired: \['a', 'b'\]"),
        ({"a": 0.0}, {"a": 1.0}, "clip 'a': figures 0.0 and 1.0 have no ratio"),
        ({"a": 1.0}, {"a": math.nan}, "have no ratio"),
        ({"a": math.inf}, {"a": 1.0}, "have no ratio"),
    ],
)
def test_figures_that_cannot_be_compared_are_refused(
    candidate: dict[str, float], baseline: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        paired_ratio(candidate, baseline)
