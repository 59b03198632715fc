"""Timing: calls measured in turns, so that drifts of the machine hit all alike.

A GPU is timed by CUDA events, every other device by the host's clock around a synchronised call.
Torch is imported only where a device other than the CPU is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]
Clock = Callable[[], float]
Stopwatch = Callable[[Call], float]

ROUNDS = 20
"""Samples per call, unless the time limit comes first."""

MIN_ROUNDS = 3
"""Samples per call that are taken whatever the time limit."""

WARM_UP_S = 0.25
"""How long each call is repeated before it is sampled."""


@dataclass(frozen=True)
class Latency:
    """Samples of how long one call took.

    Attributes:
        samples_ms: All of them, in the order taken.
    """

    samples_ms: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples_ms:
            raise ValueError("a latency needs at least one sample")

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        """Median of the samples."""
        return statistics.median(self.samples_ms)

    @property
    def spread_ms(self) -> float:
        """Interquartile range of the samples, 0 for a single one."""
        if self.n == 1:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_ms, n=4, method="inclusive")
        return high - low

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ms (spread {self.spread_ms:.2f}, n = {self.n})"


def interleaved(
    calls: Mapping[str, Call],
    *,
    before: Callable[[str], object] | None = None,
    device: torch.device | str = "cpu",
    rounds: int | Mapping[str, int] = ROUNDS,
    warm_up_s: float = WARM_UP_S,
    limit_s: float | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Time calls in turns: each round samples every call once.

    Calls that are given fewer samples than others have them spread evenly over the rounds. Every
    other round goes backwards, so that a steady drift adds the same to every call. Calls
    are warmed up one after the other before the first round.

    Args:
        calls: What to time, by name.
        before: Called with a call's name before it runs, and not timed; None for nothing to do.
        device: Where the calls do their work.
        rounds: Samples per call, or of each call by name.
        warm_up_s: How long each call is repeated first, at least once; 0 for not at all.
        limit_s: Stop after the round in which so many seconds have passed since the first, though
            not before `MIN_ROUNDS` rounds; None for no limit.
        clock: Seconds; replaced in tests. Not used for samples on a CUDA device.

    Returns:
        The samples of each call, in the order given.

    Raises:
        ValueError: If a call would have no sample.
    """
    wanted = dict.fromkeys(calls, rounds) if isinstance(rounds, int) else dict(rounds)
    if wanted.keys() != calls.keys() or min(wanted.values(), default=1) < 1:
        raise ValueError(f"rounds is {rounds}, expected at least 1 for every call")
    stopwatch = make_stopwatch(device, clock)
    prepare = before or (lambda name: None)
    for name, call in calls.items() if warm_up_s > 0 else ():
        prepare(name)
        warm_up(call, stopwatch, warm_up_s, clock)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    begin = clock()
    most = max(wanted.values(), default=0)
    for done in range(1, most + 1):
        for name in order:
            if done * wanted[name] // most == (done - 1) * wanted[name] // most:
                continue
            prepare(name)
            samples[name].append(stopwatch(calls[name]))
        order.reverse()
        if limit_s is not None and done >= MIN_ROUNDS and clock() - begin >= limit_s:
            break
    return {name: Latency(tuple(taken)) for name, taken in samples.items()}


def measure(
    call: Call,
    *,
    device: torch.device | str = "cpu",
    rounds: int = ROUNDS,
    warm_up_s: float = WARM_UP_S,
    limit_s: float | None = None,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Time one call; see `interleaved`."""
    timed = interleaved(
        {"call": call},
        device=device,
        rounds=rounds,
        warm_up_s=warm_up_s,
        limit_s=limit_s,
        clock=clock,
    )
    return timed["call"]


def warm_up(
    call: Call, stopwatch: Stopwatch, seconds: float, clock: Clock = time.perf_counter
) -> None:
    """Repeat a call for so many seconds, at least once; 0 is not at all."""
    begin = clock()
    while clock() - begin < seconds:
        stopwatch(call)


def make_stopwatch(
    device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> Stopwatch:
    """Return a function that runs a call and says how many milliseconds it took.

    Args:
        device: Where the call does its work.
        clock: Seconds, for every device but CUDA.
    """
    kind = str(device).partition(":")[0]
    if kind == "cuda":
        return _event_stopwatch(device)

    def timed(call: Call) -> float:
        begin = clock()
        call()
        return 1000 * (clock() - begin)

    if kind == "cpu":
        return timed

    def synchronised(call: Call) -> float:
        import torch

        synchronize = getattr(torch, kind).synchronize
        synchronize()

        def call_and_wait() -> None:
            call()
            synchronize()

        return timed(call_and_wait)

    return synchronised


def _event_stopwatch(device: torch.device | str) -> Stopwatch:
    import torch

    def timed(call: Call) -> float:
        with torch.cuda.device(device):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end)

    return timed
