"""The latency model: milliseconds of any schedule from realised lengths, and its fit to timings.

A pass takes ``rest + Σ over global layers of Σ terms``. The terms of a layer follow from the
arithmetic of reduced attention, with N tokens in the clip, n remaining queries and m remaining
keys:

=============  ==========  =================================================================
term           unit        where the time goes
=============  ==========  =================================================================
``attention``  10⁶ n·m     the two attention products
``queries``    10³ n       their rows of the softmax, reading and writing
``keys``       10³ m       projection, norm and rotary embedding of keys and values
``masked``     10⁶ n·m     what mass correction adds: its bias, and the kernel that takes one
``gathered``   10³ m       keys and values taken by index and not by stride
``merged``     10³ N       gathering, averaging and copying back, where queries are merged
``moved``      10³ N       fitting and applying the map of linear unmerging
``matched``    10⁶ pairs   comparing sources with destinations inside the groups
=============  ==========  =================================================================

``rest`` holds everything else: frame attention, heads, and the parts of the global layers that
always run. It is the wall. All constants are non-negative, so that more work is never predicted to
take less time.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls

from spark3r.layout import TokenLayout
from spark3r.reduction.plans import key_value_length, plan, query_length, select
from spark3r.reduction.rule import ResolvedRule, clamp
from spark3r.schedule import Schedule

TERMS = ("attention", "queries", "keys", "masked", "gathered", "merged", "moved", "matched")

MOST_GAIN = 3.0
"""Largest factor by which one schedule corrects the terms."""

FORM = "separable-2"
"""Name of this formula in profiles."""


@dataclass(frozen=True)
class LatencyModel:
    """Latency of any schedule on one model, device, dtype and patch grid.

    Attributes:
        frames: Length of the clips that it was fitted to. At another length ``rest`` is assumed to
            be proportional to the length.
        rest_ms: Latency of everything outside the terms, per clip.
        term_ms: Milliseconds per unit of each term.
    """

    frames: int
    rest_ms: float
    term_ms: Mapping[str, float]

    def layer_ms(self, rule: ResolvedRule, layout: TokenLayout) -> float:
        """Return the latency of a layer beyond the wall."""
        amounts = terms(clamp(rule, layout), layout)
        return sum(self.term_ms[name] * amount for name, amount in zip(TERMS, amounts, strict=True))

    def wall_ms(self, layout: TokenLayout) -> float:
        """Return the latency of a clip when global attention returns zeros."""
        return self.rest_ms * layout.frames / self.frames

    def predict_ms(self, schedule: Schedule, layout: TokenLayout) -> float:
        """Return the latency of a clip under a schedule."""
        rules = schedule.resolve(layout.frames)
        return self.wall_ms(layout) + math.fsum(self.layer_ms(rule, layout) for rule in rules)

    def corrected(
        self, layout: TokenLayout, wall_ms: float, predicted_ms: float, measured_ms: float
    ) -> LatencyModel:
        """Return the model with another wall, and terms scaled to be right about one schedule.

        Args:
            layout: Token layout of the clip.
            wall_ms: The wall, measured.
            predicted_ms: Latency of the schedule as this model predicts it.
            measured_ms: Latency of the schedule, measured beside the wall.
        """
        work_ms = predicted_ms - self.wall_ms(layout)
        gain = (measured_ms - wall_ms) / work_ms if work_ms > 0 else 1.0
        gain = min(max(gain, 1 / MOST_GAIN), MOST_GAIN)  # a schedule at the wall tells nothing
        rest_ms = wall_ms * self.frames / layout.frames
        return LatencyModel(
            self.frames, rest_ms, {name: gain * each for name, each in self.term_ms.items()}
        )

    def to_dict(self) -> dict[str, float]:
        """Return the constants by name, in the form that a profile stores."""
        constants = {f"{name}_ms": self.term_ms[name] for name in TERMS}
        return {"frames": float(self.frames), "rest_ms": self.rest_ms, **constants}

    @classmethod
    def from_dict(cls, constants: Mapping[str, float]) -> LatencyModel:
        """Return the model that `to_dict` wrote.

        Raises:
            ValueError: If a constant is missing or unknown.
        """
        expected = {"frames", "rest_ms", *(f"{name}_ms" for name in TERMS)}
        if constants.keys() != expected:
            raise ValueError(
                f"latency model of the form '{FORM}' with {sorted(constants)}, expected the "
                f"constants {sorted(expected)}"
            )
        term_ms = {name: constants[f"{name}_ms"] for name in TERMS}
        return cls(int(constants["frames"]), constants["rest_ms"], term_ms)


@lru_cache(maxsize=4096)
def terms(rule: ResolvedRule, layout: TokenLayout) -> tuple[float, ...]:
    """Return the amounts of a layer's `TERMS`, each in its unit, under a rule within the layout."""
    cpu = torch.device("cpu")
    queries, keys = query_length(layout, rule), key_value_length(layout, rule)
    selection, merge_plan = select(layout, rule, cpu), plan(layout, rule, cpu)
    products = queries * keys / 1e6
    has_bias = selection is not None and selection.logit_bias is not None
    by_index = selection is not None and selection.index is not None
    merged = 0.0 if merge_plan is None else layout.tokens / 1e3
    pairs = 0
    if merge_plan is not None:
        pairs = sum(
            block.groups * block.destinations * block.sources for block in merge_plan.blocks
        )
    return (
        products,
        queries / 1e3,
        keys / 1e3,
        products * has_bias,
        keys / 1e3 * by_index,
        merged,
        merged * rule.operators.query.unmerging.fits_map,
        pairs / 1e6,
    )


