"""Latencies: samples in turns, treatments that fit into memory, clocks of devices."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from spark3r.memory import fits_into_memory
from spark3r.timing import (
    FIRST_COUNTS_S,
    LONG_S,
    MIN_ROUNDS,
    ROUNDS,
    VERY_LONG_S,
    Latency,
    Timer,
    Treatment,
    interleaved,
    make_stopwatch,
    measure,
    samples_to_take,
)


class FakeClock:
    """A clock that only calls move; each call takes its time, stretched by a drift."""

    def __init__(self, drift_per_s: float = 0.0) -> None:
        self.now = 0.0
        self.drift_per_s = drift_per_s
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def taking(self, name: str, ms: float) -> Callable[[], None]:
        def call() -> None:
            self.log.append(name)
            self.now += ms / 1000 + self.drift_per_s * self.now

        return call


def test_median_spread_and_all_samples_are_kept() -> None:
    samples = (5.0, 1.0, 2.0, 9.0, 3.0)
    latency = Latency(samples)
    assert latency.samples_ms == samples
    assert latency.median_ms == 3.0
    low, high = np.percentile(samples, [25, 75])
    assert latency.spread_ms == high - low
    assert latency.n == 5
    assert str(latency) == "3.00 ms (spread 3.00, n = 5)"
    assert Latency((4.0,)).spread_ms == 0.0


def test_no_sample_is_no_latency() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Latency(())


def test_rounds_take_turns_and_reverse() -> None:
    clock = FakeClock()
    calls = {"a": clock.taking("a", 3), "b": clock.taking("b", 5), "c": clock.taking("c", 7)}
    timed = interleaved(calls, rounds=3, warm_up_s=0, clock=clock)
    assert "".join(clock.log) == "abc" + "cba" + "abc"
    assert {name: latency.n for name, latency in timed.items()} == {"a": 3, "b": 3, "c": 3}
    assert [latency.median_ms for latency in timed.values()] == pytest.approx([3, 5, 7])


def test_a_drift_hits_all_calls_alike() -> None:
    clock = FakeClock(drift_per_s=0.01)
    calls = {name: clock.taking(name, 10) for name in "abcd"}
    timed = interleaved(calls, rounds=20, warm_up_s=0, clock=clock)
    means = [sum(latency.samples_ms) / latency.n for latency in timed.values()]
    assert max(means) / min(means) < 1.001
    first, *_, last = timed["a"].samples_ms
    assert last > 1.05 * first  # there was a drift


def test_warm_up_is_by_time_and_not_sampled() -> None:
    clock = FakeClock()
    latency = measure(clock.taking("a", 30), rounds=2, warm_up_s=0.1, clock=clock)
    assert len(clock.log) == 4 + 2
    assert latency.n == 2


def test_a_long_call_is_warmed_up_once() -> None:
    clock = FakeClock()
    measure(clock.taking("a", 30_000), rounds=1, warm_up_s=0.1, clock=clock)
    assert len(clock.log) == 2


def test_calls_with_fewer_samples_are_spread_over_the_rounds() -> None:
    clock = FakeClock()
    order: list[str] = []
    calls = {name: clock.taking(name, 10) for name in ("slow", "fast")}
    timed = interleaved(
        calls, before=order.append, rounds={"slow": 2, "fast": 5}, warm_up_s=0, clock=clock
    )
    assert {name: latency.n for name, latency in timed.items()} == {"slow": 2, "fast": 5}
    assert order == ["fast", "fast", "slow", "fast", "fast", "slow", "fast"]
    with pytest.raises(ValueError, match="at least 1 for every call"):
        interleaved(calls, rounds={"slow": 2})


@pytest.mark.parametrize(("limit_s", "rounds"), [(None, 20), (0.095, 10), (0.0, MIN_ROUNDS)])
def test_a_time_limit_ends_the_rounds(limit_s: float | None, rounds: int) -> None:
    clock = FakeClock()
    latency = measure(clock.taking("a", 10), warm_up_s=0, limit_s=limit_s, clock=clock)
    assert latency.n == rounds


def test_preparation_comes_before_each_call_and_is_not_timed() -> None:
    clock = FakeClock()
    calls = {"a": clock.taking("a", 3), "b": clock.taking("b", 5)}

    def before(name: str) -> None:
        clock.log.append(name.upper())
        clock.now += 1

    timed = interleaved(calls, before=before, rounds=2, warm_up_s=0, clock=clock)
    assert "".join(clock.log) == "AaBb" + "BbAa"
    assert timed["a"].samples_ms == pytest.approx([3, 3])


def test_an_error_of_a_call_is_not_swallowed() -> None:
    def fails() -> None:
        raise MemoryError("too long a clip")

    with pytest.raises(MemoryError, match="too long"):
        measure(fails)


def test_at_least_one_round() -> None:
    with pytest.raises(ValueError, match="rounds is 0"):
        measure(lambda: None, rounds=0)


def test_the_host_clock_sees_real_work() -> None:
    a = torch.rand(64, 64)
    latency = measure(lambda: a @ a, rounds=5, warm_up_s=0.01)
    assert 0 < latency.median_ms < 1000


@pytest.mark.gpu
def test_cuda_events_wait_for_the_device() -> None:
    a = torch.rand(4096, 4096, device="cuda")
    small = a[:128, :128].contiguous()
    timed = interleaved({"big": lambda: a @ a, "small": lambda: small @ small}, device="cuda")
    assert timed["big"].median_ms > 2 * timed["small"].median_ms


def test_another_device_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()

    class Device:
        @staticmethod
        def synchronize() -> None:
            clock.log.append("wait")
            clock.now += 0.002

    monkeypatch.setattr(torch, "odd", Device, raising=False)
    assert make_stopwatch("odd:0", clock)(clock.taking("call", 1)) == pytest.approx(3)
    assert clock.log == ["wait", "call", "wait"]


def test_timing_the_cpu_does_not_import_torch() -> None:
    program = (
        "import sys; from spark3r.timing import measure; measure(lambda: None, rounds=1); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def treatments(
    clock: FakeClock, ms: dict[str, float], log: list[str] | None = None
) -> list[Treatment]:
    """Treatments that take their milliseconds, and note their name when they are applied."""
    applied: list[str] = [] if log is None else log
    return [
        Treatment(name, clock.taking(name, taken), partial(applied.append, name.upper()))
        for name, taken in ms.items()
    ]


def test_first_runs_of_long_calls_are_samples() -> None:
    clock = FakeClock()
    second = {"short": 0.5 * FIRST_COUNTS_S, "long": 1.5 * FIRST_COUNTS_S, "longer": LONG_S}
    asked = treatments(clock, {name: 1000 * s for name, s in second.items()})
    found = Timer(clock).time_in_turns(asked, limit_s=0.0)
    assert {name: each.n for name, each in found.items()} == {"short": 3, "long": 3, "longer": 2}
    for name, each in found.items():
        assert each.samples_ms == pytest.approx([1000 * second[name]] * each.n)
    # One run is spent on the machine, and one on the call that is too short to count.
    assert Counter(clock.log) == {"short": 1 + 1 + 3, "long": 3, "longer": 2}


def test_each_run_has_its_treatment_and_rounds_take_turns() -> None:
    clock = FakeClock()
    asked = treatments(clock, {"a": 3, "b": 5}, clock.log)
    timed = Timer(clock, rounds=2, warm_up_s=0).time_in_turns(asked)
    # First runs forwards, the machine's own before them; then rounds that begin backwards.
    assert "".join(clock.log) == "Aaa" + "Bb" + "BbAa" + "AaBb"
    assert list(timed) == ["a", "b"]


def test_calls_that_have_run_before_are_sampled_from_the_first_run() -> None:
    clock = FakeClock()
    asked = treatments(clock, {"a": 3, "b": 5}, clock.log)
    timed = Timer(clock, rounds=3).time_in_turns(asked, warmed_up=True)
    assert "".join(clock.log) == "AaBb" + "BbAa" + "AaBb"
    assert timed["a"].samples_ms == pytest.approx([3] * 3)
    assert {each.n for each in Timer(clock, 1).time_in_turns(asked, warmed_up=True).values()} == {1}


def test_warm_up_is_by_time_and_a_tenth_of_a_limit_at_most() -> None:
    # The machine's run and the first one, repetitions until 250 or 100 ms are over, a sample.
    for limit_s, runs in ((None, 2 + 4 + 1), (1.0, 2 + 1 + 1)):
        clock = FakeClock()
        Timer(clock, rounds=1, warm_up_s=0.25).time_in_turns(
            treatments(clock, {"a": 60}), limit_s=limit_s
        )
        assert len(clock.log) == runs


def test_treatments_that_run_out_of_memory_are_left_out() -> None:
    clock = FakeClock()

    def too_large() -> None:
        clock.log.append("x")
        raise MemoryError

    asked = [Treatment("x", too_large), *treatments(clock, {"a": 3}), Treatment("y", too_large)]
    timed = Timer(clock, rounds=2, warm_up_s=0).time_in_turns(asked)
    assert list(timed) == ["a"]
    assert clock.log.count("x") == 2
    assert Timer(clock).time_in_turns([Treatment("x", too_large)]) == {}
    assert Timer(clock).time_in_turns([]) == {}


def test_other_errors_are_raised_and_names_are_unique() -> None:
    def fails() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        Timer().time_in_turns([Treatment("a", fails)])
    with pytest.raises(ValueError, match="the same name"):
        Timer().time_in_turns([Treatment("a", fails), Treatment("a", fails)])


def test_progress_counts_runs_up_to_their_total() -> None:
    clock = FakeClock()
    told: list[tuple[int, int]] = []
    asked = treatments(clock, {"a": 10, "b": 2000})
    Timer(clock, rounds=3, warm_up_s=0).time_in_turns(
        asked, progress=lambda done, total: told.append((done, total))
    )
    # Two first runs, of which the second is a sample, then three samples and two.
    assert told == [(0, 2), (1, 2), *((done, 7) for done in range(2, 8))]


def test_samples_follow_how_long_a_call_takes() -> None:
    assert samples_to_take({"short": 0.1, "long": LONG_S, "very": VERY_LONG_S}, 0.0) == {
        "short": 3,
        "long": 2,
        "very": 1,
    }
    assert samples_to_take({"a": 0.5, "b": 2.0}, 16.0) == {"a": 16, "b": 4}
    assert samples_to_take({"a": 0.01}, None) == {"a": ROUNDS}
    assert samples_to_take({"a": 0.01, "b": 20.0}, 10.0, rounds=2) == {"a": 2, "b": 1}


def test_fitting_into_memory() -> None:
    def raising(error: Exception) -> Callable[[], None]:
        def call() -> None:
            raise error

        return call

    assert fits_into_memory(lambda: None)
    assert not fits_into_memory(raising(MemoryError()))
    assert not fits_into_memory(raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    with pytest.raises(RuntimeError, match="shapes"):
        fits_into_memory(raising(RuntimeError("shapes do not match")))


@pytest.mark.parametrize("wall_over_cpu", [1.0, 1.04, 2.0])
def test_cpu_time_counts_where_other_programs_use_the_processors(wall_over_cpu: float) -> None:
    clock, cpu_s = FakeClock(), [0.0]

    def busy(name: str, ms: float) -> Treatment:
        waiting = clock.taking(name, wall_over_cpu * ms)

        def call() -> None:
            waiting()
            cpu_s[0] += ms / 1000

        return Treatment(name, call)

    timer = Timer(clock, rounds=4, cpu_clock=lambda: cpu_s[0])
    asked = [busy("short", 40.0), busy("long", 1500.0)]  # the first run of the long one counts
    timed = timer.time_in_turns(asked)
    is_busy = wall_over_cpu > 1.05
    for name, ms in (("short", 40.0), ("long", 1500.0)):
        expected = ms if is_busy else wall_over_cpu * ms
        assert timed[name].samples_ms == pytest.approx([expected] * 4)
        assert timed[name].busy == pytest.approx(wall_over_cpu if is_busy else 1.0)
    assert timed["short"].scaled(0.5).median_ms == pytest.approx(timed["short"].median_ms / 2)


def test_at_least_so_many_samples_whatever_the_limit() -> None:
    clock = FakeClock()
    timed = Timer(clock).time_in_turns(treatments(clock, {"a": 20_000}), limit_s=1.0, least=2)
    assert timed["a"].n == 2
