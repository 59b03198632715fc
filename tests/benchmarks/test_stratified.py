"""Random schedules that are spread evenly from the wall to dense."""

from __future__ import annotations

import pytest
from benchmark_scripts import script

from spark3r import Operators, Schedule
from spark3r.latency import TERMS, LatencyModel
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import QueryMerging, TokenStride

DEPTH = 8
LAYOUT = TokenLayout(40, 8, 8, special=5, anchor_frame=0)
OPERATORS = [
    Operators(),
    Operators(QueryMerging(unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0)),
]
QUERY_FACTORS, KEY_VALUE_FACTORS = (1, 2, 3, 4, 8), (1, 2, 4, 8, 16, 32)
MODEL = LatencyModel(40, 300.0, dict.fromkeys(TERMS, 1.0) | {"attention": 12.0})


@pytest.mark.slow
def test_stratified_schedules_spread_from_wall_to_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    stratified_schedules = script(monkeypatch, "stratified").stratified_schedules
    arguments = (DEPTH, OPERATORS, QUERY_FACTORS, KEY_VALUE_FACTORS, MODEL, LAYOUT)
    schedules = stratified_schedules(21, *arguments)
    assert len(set(schedules)) == 21
    assert schedules == stratified_schedules(21, *arguments)
    wall_ms = MODEL.wall_ms(LAYOUT)
    span_ms = MODEL.predict_ms(Schedule.dense(DEPTH), LAYOUT) - wall_ms
    places = [(MODEL.predict_ms(each, LAYOUT) - wall_ms) / span_ms for each in schedules]
    assert min(places) < 0.15
    assert max(places) > 0.8
    assert any(all(rule.query == 1 for rule in each.layers) for each in schedules)
    assert any(all(rule.key_value == 1 for rule in each.layers) for each in schedules)
    with pytest.raises(ValueError, match="only 0 different schedules"):
        stratified_schedules(3, 1, OPERATORS[:1], [1], [1], MODEL, LAYOUT)
