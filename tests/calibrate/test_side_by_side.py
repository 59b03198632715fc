"""Clips that run side by side give what they give one after the other."""

import threading

import pytest
import torch
from faulty_runs import make_clip
from torch import nn

from calibrate.defaults import OPERATORS
from calibrate.measure.evaluator import evaluate, run_dense
from calibrate.measure.residual_drift import drift
from calibrate.side_by_side import SMALL_BYTES, clips_at_once, side_by_side
from spark3r import Schedule
from spark3r.runner import Runner


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_and_progress_in_steps() -> None:
    meet = threading.Barrier(2)
    seen: list[tuple[int, int]] = []

    def work(item: int) -> tuple[int, int]:
        meet.wait(timeout=10)  # two items are under way at once
        return item * item, torch.get_num_threads()

    found = side_by_side(work, range(6), 2, lambda done, total: seen.append((done, total)))
    assert found == [(item * item, 1) for item in range(6)]
    assert seen == [(done, 6) for done in range(7)]
    assert torch.get_num_threads() == 2


def test_the_first_error_is_raised_and_threads_are_as_before() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item >= 1:
            raise ValueError(f"item {item}")
        return item

    with pytest.raises(ValueError, match="item 1"):
        side_by_side(work, range(100), 2)
    assert len(begun) < 100
    assert torch.get_num_threads() == 2
    assert side_by_side(work, [], 2) == []


def test_large_models_and_those_elsewhere_have_their_clips_one_by_one() -> None:
    small, large = nn.Linear(8, 8), nn.Linear(1, SMALL_BYTES // 4, bias=False, device="meta")
    assert clips_at_once(small) == 2
    assert clips_at_once(large) == 1
    with torch.device("meta"):
        assert clips_at_once(nn.Linear(8, 8)) == 1


def test_clips_side_by_side_give_the_same_qualities_and_drifts(model: nn.Module) -> None:
    runner = Runner.of(model)
    clips = [make_clip(6, step=0.1 + 0.05 * number, name=str(number)) for number in range(5)]
    schedule = Schedule.uniform(runner.depth, 2, 2, operators=OPERATORS[1])

    def measured():
        dense = run_dense(runner, clips)
        drifts = drift(runner, clips, OPERATORS, query_factors=(2,), key_value_factors=(2, 3))
        return dense.predictions, evaluate(runner, schedule, dense), drifts

    at_once = measured()
    torch.set_num_threads(1)
    alone = measured()
    for one, other in zip(at_once[0], alone[0], strict=True):
        assert torch.equal(one.depth, other.depth)
        assert torch.equal(one.extrinsics, other.extrinsics)
    assert at_once[1] == alone[1]
    assert at_once[2].equals(alone[2])
