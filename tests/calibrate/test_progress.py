from __future__ import annotations

import pytest
from tiny_job import Notes

from calibrate.progress import EVERY_S, Reporter, StepTimes, TerminalReporter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_show_the_remaining_time_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with TerminalReporter(clock) as reporter:
        for done in range(11):
            reporter.progress("search", done, 10)
            clock.now += 0.4 * EVERY_S
        reporter.progress("search", 10, 10)  # shown once
        reporter.say("a line")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "[  18.0 s] search: 3 of 10, about 42 s left",
        "[  36.0 s] search: 6 of 10, about 24 s left",
        "[  54.0 s] search: 9 of 10, about 6 s left",
        "[  60.0 s] search: 10 of 10",
        "a line",
    ]


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        reporter.progress("search", 1, 1)
        reporter.say("a line")
    assert capsys.readouterr().err == ""


def test_steps_are_timed_from_first_to_last() -> None:
    clock, seen = Clock(), Notes()
    times = StepTimes(seen, clock)
    times.progress("a", 0, 2)
    clock.now += 3
    times.progress("b", 0, 1)
    clock.now += 4
    times.progress("a", 2, 2)
    assert times.seconds == {"a": 7.0, "b": 0.0}
    times.say("a line")
    assert (seen.steps, seen.lines) == (["a", "b", "a"], ["a line"])
