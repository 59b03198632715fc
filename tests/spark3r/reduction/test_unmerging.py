"""Linear unmerging: against loops in float64, and in cases where it must change nothing."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_properties import check_attention
from qkv import random_qkv, reduced
from strategies import layouts, operators
from tiers import examples

from spark3r.layout import TokenLayout
from spark3r.reduction import unmerging
from spark3r.reduction.operators import Operators, QueryMerging
from spark3r.reduction.rule import ResolvedRule, clamp

few = settings(max_examples=examples(40), deadline=None)


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_linear_unmerging_follows_attention_where_it_is_nearly_linear(factor):
    # With small logits the softmax is nearly linear in the query, with one slope everywhere.
    layout = TokenLayout(12, 4, 5, special=3, anchor_frame=0)
    query, key, value = random_qkv(layout)
    query = 0.02 * query
    dense = F.scaled_dot_product_attention(query, key, value)
    off = {
        unmerge: (
            reduced(
                query,
                key,
                value,
                layout,
                ResolvedRule(factor, 1, Operators(QueryMerging(group=5, unmerge=unmerge))),
            )
            - dense
        ).norm()
        for unmerge in ("copy", "linear")
    }
    assert off["linear"] < 0.25 * off["copy"]


@few
@given(layouts(), operators(), st.integers(2, 12))
def test_linear_unmerging_keeps_what_tokens_of_a_merged_query_are_on_average(layout, ops, factor):
    copying, moving = (
        clamp(ResolvedRule(factor, 3, replace(ops, query=replace(ops.query, unmerge=each))), layout)
        for each in ("copy", "linear")
    )
    query, key, value = random_qkv(layout)
    copied = reduced(query, key, value, layout, copying)
    moved = reduced(query, key, value, layout, moving)
    sets = oracle.merge_sets(query[0], layout, copying) if copying.query > 1 else []
    for members in sets:
        mean = moved[0][:, members].mean(dim=1)
        torch.testing.assert_close(mean, copied[0, :, members[0]], rtol=0, atol=1e-11)
        if len(members) == 1:
            assert torch.equal(moved[0, :, members[0]], copied[0, :, members[0]])


def test_linear_unmerging_of_groups_with_one_destination_is_that_of_the_oracle():
    layout = TokenLayout(12, 4, 5, special=2, anchor_frame=0)  # no pair to compare
    rule = ResolvedRule(20, 2, Operators(QueryMerging(group=1, unmerge="linear")))
    check_attention(layout, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_unmerging_of_frames_that_repeat_does_no_harm(dtype):
    # With a camera at rest most pairs of destinations do not differ. The last group is short.
    layout = TokenLayout(11, 4, 5, special=2)
    once = random_qkv(TokenLayout(1, 4, 5, special=2))
    query, key, value = (each.repeat(1, 1, 11, 1).to(dtype) for each in once)
    dense = F.scaled_dot_product_attention(query, key, value)
    off = {}
    for unmerge in ("copy", "linear"):
        leaf = query.clone().requires_grad_()
        rule = ResolvedRule(4, 1, Operators(QueryMerging(group=4, unmerge=unmerge)))
        output = reduced(leaf, key, value, layout, rule)
        output.float().sum().backward()
        assert leaf.grad.isfinite().all()
        off[unmerge] = (output - dense).float().norm().item()
    assert off["linear"] <= 1.01 * off["copy"] + 1e-6


def test_queries_in_another_precision_than_the_values_are_unmerged_linearly():
    # Under autocast on a GPU a norm returns float32, and attention lowers the precision itself.
    layout = TokenLayout(8, 4, 4, special=2)
    query, key, value = random_qkv(layout, dtype=torch.float32)
    rule = ResolvedRule(4, 1, Operators(QueryMerging(unmerge="linear")))
    exact = reduced(query, key, value, layout, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = reduced(query, key, value.bfloat16(), layout, rule)
    assert lowered.dtype == torch.bfloat16
    torch.testing.assert_close(lowered.float(), exact, rtol=0.05, atol=0.05)


def test_a_regression_without_a_solution_moves_nothing():
    apart, output_apart = torch.randn(2, 50, 8), torch.randn(2, 50, 3)
    apart[1] *= torch.linspace(0.01, 3, 8)
    ridge = -2.0  # makes a matrix that is not definite, as rounding may
    slope = unmerging.regress(apart, output_apart, torch.zeros(2), ridge)
    assert torch.equal(slope, torch.zeros(2, 8, 3))


def test_linear_unmerging_of_queries_that_do_not_differ_is_copying():
    layout = TokenLayout(4, 2, 4)
    _, key, value = random_qkv(layout)
    query = torch.ones_like(key)
    copied = reduced(query, key, value, layout, ResolvedRule(4, 1, Operators()))
    moved = reduced(
        query, key, value, layout, ResolvedRule(4, 1, Operators(QueryMerging(unmerge="linear")))
    )
    assert torch.equal(moved, copied)
