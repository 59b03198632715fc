"""A plan by which a pass fits into memory: counted before anything runs.

`fit` goes up a ladder of settings, each of which needs less memory and more time than the one
before it, until the counted peak fits. All of them but another schedule leave outputs as they are,
apart from rounding in a dense head's convolutions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from .errors import Spark3rError
from .families.base import Family, unwrap
from .families.parts.limits import NONE, Limits, limited
from .memory import free_bytes
from .memory_count import INPUT, MemoryCount, count_memory
from .patching.apply import apply
from .runner import HALF, Runner
from .schedule import Schedule

if TYPE_CHECKING:
    from .profile import Profile

UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}

MARGIN = 1.12
"""Factor between a counted peak and the memory that is set aside for it."""

_ON_HOST = Limits(features_on_host=True, outputs_on_host=True)
_FEW = 64
_UNCOUNTED = MemoryCount(0, {}, "")


class FitError(Spark3rError):
    """No plan fits. The message says how many frames would, and how much memory is needed."""


@dataclass(frozen=True)
class Plan:
    """Settings by which a pass fits.

    Attributes:
        memory: Bytes that it was made for.
        count: Counted memory of the pass.
        longest: Largest number of frames that fits with the settings of this schedule that need
            least, within a hundredth.
        schedule: The schedule; None is dense.
        schedule_name: Its name in the profile; None if it is dense or of no profile.
        lossy: What changes the outputs, in words; None if nothing does.
        save_memory: True with the family's memory savers.
        limits: Sizes of pieces, and what waits on the host.
        half_weights: Names of the parameters that are stored in the precision of autocast, which
            reads them in no other.
        dtype: Precision of the pass.
    """

    memory: int
    count: MemoryCount
    longest: int
    schedule: Schedule | None = None
    schedule_name: str | None = None
    lossy: str | None = None
    save_memory: bool = False
    limits: Limits = NONE
    half_weights: tuple[str, ...] = ()
    dtype: torch.dtype | None = None

    @property
    def peak(self) -> int:
        """Bytes at the peak, with weights and clip, and with the `MARGIN` of the count."""
        return int(self.count.total * MARGIN)

    def lines(self) -> tuple[str, ...]:
        """Return the plan in five lines."""
        limits, told = self.limits, "dense" if self.schedule is None else "a schedule"
        told = f"schedule '{self.schedule_name}'" if self.schedule_name else told
        stored = "in half precision where autocast casts them" if self.half_weights else "as loaded"
        pieces = "of the usual size"
        if limits.frames is not None:
            pieces = f"of {limits.frames} frames, in heads of {limits.head_frames}"
        where = "on the device"
        if limits.features_on_host:
            where = f"on the host, {in_words(self.count.host)}"
        return (
            f"{self.count.frames} frames need {in_words(self.peak)} of {in_words(self.memory)}",
            f"{told}; {self.lossy or 'outputs are those of a run without a plan'}",
            f"memory savers {'on' if self.save_memory else 'off'}, pieces {pieces}",
            f"weights {stored}; features and outputs {where}",
            f"at most {self.longest} frames fit",
        )

    @contextmanager
    def applied(self, model: nn.Module, *, family: Family | str | None = None) -> Iterator[None]:
        """Run the block's passes of a model as planned. The model is as it was afterwards.

        Args:
            model: The model, without a schedule.
            family: The model's family or the name of one; None recognises it.

        Raises:
            PatchError: If the schedule does not fit the model.
        """
        runner = Runner.of(model, family)
        rules = self.schedule or Schedule.dense(runner.depth)
        with ExitStack() as stack:
            if self.save_memory or self.schedule is not None:
                stack.enter_context(
                    apply(model, rules, family=runner.family, save_memory=self.save_memory)
                )
            stack.enter_context(self.running(model))
            yield

    @contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Run the block with the limits of the plan, on a model to which a schedule is applied."""
        originals = []
        root = unwrap(model)
        try:
            for name in self.half_weights:
                parameter = root.get_parameter(name)
                originals.append((parameter, parameter.data.cpu()))
                parameter.data = parameter.data.to(self.dtype)
            with limited(self.limits):
                yield
        finally:
            for parameter, original in originals:
                parameter.data = original.to(parameter.device)


