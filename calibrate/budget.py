"""Budgets: the largest latency of a clip, as the user writes it and in ms per clip.

========================  ==================================================
``30ms``, ``30ms/frame``  time per frame of the clip, amortised like a frame rate
``1.5s/clip``             time of the whole clip, whatever its length
``10x``                   speed-up over dense
``25%``                   share of the dense latency
========================  ==================================================

A time is in ``ms`` or ``s``. Without ``/frame`` or ``/clip`` it is per frame. If dense meets such a
budget and would not meet the same time per clip, the message points that out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Literal

from spark3r.errors import Spark3rError

Kind = Literal["frame", "clip", "speed_up", "share"]

_FORMS = (
    "expected a time per frame (30ms or 30ms/frame), a time per clip (1.5s/clip), a speed-up over "
    "dense (10x) or a share of dense latency (25%)"
)
_SHAPE = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*([^\s\d./]*)\s*(?:/\s*(\S*))?", re.ASCII)
_MS_PER_UNIT = {"ms": 1.0, "s": 1000.0}
_RATIOS = {"x": "a speed-up", "×": "a speed-up", "%": "a share"}


class BudgetError(Spark3rError):
    """A budget cannot be read. The message shows the right form."""


class UnreachableBudgetError(BudgetError):
    """No schedule meets a budget.

    Attributes:
        minimum_ms: Least latency per clip that can be reached.
    """

    def __init__(self, message: str, minimum_ms: float) -> None:
        super().__init__(message)
        self.minimum_ms = minimum_ms


@dataclass(frozen=True)
class Budget:
    """A budget as the user wrote it.

    Attributes:
        text: Text of the user.
        kind: Meaning of the value: time per ``frame`` or per ``clip``, ``speed_up`` or ``share``.
        value: Milliseconds, speed-up over dense, or fraction of dense latency.
        says_per: Whether the text of a time names ``/frame`` or ``/clip``.
    """

    text: str
    kind: Kind
    value: float
    says_per: bool = True

    def clip_ms(self, frames: int, dense_ms: float) -> float:
        """Return the largest latency of a clip of some frames and dense latency, in ms."""
        if self.kind == "frame":
            return self.value * frames
        if self.kind == "clip":
            return self.value
        return dense_ms / self.value if self.kind == "speed_up" else dense_ms * self.value

    def like(self, clip_ms: float, frames: int, dense_ms: float, round_up: bool = True) -> str:
        """Return the text of another budget in the form of this one, rounded so that it holds.

        Args:
            clip_ms: Latency per clip.
            frames: Length of the clip.
            dense_ms: Dense latency of such a clip.
            round_up: Whether to round to a larger budget than ``clip_ms``; a smaller one if not.
        """
        if self.kind == "speed_up":
            return f"{_rounded(dense_ms / clip_ms, up=not round_up)}x"
        if self.kind == "share":
            return f"{_rounded(100 * clip_ms / dense_ms, up=round_up)}%"
        per = f"/{self.kind}" if self.says_per else ""
        ms = clip_ms / frames if self.kind == "frame" else clip_ms
        unit, scale = ("s", 1000.0) if ms >= 1000 else ("ms", 1.0)
        return f"{_rounded(ms / scale, up=round_up)}{unit}{per}"


@dataclass(frozen=True)
class ResolvedBudget:
    """A budget on one device, for clips of one length.

    Attributes:
        budget: The budget.
        frames: Length of the clips.
        clip_ms: Largest latency per clip.
        dense_ms: Dense latency per clip.
        minimum_ms: Least latency that can be reached.
        suggestion: Text of a budget that would bind, if this one does not; None if there is none.
    """

    budget: Budget
    frames: int
    clip_ms: float
    dense_ms: float
    minimum_ms: float
    suggestion: str | None = None

    @property
    def frame_ms(self) -> float:
        """Milliseconds per frame."""
        return self.clip_ms / self.frames

    @property
    def speed_up(self) -> float:
        """Dense latency ÷ budget."""
        return self.dense_ms / self.clip_ms

    @property
    def binds(self) -> bool:
        """Whether dense takes longer than the budget, so that something must be reduced."""
        return self.clip_ms < self.dense_ms

    @property
    def text(self) -> str:
        """The resolved budget in one line."""
        line = (
            f"{time_text(self.frame_ms)}/frame × {self.frames} frames = "
            f"{time_text(self.clip_ms)} per clip, {number_text(self.speed_up)}x dense speed"
        )
        if self.binds:
            return line
        hint = f", {self.suggestion} would bind" if self.suggestion else ""
        return f"{line}; dense takes {time_text(self.dense_ms)} and meets it as it is{hint}"


def parse_budget(text: str) -> Budget:
    """Return the budget in a text.

    Raises:
        BudgetError: If the text has none of the forms above. The message shows the right form.
    """
    given = text.strip()
    if not given:
        raise BudgetError(f"the budget is empty, {_FORMS}")
    shape = _SHAPE.fullmatch(given)
    if shape is None:
        if re.fullmatch(r"[+-]?\d+,\d+\s*\D*", given, re.ASCII):
            raise BudgetError(
                f"budget '{given}' has a decimal comma, write {given.replace(',', '.')}"
            )
        raise BudgetError(f"budget '{given}' is not a number with a unit, {_FORMS}")
    number, unit, per = shape[1], shape[2].lower(), shape[3]
    value = float(number)
    if not unit:
        raise BudgetError(
            f"budget '{given}' has no unit, write {number}ms (per frame), {number}ms/clip, "
            f"{number}x (speed-up over dense) or {number}% (of dense latency)"
        )
    if unit not in _MS_PER_UNIT and unit not in _RATIOS:
        raise BudgetError(f"budget '{given}' has the unit '{shape[2]}', {_FORMS}")
    if not (value > 0 and math.isfinite(value)):
        raise BudgetError(f"budget '{given}' is {number}, expected a finite number above 0")
    if unit in _RATIOS:
        if per is not None:
            raise BudgetError(
                f"budget '{given}' is {_RATIOS[unit]} per '{per}', write {number}{unit}: it is the "
                "same per frame and per clip"
            )
        if unit == "%":
            return Budget(given, "share", value / 100)
        return Budget(given, "speed_up", value)
    if per not in (None, "frame", "clip"):
        raise BudgetError(
            f"budget '{given}' is per '{per}', write {number}{unit}/frame or {number}{unit}/clip"
        )
    return Budget(
        given, "clip" if per == "clip" else "frame", value * _MS_PER_UNIT[unit], per is not None
    )


def resolve(budget: Budget, frames: int, dense_ms: float, minimum_ms: float) -> ResolvedBudget:
    """Return the budget for clips of ``frames`` frames.

    Args:
        budget: The budget.
        frames: Length of the clips.
        dense_ms: Dense latency per clip.
        minimum_ms: Least latency that can be reached: that of the fastest schedule.

    Raises:
        UnreachableBudgetError: If the budget is less than ``minimum_ms``.
        ValueError: If a latency is not positive, or ``frames`` less than 1.
    """
    if frames < 1 or not (dense_ms > 0 and minimum_ms > 0):
        raise ValueError(
            f"expected frames and latencies above 0, got {frames} frames, dense {dense_ms} ms, "
            f"minimum {minimum_ms} ms"
        )
    clip_ms = budget.clip_ms(frames, dense_ms)
    if clip_ms < minimum_ms * (1 - 1e-9):  # a budget from `Budget.like` must not fail by rounding
        too_small = ResolvedBudget(budget, frames, clip_ms, dense_ms, minimum_ms)
        raise UnreachableBudgetError(
            f"budget '{budget.text}' cannot be reached: it allows {time_text(clip_ms)} per clip of "
            f"{frames} frames ({time_text(too_small.frame_ms)}/frame), and the least is "
            f"{time_text(minimum_ms)} ({time_text(minimum_ms / frames)}/frame, "
            f"{number_text(dense_ms / minimum_ms)}x dense speed), because what is outside global "
            "attention is not reduced. Ask for "
            f"{budget.like(minimum_ms, frames, dense_ms)} or a looser one",
            minimum_ms,
        )
    suggestion = None
    if clip_ms >= dense_ms:
        suggestion = _binding(budget, frames, dense_ms, minimum_ms)
    return ResolvedBudget(budget, frames, clip_ms, dense_ms, minimum_ms, suggestion)


def time_text(ms: float) -> str:
    """Return a time with three digits, in ms, or in s from one second on."""
    return f"{number_text(ms)} ms" if _three_digits(ms) < 1000 else f"{number_text(ms / 1000)} s"


def number_text(value: float) -> str:
    """Return a number of at least 0 with at least three digits and without an exponent."""
    if value == 0:
        return "0"
    decimals = 2 - math.floor(math.log10(_three_digits(value)))
    return f"{value:.{max(0, decimals)}f}"


def _three_digits(value: float) -> float:
    return float(f"{value:.3g}")


def _binding(budget: Budget, frames: int, dense_ms: float, minimum_ms: float) -> str | None:
    """Return a budget between dense and the minimum, or None if there is no room for one."""
    if not budget.says_per and minimum_ms <= budget.value < dense_ms:
        return f"{budget.text}/clip (a plain time is per frame)"
    middle_ms = math.sqrt(minimum_ms * dense_ms)
    suggestion = budget.like(middle_ms, frames, dense_ms, round_up=False)
    clip_ms = parse_budget(suggestion).clip_ms(frames, dense_ms)
    return suggestion if minimum_ms <= clip_ms < dense_ms else None


def _rounded(value: float, up: bool) -> str:
    """Return ``value`` rounded up or down to three significant digits, without an exponent."""
    context = Context(prec=3, rounding=ROUND_CEILING if up else ROUND_FLOOR)
    text = f"{context.create_decimal_from_float(value):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
