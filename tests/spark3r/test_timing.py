from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from spark3r.timing import MIN_ROUNDS, Latency, interleaved, make_stopwatch, measure


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
