from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from tiers import examples

from calibrate.search.knapsack import Assignment, Choice, FrontTooLargeError, solve, solve_cheapest
from spark3r.reduction.operators import Operators, TokenStride
from spark3r.schedule import LayerRule

Layers = list[list[Choice]]


def choice(cost_ms: float, degradation: float) -> Choice:
    return Choice(LayerRule(), cost_ms, degradation)


def problems(numbers: st.SearchStrategy[float]) -> st.SearchStrategy[Layers]:
    layer = st.lists(st.builds(choice, numbers, numbers), min_size=1, max_size=4)
    return st.lists(layer, min_size=1, max_size=5)


any_real = problems(st.floats(-100, 100, allow_subnormal=False))
with_ties = problems(st.integers(-2, 3).map(float))


def everything(layers: Layers) -> list[tuple[float, float, tuple[int, ...]]]:
    """All assignments as (cost, degradation, indices), sums in the order of the layers."""
    found = []
    for indices in itertools.product(*(range(len(layer)) for layer in layers)):
        cost = degradation = 0.0
        for layer, index in zip(layers, indices, strict=True):
            cost += layer[index].cost_ms
            degradation += layer[index].degradation
        found.append((cost, degradation, indices))
    return found


@given(any_real, st.floats(-300, 300))
@example([[choice(0.0, 0.0), choice(sys.float_info.min, -4.0)]], 0.0)
@settings(max_examples=examples(150))
def test_solve_is_exact(layers: Layers, budget_ms: float) -> None:
    fitting = [found for found in everything(layers) if found[0] <= budget_ms]
    answer = solve(layers, budget_ms)
    if not fitting:
        assert answer is None
        return
    assert answer is not None
    assert answer.degradation == min(degradation for _, degradation, _ in fitting)
    assert answer.cost_ms <= budget_ms
    assert (answer.cost_ms, answer.degradation, answer.indices) in fitting


@given(any_real, st.floats(-300, 300))
@settings(max_examples=examples(150))
def test_solve_cheapest_is_exact(layers: Layers, max_degradation: float) -> None:
    fitting = [found for found in everything(layers) if found[1] <= max_degradation]
    answer = solve_cheapest(layers, max_degradation)
    if not fitting:
        assert answer is None
        return
    assert answer is not None
    assert answer.cost_ms == min(cost for cost, _, _ in fitting)
    assert answer.degradation <= max_degradation


@given(with_ties, st.integers(-10, 15))
@settings(max_examples=examples(150))
def test_ties_go_to_the_other_measure_and_then_to_the_earlier_choice(
    layers: Layers, bound: int
) -> None:
    assignments = everything(layers)
    cheap = [found for found in assignments if found[0] <= bound]
    answer = solve(layers, bound)
    expected = min(((d, c, i) for c, d, i in cheap), default=None)
    assert (answer and (answer.degradation, answer.cost_ms, answer.indices)) == expected
    harmless = [found for found in assignments if found[1] <= bound]
    answer = solve_cheapest(layers, bound)
    assert (answer and (answer.cost_ms, answer.degradation, answer.indices)) == min(
        harmless, default=None
    )


def layers_like_a_model(seed: int, count: int = 24) -> Layers:
    rng = random.Random(seed)
    layers = []
    for _ in range(count):
        query_weight, key_weight = rng.lognormvariate(0, 1), rng.lognormvariate(0, 1)
        layers.append(
            [
                Choice(
                    LayerRule(query, key_value),
                    1 + 100 / (query * key_value) + 5 / query + 3 / key_value + 2 * (query > 1),
                    query_weight * (query - 1) ** 1.3 * rng.lognormvariate(0, 0.2)
                    + key_weight * (key_value - 1) ** 0.6 * rng.lognormvariate(0, 0.2),
                )
                for query in (1, 2, 3, 4, 6)
                for key_value in (1, 2, 4, 8, 16, 32, 64, 128)
            ]
        )
    return layers


@pytest.mark.parametrize("budget_ms", [100.0, 150.0, 300.0, 900.0])
def test_no_exchange_in_two_of_twenty_four_layers_is_better(budget_ms: float) -> None:
    layers = layers_like_a_model(0)
    answer = solve(layers, budget_ms)
    assert answer is not None
    assert answer.cost_ms <= budget_ms
    costs = [np.array([choice.cost_ms for choice in layer]) for layer in layers]
    harms = [np.array([choice.degradation for choice in layer]) for layer in layers]
    for i, j in itertools.combinations(range(len(layers)), 2):
        at_i, at_j = answer.indices[i], answer.indices[j]
        spare = budget_ms - answer.cost_ms + costs[i][at_i] + costs[j][at_j]
        fits = costs[i][:, None] + costs[j] <= spare - 1e-9
        least = np.where(fits, harms[i][:, None] + harms[j], np.inf).min()
        assert least >= harms[i][at_i] + harms[j][at_j] - 1e-9


