from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import tiny_job
from hypothesis import given
from hypothesis import strategies as st
from tiny_job import make_tiny

from calibrate.budget import Budget, parse_budget
from calibrate.clips import split_clips
from calibrate.measure.target_length import choose_target_length, longest_short
from calibrate.measure.timing import PassTiming
from calibrate.settings import Settings, make_job
from spark3r.timing import Latency, Timer, Treatment


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


@pytest.mark.parametrize(
    ("wall_ms", "square_ms", "at_most", "frames", "first"),
    [
        (4.4, 0.115, 1024, 96, 1.0),  # the reference model on two cores
        (4.4, 0.115, 48, 48, 1.0),
        (0.001, 0.01, 1024, 384, 1.0),
        (0.001, 0.001, 1024, 1024, 1.0),
        (4.4, 0.115, 1024, 96, 0.92),  # the first dense pass is disturbed, by 8 % of it
        (0.001, 100.0, 1024, 8, 1.0),  # too slow at any length
    ],
)
def test_the_length_to_fit_at_is_the_longest_at_which_dense_is_short(
    wall_ms: float, square_ms: float, at_most: int, frames: int, first: float
) -> None:
    taken: list[int] = []

    def dense_ms(frames: int) -> float:
        return wall_ms * frames + square_ms * frames**2

    class LengthTimer(Timer):
        def time_in_turns(
            self, treatments: Sequence[Treatment], **options: object
        ) -> dict[str, Latency]:
            by_name = {each.name: each.subject for each in treatments}
            dense = by_name["dense"]
            assert isinstance(dense, PassTiming)
            taken.append(dense.layout.frames)
            share = first if len(taken) == 1 else 1.0
            return {
                "wall": Latency((wall_ms * dense.layout.frames,)),
                "dense": Latency((share * dense_ms(dense.layout.frames),)),
            }

    split = split_clips(tiny_job.clips())
    job = make_job(make_tiny(), split, Settings(parse_budget("50%")), timer=LengthTimer())
    short = longest_short(job, split.search[0].images, at_most)
    assert short.frames == frames
    assert frames <= 8 or dense_ms(frames) <= 1500
    if first == 1:
        assert frames == taken[-1]
        assert all(dense_ms(n) <= 1500 for n in taken[1:])
    assert len(taken) <= 6
    assert all(after <= 4 * before for before, after in pairwise(taken))
    for length in (frames, 2 * frames):
        assert short.extended(length) == pytest.approx(
            (dense_ms(length), wall_ms * length), rel=1e-6
        )
