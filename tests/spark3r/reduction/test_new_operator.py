"""A new operator is one class, its entry in the registry, and its twin in the oracle.

The operator of this file exists nowhere else: no other file names it or changes for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import oracle
import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_properties import check_attention, check_selection
from qkv import random_qkv, reduced
from small_models import make_images
from strategies import key_value_prunings, layouts
from tiers import examples
from torch import Tensor, nn

import spark3r
from calibrate.search.baselines import largest_factors
from spark3r import Operators, Profile, ProfileError, Schedule, Spark3rWarning, TokenLayout
from spark3r.checks import integer
from spark3r.families.registry import detect
from spark3r.identity import describe
from spark3r.reduction import ResolvedRule, clamp
from spark3r.reduction.operators import KEY_VALUE_OPERATORS, KeyValuePruning
from spark3r.schedule import operators_text


@dataclass(frozen=True)
class RowStride(KeyValuePruning):
    """Keep every r-th row of patches of each frame, one row further in every frame.

    Attributes:
        first: Row of frame 0 that is kept first.
    """

    name: ClassVar[str] = "row_stride"
    first: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        integer(self.first, "first", minimum=0)

    def kept_patches(self, layout: TokenLayout, factor: int) -> Tensor:
        frame = torch.arange(layout.frames).view(-1, 1, 1)
        row = torch.arange(layout.height).view(1, -1, 1)
        kept = (row - frame - self.first) % factor == 0
        return kept.expand(-1, -1, layout.width).flatten(1)

    def largest_factor(self, layout: TokenLayout) -> int:
        return layout.height


def row_stays(operator: RowStride, frame: int, y: int, x: int, factor: int) -> bool:
    return y % factor == (frame + operator.first) % factor


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KEY_VALUE_OPERATORS, RowStride.name, RowStride)
        patch.setitem(oracle.KEPT_PATCHES, RowStride.name, row_stays)
        yield


OPERATORS = Operators(key_value=RowStride(keep_anchor=True, mass_correction=1.0, first=2))
SCHEDULE = Schedule.uniform(2, 2, 3, operators=OPERATORS)


@settings(max_examples=examples(40), deadline=None)
@given(layouts(), key_value_prunings([RowStride]), st.integers(1, 12), st.integers(0, 5))
def test_it_has_the_properties_of_all_operators(
    layout: TokenLayout, pruning: RowStride, factor: int, query: int
) -> None:
    rule = clamp(ResolvedRule(1 + query, factor, Operators(key_value=pruning)), layout)
    check_selection(layout, rule)
    check_attention(layout, rule)


def test_the_strategies_draw_it() -> None:
    assert "RowStride" in str(key_value_prunings())


def test_it_is_applied_and_printed(model: nn.Module) -> None:
    images = make_images(6)
    with torch.no_grad():
        dense = model(images)["depth"]
        with spark3r.apply(model, SCHEDULE) as handle:
            assert "operators: row stride + anchor, β 1; queries merged" in str(handle)
            reduced_depth = model(images)["depth"]
        assert torch.equal(model(images)["depth"], dense)
    assert reduced_depth.isfinite().all()
    assert not torch.equal(reduced_depth, dense)


def test_a_profile_holds_it_with_its_own_field(model: nn.Module, tmp_path: Path) -> None:
    family = detect(model)
    record = describe(family.name, family.attention(model), family.metadata(model))
    profile = Profile.create(record, {"rows": SCHEDULE}, status="paper", source="here")
    path = tmp_path / "rows.json"
    profile.save(path)
    assert spark3r.load_profile(path).schedule() == SCHEDULE
    with (
        pytest.warns(Spark3rWarning, match="not measured on your weights"),
        spark3r.apply(model, str(path)) as handle,
    ):
        assert handle.schedule == SCHEDULE
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schedules"][0]["operators"]["key_value"]["first"] == 2
    document["schedules"][0]["operators"]["key_value"]["first"] = -1
    with pytest.raises(ProfileError, match="first is -1, expected an integer of at least 0"):
        Profile.parse(json.dumps(document))


def test_the_toolkit_asks_it() -> None:
    assert largest_factors(OPERATORS, TokenLayout(9, 4, 7)) == (28, 4)
    assert OPERATORS.describe() == "row stride + anchor, β 1"
    assert Operators.from_dict(json.loads(operators_text(OPERATORS))) == OPERATORS


@pytest.mark.slow
@pytest.mark.dynamo
def test_a_compiled_graph_follows_its_fields() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(reduced, fullgraph=True, backend="eager")
    layout = TokenLayout(6, 4, 3, special=2, anchor_frame=0)
    query, key, value = random_qkv(layout)
    # A number that changes between calls is a symbol to Dynamo.
    changes = [{"first": 1}, {"first": 2}, {"mass_correction": 0.5}, {"mass_correction": 0.25}, {}]
    for change in changes:
        operators = Operators(key_value=RowStride(**change))
        rule = ResolvedRule(1, 4, operators)
        expected = reduced(query, key, value, layout, rule)
        torch.testing.assert_close(compiled(query, key, value, layout, rule), expected)
    torch._dynamo.reset()
