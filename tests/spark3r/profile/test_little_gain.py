"""A schedule that hardly gains where it was measured says so when it is applied."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
from profile_documents import Document

import spark3r
from spark3r import Profile, Spark3rWarning, load_model
from spark3r.profile import profile_path
from spark3r.profile.estimate import little_gain


def sped_up(by: float) -> Profile:
    """Return the reference model's profile, as if schedules were so many times as fast as dense."""
    document: Document = json.loads(profile_path("reference").read_text())
    measurement: Any = document["measurements"][0]
    for run in measurement["schedules"]:
        if run["latency"] is not None:
            run["latency"]["median_ms"] = measurement["dense"]["latency"]["median_ms"] / by
    return Profile.model_validate_json(json.dumps(document), context={"source": "these tests"})


@pytest.mark.parametrize(("by", "warns"), [(0.9, True), (1.05, True), (1.2, False)])
def test_little_or_negative_gain_is_told_once_at_apply(by: float, warns: bool) -> None:
    profile, model = sped_up(by), load_model("reference")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spark3r.apply(model, profile).remove()
    told = [str(each.message) for each in caught if "gains little" in str(each.message)]
    assert len(told) == warns
    if warns:
        assert f"at 128 frames {by:.2f} times as fast as the dense model" in told[0]
        assert any(issubclass(each.category, Spark3rWarning) for each in caught)


def test_nothing_is_told_without_evidence_or_reduction() -> None:
    assert little_gain(spark3r.load_profile("vggt-1b"), "paper") is None
    assert little_gain(spark3r.load_profile("reference"), "knapsack") is None
