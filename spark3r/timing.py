"""Latencies: calls timed in turns, so that a drift of the machine changes all of them alike.

A GPU is timed by CUDA events, every other device by the host's clock around a synchronised call.
On a CPU that other programs use as well, the CPU time of the calling thread can take the place of
wall-clock time. Torch is imported only where a device other than the CPU is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .memory import fits_into_memory

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]
Clock = Callable[[], float]
Stopwatch = Callable[[Call], float]
Progress = Callable[[int, int], object]

ROUNDS = 20
"""Samples per call, unless the time limit comes first."""

MIN_ROUNDS = 3
"""Samples per call that are taken whatever the time limit."""

WARM_UP_S = 0.25
"""Seconds for which each call is repeated before it is sampled."""

LONG_S, VERY_LONG_S = 3.0, 10.0
"""A call that takes this long needs one and two samples fewer, as each is a mean over more work."""

CLOCKS_AGREE = 1.05
"""Wall-clock time ÷ CPU time of a thread up to which wall-clock time counts."""

FIRST_COUNTS_S = 1.0
"""The first run of a call that takes this long is a sample. What only a first run does, such as
building the indices of its factors, is then a small part of it."""


@dataclass(frozen=True)
class Latency:
    """Samples of the latency of one call.

    Attributes:
        samples_ms: All samples in the order taken, milliseconds.
        busy: Wall-clock time ÷ CPU time where the samples are CPU time of the calling thread; 1
            where they are wall-clock time.
        order: Position of each sample among all that were taken in turns with them; empty where it
            is not known.
    """

    samples_ms: tuple[float, ...]
    busy: float = 1.0
    order: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.samples_ms:
            raise ValueError("a latency needs at least one sample")
        if self.order and len(self.order) != len(self.samples_ms):
            raise ValueError(f"{self.n} samples have {len(self.order)} positions")

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

    def scaled(self, by: float) -> Latency:
        """Return the latency with all samples multiplied by a factor."""
        return replace(self, samples_ms=tuple(by * ms for ms in self.samples_ms))

    def __str__(self) -> str:
        return f"{self.median_ms:.2f} ms (spread {self.spread_ms:.2f}, n = {self.n})"


@dataclass(frozen=True)
class Treatment:
    """A call to time, and how to prepare the model for it.

    Attributes:
        name: Name, unique among the treatments that are timed together.
        call: The timed call.
        apply: Function called before each run of ``call``, not timed. It puts the model into the
            state that the treatment stands for, whatever state it is in; by default nothing.
        subject: Description of what runs, such as a schedule, for a timer that looks latencies up
            instead of taking them.
    """

    name: str
    call: Call
    apply: Callable[[], object] = lambda: None
    subject: object = None


@dataclass(frozen=True)
class Timer:
    """Takes latencies of treatments.

    Functions that time something have a parameter for it. A subclass that overrides
    `time_in_turns` gives fixed latencies instead.

    Attributes:
        clock: Function that returns seconds. Not used for samples on a CUDA device.
        rounds: Samples of each treatment, default 20, fewer where a time limit has no room.
        warm_up_s: Seconds for which each call is repeated before it is sampled, default 0.25.
        cpu_clock: Function that returns the seconds of CPU time of the calling thread, such as
            `time.thread_time`. On a CPU its samples count where wall-clock time is more than
            `CLOCKS_AGREE` times as long. None, the default, always takes wall-clock time.
    """

    clock: Clock = time.perf_counter
    rounds: int = ROUNDS
    warm_up_s: float = WARM_UP_S
    cpu_clock: Clock | None = None

    def time_in_turns(
        self,
        treatments: Sequence[Treatment],
        *,
        device: torch.device | str = "cpu",
        limit_s: float | None = None,
        least: int | Mapping[str, int] | None = None,
        warmed_up: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> dict[str, Latency]:
        """Return the latencies of treatments, without those that run out of memory.

        Each call first runs alone. That run says how many samples there is room for, and is a
        sample itself if it takes `FIRST_COUNTS_S`. The other samples follow in rounds over all
        treatments, see `interleaved`.

        Args:
            treatments: The treatments. The model stays in the state of the last one.
            device: Device on which the calls do their work.
            limit_s: Approximate seconds for everything; each treatment has an equal share of it,
                but at least the samples that `samples_to_take` demands. None takes ``rounds``
                samples of each.
            least: Samples of each treatment that are taken whatever the limit, or those of each by
                name; None leaves that to `samples_to_take`.
            warmed_up: True if every call has already run on this device, so that no run is spent
                on warming up and the first one is always a sample.
            progress: Callback(runs done, runs in all).

        Raises:
            ValueError: If two treatments have the same name.
        """
        by_name = {each.name: each for each in treatments}
        if len(by_name) < len(treatments):
            raise ValueError(f"two treatments have the same name: {[e.name for e in treatments]}")
        warm_up_s = self.warm_up_s
        if limit_s is not None:
            warm_up_s = min(warm_up_s, 0.1 * limit_s / max(1, len(treatments)))
        stopwatch = make_stopwatch(device, self.clock)
        first_s: dict[str, float] = {}
        first_cpu_s: dict[str, float] = {}
        cpu = _CpuTimes(self.cpu_clock if str(device).startswith("cpu") else None)

        def first_runs(number: int, each: Treatment) -> None:
            if number == 0 and not warmed_up:
                each.call()  # the first call in a process takes up to twice as long
            taken_s = stopwatch(cpu.counted(each.name, each.call)) / 1000
            first_cpu_s[each.name] = cpu.last_s
            if not warmed_up:
                warm_up(each.call, stopwatch, warm_up_s - taken_s, self.clock)
            first_s[each.name] = taken_s

        for number, each in enumerate(treatments):
            progress(number, len(treatments))
            each.apply()
            fits_into_memory(partial(first_runs, number, each), device)
        wanted = samples_to_take(first_s, limit_s, self.rounds, least)
        taken: dict[str, tuple[float, ...]] = {
            name: (1000 * taken_s,) if warmed_up or taken_s >= FIRST_COUNTS_S else ()
            for name, taken_s in first_s.items()
        }
        cpu.samples_ms = {
            name: [1000 * first_cpu_s[name]] if first else [] for name, first in taken.items()
        }
        left = {name: number - len(taken[name]) for name, number in wanted.items()}
        total, done = len(treatments) + sum(left.values()), len(treatments)

        def before(name: str) -> None:
            nonlocal done
            progress(done, total)
            done += 1
            by_name[name].apply()

        # First runs went forwards, so the first round goes backwards.
        rounds = {name: left[name] for name in reversed(left) if left[name]}
        timed = interleaved(
            {name: cpu.counted(name, by_name[name].call) for name in rounds},
            before=before,
            device=device,
            rounds=rounds,
            warm_up_s=0,
            clock=self.clock,
        )
        progress(total, total)
        return cpu.taken_where_busy(
            {
                name: _joined(taken[name], number, timed.get(name), len(treatments))
                for number, name in enumerate(by_name)
                if name in taken
            }
        )


def _joined(first: tuple[float, ...], number: int, later: Latency | None, before: int) -> Latency:
    """Return the latency of a call's first run, if that counts, and of its later samples.

    Args:
        first: The sample of the first run, or none.
        number: Its position.
        later: The later samples, in turns with those of other calls.
        before: Number of first runs.
    """
    order = (number,) * len(first)
    if later is None:
        return Latency(first, order=order)
    after = tuple(before + position for position in later.order)
    return Latency((*first, *later.samples_ms), order=(*order, *after))


class _CpuTimes:
    """CPU time of the calling thread in calls, beside the wall-clock time of the same calls."""

    def __init__(self, clock: Clock | None) -> None:
        self._clock = clock
        self.samples_ms: dict[str, list[float]] = {}
        self.last_s = 0.0

    def counted(self, name: str, call: Call) -> Call:
        """Return the call with a note of its CPU time."""
        clock = self._clock
        if clock is None:
            return call

        def noted() -> None:
            begin = clock()
            call()
            self.last_s = clock() - begin
            self.samples_ms.setdefault(name, []).append(1000 * self.last_s)

        return noted

    def taken_where_busy(self, wall: Mapping[str, Latency]) -> dict[str, Latency]:
        """Return the CPU times of all calls if they are much less than the wall-clock times."""
        if self._clock is None:
            return dict(wall)
        in_all = sum(sum(each.samples_ms) for each in wall.values())
        cpu_ms = sum(sum(self.samples_ms[name]) for name in wall)
        if cpu_ms <= 0 or in_all <= CLOCKS_AGREE * cpu_ms:
            return dict(wall)
        busy = in_all / cpu_ms
        return {
            name: Latency(tuple(self.samples_ms[name]), busy, each.order)
            for name, each in wall.items()
        }


TIMER = Timer()
"""The timer of all functions that are not given another."""


def samples_to_take(
    seconds: Mapping[str, float],
    limit_s: float | None,
    rounds: int = ROUNDS,
    least: int | Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Return the number of samples to take of each call.

    Each call has an equal share of the time limit. At least ``least`` samples are taken. Without it
    these are `MIN_ROUNDS`, of a call that takes `LONG_S` one fewer, and of one that takes
    `VERY_LONG_S` two fewer.

    Args:
        seconds: Duration of each call by name.
        limit_s: Seconds for all samples together; None takes ``rounds`` of each.
        rounds: Largest number of samples of a call, default `ROUNDS`.
        least: Smallest number of samples of each call, or of each by name.
    """

    def number(name: str, taken_s: float) -> int:
        if limit_s is None:
            return rounds
        given = least[name] if isinstance(least, Mapping) else least
        fewest = given or MIN_ROUNDS - (taken_s >= LONG_S) - (taken_s >= VERY_LONG_S)
        room = int(limit_s / len(seconds) / max(taken_s, 1e-9))
        return min(rounds, max(fewest, room))

    return {name: number(name, taken_s) for name, taken_s in seconds.items()}


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

    A call with fewer samples than others has them spread evenly over the rounds. Every other round
    goes backwards, so that a steady drift adds the same to every call. All calls are warmed up one
    after the other before the first round.

    Args:
        calls: The calls by name.
        before: Function called with a call's name before it runs, not timed; None for none.
        device: Device on which the calls do their work.
        rounds: Samples per call, or samples of each call by name; default `ROUNDS`.
        warm_up_s: Seconds for which each call is repeated first, at least once; 0 for not at all;
            default `WARM_UP_S`.
        limit_s: Seconds after which no further round begins, once there were `MIN_ROUNDS`; None
            for no limit.
        clock: Function that returns seconds. Not used for samples on a CUDA device.

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
    positions: dict[str, list[int]] = {name: [] for name in calls}
    taken = 0
    order = list(calls)
    begin = clock()
    most = max(wanted.values(), default=0)
    for done in range(1, most + 1):
        for name in order:
            if done * wanted[name] // most == (done - 1) * wanted[name] // most:
                continue
            prepare(name)
            samples[name].append(stopwatch(calls[name]))
            positions[name].append(taken)
            taken += 1
        order.reverse()
        if limit_s is not None and done >= MIN_ROUNDS and clock() - begin >= limit_s:
            break
    return {
        name: Latency(tuple(each), order=tuple(positions[name])) for name, each in samples.items()
    }


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
    """Repeat a call until the seconds are over, at least once.

    With 0 seconds or less the call is not made.
    """
    begin = clock()
    while clock() - begin < seconds:
        stopwatch(call)


def make_stopwatch(
    device: torch.device | str = "cpu", clock: Clock = time.perf_counter
) -> Stopwatch:
    """Return a function that runs a call and returns its milliseconds.

    Args:
        device: Device on which the call does its work.
        clock: Function that returns seconds, for every device but CUDA.
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
