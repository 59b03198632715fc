"""Every reduced layer of a whole model against the slow oracle, on the layer's own input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_oracle import reduced_attention
from family_cases import (
    CASES,
    PATCHES_FIRST,
    Case,
    attentions,
    build,
    difference,
    images,
    reducing,
    run,
)
from torch import Tensor, nn

import spark3r
from spark3r import paper_schedule
from spark3r.families.registry import detect

TOLERANCE = 1e-5
# Below this margin float32 may prefer another destination than float64 does.
DECIDED = 1e-6


# The oracle rotates by positions, but layers of the reference model are given tables.
WITH_POSITIONS = [case for case in CASES if case.family != "reference"]


@pytest.mark.parametrize("case", WITH_POSITIONS, ids=str)
@pytest.mark.parametrize(
    ("frames", "rows", "columns"), [(7, 2, 3), (104, 1, 2)], ids=["uniform", "paper"]
)
def test_agrees_with_a_slow_oracle(case: Case, frames: int, rows: int, columns: int) -> None:
    model = build(case)
    if frames == 104:
        schedule = paper_schedule(case.family, case.layers, sensitive=[1])
    else:
        schedule = reducing(case.layers)
    clip = images(case, frames, rows=rows, columns=columns)
    modules = attentions(model)
    seen: dict[nn.Module, tuple[Tensor, Tensor | None, Tensor]] = {}

    def record(attn: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        positions = kwargs.get("pos", kwargs.get("xpos"))  # a list of None in MapAnything
        seen[attn] = (args[0], positions if isinstance(positions, Tensor) else None, output)

    hooks = [attn.register_forward_hook(record, with_kwargs=True) for attn in modules.values()]
    try:
        with spark3r.apply(model, schedule):
            run(model, clip)
    finally:
        for hook in hooks:
            hook.remove()

    compared = 0
    for rule, attn in zip(schedule.resolve(frames), modules.values(), strict=True):
        x, positions, output = seen[attn]
        assert rule.operators is not None
        with torch.no_grad():
            expected, margin = reduced_attention(
                attn,
                x,
                positions,
                frames=frames,
                grid=(rows, columns),
                special=detect(model).metadata(model)["special_tokens"],
                query=rule.query,
                key_value=rule.key_value,
                group=rule.operators.query.group,
                patches_first=case.family in PATCHES_FIRST,
                tail=int(case.family in PATCHES_FIRST),
            )
        if margin < DECIDED:
            continue
        compared += 1
        assert difference({"output": output.double()}, {"output": expected}) < TOLERANCE
    assert compared > case.layers // 2
