"""VGGT-Omega's register attention is left alone, and its masked bias is honoured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import CASES, Case, attentions, build, images, reducing, run
from torch import nn

import spark3r
from spark3r.families.parts.projection import project_all, project_kept, project_queries
from spark3r.layout import TokenLayout
from spark3r.reduction.operators import Operators, TokenStride
from spark3r.reduction.plans import select
from spark3r.reduction.rule import ResolvedRule

OMEGA = [case for case in CASES if case.family == "omega"]


@pytest.fixture(params=OMEGA, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def _register_blocks(model: Any) -> list[nn.Module]:
    aggregator = model.aggregator
    blocks = zip(aggregator.inter_frame_blocks, aggregator.inter_frame_attention_types, strict=True)
    return [block for block, kind in blocks if kind == "register"]


def test_register_blocks_are_bit_identical(case: Case) -> None:
    model, clip = build(case), images(case, 6)
    blocks = _register_blocks(model)
    assert blocks
    seen: list[tuple[Any, ...]] = []
    hooks = [
        block.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
        for block in blocks
    ]
    with spark3r.apply(model, reducing(case.layers)):
        assert not any(block.attn in attentions(model).values() for block in blocks)
        run(model, clip)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(blocks)
    for block, args, kwargs, output in seen:
        assert args[0].shape[1] == 6 * model.get_submodule("aggregator").patch_token_start
        with torch.no_grad():
            assert torch.equal(block(*args, **kwargs), output)


def test_projection_of_kept_tokens_equals_the_full_one(case: Case) -> None:
    attn: Any = next(iter(attentions(build(case)).values()))
    layout = TokenLayout(frames=6, height=2, width=2, special=1)
    width = attn.qkv.in_features
    x = torch.randn(1, layout.tokens, width, generator=torch.Generator().manual_seed(0))
    for operators in (Operators(), Operators(key_value=TokenStride())):
        selection = select(layout, ResolvedRule(1, 2, operators), x.device)
        assert selection is not None
        with torch.no_grad():
            query, key, value = project_all(attn, x)
            kept = project_kept(attn, selection.take(x))
            assert torch.equal(project_queries(attn)(x), query)
        for found, whole in zip(kept, (key, value), strict=True):
            torch.testing.assert_close(found, selection.take(whole, 2), rtol=1e-6, atol=1e-6)
