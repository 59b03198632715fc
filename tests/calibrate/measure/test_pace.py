from __future__ import annotations

import pytest
import torch

from calibrate.measure.pace import Pace
from spark3r.timing import Latency


@pytest.mark.parametrize(("wall", "dense"), [(1.0, 1.0), (1.5, 1.2)])
def test_a_disturbed_sample_does_not_change_the_pace(wall: float, dense: float) -> None:
    pace = Pace(torch.zeros(8, 3, 16, 16), wall_ms=400.0, dense_ms=1000.0)
    wall_ms = 400 * wall
    now = {
        "pace, wall": Latency((1.7 * wall_ms, wall_ms)),
        "pace, dense": Latency((wall_ms + 600 * dense, 1.4 * (wall_ms + 600 * dense))),
    }
    assert pace.slowdowns(now) == pytest.approx((wall, dense))


def test_without_dense_the_wall_shows_the_pace() -> None:
    pace = Pace(torch.zeros(8, 3, 16, 16), wall_ms=400.0, dense_ms=None)
    assert pace.slowdowns({"pace, wall": Latency((440.0, 480.0))}) == pytest.approx((1.1, 1.1))
