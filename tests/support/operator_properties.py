"""What holds of every operator on every layout: it does what its slow twin in the oracle does."""

from __future__ import annotations

import oracle
import torch
from qkv import hidden, random_qkv, reduced

from spark3r.layout import TokenLayout
from spark3r.reduction.plans import key_value_length, select
from spark3r.reduction.rule import ResolvedRule

CPU = torch.device("cpu")


def check_attention(layout: TokenLayout, rule: ResolvedRule, batch: int = 1) -> None:
    query, key, value = random_qkv(layout, batch)
    expected = oracle.attend(query, key, value, layout, rule)
    torch.testing.assert_close(
        reduced(query, key, value, layout, rule), expected, rtol=0, atol=1e-11
    )


def check_selection(layout: TokenLayout, rule: ResolvedRule) -> None:
    seen = hidden(random_qkv(layout)[1])
    selection = select(layout, rule, CPU, tokens=seen)
    if selection is None:
        assert rule.key_value == 1
        return
    expected = oracle.kept_keys(layout, rule, seen)
    tokens = torch.arange(layout.tokens).view(1, -1, 1)
    kept = selection.take(tokens).flatten().tolist()
    assert sorted(kept) == sorted(expected)
    assert rule.operators.key_value.by_content or kept == sorted(kept)
    assert selection.length == key_value_length(layout, rule) == len(expected)
    bias = selection.logit_bias
    if bias is None:  # off, or nothing that is kept stands for anything dropped
        bias = torch.zeros(selection.length, dtype=torch.float64)
    else:
        assert rule.operators.key_value.mass_correction > 0
    biases = [expected[token] for token in kept]
    torch.testing.assert_close(bias, torch.tensor(biases, dtype=torch.float64))
