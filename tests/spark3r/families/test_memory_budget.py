"""The memory of a pass of 1,000 frames stays within a budget, as `spark3r memory` counts it.

Budgets are gigabytes above weights and input, in bfloat16. Without the memory savers a pass must be
above its budget, or the budget says nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import stand_in_parts
import stand_ins
import torch
from torch import nn
from upstream_needed import need_upstream

from spark3r import Operators, Schedule
from spark3r.families.registry import detect
from spark3r.loading.architecture import load_architecture
from spark3r.memory_count import count_memory
from spark3r.reduction.operators import QueryMerging, TokenStride

pytestmark = pytest.mark.slow

FRAMES = 1000
PAPER = Operators()
BOTH = Operators(QueryMerging(unmerge="linear"), TokenStride(keep_anchor=True, mass_correction=1.0))


def _gigabytes(
    model: nn.Module, size: tuple[int, int], operators: Operators, *, save_memory: bool = True
) -> float:
    """Return the memory that a pass adds to weights and input."""
    schedule = Schedule.uniform(len(detect(model).attention(model)), 3, 8, operators=operators)
    dtype = torch.bfloat16
    found = count_memory(
        model, FRAMES, size, schedule=schedule, dtype=dtype, save_memory=save_memory
    )
    return found.extra / 1e9


@pytest.mark.parametrize(
    ("make", "size", "most"),
    [
        pytest.param(stand_ins.Vggt, (392, 518), 35.0, id="vggt"),
        pytest.param(stand_ins.Pi3, (392, 518), 21.0, id="pi3"),
        pytest.param(stand_ins.Da3, (392, 518), 19.0, id="da3"),
        pytest.param(stand_ins.Omega, (384, 512), 12.5, id="omega"),
    ],
)
def test_a_stand_in_of_the_published_width(
    make: Callable[[], nn.Module],
    size: tuple[int, int],
    most: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (stand_ins, stand_in_parts):
        monkeypatch.setattr(module, "WIDTH", 1024)
    monkeypatch.setattr(stand_in_parts, "HEADS", 16)
    with torch.device("meta"):
        model = make()
    found = _gigabytes(model, size, BOTH)
    assert found <= most < _gigabytes(model, size, BOTH, save_memory=False)


@pytest.mark.parametrize(
    ("name", "size", "most"),
    [
        pytest.param("vggt:random", (392, 518), 21.0, id="vggt"),
        pytest.param("pi3:random-pi3", (392, 518), 18.0, id="pi3"),
        pytest.param("da3:random-giant", (392, 518), 28.0, id="da3"),
        pytest.param("omega:random", (384, 512), 16.0, id="omega"),
    ],
)
def test_a_published_model(name: str, size: tuple[int, int], most: float) -> None:
    need_upstream(name.partition(":")[0])
    assert _gigabytes(load_architecture(name), size, PAPER) <= most
