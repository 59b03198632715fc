from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.budget import Budget, parse_budget
from calibrate.measure.target_length import choose_target_length


def latencies(frames: int) -> tuple[float, float]:
    """Dense grows with the square of the length, the wall in proportion to it."""
    return 10.0 * frames + 0.1 * frames**2, 10.0 * frames


@pytest.mark.parametrize(
    ("text", "frames", "meets_rule"),
    [
        ("15ms", 128, True),  # dense 22.8 ms/frame, wall 10
        ("25ms", 512, True),  # dense 35.6 at 256 is too little, 61.2 at 512 is enough
        ("75ms", 1024, False),  # dense 112.4 at 1024 is just short of 1.5 times
        ("10.5ms", 128, False),  # never 1.1 times the wall: every length is as bad
        ("8ms", 128, False),  # below the wall
        ("2x", 128, True),  # half of dense is 11.4 ms/frame, above 1.1 times the wall
        ("3s/clip", 256, True),
    ],
)
def test_the_default_target_length(text: str, frames: int, meets_rule: bool) -> None:
    lengths_timed: list[int] = []

    def measured(length: int) -> tuple[float, float]:
        lengths_timed.append(length)
        return latencies(length)

    target = choose_target_length(parse_budget(text), measured)
    assert (target.frames, target.meets_rule) == (frames, meets_rule)
    assert lengths_timed == [n for n in (128, 256, 512, 1024) if not meets_rule or n <= frames]
    assert str(frames) in target.text


@given(st.floats(0.1, 1000), st.sampled_from(["frame", "clip", "speed_up", "share"]))
def test_the_default_target_length_is_the_shortest_that_meets_the_rule(
    value: float, kind: str
) -> None:
    budget = Budget("text", kind, value)  # type: ignore[arg-type]

    def meets(frames: int) -> bool:
        dense_ms, wall_ms = latencies(frames)
        clip_ms = budget.clip_ms(frames, dense_ms)
        return dense_ms >= 1.5 * clip_ms and clip_ms >= 1.1 * wall_ms

    target = choose_target_length(budget, latencies)
    fitting = [frames for frames in (128, 256, 512, 1024) if meets(frames)]
    assert target.meets_rule == bool(fitting)
    if fitting:
        assert target.frames == fitting[0]


def test_without_lengths_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="no length"):
        choose_target_length(parse_budget("30ms"), latencies, lengths=())
