"""Samples at one pace, against passes and a pace that are known."""

import math
import random
import statistics
from collections.abc import Iterable

import pytest

from calibrate.measure.one_pace import at_one_pace
from spark3r.timing import Latency, Timer, Treatment

PASSES = {"wall": 0.6, "dense": 1.4, "a": 0.9, "b": 0.75, "c": 0.8}


def timed(pace, noise: float = 0.0, rounds: int = 3, seed: int = 0) -> dict[str, Latency]:
    """Return latencies that a machine of a changing pace would have, by time in seconds."""
    rng, now = random.Random(seed), 0.0
    samples = {name: [] for name in PASSES}
    orders = {name: [] for name in PASSES}
    names = list(PASSES)
    for position in range(rounds * len(names)):
        turn, index = divmod(position, len(names))
        name = names[index] if turn % 2 == 0 else names[-1 - index]
        taken = PASSES[name] * pace(now) * math.exp(rng.gauss(0, noise))
        now += taken
        samples[name].append(1000 * taken)
        orders[name].append(position)
    return {name: Latency(tuple(samples[name]), order=tuple(orders[name])) for name in PASSES}


def ratio_error(latencies: dict[str, Latency]) -> float:
    """Return the largest error of a latency relative to dense."""
    dense = latencies["dense"].median_ms
    return max(
        abs(latencies[name].median_ms / dense / (true / PASSES["dense"]) - 1)
        for name, true in PASSES.items()
    )


def test_a_steady_machine_is_left_alone() -> None:
    steady = timed(lambda now: 1.0)
    assert at_one_pace(steady) == pytest.approx(steady)


def mean_error(found: Iterable[dict[str, Latency]]) -> float:
    return statistics.fmean(map(ratio_error, found))


@pytest.mark.parametrize("at_s", [3.0, 5.0, 7.0, 9.0])
@pytest.mark.parametrize("jump", [0.67, 1.5])
def test_a_jump_of_the_pace_changes_no_ratio(at_s: float, jump: float) -> None:
    raw = timed(lambda now: jump if now > at_s else 1.0)
    assert ratio_error(raw) > 0.04 or at_s in (3.0, 9.0)
    assert ratio_error(at_one_pace(raw)) < 0.01


def test_jumps_on_a_noisy_machine_matter_much_less_and_noise_alone_no_more() -> None:
    jumps = [
        timed(lambda now, at=2 + seed % 8: 1.5 if now > at else 1.0, 0.04, seed=seed)
        for seed in range(24)
    ]
    assert mean_error(map(at_one_pace, jumps)) < 0.5 * mean_error(jumps)
    steady = [timed(lambda now: 1.0, 0.04, seed=seed) for seed in range(24)]
    assert mean_error(map(at_one_pace, steady)) < 1.1 * mean_error(steady)


def test_a_single_disturbed_sample_and_a_pass_with_one_sample_are_kept_apart() -> None:
    steady = timed(lambda now: 1.0)
    samples = steady["a"].samples_ms
    disturbed = steady | {
        "a": Latency((samples[0], 5 * samples[1], samples[2]), order=steady["a"].order),
        "long": Latency((9000.0,), order=(15,)),
    }
    found = at_one_pace(disturbed)
    assert ratio_error(found) < 1e-9
    assert found["long"].samples_ms == pytest.approx((9000.0,))
    assert found["a"].samples_ms[1] == pytest.approx(5 * samples[1])


def test_samples_of_an_unknown_order_are_left_alone() -> None:
    unknown = {"wall": Latency((1.0, 2.0, 3.0, 9.0)), "dense": Latency((2.0, 2.0, 2.0))}
    assert at_one_pace(unknown) == unknown


def test_the_timer_tells_the_order_in_which_it_took_samples() -> None:
    calls: list[str] = []
    now = iter(range(10_000))
    treatments = [
        Treatment(name, lambda name=name: calls.append(name)) for name in ("one", "two", "three")
    ]
    timer = Timer(clock=lambda: float(next(now)), rounds=3, warm_up_s=0.0)
    found = timer.time_in_turns(treatments, warmed_up=True, least={"one": 1, "two": 3, "three": 2})
    by_position = {position: name for name, latency in found.items() for position in latency.order}
    assert [by_position[position] for position in sorted(by_position)] == calls
