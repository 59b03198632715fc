"""Attention group by group, joined by log-sum-exp, against a mask in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from qkv import hidden, random_qkv
from strategies import layouts, rules
from tiers import examples
from torch import Tensor

from spark3r import TokenLayout
from spark3r.kernels import forced, grouped_attention, trials
from spark3r.kernels.grouped_attention import MASK, OPERATION, Group, attend, masked, masked_rows
from spark3r.reduction.attention import attend as reduced_attention
from spark3r.reduction.operators import Operators, QueryMerging, TemporalStride, TokenStride
from spark3r.reduction.plans import select
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.sdpa import ReplaceSDPA

CPU = torch.device("cpu")
LAYOUT = TokenLayout(24, 4, 5, special=5, anchor_frame=0)
FAITHFUL = ResolvedRule(
    1, 8, Operators(key_value=TokenStride(keep_anchor=True, mass_correction=1.0))
)


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, list[Group], Tensor]:
    """Return queries, keys, values, groups and bias: an anchor frame, special tokens, patches."""
    groups = [(0, 41, 0.0), (41, 20, math.log(24.9)), (61, 439, math.log(25.3))]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, length, 4, 64, generator=generator).to(dtype).transpose(1, 2)
        for length in (300, 500, 500)
    )
    bias = torch.cat([torch.full((n,), each, dtype=torch.float64) for _, n, each in groups])
    return query, key, value, groups, bias


def _errors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    query, key, value, groups, bias = _inputs(dtype)
    exact = masked(query.double(), key.double(), value.double(), bias)
    joined = attend(query, key, value, groups, "flash")
    assert joined.dtype == dtype
    return joined - exact, masked(query, key, value, bias.to(dtype)) - exact


def test_the_join_in_float32_is_exact_to_its_last_bits() -> None:
    joined, _ = _errors(torch.float32)
    assert joined.abs().max() <= 5e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_join_in_half_precision_is_nearly_as_good_as_the_mask(dtype: torch.dtype) -> None:
    # Each group's output is rounded once before the join, and the result once after it.
    joined, by_mask = _errors(dtype)
    assert joined.square().mean().sqrt() <= 1.5 * by_mask.square().mean().sqrt()
    assert joined.abs().max() <= 2 * by_mask.abs().max()


def test_queries_in_pieces_and_another_scale_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value, groups, bias = _inputs(torch.float32)
    whole = attend(query, key, value, groups, "flash", 0.3)
    exact = masked(query.double(), key.double(), value.double(), bias, 0.3)
    assert (whole - exact).abs().max() <= 1e-5
    monkeypatch.setattr(grouped_attention, "MOST_QUERIES", 64)
    torch.testing.assert_close(attend(query, key, value, groups, "flash", 0.3), whole)


def test_long_masked_calls_are_split_where_a_kernel_counts_in_32_bits() -> None:
    assert masked_rows(torch.device("cuda"), 100_000, 41_640) == 2**31 // 41_640
    assert masked_rows(torch.device("cuda"), 50_000, 41_640) == 50_000
    assert masked_rows(CPU, 100_000, 41_640) == 100_000


def test_masked_attention_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, _, bias = _inputs(torch.float64)
    whole = masked(query, key, value, bias)
    lengths = []

    def note(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        lengths.append(query.shape[2])
        return F.scaled_dot_product_attention(query, *rest, **options)

    monkeypatch.setattr(grouped_attention, "masked_rows", lambda *_: 97)
    with ReplaceSDPA(note):
        torch.testing.assert_close(masked(query, key, value, bias), whole)
    assert lengths == [97, 97, 97, 9]


@settings(max_examples=examples(30), deadline=None)
@given(layouts(), rules(), st.booleans())
def test_keys_by_group_are_the_same_keys_with_the_same_bias(
    layout: TokenLayout, rule: ResolvedRule, stride: bool
) -> None:
    if stride:
        operators = Operators(key_value=TemporalStride(keep_anchor=True, mass_correction=0.7))
        rule = ResolvedRule(1, max(2, rule.key_value), operators)
    rule = clamp(rule, layout)
    seen = hidden(random_qkv(layout)[1])
    plain = select(layout, rule, CPU, tokens=seen, by_group=False)
    grouped = select(layout, rule, CPU, tokens=seen, by_group=True)
    if plain is None or grouped is None:
        assert plain is grouped is None
        return
    tokens = torch.arange(layout.tokens).view(1, -1, 1)
    place, order = plain.take(tokens).flatten().sort()
    moved = grouped.take(tokens).flatten()
    assert torch.equal(moved.sort().values, place)
    none = torch.zeros(len(place), dtype=torch.float64)
    bias = none if plain.logit_bias is None else plain.logit_bias[order]
    if grouped.logit_bias is None:
        assert grouped.groups == ()
        assert len(bias.unique()) == 1  # it cancels
        return
    assert torch.equal(grouped.logit_bias, bias[torch.searchsorted(place, moved)])
    runs = [(start, start + count, value) for start, count, value in grouped.groups]
    assert [runs[0][0], runs[-1][1]] == [0, grouped.length]
    assert all(one[1] == other[0] and one[2] < other[2] for one, other in pairwise(runs))
    assert all((grouped.logit_bias[start:end] == value).all() for start, end, value in runs)


def test_many_different_biases_keep_their_mask() -> None:
    from spark3r.reduction.pruning import KeySelection

    selection = KeySelection(9, 3, index=torch.arange(9), logit_bias=torch.arange(9.0).double())
    assert selection.by_group() is selection


@pytest.mark.parametrize("factor", [1, 3])
def test_reduced_attention_by_group_is_that_of_the_mask(factor: int) -> None:
    operators = Operators(QueryMerging(group=5), FAITHFUL.operators.key_value)
    rule = ResolvedRule(factor, 8, operators)
    query, key, value = random_qkv(LAYOUT, dtype=torch.float32)
    results = []
    for kernel, by_group in ((MASK, False), (MASK, True), ("flash", True)):
        selection = select(LAYOUT, rule, CPU, by_group=by_group)
        assert selection is not None
        kept = (selection.take(each, 2) for each in (key, value))
        with forced(OPERATION, kernel), torch.inference_mode():
            results.append(reduced_attention(query, *kept, LAYOUT, rule, selection))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-6)


def test_where_gradients_are_recorded_the_mask_stays() -> None:
    selection = select(LAYOUT, FAITHFUL, CPU, by_group=True)
    assert selection is not None
    query, key, value = (each.requires_grad_() for each in random_qkv(LAYOUT))
    kept = [selection.take(each, 2) for each in (key, value)]

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a fused kernel has no gradient")

    with forced(OPERATION, "flash"):
        output = reduced_attention(query, *kept, LAYOUT, FAITHFUL, selection)
        output.sum().backward()
    assert query.grad is not None
    assert query.grad.abs().sum() > 0


def test_autocast_does_not_reach_the_kernels_and_is_followed() -> None:
    selection = select(LAYOUT, FAITHFUL, CPU, by_group=True)
    assert selection is not None
    query, key, value = random_qkv(LAYOUT, dtype=torch.float32)
    key, value = selection.take(key, 2), selection.take(value, 2).bfloat16()
    with forced(OPERATION, "flash"), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = reduced_attention(query, key, value, LAYOUT, FAITHFUL, selection)
    with forced(OPERATION, MASK), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = reduced_attention(query, key, value, LAYOUT, FAITHFUL, selection)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_accepts_a_right_kernel_and_refuses_wrong_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = grouped_attention._trial
    assert trial("flash", CPU, dtype, 64) is None

    def without_mass(*arguments: Any) -> tuple[Tensor, Tensor]:
        output, mass = grouped_attention._flash(*arguments)
        return output, torch.zeros_like(mass)

    def swapped(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Any:
        output, mass = grouped_attention._flash(query, key, value, scale)
        return output, mass.flip(1)  # a log-sum-exp of another order of heads

    for wrong in (without_mass, swapped):
        monkeypatch.setitem(grouped_attention._KERNELS, "wrong", wrong)
        reason = trial("wrong", CPU, dtype, 64)
        assert reason is not None
        assert "differs from the plain result" in reason


def test_a_cpu_keeps_the_mask_and_tries_nothing() -> None:
    before = trials.choices()
    assert grouped_attention.implementation(CPU, torch.bfloat16, 64) == MASK
    assert trials.choices() == before
    selection = select(LAYOUT, FAITHFUL, CPU)
    assert selection is not None
    assert selection.groups == ()


@pytest.mark.slow
@pytest.mark.dynamo
def test_the_choice_and_the_join_compile_into_one_graph_per_length() -> None:
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    def run(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> Tensor:
        selection = select(layout, FAITHFUL, CPU, by_group=True)
        assert selection is not None
        kept = selection.take(key, 2), selection.take(value, 2)
        return reduced_attention(query, *kept, layout, FAITHFUL, selection)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    with forced(OPERATION, "flash"), torch.no_grad():
        for frames in (9, 12):
            layout = TokenLayout(frames, 4, 5, special=5, anchor_frame=0)
            inputs = random_qkv(layout, dtype=torch.float32)
            for _ in range(2):
                torch.testing.assert_close(compiled(*inputs, layout), run(*inputs, layout))
    assert counter.frame_count == 2
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_some_kernel_is_found_on_a_gpu(dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    kernel = grouped_attention.implementation(device, dtype, 64)
    assert kernel != MASK, trials.choices()
    query, key, value, groups, bias = _inputs(dtype)
    exact = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=bias.view(1, 1, 1, -1)
    )
    moved = (each.to(device) for each in (query, key, value))
    found = attend(*moved, groups, kernel)
    assert trials.disagreement(found, exact, torch.finfo(dtype).eps) is None
