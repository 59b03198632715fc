"""What no Prediction reads is left out of passes of a Runner, and of nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from family_cases import CASES, Case, build, images, quiet, reducing, run
from torch import Tensor, nn

import spark3r
from spark3r.families.registry import detect
from spark3r.runner import Runner, without_unread

# Of each model, modules that a pass runs and a prediction does not read, by parts of their names.
UNREAD = {
    "vggt-stand-in": {"point_head"},
    "da3-stand-in": {"_aux"},
    "omega-stand-in": {"text_alignment_head"},
    "panovggt-stand-in": {"global_point"},
    "panovggt-upstream": {"global"},
    "worldmirror-stand-in": {"norm_head"},
    "worldmirror-upstream": {"norm_head"},
    "worldmirror-1-upstream": {"norm_head"},
    "vggt-upstream": {"point_head"},
    "da3-tiny-upstream": {"_aux"},
    "da3-small-upstream": {"_aux"},
}


def everything(root: nn.Module) -> tuple[()]:
    return ()


def predicted(runner: Runner, clip: Tensor) -> dict[str, Tensor]:
    with quiet():
        found = runner.predict(spark3r.Clip("clip", clip))
    return {field.name: getattr(found, field.name) for field in fields(found)}


@contextmanager
def names_of_calls(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names of the modules that run inside the block."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: called.add(name)

    hooks = [m.register_forward_pre_hook(note(name)) for name, m in model.named_modules()]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def state(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(module.__dict__) for module in model.modules()]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("reduced", [False, True], ids=["dense", "reduced"])
def test_a_prediction_holds_the_same_bits(case: Case, reduced: bool) -> None:
    model = build(case)
    family, clip = detect(model), images(case, 5)[0]
    runner, whole = Runner(model, family), Runner(model, replace(family, unread=everything))
    schedule = reducing(case.layers) if reduced else spark3r.Schedule.dense(case.layers)
    # Where a prediction leaves a head out, memory savers drop the tokens that it would read.
    with spark3r.apply(model, schedule, save_memory=False), names_of_calls(model) as all_of_them:
        expected = predicted(whole, clip)
    with spark3r.apply(model, schedule), names_of_calls(model) as called:
        found = predicted(runner, clip)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert called <= all_of_them
    parts = UNREAD.get(case.name, set())
    for name in all_of_them - called:
        assert any(part in name for part in parts), name
    for part in parts:
        assert any(part in name for name in all_of_them), part
        assert not any(part in name for name in called), part


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_users_own_calls_return_everything(case: Case) -> None:
    model, clip = build(case), images(case, 3)
    before, untouched = run(model, clip), state(model)
    names = list(model.state_dict())
    predicted(Runner.of(model), clip[0])
    assert state(model) == untouched
    after = run(model, clip)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert list(model.state_dict()) == names


CASE = next(case for case in CASES if case.name == "vggt-stand-in")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_pass_leaves_the_model_whole(error: type[BaseException]) -> None:
    model, clip = build(CASE), images(CASE, 3)

    def fail(*_: object) -> None:
        assert model.point_head is None
        raise error

    hook = model.depth_head.register_forward_pre_hook(fail)
    with pytest.raises(error):
        Runner.of(model).run(clip[0])
    hook.remove()
    assert isinstance(model.point_head, nn.Module)
    assert "world_points" in run(model, clip)


def test_passes_of_several_threads_overlap() -> None:
    """The last of them to end puts the head back."""
    model, clip = build(CASE), images(CASE, 3)
    both, first_is_over = threading.Barrier(2, timeout=10), threading.Event()
    outputs: dict[str, Any] = {}
    threads: list[threading.Thread] = []

    def wait(*_: object) -> None:
        both.wait()
        if threading.current_thread() is threads[1]:
            assert first_is_over.wait(10)
            assert model.point_head is None

    def work(name: str) -> None:
        outputs[name] = Runner.of(model).run(clip[0])

    hook = model.depth_head.register_forward_pre_hook(wait)
    threads += [threading.Thread(target=work, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    threads[0].join(20)
    first_is_over.set()
    threads[1].join(20)
    hook.remove()
    assert outputs.keys() == {"first", "second"}
    assert all("world_points" not in output for output in outputs.values())
    assert isinstance(model.point_head, nn.Module)


class _TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depth_head, self.point_head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        output = {"depth": self.depth_head(x)}
        if self.point_head is not None:
            output["world_points"] = self.point_head(x)
        return output


def test_a_graph_that_was_compiled_without_a_head_is_not_run_with_it() -> None:
    """The other way round a graph keeps its head, which costs time and changes nothing."""
    model = _TwoHeads()
    family = replace(detect(build(CASE)), unread=lambda root: [(root, "point_head", None)])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with without_unread(model, family):
        assert compiled(torch.ones(1, 2)).keys() == {"depth"}
    assert compiled(torch.ones(1, 2)).keys() == {"depth", "world_points"}
    with without_unread(model, family):
        assert "depth" in compiled(torch.ones(1, 2))
    assert compiled(torch.ones(1, 2)).keys() == {"depth", "world_points"}


def test_another_value_in_the_place_of_a_head_is_left_alone() -> None:
    model, clip = build(CASE), images(CASE, 3)
    model.__dict__["point_head"] = model.depth_head
    try:
        assert "world_points" in Runner.of(model).run(clip[0])
        assert model.__dict__["point_head"] is model.depth_head
    finally:
        del model.__dict__["point_head"]
