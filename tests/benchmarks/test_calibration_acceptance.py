"""Acceptance criteria of calibration judge what they say."""

from __future__ import annotations

from types import ModuleType

import pytest
from benchmark_scripts import script

FOUND = {("error", 0.1): {"exported": "knapsack"}}
OURS = "error, wall + 10%: knapsack"


@pytest.fixture
def acceptance(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "calibration_acceptance")


def test_a_run_is_the_median_of_five_passes(acceptance: ModuleType) -> None:
    """The budget is 100 + .1 · (1100 - 100) = 200 in every run."""
    passes = [
        {"wall": 100.0, "dense": 1100.0, OURS: 200.0 * (5.0 if number % 5 < 2 else share)}
        for number, share in enumerate([0.95] * 45 + [1.2] * 5)
    ]
    (criterion,) = acceptance.latency_criteria(FOUND, passes, 50)
    assert criterion.met  # nine of ten, whatever two passes of each took
    assert criterion.measured.startswith("9 of 10, 0.950 to 1.200; of single passes 27 of 50")
    passes[0:5] = [each | {OURS: 300.0} for each in passes[0:5]]
    (criterion,) = acceptance.latency_criteria(FOUND, passes, 50)
    assert criterion.met is False
    (criterion,) = acceptance.latency_criteria(FOUND, passes[:49], 50)
    assert criterion.met is None


def test_a_baseline_is_excluded_only_where_model_and_timing_agree(acceptance: ModuleType) -> None:
    names = {kind: f"error, wall + 10%: {kind}" for kind in ("both", "model", "timing")}
    predicted = {OURS: 100.0, names["both"]: 107.0, names["model"]: 107.0, names["timing"]: 100.0}
    timed = {OURS: 200.0, names["both"]: 212.0, names["model"]: 198.0, names["timing"]: 220.0}
    rounds = [{"wall": 50.0} | timed] * 3
    out = acceptance.slower_baselines(FOUND, predicted, rounds)
    assert out == {names["both"]: "1.070 predicted, 1.060 measured"}
    assert acceptance.slower_baselines(FOUND, predicted, []) == {}
    runs = {7: dict.fromkeys((OURS, *names.values()), "quality")}
    assert acceptance.without(runs, out)[7].keys() == {OURS, names["model"], names["timing"]}
