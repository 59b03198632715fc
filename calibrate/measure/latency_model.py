"""The fit of the latency model of `spark3r.latency` to timings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from spark3r.latency import TERMS, LatencyModel, terms
from spark3r.layout import TokenLayout
from spark3r.reduction.rule import ResolvedRule, clamp

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