def test_the_same_problem_has_the_same_answer() -> None:
    layers = layers_like_a_model(1, 12)
    assert solve(layers, 100.0) == solve(layers, 100.0)


def test_more_budget_never_means_more_degradation() -> None:
    layers = layers_like_a_model(2, 8)
    found = [solve(layers, float(budget_ms)) for budget_ms in range(20, 900, 40)]
    degradations = [answer.degradation for answer in found if answer is not None]
    assert len(degradations) > 10
    assert degradations == sorted(degradations, reverse=True)


def test_an_infinite_budget_takes_the_least_degradation_of_each_layer() -> None:
    layers = layers_like_a_model(3, 6)
    answer = solve(layers, math.inf)
    assert answer is not None
    assert answer.degradation == 0.0
    assert solve(layers, -math.inf) is None


def test_a_choice_of_infinite_degradation_is_never_taken() -> None:
    layers = [[choice(1.0, math.inf), choice(2.0, 5.0)]]
    assert solve(layers, 1.5) is None
    assert solve(layers, 2.0) == Assignment((1,), 2.0, 5.0)


def test_an_assignment_makes_a_schedule() -> None:
    own, common = Operators(key_value=TokenStride()), Operators()
    layers = [
        [Choice(LayerRule(1, 1), 9.0, 0.0), Choice(LayerRule(1, 4, own), 1.0, 1.0)],
        [Choice(LayerRule(1, 1), 9.0, 0.0), Choice(LayerRule(2, 8, common), 1.0, 1.0)],
    ]
    answer = solve(layers, 2.0)
    assert answer is not None
    schedule = answer.schedule(layers, common)
    assert schedule.layers == (LayerRule(1, 4, own), LayerRule(2, 8))
    assert schedule.operators == common


@pytest.mark.parametrize("solver", [lambda p: solve(p, 1.0), lambda p: solve_cheapest(p, 1.0)])
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "there is no layer"),
        ([[choice(1, 1)], []], "layer 1 has no choice of finite degradation"),
        ([[choice(1, math.inf)]], "layer 0 has no choice of finite degradation"),
        ([[choice(math.nan, 1)]], "layer 0, choice 0: cost nan ms"),
        ([[choice(math.inf, 1)]], "layer 0, choice 0: cost inf ms"),
        ([[choice(1, math.nan)]], "degradation nan"),
        ([[choice(1, -math.inf)]], "degradation -inf"),
    ],
)
def test_tables_that_make_no_sense_are_refused(
    solver: Callable[[Layers], object], layers: Layers, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        solver(layers)


def test_a_bound_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="the bound is NaN"):
        solve([[choice(1, 1)]], math.nan)


def test_too_many_partial_assignments_are_an_error_and_not_an_approximation() -> None:
    with pytest.raises(FrontTooLargeError, match="expected at most 4: offer fewer choices"):
        solve(layers_like_a_model(0), 150.0, max_partial=4)


def by_milp(layers: Layers, budget_ms: float, scale: float) -> float:
    """The least degradation by integer programming, in units of ``scale``.

    Unscaled, its tolerances would let answers pass that are far from the best.
    """
    costs = [choice.cost_ms / budget_ms for layer in layers for choice in layer]
    degradations = [choice.degradation / scale for layer in layers for choice in layer]
    one_each = np.repeat(np.eye(len(layers)), [len(layer) for layer in layers], axis=1)
    found = milp(
        degradations,
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint([costs], -np.inf, 1)],
        options={"mip_rel_gap": 0},
    )
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("budget_ms", [60.0, 150.0, 400.0])
def test_integer_programming_finds_nothing_better(seed: int, budget_ms: float) -> None:
    layers = layers_like_a_model(seed, 12)
    exact = solve(layers, budget_ms)
    # Integer programming may exceed the budget by its tolerance, 1e-6 of it.
    looser = solve(layers, budget_ms * (1 + 1e-5))
    assert exact is not None
    assert looser is not None
    found = by_milp(layers, budget_ms, exact.degradation)
    assert looser.degradation / exact.degradation - 1e-6 <= found <= 1 + 1e-6
