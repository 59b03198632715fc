from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.budget import (
    Budget,
    BudgetError,
    UnreachableBudgetError,
    number_text,
    parse_budget,
    resolve,
    time_text,
)
from spark3r import Spark3rError

FORMS = (
    "expected a time per frame (30ms or 30ms/frame), a time per clip (1.5s/clip), a speed-up over "
    "dense (10x) or a share of dense latency (25%)"
)
latency = st.floats(1e-2, 1e7)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("30ms", "frame", 30.0),
        ("30ms/frame", "frame", 30.0),
        ("0.03s", "frame", 30.0),
        ("1.5s", "frame", 1500.0),
        ("1.5s/clip", "clip", 1500.0),
        ("900ms/clip", "clip", 900.0),
        ("10x", "speed_up", 10.0),
        ("2.5X", "speed_up", 2.5),
        ("10×", "speed_up", 10.0),
        ("25%", "share", 0.25),
        (" 30 ms / frame ", "frame", 30.0),
        (".5ms", "frame", 0.5),
        ("30.MS", "frame", 30.0),
    ],
)
def test_every_form_is_read(text: str, kind: str, value: float) -> None:
    budget = parse_budget(text)
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"the budget is empty, {FORMS}"),
        ("  ", f"the budget is empty, {FORMS}"),
        ("fast", f"budget 'fast' is not a number with a unit, {FORMS}"),
        ("ms", f"budget 'ms' is not a number with a unit, {FORMS}"),
        ("nanms", f"budget 'nanms' is not a number with a unit, {FORMS}"),
        ("1e3ms", f"budget '1e3ms' is not a number with a unit, {FORMS}"),
        ("1.2.3ms", f"budget '1.2.3ms' is not a number with a unit, {FORMS}"),
        ("30ms/frame/s", "budget '30ms/frame/s' is per 'frame/s', write 30ms/frame or 30ms/clip"),
        (
            "30",
            "budget '30' has no unit, write 30ms (per frame), 30ms/clip, 30x (speed-up over dense) "
            "or 30% (of dense latency)",
        ),
        (
            "30/frame",
            "budget '30/frame' has no unit, write 30ms (per frame), 30ms/clip, 30x (speed-up over "
            "dense) or 30% (of dense latency)",
        ),
        ("30fps", f"budget '30fps' has the unit 'fps', {FORMS}"),
        ("2min/clip", f"budget '2min/clip' has the unit 'min', {FORMS}"),
        ("1,5s/clip", "budget '1,5s/clip' has a decimal comma, write 1.5s/clip"),
        ("0ms", "budget '0ms' is 0, expected a finite number above 0"),
        ("-3ms", "budget '-3ms' is -3, expected a finite number above 0"),
        ("-10x", "budget '-10x' is -10, expected a finite number above 0"),
        ("30ms/", "budget '30ms/' is per '', write 30ms/frame or 30ms/clip"),
        ("30ms/s", "budget '30ms/s' is per 's', write 30ms/frame or 30ms/clip"),
        (
            "10x/clip",
            "budget '10x/clip' is a speed-up per 'clip', write 10x: it is the same per frame and "
            "per clip",
        ),
        (
            "25%/frame",
            "budget '25%/frame' is a share per 'frame', write 25%: it is the same per frame and "
            "per clip",
        ),
    ],
)
def test_every_wrong_form_has_its_message(text: str, message: str) -> None:
    with pytest.raises(BudgetError, match=f"^{re.escape(message)}$") as caught:
        parse_budget(text)
    assert isinstance(caught.value, Spark3rError)


def test_a_number_too_large_for_a_float_is_refused() -> None:
    with pytest.raises(BudgetError, match="expected a finite number above 0"):
        parse_budget("9" * 400 + "ms")


@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_an_error_that_shows_the_right_form(text: str) -> None:
    outcome: Budget | BudgetError
    try:
        outcome = parse_budget(text)
    except BudgetError as error:
        outcome = error
    if isinstance(outcome, BudgetError):
        assert re.search("expected|write", str(outcome))
    else:
        assert 0 < outcome.value < math.inf


@given(
    st.decimals(min_value="0.001", max_value="99999", places=3, allow_nan=False),
    st.sampled_from(["ms", "s", "ms/frame", "s/frame", "ms/clip", "s/clip", "x", "%"]),
    st.integers(1, 2000),
    latency,
)
def test_a_resolved_budget_has_the_value_of_its_text(
    number: object, unit: str, frames: int, dense_ms: float
) -> None:
    value = float(str(number))
    clip_ms = parse_budget(f"{number}{unit}").clip_ms(frames, dense_ms)
    scale = 1000.0 if unit.startswith("s") else 1.0
    expected = {
        "x": dense_ms / value,
        "%": dense_ms * value / 100,
        "clip": value * scale,
    }.get(unit.rpartition("/")[2], value * scale * frames)
    assert clip_ms == pytest.approx(expected)


