"""Samples of several passes, taken in turns, as if the machine had kept one pace meanwhile.

A machine that others use changes its pace by tens of percent within seconds. Each sample is then
the product of the latency of its pass and of the pace at that moment. Latencies and paces are those
with the least sum of absolute differences, in logarithms, between samples and their products, and
between the paces of successive samples. It is a linear program. What disturbs a single sample
changes neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from spark3r.timing import Latency

STEADY = 1.2
"""Weight of a change of pace between two samples. Above 1, a disturbance of two samples counts as
one of these samples, and not as a change of pace."""

_LEAST_TELLING = 4


def at_one_pace(timed: Mapping[str, Latency]) -> dict[str, Latency]:
    """Return latencies whose samples are at the median pace of the timing.

    A pass with one sample says nothing about the pace. Latencies whose order of samples is not
    known are returned as they are.

    Args:
        timed: Latencies that were taken in turns, by name.
    """
    taken = sorted(
        (position, name, number)
        for name, latency in timed.items()
        for number, position in enumerate(latency.order)
    )
    if sum(timed[name].n > 1 for _, name, _ in taken) < _LEAST_TELLING:
        return dict(timed)
    logs = np.log([timed[name].samples_ms[number] for _, name, number in taken])
    names = sorted({name for _, name, _ in taken})
    pace = _pace(logs, np.array([names.index(name) for _, name, _ in taken]))
    scaled = {name: list(latency.samples_ms) for name, latency in timed.items()}
    for (_, name, number), at in zip(taken, np.exp(np.median(pace) - pace), strict=True):
        scaled[name][number] *= float(at)
    return {
        name: replace(latency, samples_ms=tuple(scaled[name])) for name, latency in timed.items()
    }


def _pace(logs: npt.NDArray[np.float64], of_pass: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the logarithm of the pace at each sample, up to a constant.

    Args:
        logs: Logarithms of the samples, ``[n]``, in the order taken.
        of_pass: Number of the pass of each sample, ``[n]``.
    """
    count, passes = len(logs), int(of_pass.max()) + 1
    # Variables: latencies of passes, paces, and the absolute values of both kinds of differences.
    belongs = np.eye(passes)[of_pass]
    own, change = np.eye(count), np.diff(np.eye(count), axis=0)
    differences = np.block([[belongs, own], [np.zeros((count - 1, passes)), change]])
    values = np.concatenate([logs, np.zeros(count - 1)])
    bounds = np.eye(len(values))
    found = linprog(
        np.concatenate([np.zeros(passes + count), np.ones(count), np.full(count - 1, STEADY)]),
        A_ub=np.block([[differences, -bounds], [-differences, -bounds]]),
        b_ub=np.concatenate([values, -values]),
        bounds=[(None, None)] * (passes + count) + [(0, None)] * len(values),
        method="highs",
    )
    pace: npt.NDArray[np.float64] = found.x[passes : passes + count]
    return pace
