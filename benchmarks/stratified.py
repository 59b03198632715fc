"""Random schedules with latencies that are spread evenly from the wall to dense."""

from __future__ import annotations

import random
from collections.abc import Sequence

from spark3r import LayerRule, Operators, Schedule, TokenLayout
from spark3r.latency import LatencyModel
from spark3r.reduction.rule import ResolvedRule

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
    """Return different schedules with predicted latencies that are spread evenly.

    One third of them reduces queries only and one third keys and values only. A schedule has the
    same operators in all layers.

    Args:
        count: Number of schedules.
        depth: Number of the model's global layers.
        operators: Operators to draw from.
        query_factors: Query factors to draw from, 1 among them.
        key_value_factors: Key-value factors to draw from, 1 among them.
        latency: The latency model.
        layout: Token layout of the clips.
        seed: Seed of the random draws, default 0.

    Raises:
        ValueError: If there are not as many different schedules.
    """
    rng = random.Random(seed)
    wall_ms = latency.wall_ms(layout)
    dense_ms = latency.predict_ms(Schedule.dense(depth), layout)
    axes = ((query_factors, key_value_factors), (query_factors, (1,)), ((1,), key_value_factors))
    layer_ms = {
        (query, key_value, each): latency.layer_ms(ResolvedRule(query, key_value, each), layout)
        for query in query_factors
        for key_value in key_value_factors
        for each in operators
    }
    drawn: list[dict[Schedule, float]] = [{}, {}, {}]
    for kind, (queries, keys) in enumerate(axes):
        for _ in range(_DRAWS):
            # Each draw uses some factors, because a mean over all never comes near the ends.
            some_queries = rng.sample(list(queries), rng.randint(1, len(queries)))
            some_keys = rng.sample(list(keys), rng.randint(1, len(keys)))
            each = rng.choice(list(operators))
            factors = [(rng.choice(some_queries), rng.choice(some_keys)) for _ in range(depth)]
            if any(pair != (1, 1) for pair in factors):
                schedule = Schedule(tuple(LayerRule(*pair) for pair in factors), each)
                drawn[kind][schedule] = wall_ms + sum(layer_ms[q, kv, each] for q, kv in factors)
    chosen: list[Schedule] = []
    for number in range(count):
        wanted_ms = wall_ms + (dense_ms - wall_ms) * (number + 0.5) / count
        left = {s: ms for s, ms in drawn[number % 3].items() if s not in chosen}
        if not left:
            raise ValueError(f"only {len(chosen)} different schedules can be drawn, not {count}")
        chosen.append(min(left, key=lambda schedule: abs(left[schedule] - wanted_ms)))
    return tuple(chosen)
