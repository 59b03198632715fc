"""Random schedules spread evenly from the wall to dense, for checks of predictions and rankings."""

from __future__ import annotations

import random
from collections.abc import Sequence

from calibrate.measure.latency_model import LatencyModel
from spark3r.layout import TokenLayout
from spark3r.schedule import LayerRule, Operators, Schedule

_DRAWS = 600


def stratified_schedules(
    count: int,
    depth: int,
    operators: Sequence[Operators],
    query_factors: Sequence[int],
    key_value_factors: Sequence[int],
    latency: LatencyModel,
    layout: TokenLayout,
    seed: int = 0,
) -> tuple[Schedule, ...]:
    """Return ``count`` different schedules whose predicted latencies are spread evenly.

    Every third reduces queries only, every third keys and values only. Each schedule has one of
    the ``operators`` in all layers.

    Args:
        count: How many schedules.
        depth: Global layers of the model.
        operators: What to draw operators from.
        query_factors: What to draw query factors from, 1 among them.
        key_value_factors: What to draw key-value factors from, 1 among them.
        latency: Predicts latencies.
        layout: Token layout of the clips.
        seed: Of the draws.

    Raises:
        ValueError: If so many different schedules cannot be drawn.
    """
    rng = random.Random(seed)
    wall_ms = latency.wall_ms(layout)
    dense_ms = latency.predict_ms(Schedule.dense(depth), layout)
    axes = ((query_factors, key_value_factors), (query_factors, (1,)), ((1,), key_value_factors))
    layer_ms = {
        (query, key_value, each): latency.layer_ms(LayerRule(query, key_value, each), layout)
        for query in query_factors
        for key_value in key_value_factors
        for each in operators
    }
    drawn: list[dict[Schedule, float]] = [{}, {}, {}]
    for kind, (queries, keys) in enumerate(axes):
        for _ in range(_DRAWS):
            # From a few factors only, because a mean over all of them never comes near the ends.
            some_queries = rng.sample(list(queries), rng.randint(1, len(queries)))
            some_keys = rng.sample(list(keys), rng.randint(1, len(keys)))
            each = rng.choice(list(operators))
            factors = [(rng.choice(some_queries), rng.choice(some_keys)) for _ in range(depth)]
            if any(pair != (1, 1) for pair in factors):
                schedule = Schedule(tuple(LayerRule(*pair) for pair in factors), each)
                drawn[kind][schedule] = wall_ms + sum(layer_ms[(*pair, each)] for pair in factors)
    chosen: list[Schedule] = []
    for number in range(count):
        wanted_ms = wall_ms + (dense_ms - wall_ms) * (number + 0.5) / count
        left = {s: ms for s, ms in drawn[number % 3].items() if s not in chosen}
        if not left:
            raise ValueError(f"only {len(chosen)} different schedules can be drawn, not {count}")
        chosen.append(min(left, key=lambda schedule: abs(left[schedule] - wanted_ms)))
    return tuple(chosen)
