"""Hooks that wrap a module's forward, put on and taken off in any order with a schedule."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from family_cases import CASES, Case, attentions, build, difference, images, reducing, run
from patched import REDUCED, depth
from small_models import make_images
from torch import nn

import spark3r
from spark3r import PatchError, Schedule
from spark3r.families.registry import detect


def hook(model: nn.Module) -> None:
    """Wrap the forward of attention and MLPs as accelerate's ``add_hook_to_module`` does."""
    for module in _hooked(model):
        module._old_forward = old = module.forward
        module.calls = 0

        def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
            module.calls += 1
            return module._old_forward(*args, **kwargs)

        module.forward = functools.update_wrapper(functools.partial(forward, module), old)


def unhook(model: nn.Module) -> None:
    """Undo `hook` as accelerate's ``remove_hook_from_module`` does."""
    for module in _hooked(model):
        module.forward = module._old_forward
        del module._old_forward


def _hooked(model: nn.Module) -> list[Any]:
    mlps = [module for name, module in model.named_modules() if name.endswith(".mlp")]
    return [*attentions(model).values(), *mlps]


def offload(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    if detect(model).name == "da3":
        pytest.skip("accelerate cannot offload it: its transformer's forward is never called")
    whole = {type(module).__name__ for module in attentions(model).values()}
    accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=sorted(whole))


def load_again(model: nn.Module) -> None:
    pytest.importorskip("accelerate").hooks.remove_hook_from_submodules(model)


class Hooks(NamedTuple):
    """Functions that put hooks on a model and take them off."""

    put_on: Callable[[nn.Module], None]
    take_off: Callable[[nn.Module], None]


@pytest.fixture(params=[Hooks(hook, unhook), Hooks(offload, load_again)], ids=["like", "real"])
def hooks(request: pytest.FixtureRequest) -> Hooks:
    found: Hooks = request.param
    return found


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.mark.parametrize("removed_first", [False, True])
def test_hooks_after_a_schedule_come_off_before_or_after_it(
    case: Case, hooks: Hooks, removed_first: bool
) -> None:
    model, clip = copy.deepcopy(build(case)), images(case, 5)
    dense = run(model, clip)
    handle = spark3r.apply(model, reducing(case.layers))
    reduced = run(model, clip)
    hooks.put_on(model)
    assert difference(run(model, clip), reduced) == 0.0
    with handle.disabled():
        assert difference(run(model, clip), dense) == 0.0
    if removed_first:
        handle.remove()
        assert difference(run(model, clip), dense) == 0.0
        hooks.take_off(model)
    else:
        hooks.take_off(model)
        assert difference(run(model, clip), reduced) == 0.0
        handle.remove()
    assert not spark3r.is_applied(model)
    assert difference(run(model, clip), dense) == 0.0
    with spark3r.apply(model, reducing(case.layers)):  # what was left behind is no obstacle
        assert difference(run(model, clip), reduced) == 0.0
    assert difference(run(model, clip), dense) == 0.0


@pytest.mark.parametrize("removed_first", [False, True])
def test_a_schedule_after_hooks_is_refused_where_it_reduces(
    case: Case, hooks: Hooks, removed_first: bool
) -> None:
    model, clip = copy.deepcopy(build(case)), images(case, 5)
    dense = run(model, clip)
    hooks.put_on(model)
    with pytest.raises(PatchError, match="has a forward of its own"):
        spark3r.apply(model, reducing(case.layers))
    assert not spark3r.is_applied(model)
    handle = spark3r.apply(model, Schedule.dense(case.layers))
    assert difference(run(model, clip), dense) == 0.0
    for step in (handle.remove, hooks.take_off)[:: 1 if removed_first else -1]:
        step(model) if step is hooks.take_off else step()
        assert difference(run(model, clip), dense) == 0.0
    assert not spark3r.is_applied(model)
    with spark3r.apply(model, reducing(case.layers)):  # hooks that are off are no obstacle
        assert difference(run(model, clip), dense) > 1e-6


def test_hooks_still_run_when_the_schedule_inside_them_is_replaced_or_removed(
    model: nn.Module,
) -> None:
    clip = make_images(6)
    dense = depth(model, clip)
    with spark3r.apply(model, REDUCED):
        reduced = depth(model, clip)
    spark3r.apply(model, Schedule.uniform(2, 1, 2))
    hook(model)
    attn: Any = next(iter(attentions(model).values()))
    handle = spark3r.apply(model, REDUCED, guard=False)  # which would call modules as well
    assert torch.equal(depth(model, clip), reduced)
    twin = copy.deepcopy(model)
    handle.remove()
    assert torch.equal(depth(model, clip), dense)
    spark3r.apply(model, REDUCED, guard=False)
    assert torch.equal(depth(model, clip), reduced)
    assert attn.calls == 3
    assert torch.equal(depth(twin, clip), reduced)
    assert attn.calls == 3


def test_hooks_that_replace_a_forward_without_telling_are_refused(model: nn.Module) -> None:
    handle = spark3r.apply(model, REDUCED)
    attn: Any = next(iter(attentions(model).values()))
    ours = attn.forward
    attn.forward = lambda *call: ours(*call)  # no __wrapped__
    with pytest.raises(PatchError, match="has a forward of its own"):
        spark3r.apply(model, REDUCED)
    assert handle.is_active
