"""Ranks: the processes that ``torchrun`` starts, which share the passes of one calibration.

Rank 0 runs the calibration, and everything is its own: timing, search, storage, report. The passes
over clips are shared. Rank 0 tells all ranks which ones to run; each runs those on its own clips,
and returns figures, which are small. Predictions stay where they were made. Messages go through
gloo on every device, because nothing large is sent.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from spark3r.errors import Spark3rError, first_line
from spark3r.ranks import loss_told, of_environment
from spark3r.timing import Latency, Timer, Treatment

_WAIT = timedelta(days=7)
"""Time that a rank waits for work: rank 0 may be timing."""

_STOP = "stop"
_LOST = (
    "another rank ended before the calibration did, and torchrun's report names it; the same "
    "command with --resume continues"
)

Work = Callable[[str, Sequence[Any], tuple[Any, ...]], dict[Any, Any]]
"""Function(name of the passes, names of clips, arguments) that runs the passes on those of the
clips that are this rank's, and returns the results by clip."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a calibration. By default it is alone.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_environment(cls) -> Ranks:
        """Return the rank that ``torchrun`` names, and rank 0 of 1 without it."""
        return cls(*of_environment())

    @property
    def is_first(self) -> bool:
        """Whether this process runs the calibration."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Return whether the clip of a number is this rank's."""
        return number % self.size == self.rank

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the ranks for the block. At its end rank 0 lets the others go."""
        if self.size == 1:
            yield
            return
        with loss_told(_LOST):
            dist.init_process_group("gloo", timeout=_WAIT)
        try:
            yield
        finally:
            with suppress(Exception):
                if self.is_first:
                    self._broadcast((_STOP, (), ()))
                dist.destroy_process_group()

    def call(self, work: Work, name: str, clips: Sequence[Any], *arguments: Any) -> list[Any]:
        """Run passes on all ranks and return their results in the order of the clips. For rank 0.

        Signals wait until all ranks have answered, so that the next call finds them ready.

        Args:
            work: Function that runs passes here.
            name: Name of the passes.
            clips: Names of the clips.
            *arguments: Further arguments, which can be pickled.

        Raises:
            RankError: If another rank ended.
            Exception: The error of the first rank that had one.
        """
        with _signals_waiting(), loss_told(_LOST):
            self._broadcast((name, tuple(clips), arguments))
            answers: list[Any] = [None] * self.size
            dist.gather_object(_answer(work, name, clips, arguments), answers, dst=0)
        found: dict[Any, Any] = {}
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            found.update(answer)
        return [found[clip] for clip in clips]

    def serve(self, work: Work) -> None:
        """Run what rank 0 asks for, until it lets this rank go. For the other ranks.

        Raises:
            RankError: If rank 0 ended.
        """
        while True:
            with loss_told(_LOST):
                message: list[Any] = [None]
                dist.broadcast_object_list(message, src=0)
                name, clips, arguments = message[0]
                if name == _STOP:
                    return
                dist.gather_object(_answer(work, name, clips, arguments), dst=0)

    def refuse(self, error: Exception) -> None:
        """Answer all that rank 0 asks for with an error. For the other ranks."""

        def work(name: str, clips: Sequence[Any], arguments: tuple[Any, ...]) -> dict[Any, Any]:
            raise Spark3rError(f"rank {self.rank}: {first_line(error)}")

        self.serve(work)

    def _broadcast(self, message: Any) -> None:
        dist.broadcast_object_list([message], src=0)


ONE_PROCESS = Ranks()


def _answer(work: Work, name: str, clips: Sequence[Any], arguments: tuple[Any, ...]) -> Any:
    """Return the results, or the error in a form that can be sent."""
    try:
        return work(name, clips, arguments)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error with arguments of its own
            return RuntimeError(f"{type(error).__name__}: {first_line(error)}")
        return error


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: came.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for each in came:
            signal.raise_signal(each)


def threads_of_one_process() -> int:
    """Return the threads that torch takes in a process that is alone.

    ``torchrun`` sets OMP_NUM_THREADS to 1 unless the user has set it, and what torch takes without
    it depends on how torch was built. So a process without it is asked.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") != "1":
        return torch.get_num_threads()
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", "import torch; print(torch.get_num_threads())"]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return int(asked.stdout) if asked.returncode == 0 else torch.get_num_threads()


@dataclass(frozen=True)
class AloneTimer(Timer):
    """Takes latencies with the threads that one process would have, while the other ranks wait.

    Attributes:
        timer: Takes the latencies.
        threads: Number of threads.
    """

    timer: Timer = Timer()
    threads: int = 1

    def time_in_turns(self, treatments: Sequence[Treatment], **options: Any) -> dict[str, Latency]:
        """Return the latencies of treatments; see `spark3r.timing.Timer`."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return self.timer.time_in_turns(treatments, **options)
        finally:
            torch.set_num_threads(before)
