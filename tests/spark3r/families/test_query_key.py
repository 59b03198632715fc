"""Queries and keys reach attention in the precision of the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases import CASES, Case, build, images, reducing, run
from torch import Tensor, nn

import spark3r
from spark3r.families.registry import detect
from spark3r.sdpa import ReplaceSDPA


class _InFloat32(nn.LayerNorm):
    """A layer norm that leaves float32, as CUDA's does under autocast."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.float()).float()


class _OverError(Exception):
    """Stops a pass after its last global layer."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_queries_and_keys_reach_attention_in_the_precision_of_the_values(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clip = build(case), images(case, 3)
    for attn in detect(model).attention(model).values():
        for norm in (attn.q_norm, attn.k_norm):
            if isinstance(norm, nn.LayerNorm):
                monkeypatch.setattr(norm, "__class__", _InFloat32)
    seen: list[tuple[torch.dtype, ...]] = []

    def note(*args: Tensor, **options: Any) -> Tensor:
        if args[1].shape[2] < args[0].shape[2]:  # keys are pruned in the reduced layers
            seen.append(tuple(each.dtype for each in args[:3]))
        return F.scaled_dot_product_attention(*args, **options)

    def stop(*_: object) -> None:
        raise _OverError  # upstream π³'s camera head takes no bfloat16 on a CPU

    *_, last = detect(model).attention(model).values()
    hook = last.register_forward_hook(stop)
    lowered = torch.autocast("cpu", torch.bfloat16)
    over = pytest.raises(_OverError)
    with over, spark3r.apply(model, reducing(case.layers, query=1)), ReplaceSDPA(note), lowered:
        run(model, clip)
    hook.remove()
    assert seen == [(torch.bfloat16,) * 3] * case.layers