# Residuals beyond this many median absolute deviations count less (Huber), so that a few disturbed
# timings do not bend the fit.
_HUBER = 2.0
_REWEIGHTINGS = 8

_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class LayerSample:
    """The latency of one global attention layer, timed alone.

    Attributes:
        rule: Its resolved rule, or None for the layer that returns zeros.
        ms: Its latency.
    """

    rule: ResolvedRule | None
    ms: float


@dataclass(frozen=True)
class PassSample:
    """The latency of a whole pass.

    Attributes:
        name: Name of the pass.
        rules: The resolved rules of its layers; empty for the wall.
        ms: Its latency.
    """

    name: str
    rules: tuple[ResolvedRule, ...]
    ms: float


def fit(
    layers: Sequence[LayerSample], passes: Sequence[PassSample], layout: TokenLayout
) -> LatencyModel:
    """Return the latency model of timings at one length.

    Args:
        layers: Layers timed alone: the one that returns zeros, and reduced ones. Terms that none of
            them shows get the constant 0.
        passes: Whole passes with the wall. With the wall alone a layer is assumed to be as fast
            inside the model as alone.
        layout: Token layout of the timed clips.

    Raises:
        ValueError: If the wall, or the layer that returns zeros, is missing, or a time is not a
            positive number.
    """
    walls = [sample.ms for sample in passes if not sample.rules]
    if not walls or all(sample.rule is not None for sample in layers):
        raise ValueError("the fit needs the wall, as a pass and as a layer")
    if any(not 0 < ms < math.inf for ms in [s.ms for s in layers] + [s.ms for s in passes]):
        raise ValueError("a latency is not a positive number of milliseconds")
    depth = max((len(sample.rules) for sample in passes), default=0) or 1
    amounts = np.array(
        [
            [1.0, *([0.0] * len(TERMS) if s.rule is None else terms(clamp(s.rule, layout), layout))]
            for s in layers
        ]
    )
    taken = np.array([sample.ms for sample in layers])
    # A layer's error matters relative to the pass, not relative to the layer.
    share_of_rest = statistics.median(walls) / depth
    alone = _robust_nnls(amounts, taken, 1 / (taken + share_of_rest))[1:]

    work = [sum(float(alone @ terms(clamp(r, layout), layout)) for r in s.rules) for s in passes]
    taken = np.array([sample.ms for sample in passes])
    rest_ms, gain = statistics.median(walls), 1.0
    if max(work) > 0:
        rest_ms, gain = _robust_nnls(np.column_stack([np.ones(len(work)), work]), taken, 1 / taken)
    return LatencyModel(
        layout.frames,
        float(rest_ms),
        {name: float(gain * constant) for name, constant in zip(TERMS, alone, strict=True)},
    )


@dataclass(frozen=True)
class FitReport:
    """Errors of predicted latencies of whole passes, relative to the measured ones.

    Attributes:
        names: Names of the passes.
        median_error: Median of |predicted - measured| ÷ measured.
        largest_error: Largest |predicted - measured| ÷ measured.
        constant_median_error: Median error of a constant, the median of the measured latencies.
        constant_largest_error: Largest error of that constant.
    """

    names: tuple[str, ...]
    median_error: float
    largest_error: float
    constant_median_error: float
    constant_largest_error: float

    def __str__(self) -> str:
        return (
            f"latency model over {len(self.names)} passes: median error {self.median_error:.1%}, "
            f"largest {self.largest_error:.1%}; a constant: {self.constant_median_error:.1%}, "
            f"{self.constant_largest_error:.1%}"
        )


def check_fit(model: LatencyModel, passes: Sequence[PassSample], layout: TokenLayout) -> FitReport:
    """Return the errors of a model on whole passes, which should not be those of its fit.

    Raises:
        ValueError: If there is no pass.
    """
    if not passes:
        raise ValueError("there is no pass to check the latency model on")
    predicted = [
        model.wall_ms(layout) + math.fsum(model.layer_ms(rule, layout) for rule in sample.rules)
        for sample in passes
    ]
    measured = [sample.ms for sample in passes]
    constant = statistics.median(measured)
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    constant_errors = [abs(constant - m) / m for m in measured]
    return FitReport(
        tuple(sample.name for sample in passes),
        statistics.median(errors),
        max(errors),
        statistics.median(constant_errors),
        max(constant_errors),
    )


def _robust_nnls(amounts: _Floats, taken: _Floats, weight: _Floats) -> _Floats:
    """Return non-negative constants for ``amounts @ constants ≈ taken``, robust to outliers.

    Args:
        amounts: ``[R, K]``.
        taken: ``[R]`` milliseconds.
        weight: ``[R]`` weight of the residuals.
    """
    scale = np.maximum(np.abs(amounts * weight[:, None]).max(axis=0), 1e-300)
    matrix, right = amounts * weight[:, None] / scale, taken * weight
    trust = np.ones(len(taken))
    constants = np.zeros(matrix.shape[1])
    for _ in range(_REWEIGHTINGS):
        constants, _ = nnls(matrix * trust[:, None], right * trust)
        residual = np.abs(matrix @ constants - right)
        typical = 1.4826 * float(np.median(residual))
        if typical <= 1e-12 * float(np.abs(right).max()):
            break
        trust = np.sqrt(np.minimum(1.0, _HUBER * typical / np.maximum(residual, 1e-300)))
    return constants / scale
