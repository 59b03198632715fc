"""Whole models with mass correction by groups of keys, against the mask."""

from __future__ import annotations

import pytest
from family_cases import CASES, Case, build, difference, images, run

import spark3r
from spark3r import LayerRule, Operators, Schedule
from spark3r.kernels import forced
from spark3r.kernels.grouped_attention import MASK, OPERATION
from spark3r.reduction.operators import QueryMerging, TemporalStride, TokenStride


@pytest.mark.parametrize("operator", [TokenStride, TemporalStride])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_groups_joined_by_log_sum_exp_give_the_results_of_the_mask(
    case: Case, operator: type[TokenStride | TemporalStride]
) -> None:
    model, clip = build(case), images(case, 5)
    kept = operator(keep_special=True, keep_anchor=True, mass_correction=1.0)
    rules = (LayerRule(1, 3),) + (LayerRule(2, 2),) * (case.layers - 1)
    with spark3r.apply(model, Schedule(rules, Operators(QueryMerging(group=4), kept))):
        plain = run(model, clip)
        with forced(OPERATION, MASK):  # keys in groups, and still a mask
            assert difference(run(model, clip), plain) < 2e-5
        with forced(OPERATION, "flash"):
            assert difference(run(model, clip), plain) < 2e-5
