"""Every operator against loops in float64, over random layouts."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_properties import CPU, check_attention, check_selection
from qkv import random_qkv, reduced
from strategies import layouts, operators, rules
from tiers import examples
from torch.utils._python_dispatch import TorchDispatchMode

from spark3r.layout import TokenLayout
from spark3r.reduction import lattice, merging, plans
from spark3r.reduction.attention import attention_share
from spark3r.reduction.operators import (
    LinearUnmerging,
    Operators,
    QueryMerging,
    TemporalStride,
    TokenStride,
)
from spark3r.reduction.plans import key_value_length, query_length, select
from spark3r.reduction.rule import ResolvedRule, clamp

few = settings(max_examples=examples(40), deadline=None)


def merge_and_unmerge(query, plan):
    places = merging.match(query, plan)
    return merging.copy_back(merging.merge(query, places, plan.kept.shape[0]), places)


@pytest.mark.parametrize("factor", [*range(1, 26), 32])
def test_lattice_shifts_are_the_best_by_brute_force(factor):
    assert lattice.row_shift(factor) == oracle.row_shift(factor)
    assert lattice.frame_shift(factor) == oracle.frame_shift(factor)


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6, 7, 16])
def test_consecutive_frames_visit_every_patch_once(factor):
    members = lattice.residues(factor, 5, 6, factor) == 0
    assert (members.sum(dim=0) == 1).all()


@few
@given(layouts(), rules(), st.integers(1, 3))
def test_reduced_attention_is_that_of_the_oracle(layout, rule, batch):
    rule = clamp(rule, layout)
    check_attention(layout, rule, batch)


@few
@given(layouts(), rules())
def test_selection_is_that_of_the_oracle(layout, rule):
    rule = clamp(rule, layout)
    check_selection(layout, rule)


@few
@given(layouts(), rules())
def test_merge_sets_are_those_of_the_oracle_and_unmerge_copies(layout, rule):
    rule = clamp(rule, layout)
    plan = plans.plan(layout, rule, CPU)
    if plan is None:
        assert rule.query == 1 or query_length(layout, rule) == layout.tokens
        return
    query, _, _ = random_qkv(layout)
    sets = oracle.merge_sets(query[0], layout, rule)
    assert query_length(layout, rule) == len(sets)
    restored = merge_and_unmerge(query, plan)
    assert restored.shape == query.shape
    for members in sets:
        mean = query[0][:, members].mean(dim=1)
        for token in members:
            torch.testing.assert_close(restored[0, :, token], mean, rtol=0, atol=1e-12)


@few
@given(layouts(), operators(), st.integers(1, 12))
def test_specials_tail_and_a_spared_anchor_stay_untouched(layout, ops, factor):
    rule = clamp(ResolvedRule(factor, 1, ops), layout)
    plan = plans.plan(layout, rule, CPU)
    if plan is None:
        return
    query, _, _ = random_qkv(layout)
    restored = merge_and_unmerge(query, plan)
    untouched = torch.ones(layout.tokens, dtype=torch.bool)
    for frame in range(layout.frames):
        if frame == layout.anchor_frame and not ops.query.merge_anchor:
            continue
        first = oracle.token_of(layout, frame, 0, 0)
        untouched[first : first + layout.patches] = False
    assert torch.equal(restored[:, :, untouched], query[:, :, untouched])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bound", [1, 30, 200, 10**6])
def test_the_nearest_are_those_of_a_full_sort_whatever_the_chunk(count, bound, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    source, destination = (
        torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64) for tokens in (7, 5)
    )
    monkeypatch.setattr(merging, "SIMILARITY_ELEMENTS", bound)
    cosine = F.cosine_similarity(source.unsqueeze(3), destination.unsqueeze(2), dim=-1)
    expected = cosine.argsort(dim=-1, descending=True)[..., :count]
    assert torch.equal(merging.nearest(source, destination, count), expected)


@given(layouts(most_frames=6), operators())
@settings(max_examples=examples(20), deadline=None)
def test_factors_of_one_are_dense_attention_bit_for_bit(layout, ops):
    query, key, value = random_qkv(layout, dtype=torch.float32)
    rule = ResolvedRule(1, 1, ops)
    dense = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(reduced(query, key, value, layout, rule), dense)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_identical_queries_in_a_merge_set_lose_nothing(factor):
    layout = TokenLayout(12, 4, 5, special=5, anchor_frame=0)
    rule = ResolvedRule(factor, 1, Operators(QueryMerging(group=5)))
    _, key, value = random_qkv(layout)
    query = torch.randn_like(key)
    generator = torch.Generator().manual_seed(1)
    for first in range(0, 12, 5):  # every source repeats one of its group's destinations
        tokens = {True: [], False: []}
        for f, y, x in product(range(first, min(first + 5, 12)), range(4), range(5)):
            chosen = oracle.in_subset(f - first, y, x, factor)
            tokens[chosen].append(oracle.token_of(layout, f, y, x))
        destinations = torch.tensor(tokens[True])
        drawn = torch.randint(len(destinations), (len(tokens[False]),), generator=generator)
        query[:, :, torch.tensor(tokens[False])] = query[:, :, destinations[drawn]]
    dense = F.scaled_dot_product_attention(query, key, value)
    difference = reduced(query, key, value, layout, rule) - dense
    assert difference.abs().max() < 1e-12


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_duplicated_frames_under_temporal_stride_lose_nothing(factor):
    layout = TokenLayout(4 * factor, 3, 4, special=5)
    rule = ResolvedRule(1, factor, Operators())
    once = TokenLayout(4, 3, 4, special=5)
    query, key, value = random_qkv(layout)
    key, value = (
        t[:, :, : once.tokens]
        .unflatten(2, (4, 1, -1))
        .expand(-1, -1, -1, factor, -1, -1)
        .flatten(2, 4)
        for t in (key, value)
    )
    dense = F.scaled_dot_product_attention(query, key, value)
    assert (reduced(query, key, value, layout, rule) - dense).abs().max() < 1e-12


def test_temporal_stride_reads_a_view_and_always_keeps_frame_zero():
    layout = TokenLayout(10, 3, 4, special=5, anchor_frame=0)
    for factor in (2, 3, 7, 10):
        selection = select(layout, ResolvedRule(1, factor, Operators()), CPU)
        assert selection.index is None
        assert selection.frame_stride == factor
        kept = selection.take(torch.arange(layout.tokens).view(1, -1))
        assert kept[0, : layout.tokens_per_frame].tolist() == list(range(layout.tokens_per_frame))


def test_token_stride_spreads_over_frames_and_columns():
    layout = TokenLayout(8, 4, 8)
    selection = select(layout, ResolvedRule(1, 8, Operators(key_value=TokenStride())), CPU)
    patch = selection.index % 32
    assert sorted(patch.tolist()) == list(range(32))  # 8 frames see every patch exactly once
    assert torch.bincount(selection.index // 32).tolist() == [4] * 8


@pytest.mark.parametrize("operator", [TokenStride, TemporalStride])
@pytest.mark.parametrize("keep_special", [True, False])
def test_full_mass_correction_of_identical_tokens_equals_dense(operator, keep_special):
    # All patches of a thinned frame have the same key and value, and so have all special tokens if
    # some are dropped. Then only the weight times the count matters.
    layout = TokenLayout(6, 4, 4, special=3, anchor_frame=0)
    ops = Operators(
        key_value=operator(keep_special=keep_special, keep_anchor=True, mass_correction=1.0)
    )
    rule = ResolvedRule(1, 4, ops)
    query, key, value = random_qkv(layout)
    for frame in range(1, 6):
        first = oracle.token_of(layout, frame, 0, 0)
        for tensor in (key, value):
            tensor[:, :, first : first + 16] = tensor[:, :, 7:8]
            if not keep_special:
                tensor[:, :, first - 3 : first] = tensor[:, :, 2:3]
    dense = F.scaled_dot_product_attention(query, key, value)
    assert (reduced(query, key, value, layout, rule) - dense).abs().max() < 1e-12
    without = ResolvedRule(1, 4, Operators(key_value=replace(ops.key_value, mass_correction=0.0)))
    assert (reduced(query, key, value, layout, without) - dense).abs().max() > 1e-3


def test_ties_go_to_the_first_destination():
    layout = TokenLayout(4, 2, 4)
    rule = ResolvedRule(4, 1, Operators())
    plan = plans.plan(layout, rule, CPU)
    query = torch.ones(1, 2, layout.tokens, 4)
    assert (merging.match(query, plan)[:, plan.sources] == 0).all()


def test_each_batch_element_is_matched_by_itself():
    layout = TokenLayout(6, 3, 3, special=2)
    rule = ResolvedRule(3, 2, Operators(QueryMerging(group=4)))
    query, key, value = random_qkv(layout, batch=3)
    together = reduced(query, key, value, layout, rule)
    for b in range(3):
        alone = reduced(query[b : b + 1], key[b : b + 1], value[b : b + 1], layout, rule)
        assert torch.equal(together[b : b + 1], alone)


class LargestMatmul(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default:
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("bound", [1, 64, 1000, 20_000])
def test_similarity_never_exceeds_its_bound_and_chunks_change_nothing(bound, monkeypatch):
    layout = TokenLayout(11, 4, 5, special=2, anchor_frame=0)
    rule = ResolvedRule(4, 1, Operators(QueryMerging(group=4, merge_anchor=False)))
    plan = plans.plan(layout, rule, CPU)
    query, _, _ = random_qkv(layout, batch=2)
    whole = merging.match(query, plan)
    monkeypatch.setattr(merging, "SIMILARITY_ELEMENTS", bound)  # of the CPU
    with LargestMatmul() as mode:
        assert torch.equal(merging.match(query, plan), whole)
    row = 2 * max(block.destinations for block in plan.blocks)  # for both batch elements
    assert 0 < mode.largest <= max(bound, row)


@pytest.mark.parametrize("factors", [(4, 1), (1, 4), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unmerge", ["copy", "linear"])
def test_half_precision_is_as_good_as_plain_attention_in_it(factors, dtype, unmerge):
    layout = TokenLayout(8, 4, 4, special=5, anchor_frame=0)
    ops = Operators(QueryMerging(unmerge=unmerge), TokenStride(mass_correction=1.0))
    rule = ResolvedRule(*factors, ops)
    query, key, value = random_qkv(layout, dtype=dtype)
    ours = reduced(query, key, value, layout, rule)
    assert ours.dtype == dtype
    exact = oracle.attend(query, key, value, layout, rule)
    plain = F.scaled_dot_product_attention(query, key, value)
    in_double = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    plain_error = (plain - in_double).abs().max()
    rounded_bias = torch.finfo(dtype).eps  # the bias has the queries' dtype
    assert (ours - exact).abs().max() <= 2 * plain_error + rounded_bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_many_half_precision_queries_lose_nothing_while_summing(dtype):
    layout = TokenLayout(8, 16, 16)  # one merge set of 2048, whose sum exceeds half precision
    plan = plans.plan(layout, ResolvedRule(256, 1, Operators(QueryMerging(group=8))), CPU)
    query = torch.ones(1, 2, layout.tokens, 4, dtype=dtype)
    query[:, :, 1::2] = 0.5
    places = torch.zeros_like(merging.match(query, plan))
    means = merging.merge(query, places, plan.kept.shape[0])
    assert torch.equal(means[:, :, 0], torch.full((1, 2, 4), 0.75, dtype=dtype))


@pytest.mark.parametrize("key_value", [TemporalStride, TokenStride])
@pytest.mark.parametrize("unmerge", ["copy", pytest.param("linear", marks=pytest.mark.slow)])
def test_gradients_flow_through_merging_and_mass_correction(key_value, unmerge):
    layout = TokenLayout(4, 1, 2, special=1, anchor_frame=0)
    ops = Operators(
        QueryMerging(group=3, unmerge=unmerge), key_value(keep_anchor=True, mass_correction=1.0)
    )
    rule = ResolvedRule(2, 2, ops)
    inputs = [t.requires_grad_() for t in random_qkv(layout)]
    assert torch.autograd.gradcheck(lambda q, k, v: reduced(q, k, v, layout, rule), inputs)


def test_no_shape_depends_on_data():
    layout = TokenLayout(30, 4, 4, special=5, anchor_frame=0)
    corrected = Operators(QueryMerging(unmerge="linear"), TokenStride(mass_correction=0.5))
    for ops in (Operators(), corrected):
        query = torch.empty(2, 2, layout.tokens, 4, device="meta")
        output = reduced(query, query, query, layout, ResolvedRule(4, 8, ops))
        assert output.shape == query.shape


def test_autocast_leaves_matching_and_fitting_in_full_precision():
    layout = TokenLayout(10, 4, 4)
    plan = plans.plan(layout, ResolvedRule(4, 1, Operators()), CPU)
    query, _, output = random_qkv(layout, dtype=torch.float32)
    expected = merging.match(query, plan)
    merged = merging.merge(query, expected, plan.kept.shape[0])
    slope = LinearUnmerging().fit(merged, output[:, :, plan.kept], plan)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(merging.match(query, plan), expected)
        again = LinearUnmerging().fit(merged, output[:, :, plan.kept], plan)
        assert torch.equal(again, slope)


def test_attention_share_counts_realised_lengths():
    layout = TokenLayout(40, 4, 4, special=5)
    rules = [ResolvedRule(1, 1, Operators()), ResolvedRule(1, 4, Operators())]
    assert attention_share(rules, layout) == pytest.approx((1 + 1 / 4) / 2)
    merged = [ResolvedRule(4, 1, Operators())]
    assert attention_share(merged, layout) == pytest.approx((5 + 16 / 4) / 21)


def test_factors_beyond_the_layout_are_brought_down():
    layout = TokenLayout(3, 2, 2)
    rule = clamp(ResolvedRule(100, 100, Operators()), layout)
    assert (rule.query, rule.key_value) == (4, 3)
    rule = clamp(ResolvedRule(100, 100, Operators(QueryMerging(group=2), TokenStride())), layout)
    assert (rule.query, rule.key_value) == (4, 4)
    assert 2 <= query_length(layout, rule) < layout.tokens  # a destination in each of two groups
    assert 1 <= key_value_length(layout, rule) < layout.tokens


def test_selections_are_built_on_the_cpu_whatever_the_default_device():
    layout = TokenLayout(23, 3, 5, special=2)
    rule = ResolvedRule(5, 7, Operators(key_value=TokenStride(mass_correction=0.3)))
    with torch.device("meta"):
        selection = select(layout, rule, CPU)
        assert query_length(layout, rule) == plans.plan(layout, rule, CPU).kept.shape[0]
        assert key_value_length(layout, rule) == selection.length
    assert selection.index.device == CPU


@pytest.mark.parametrize("unmerge", ["copy", "linear"])
def test_what_inference_mode_caches_serves_a_backward_pass(unmerge):
    layout = TokenLayout(19, 2, 3, special=1)
    rule = ResolvedRule(
        3, 2, Operators(QueryMerging(group=7, unmerge=unmerge), TemporalStride(mass_correction=0.7))
    )
    query, key, value = random_qkv(layout)
    with torch.inference_mode():
        expected = reduced(query, key, value, layout, rule)
    query.requires_grad_()
    output = reduced(query, key, value, layout, rule)
    output.sum().backward()
    assert torch.equal(output.detach(), expected)
    assert query.grad.isfinite().all()