def test_a_resolved_budget_is_one_line_of_text() -> None:
    resolved = resolve(parse_budget("30ms"), 256, dense_ms=18432.0, minimum_ms=3000.0)
    assert resolved.binds
    assert resolved.clip_ms == 7680.0
    assert resolved.frame_ms == 30.0
    assert resolved.speed_up == pytest.approx(2.4)
    assert resolved.text == ("30.0 ms/frame × 256 frames = 7.68 s per clip, 2.40x dense speed")


def test_below_the_minimum_the_error_names_a_reachable_budget() -> None:
    message = (
        "budget '5ms' cannot be reached: it allows 1.28 s per clip of 256 frames (5.00 ms/frame), "
        "and the least is 2.10 s (8.20 ms/frame, 4.76x dense speed), because what is outside "
        "global attention is not reduced. Ask for 8.21ms or a looser one"
    )
    with pytest.raises(UnreachableBudgetError, match=f"^{re.escape(message)}$") as caught:
        resolve(parse_budget("5ms"), 256, dense_ms=10_000.0, minimum_ms=2100.0)
    assert caught.value.minimum_ms == 2100.0


@given(
    st.sampled_from(["ms", "ms/frame", "s/clip", "x", "%"]),
    st.integers(1, 2000),
    latency,
    st.floats(1.01, 1e3),
)
def test_the_budget_an_error_asks_for_is_reachable(
    unit: str, frames: int, minimum_ms: float, ratio: float
) -> None:
    dense_ms = minimum_ms * ratio
    impossible = "1000000x" if unit == "x" else f"0.0000001{unit}"
    with pytest.raises(UnreachableBudgetError) as caught:
        resolve(parse_budget(impossible), frames, dense_ms, minimum_ms)
    found = re.search(r"Ask for (\S+) or", str(caught.value))
    assert found is not None
    resolved = resolve(parse_budget(found[1]), frames, dense_ms, minimum_ms)
    assert resolved.clip_ms <= minimum_ms * 1.011


@given(
    st.sampled_from(["ms", "ms/frame", "s/clip", "x", "%"]),
    st.integers(1, 2000),
    latency,
    st.floats(1.05, 1e3),
)
def test_a_budget_above_dense_comes_with_one_that_binds(
    unit: str, frames: int, minimum_ms: float, ratio: float
) -> None:
    dense_ms = minimum_ms * ratio
    loose = "0.5x" if unit == "x" else "200%" if unit == "%" else f"99999999999{unit}"
    resolved = resolve(parse_budget(loose), frames, dense_ms, minimum_ms)
    assert not resolved.binds
    assert resolved.suggestion is not None
    assert resolve(parse_budget(resolved.suggestion), frames, dense_ms, minimum_ms).binds
    assert resolved.text.endswith(f"meets it as it is, {resolved.suggestion} would bind")


def test_a_plain_time_that_would_bind_per_clip_is_pointed_out() -> None:
    resolved = resolve(parse_budget("1.5s"), 256, dense_ms=4000.0, minimum_ms=500.0)
    assert resolved.suggestion == "1.5s/clip (a plain time is per frame)"


def test_without_room_between_minimum_and_dense_nothing_is_suggested() -> None:
    resolved = resolve(parse_budget("50%"), 8, dense_ms=100.0, minimum_ms=50.0)
    assert resolved.binds
    resolved = resolve(parse_budget("200%"), 8, dense_ms=100.0, minimum_ms=100.0)
    assert resolved.suggestion is None
    assert resolved.text.endswith("meets it as it is")


def test_impossible_latencies_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        resolve(parse_budget("30ms"), 8, dense_ms=0.0, minimum_ms=1.0)


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (7.684, "7.68"), (30, "30.0"), (1234.5, "1234")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number_text(value) == text


def test_no_time_at_all_has_a_text() -> None:
    assert time_text(0.0) == "0 ms"


@pytest.mark.parametrize(
    ("ms", "text"), [(0.5, "0.500 ms"), (30, "30.0 ms"), (999.97, "1.00 s"), (7680, "7.68 s")]
)
def test_times_have_their_unit(ms: float, text: str) -> None:
    assert time_text(ms) == text