def fit(
    model: nn.Module,
    *,
    frames: int,
    size: tuple[int, int],
    memory: int | str | None = None,
    profile: Profile | None = None,
    schedule: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    family: Family | str | None = None,
) -> Plan:
    """Return the plan by which a reconstruction fits into memory, without running the model.

    It takes the first settings that fit of: the pass as it is, the family's memory savers, weights
    in half precision where autocast casts them anyway, features and outputs on the host, smaller
    pieces. Half precision and the host are tried on a GPU only. If none fits, it tries the other
    schedules of the profile, unless ``schedule`` names one, and the plan says so.

    Args:
        model: A model on any device, the meta device too. It stays as it is.
        frames: Length of the clip.
        size: Height and width of its images in pixels.
        memory: Bytes, or a size such as ``12GB``, for weights, clip, pass and prediction. None
            takes what ``device`` has free now.
        profile: A profile; None counts dense passes.
        schedule: Name of the schedule of it to take; None takes its default, or another.
        dtype: Autocast precision; None or ``float32`` for none.
        device: Where the pass is to run; None takes the model's device, or the CPU.
        family: The model's family or the name of one; None recognises it.

    Raises:
        FitError: If nothing fits.
        FamilyError: If no family knows the model.
        Spark3rError: If the memory of the model cannot be counted.
    """
    runner = Runner.of(model, family)
    where = torch.device(device or runner.device)
    if where.type == "meta":
        where = torch.device("cpu")
    room = free_bytes(where) if memory is None else bytes_of(memory)
    if room is None:
        raise FitError(f"what {where} has free is not known: give memory=, such as 12GB")
    host = None if where.type == "cpu" else free_bytes("cpu")

    def counted(plan: Plan, length: int) -> MemoryCount:
        return count_memory(
            runner.root,
            length,
            size,
            schedule=plan.schedule,
            dtype=dtype,
            family=runner.family,
            save_memory=plan.save_memory,
            reading=runner.family.predict is not None,
            limits=plan.limits,
            half_weights=plan.half_weights,
        )

    def fits(plan: Plan) -> bool:
        needed_on_host = plan.count.host + 3 * plan.count.parts[INPUT]  # clip and prediction
        return plan.peak <= room and (host is None or needed_on_host <= host)

    def longest(plan: Plan) -> int:
        known = {frames: plan.peak} if plan.count.parts else {}

        def total(length: int) -> int:
            if length not in known:
                known[length] = int(counted(plan, length).total * MARGIN)
            return known[length]

        return most_frames(total, room, frames)

    refused: list[Plan] = []
    for name, rules in _schedules(profile, schedule):
        first = Plan(room, _UNCOUNTED, 0, rules, name, save_memory=rules is not None, dtype=dtype)
        if refused:
            first = replace(first, lossy=f"lossy: '{refused[0].schedule_name}' does not fit")
        first = replace(first, count=counted(first, frames))
        ladder = [first]
        while not fits(ladder[-1]) and (following := _next(ladder[-1], where, first)) is not None:
            ladder.append(replace(following, count=counted(following, frames)))
        found = ladder[-1]
        *_, usual, small = _rungs(found if len(ladder) == 1 else ladder[-2], where, first)
        # Smaller pieces save as much at any length, and take long to count at a great one.
        most = longest(usual)
        if most < _FEW:
            most = max(most, longest(small))
        if fits(found):
            return replace(found, longest=max(most, frames))
        refused.append(replace(found, longest=most))
    best = max(refused, key=lambda each: each.longest)
    raise FitError(_refusal(best, refused[0]))


def _refusal(best: Plan, first: Plan) -> str:
    what = f"{first.count.frames} frames need {in_words(first.peak)}, and there are "
    name = "" if best is first else f" with schedule '{best.schedule_name}'"
    if best.longest < 2:
        return f"{what}{in_words(first.memory)}, into which not even 2 frames fit{name}"
    return (
        f"{what}{in_words(first.memory)}: {best.longest} frames fit{name} (--frames "
        f"{best.longest}), or give --memory {_rounded_up(min(first.peak, best.peak))}"
    )


