"""A new family is one file that ends in a `Family`, and its entry in the registry.

The family of this test exists nowhere else: no other file names it or changes for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from toy_model import ToyModel

import spark3r
from spark3r import LayerRule, Operators, Profile, QueryMerging, Schedule, TokenLayout, TokenStride
from spark3r.families.base import Family
from spark3r.families.parts.projection import join
from spark3r.families.registry import FAMILIES, detect
from spark3r.patching.wall import apply_wall
from spark3r.reduction import ResolvedRule, attend, select
from spark3r.runner import Runner

PATCH = 8


def _layout(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, TokenLayout]:
    batch, frames, _, height, width = args[0].shape
    return batch, TokenLayout(frames, height // PATCH, width // PATCH)


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = attn.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _reduced_forward(attn: nn.Module, layout: TokenLayout, rule: ResolvedRule, x: Tensor) -> Tensor:
    query, key, value = _heads(attn, x)
    selection = select(layout, rule, x.device)
    if selection is not None:
        key, value = selection.take(key, 2), selection.take(value, 2)
    return join(attend(query, key, value, layout, rule, selection))


FAMILY = Family(
    name="toy",
    usage="model(images)",
    matches=lambda root: type(root).__name__ == "ToyModel",
    attention=lambda root: {"attn": root.get_submodule("attn")},
    entry=lambda root: root,
    layout=_layout,
    reduced_forward=_reduced_forward,
    metadata=lambda root: {"patch_size": PATCH, "special_tokens": 0},
)

OPERATORS = Operators(QueryMerging(group=4, unmerge="linear"), TokenStride(mass_correction=1.0))
SCHEDULE = Schedule((LayerRule(3, 2),), OPERATORS)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, FAMILY.name, FAMILY)


@pytest.fixture
def toy() -> nn.Module:
    torch.manual_seed(0)
    return ToyModel()


def test_it_is_recognised_and_knows_its_layout(toy: nn.Module) -> None:
    assert detect(toy) is FAMILY
    assert Runner.of(toy).layout(torch.rand(5, 3, 24, 16)) == TokenLayout(5, 3, 2)


def test_its_passes_are_reduced_as_the_oracle_says_and_dense_again_afterwards(
    toy: nn.Module,
) -> None:
    runner, images = Runner.of(toy), torch.rand(10, 3, 24, 16)
    seen: list[tuple[Tensor, Tensor]] = []
    hook = toy.get_submodule("attn").register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    dense = runner.run(images)
    with spark3r.apply(toy, SCHEDULE):
        runner.run(images)
    hook.remove()
    x, output = seen[1]
    layout = runner.layout(images)
    (rule,) = SCHEDULE.resolve_within(layout)
    with torch.inference_mode():
        expected = oracle.attend(*_heads(toy.get_submodule("attn"), x), layout, rule)
    torch.testing.assert_close(output.double(), join(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output, seen[0][1], atol=1e-5)
    assert torch.equal(runner.run(images), dense)
    with apply_wall(runner):
        assert torch.equal(runner.run(images), seen[0][0])  # attention adds nothing to the tokens


def test_a_profile_is_written_for_it_and_applied(toy: nn.Module, tmp_path: Path) -> None:
    record = Runner.of(toy).record("Toy")
    assert (record.family, record.patch_size, record.special_tokens) == ("toy", PATCH, 0)
    profile = Profile.create(record, {"only": SCHEDULE}, status="paper", source="here")
    profile.save(tmp_path / "toy.json")
    with (
        pytest.warns(spark3r.Spark3rWarning, match="not measured on your weights"),
        spark3r.apply(toy, str(tmp_path / "toy.json")) as handle,
    ):
        assert "family toy, 1 global layers" in str(handle)


@pytest.mark.slow
@pytest.mark.dynamo
def test_it_compiles_without_a_graph_break(toy: nn.Module) -> None:
    images = torch.rand(1, 6, 3, 16, 16)
    with spark3r.apply(toy, SCHEDULE), torch.no_grad():
        expected = toy(images)
        compiled = torch.compile(toy, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected)
