"""The fused search for the nearest destination against the plain one, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import interpreted  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from qkv import random_qkv
from torch import Tensor

from spark3r import TokenLayout
from spark3r.kernels import forced, nearest
from spark3r.kernels.nearest import OPERATION, PLAIN, TRITON, apply
from spark3r.reduction import merging, plans
from spark3r.reduction.operators import Operators, QueryMerging
from spark3r.reduction.rule import ResolvedRule

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with forced(OPERATION, TRITON):
        assert nearest.implementation(CPU, torch.float32, 64) == TRITON
        yield


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("groups", "sources", "destinations", "features"),
    [(1, 1, 1, 16), (2, 63, 64, 32), (1, 65, 1, 64), (2, 64, 65, 16), (1, 7, 200, 128)],
)
def test_any_number_of_sources_and_destinations(
    groups: int, sources: int, destinations: int, features: int
) -> None:
    source = _random(2, groups, sources, features)
    destination = F.normalize(_random(2, groups, destinations, features, seed=1), dim=-1)
    found = apply(source, destination)
    exact = (source.double() @ destination.double().transpose(2, 3)).argmax(dim=3)
    assert found.dtype == torch.int64
    assert torch.equal(found, exact)


def test_any_strides() -> None:
    source = _random(2, 16, 40, 3).permute(0, 3, 2, 1)
    destination = F.normalize(_random(2, 3, 70, 16, seed=1)[:, :, ::2], dim=-1)
    exact = (source.double() @ destination.double().transpose(2, 3)).argmax(dim=3)
    assert torch.equal(apply(source, destination), exact)


def test_ties_go_to_the_first_and_nan_to_some_destination() -> None:
    source, destination = torch.ones(1, 1, 70, 16), torch.ones(1, 1, 150, 16)
    source[0, 0, 5] = float("nan")
    assert torch.equal(apply(source, destination), torch.zeros(1, 1, 70, dtype=torch.int64))
    destination[:, :, :80] = 0.5
    found = apply(source, destination)[0, 0]
    assert found[5] == 0
    assert (found[:5] == 80).all()


@pytest.mark.parametrize("factor", [2, 4])
def test_places_are_those_of_the_plain_search(factor: int) -> None:
    layout = TokenLayout(9, 4, 5, special=2, anchor_frame=0)
    rule = ResolvedRule(factor, 1, Operators(QueryMerging(group=4)))
    plan = plans.plan(layout, rule, CPU)
    assert plan is not None
    query = random_qkv(layout, batch=2, dtype=torch.float32)[0].repeat(1, 1, 1, 4)
    fused = merging.match(query, plan)
    with forced(OPERATION, PLAIN):
        assert torch.equal(fused, merging.match(query, plan))


def test_a_bound_of_similarities_and_several_neighbours_take_the_plain_search() -> None:
    source, destination = _random(1, 1, 5, 16).double(), _random(1, 1, 7, 16, seed=1).double()
    assert merging.nearest(source, destination, 2).shape == (1, 1, 5, 2)
    assert merging.nearest(source, destination, 1, elements=3).shape == (1, 1, 5, 1)


def test_the_trial_accepts_the_kernel() -> None:
    assert nearest._trial(TRITON, CPU, torch.float32, 64) is None


@pytest.mark.parametrize("mistake", ["last of ties", "rounded", "out of range"])
def test_the_trial_refuses_a_kernel_that_is_wrong(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(source: Tensor, destination: Tensor) -> Tensor:
        if mistake == "rounded":
            source, destination = source.bfloat16().float(), destination.bfloat16().float()
        products = source @ destination.transpose(2, 3)
        if mistake == "last of ties":
            return products.shape[3] - 1 - products.flip(3).argmax(dim=3)
        return products.argmax(dim=3) + (1000 if mistake == "out of range" else 0)

    monkeypatch.setattr(nearest, "apply", wrong)
    assert nearest._trial(TRITON, CPU, torch.float32, 64) is not None


@pytest.mark.slow
@pytest.mark.dynamo
def test_matching_with_the_kernel_compiles_into_one_graph() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    layout = TokenLayout(6, 3, 4, special=2, anchor_frame=0)
    rule = ResolvedRule(3, 1, Operators(QueryMerging(group=4)))
    query = random_qkv(layout, dtype=torch.float32)[0].repeat(1, 1, 1, 4)

    def run(query: Tensor) -> Tensor:
        plan = plans.plan(layout, rule, CPU)
        assert plan is not None
        return merging.match(query, plan)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query), run(query))
    torch._dynamo.reset()
