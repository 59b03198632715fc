"""Passes that never wait for the device, and models that compile without a graph break."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import pytest
import stand_ins
import torch
import torch._dynamo
from device_waits import waits
from family_cases import CASES, Case, build, difference, entry_call, images, reducing, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import spark3r
from spark3r import Schedule
from spark3r.families.registry import detect

# Upstream's rotary embeddings wait for the device, except for those of the first two; the third has
# none.
UNTURNED = ("omega", "reference", "mapanything")
ROTARY = [case for case in CASES if case.family not in UNTURNED]
# Compiling takes seconds. So one instance represents both of Depth-Anything-3.
COMPILED = [
    pytest.param(case, reduced, id=f"{case}-{'reduced' if reduced else 'dense'}")
    for case in CASES
    if case.name != "da3-small-upstream"
    for reduced in ([True] if case.needs else [False, True])
]


class _NoHostReads(TorchDispatchMode):
    """Mode that refuses operations whose result the host would have to wait for."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        reason = waits(func, args, kwargs or {}, None)
        assert reason is None, reason
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_pass_waits_for_the_device(case: Case) -> None:
    model, clip = build(case), images(case, 5)
    if case in ROTARY:
        with pytest.raises(AssertionError, match="waits for the device"), _NoHostReads():
            run(model, clip)
    for schedule in (Schedule.dense(case.layers), reducing(case.layers)):
        with spark3r.apply(model, schedule):
            run(model, clip)  # makes the tables of this grid
            with _NoHostReads():
                run(model, clip)


@pytest.mark.slow
@pytest.mark.dynamo
@pytest.mark.parametrize(("case", "reduced"), COMPILED)
def test_entry_compiles_without_a_graph_break(case: Case, reduced: bool) -> None:
    torch._dynamo.reset()
    model, clip = build(case), images(case, 5)
    schedule = reducing(case.layers) if reduced else Schedule.dense(case.layers)
    entry = detect(model).entry(model)
    args, kwargs = entry_call(model, clip)
    with spark3r.apply(model, schedule, save_memory=False), torch.no_grad():
        expected = _tensors(entry(*args, **kwargs))
    with spark3r.apply(model, schedule), torch.no_grad():  # a graph drops unread tokens by itself
        compiled = torch.compile(entry, fullgraph=True, backend="eager")
        found = _tensors(compiled(*args, **kwargs))
    torch._dynamo.reset()
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", ROTARY, ids=str)
def test_embeddings_are_given_back_and_copied(case: Case) -> None:
    model, clip = build(case), images(case, 5)
    dense = run(model, clip)
    embedding = _embedding(model)
    with spark3r.apply(model, reducing(case.layers)) as handle:
        copy = deepcopy(model)
        assert vars(embedding)["forward"].args == (embedding,)
        assert vars(_embedding(copy))["forward"].args == (_embedding(copy),)
        with handle.disabled():
            assert difference(run(model, clip), dense) == 0.0
    assert "forward" not in vars(embedding)
    spark3r.remove(copy)
    assert "forward" not in vars(_embedding(copy))


def test_an_embedding_with_a_forward_of_its_own_is_left_alone() -> None:
    model = stand_ins.Vggt()
    own = partial(type(model.aggregator.rope).forward, model.aggregator.rope)
    model.aggregator.rope.forward = own
    with spark3r.apply(model, Schedule.dense(3)):
        assert vars(model.aggregator.rope)["forward"] is own
    assert vars(model.aggregator.rope)["forward"] is own


def _embedding(model: nn.Module) -> nn.Module:
    attn: Any = next(iter(detect(model).attention(model).values()))
    embedding: nn.Module = attn.rope
    return embedding


def _tensors(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    held = [value for leaf in leaves if is_dataclass(leaf) for value in vars(leaf).values()]
    leaves += torch.utils._pytree.tree_leaves(held)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
