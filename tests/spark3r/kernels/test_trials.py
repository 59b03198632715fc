"""A kernel is used only after it ran and agreed with the plain implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spark3r.kernels import choices, forced, trials

CPU = torch.device("cpu")
EXACT = torch.linspace(-3, 3, 50, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = dict(trials._choices)
    trials._choices.clear()
    yield
    trials._choices.clear()
    trials._choices.update(before)


def _trial(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if kernel == "broken":
        raise RuntimeError("no kernel image is available\nCUDA kernel errors ...")
    wrong = {"right": 0.0, "wrong": 0.5, "nan": float("nan")}[kernel]
    found = EXACT.to(device, dtype)
    found[3] += wrong
    return trials.disagreement(found, EXACT, torch.finfo(dtype).eps)


def _choose(*candidates: str, dtype: torch.dtype = torch.bfloat16) -> str:
    return trials.choose("adding", candidates, "plain", _trial, CPU, dtype, 64)


def test_the_first_candidate_that_runs_and_agrees_is_chosen() -> None:
    assert _choose("broken", "wrong", "right", "nan") == "right"
    (choice,) = choices()
    assert (choice.operation, choice.device, choice.dtype) == ("adding", "cpu", "bfloat16")
    assert choice.implementation == "right"
    assert choice.refused == (
        ("broken", "it raised RuntimeError: no kernel image is available"),
        ("wrong", "it differs from the plain result by 0.51 (most), allowed 0.094"),
    )


def test_the_plain_implementation_remains_where_all_are_refused() -> None:
    assert _choose("nan", "broken") == "plain"
    assert "nan" in choices()[0].refused[0][1]


def test_every_candidate_is_tried_once_per_precision() -> None:
    tried = []

    def trial(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        tried.append(dtype)

    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16):
        trials.choose("adding", ("a", "b"), "plain", trial, CPU, dtype, 64)
    assert tried == [torch.float32, torch.bfloat16]
    assert [choice.dtype for choice in choices()] == ["float32", "bfloat16"]


def test_without_candidates_nothing_is_tried_and_nothing_recorded() -> None:
    assert _choose() == "plain"
    assert choices() == ()


def test_forcing_names_the_implementation_and_ends_with_the_block() -> None:
    assert not trials.is_possible("adding", CPU)
    with forced("adding", "wrong"):
        assert _choose("right") == "wrong"
        assert trials.is_possible("adding", CPU)
        assert not trials.is_possible("matching", CPU)
    assert _choose("right") == "right"


def test_another_shape_is_a_disagreement() -> None:
    assert trials.disagreement(EXACT[1:].float(), EXACT, 1e-7) is not None


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: object, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        raise AssertionError("a trial ran inside the mode that surrounds the call")


def test_a_trial_runs_on_real_tensors_in_full_precision_whatever_surrounds_it() -> None:
    seen: list[Tensor] = []

    def trial(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
        one = torch.ones(2, 2)
        seen.append(one @ one)

    with _Refuse(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        trials.choose("adding", ("a",), "plain", trial, CPU, torch.float32, 64)
    (result,) = seen
    assert result.device == CPU
    assert result.dtype == torch.float32
    assert choices()[0].implementation == "a"
    assert choices()[0].refused == ()