def _schedules(
    profile: Profile | None, chosen: str | None
) -> Iterator[tuple[str | None, Schedule | None]]:
    """Yield the schedules to try, by name, in the order of the profile."""
    if profile is None:
        yield None, None
        return
    first = chosen or profile.default
    yield first, profile.schedule(first)
    if chosen is None:
        others = (each.name for each in profile.schedules if each.name != first)
        yield from ((name, profile.schedule(name)) for name in others)


def _rungs(plan: Plan, device: torch.device, first: Plan) -> Iterator[Plan]:
    """Yield a plan and all that `_next` returns after it."""
    following: Plan | None = plan
    while following is not None:
        yield following
        following = _next(following, device, first)


def _next(plan: Plan, device: torch.device, first: Plan) -> Plan | None:
    """Return the settings that need less memory than a plan's, None after the last.

    Args:
        plan: The plan.
        device: Where the pass is to run.
        first: The first plan of its schedule, counted.
    """
    if not plan.save_memory:
        return replace(plan, save_memory=True, count=_UNCOUNTED)
    if device.type != "cpu":
        lowered = first.count.lowered if plan.dtype in HALF else ()
        if lowered and not plan.half_weights and plan.limits == NONE:
            return replace(plan, half_weights=lowered, count=_UNCOUNTED)
        if plan.limits == NONE:
            return replace(plan, limits=_ON_HOST, count=_UNCOUNTED)
    if plan.limits.frames is None:
        smaller = replace(plan.limits, frames=4, head_frames=2)
        return replace(plan, limits=smaller, count=_UNCOUNTED)
    return None


def obviously_fits(model: nn.Module, frames: int, size: tuple[int, int], memory: int) -> bool:
    """Return True if a pass of any known model fits without a plan, by the size of its clip.

    The largest ratio known is that of a dense pass of VGGT without memory savers, whose peak is
    100 times its clip.
    """
    weights = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    clip = frames * 3 * size[0] * size[1] * 4
    return 10**9 + 3 * weights + 150 * clip < memory


def most_frames(count: Callable[[int], int], room: int, start: int) -> int:
    """Return the largest number of frames whose memory fits, within a hundredth.

    Args:
        count: Function from a number of frames to bytes. They grow nearly in proportion.
        room: Bytes that there are.
        start: Length from which the search starts.

    Returns:
        A length that fits by its own count, while one that is a hundredth longer does not. 0 if
        a single frame does not fit.
    """
    low, low_bytes = 1, count(1)
    if low_bytes > room:
        return 0
    high = max(2, start)
    high_bytes = count(high)
    while high_bytes <= room:
        slope = (high_bytes - low_bytes) / (high - low)
        along = 1.02 * (room - high_bytes) / slope if slope > 0 else high
        low, low_bytes = high, high_bytes
        high += max(1, int(min(along, 3 * high)))
        high_bytes = count(high)
    halve = False
    while high - low > max(1, low // 100):
        # Just below where a line through both ends meets the room, or in the middle.
        share = 0.5 if halve else 0.995 * (room - low_bytes) / (high_bytes - low_bytes)
        middle = min(max(low + int(share * (high - low)), low + 1), high - 1)
        found = count(middle)
        halve = not halve and found <= room
        if found > room:
            high, high_bytes = middle, found
        else:
            low, low_bytes = middle, found
    return low


def bytes_of(text: int | str) -> int:
    """Return the bytes of a size such as ``24GB``, ``22.5GiB`` or ``800MB``.

    Raises:
        Spark3rError: If it is none.
    """
    if isinstance(text, int):
        found, size = True, float(text)
    else:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]+)", text.strip())
        unit = UNITS.get(match[2].upper()) if match else None
        found = match is not None and unit is not None
        size = float(match[1]) * unit if match and unit else 0.0
    if not found or size <= 0:
        raise Spark3rError(f"'{text}', expected a size such as 24GB or 22.5GiB")
    return int(size)


def in_words(size: int) -> str:
    """Return bytes in GB with two digits, or in MB below a gigabyte."""
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.0f} MB"


def _rounded_up(size: int) -> str:
    """Return a size that holds the bytes, as `--memory` takes it."""
    return f"{-(-size // 10**7) / 100:.2f}GB" if size >= 10**9 else f"{-(-size // 10**6)}MB"
