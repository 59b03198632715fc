from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.measure.timing import (
    machine_slowdown,
    relative_spread,
    shrunk_latency_ms,
    slowdown_from_model,
)
from spark3r.timing import Latency


@given(
    predicted=st.floats(1.0, 1e5),
    ratio=st.floats(0.5, 2.0),
    spread=st.floats(0.0, 1.0),
    more=st.floats(0.0, 1.0),
)
def test_a_measured_latency_counts_less_on_a_busier_machine(
    predicted: float, ratio: float, spread: float, more: float
) -> None:
    measured = ratio * predicted
    assert shrunk_latency_ms(predicted, measured, 0.0) == pytest.approx(measured)
    quiet, busy = (shrunk_latency_ms(predicted, measured, each) for each in (spread, spread + more))
    distance = [abs(math.log(each / predicted)) for each in (busy, quiet, measured)]
    assert distance == pytest.approx(sorted(distance))
    assert (quiet >= predicted * (1 - 1e-9)) == (ratio >= 1) or quiet == pytest.approx(predicted)


def test_the_spread_is_that_of_repeated_timings() -> None:
    latencies = {"once": Latency((5.0,)), "steady": Latency((2.0, 2.0, 2.0))}
    assert relative_spread(latencies) == 0.0
    assert relative_spread(latencies | {"uneven": Latency((8.0, 10.0, 12.0))}) == pytest.approx(0.1)
    busy = {"then": Latency((8.0, 10.0, 14.0))}
    assert (
        relative_spread(latencies, busy) == relative_spread(busy, latencies) == pytest.approx(0.3)
    )
    assert relative_spread({}) == relative_spread() == 0.0


def test_the_slowdown_is_that_of_most_schedules() -> None:
    timed = [(110.0, 100.0), (33.0, 30.0), (80.0, 40.0)]
    assert slowdown_from_model(timed, (5.0, 1.0)) == pytest.approx(1.1)
    assert slowdown_from_model([], (5.0, 4.0)) == pytest.approx(1.25)


def test_calls_that_agree_on_the_slowdown_leave_no_doubt() -> None:
    then_ms = {"wall": 100.0, "dense": 900.0, "did not fit": 9000.0}
    slower, unsure = machine_slowdown(
        then_ms, {"wall": Latency((110.0,)), "dense": Latency((990.0,))}
    )
    assert slower == pytest.approx(1.1)
    assert unsure == pytest.approx(0.0, abs=1e-12)
    # A short call that was disturbed hardly moves it, and makes it unsure.
    slower, unsure = machine_slowdown(
        then_ms, {"wall": Latency((130.0,)), "dense": Latency((900.0,))}
    )
    assert slower == pytest.approx(1.03)
    assert unsure == pytest.approx(math.log(1.3))
    assert machine_slowdown(then_ms, {"wall": Latency((130.0,))}) == (pytest.approx(1.3), 0.0)
