"""The search: weights on the degradations, which the knapsack turns into feasible schedules.

Sensitivities describe each layer alone. They miss interactions between layers, which Optuna
corrects: its parameters are the logarithms of weights on the degradations of each layer, of the
query axis and of all operators but the first. For any weights the knapsack returns the schedule of
least weighted degradation within the budget, so that every trial is feasible by the latency model
and uses the budget up. (For a `DeviationLimit` it returns the fastest schedule within the allowed
degradation.)

The initial schedules run first: the knapsack's own answer, which is that of all weights 1, its
answers to other budgets, the scaled paper schedules and the best uniform ones. All trials are
stored with latency and figures, so that the trade-off between latency and quality comes out of the
same search.

Several processes may run trials of one search, see `.queue`. The first, which asks for the search,
adds all trials at once and stores the problem beside them; others join it, see `.joining`.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from spark3r.schedule import Schedule

from ..defaults import LOG_WEIGHT, TRIALS
from ..measure.evaluator import is_failure
from .problem import Goal, SearchProblem
from .queue import KEY, Entry, NoResult, add_missing, all_ended, run_all, unfinished
from .sampler import KeyedSampler
from .storage import (
    DEFAULT_HEARTBEAT,
    Heartbeat,
    Studies,
    close_database,
    decode,
    encode,
    finished,
    is_finished,
    open_studies,
    quiet,
)
from .storage_errors import Storage, fail, is_of_storage

OPEN, DOCUMENT = "open", "problem"
"""Names of the attributes of the first and the second study that say whether processes may take
trials, and what they must know for that."""

POLL_S = 0.5
"""Seconds between two looks at the trials that other processes run."""


@dataclass(frozen=True)
class Score:
    """The score of a schedule.

    Attributes:
        value: Number that the search minimises.
        figures: Further figures to store, by name.
        judged: Mean score by the source that schedules are judged by; None if that is ``value``.
    """

    value: float
    figures: Mapping[str, float] = field(default_factory=dict)
    judged: float | None = None

    @property
    def mean(self) -> float:
        """Mean score by the source that schedules are judged by."""
        return self.value if self.judged is None else self.judged


@dataclass(frozen=True)
class Trial:
    """One schedule that was tried.

    Attributes:
        name: Origin of the schedule, such as ``knapsack`` or ``search 7``.
        schedule: The schedule.
        latency_ms: Predicted latency.
        score: Its score, None if it failed or did not run.
        failure: Reason of the failure, or None.
        parameters: Parameters that the sampler proposed; empty for an initial schedule.
    """

    name: str
    schedule: Schedule
    latency_ms: float
    score: Score | None
    failure: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        trials: All finished trials, those of the initial schedules first.
        goal: The goal of the search.
        interrupted: Whether Ctrl-C stopped it before its last trial.
        was_run: Whether schedules ran on clips. The answer of `solve` is not run.
    """

    trials: tuple[Trial, ...]
    goal: Goal
    interrupted: bool = False
    was_run: bool = True

    @property
    def is_usable(self) -> bool:
        """Whether there is a schedule to export."""
        return bool(self.ranked() if self.was_run else self.trials)

    def ranked(self) -> tuple[Trial, ...]:
        """Return the trials that are allowed and did not fail, the best first.

        Each schedule stands once, under the name of its first trial.
        """
        fitting: dict[Schedule, tuple[float, Trial]] = {}
        for trial in self.trials:
            if trial.score is None or self.goal.excess(trial.latency_ms, trial.score.mean) > 0:
                continue
            value = self.goal.value(trial.latency_ms, trial.score.value)
            fitting.setdefault(trial.schedule, (value, trial))
        return tuple(trial for _, trial in sorted(fitting.values(), key=lambda each: each[0]))

    def front(self) -> tuple[Trial, ...]:
        """Return the trials that no other undercuts in latency and score, the fastest first."""
        front: list[Trial] = []
        succeeded = [trial for trial in self.trials if trial.score is not None]
        for trial in sorted(succeeded, key=lambda trial: (trial.latency_ms, _value(trial))):
            if not front or _value(trial) < _value(front[-1]):
                front.append(trial)
        return tuple(front)


@dataclass(frozen=True)
class SearchOptions:
    """How long a search takes, and where its trials are stored.

    Attributes:
        trials: Trials beyond those of the initial schedules, default `TRIALS`.
        seed: Seed of the sampler, default 0.
        storage: Storage of the trials; see `.storage.open_studies`.
        name: Name of the studies there.
        resume: Whether to continue studies of this name.
        timeout_s: Seconds after which no further trial is proposed; None for no limit.
        heartbeat: Heartbeats, where processes share the storage.
        document: What a process that joins the search must know, as plain JSON values; stored where
            processes share the storage.
        corrected: Whether the latency model was corrected before. A continued search takes no
            notice of trials after the correction until it has come to that point itself, so that
            it decides what an undisturbed search decides.
    """

    trials: int = TRIALS
    seed: int = 0
    storage: Storage = None
    name: str = "search"
    resume: bool = False
    timeout_s: float | None = None
    heartbeat: Heartbeat = DEFAULT_HEARTBEAT
    document: Mapping[str, Any] | None = None
    corrected: bool = False


def optimize(
    problem: SearchProblem,
    initial: Mapping[str, Schedule],
    objective: Callable[[Schedule], Score],
    options: SearchOptions,
    *,
    on_trial: Callable[[Trial], object] = lambda trial: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Search the best schedule that a problem's goal allows.

    Args:
        problem: The problem. Its latency model also predicts earlier trials anew.
        initial: Schedules to run first, by name; they may be outside what the goal allows.
        objective: Function that runs a schedule. A trial for which it raises a `Spark3rError`, runs
            out of memory or returns NaN counts as failed, and the search continues.
        options: Length and storage of the search.
        on_trial: Callback for every trial that finishes during the search, here or elsewhere.
        clock: Function that returns seconds.

    Raises:
        StudyError: If the storage cannot be used. Trials that finished before are stored.
    """
    begin = clock()
    sampler = KeyedSampler(options.seed)
    studies = open_studies(
        options.storage,
        options.name,
        sampler,
        options.resume,
        heartbeat=options.heartbeat,
    )
    work = Work(studies, problem, objective, on_trial, options.corrected, clock)

    def is_over() -> bool:
        return options.timeout_s is not None and clock() - begin >= options.timeout_s

    interrupted = False
    try:
        with quiet(), storage_errors(options.storage, work.done):
            work.refresh(report=False)
            starts = work.entries(initial)
            proposals = work.proposals(options.trials)
            try:
                if studies.database is not None and not options.corrected:
                    add_missing(studies.initial, starts)
                    add_missing(studies.proposed, proposals)
                    studies.proposed.set_user_attr(DOCUMENT, options.document)
                    studies.initial.set_user_attr(OPEN, True)
                work.run(starts, proposals, is_over)
            except KeyboardInterrupt:
                interrupted = True
                work.refresh(report=False)
            if studies.database is not None:
                studies.initial.set_user_attr(OPEN, False)
    except KeyboardInterrupt:  # before the first trial, or the second time
        interrupted = True
    finally:
        close_database(studies.database)
    return Found(tuple(work.done), problem.goal, interrupted)


@contextmanager
def storage_errors(storage: Storage, done: Sequence[object]) -> Iterator[None]:
    """Raise errors of the storage as a `StudyError` that says how many trials are kept."""
    try:
        yield
    except Exception as error:
        if not is_of_storage(error):
            raise
        problem_text = (
            f"the search stopped after {len(done)} trials, which are kept, because the next "
            "could not be stored; once it can, --resume continues from them"
        )
        fail(storage, problem_text, error)


@dataclass
class Work:
    """The way of one process through the trials of a search.

    Attributes:
        studies: The studies.
        problem: The problem.
        objective: Function that runs a schedule.
        on_trial: Callback for every trial that finishes during the search.
        corrected: As for `SearchOptions`.
        clock: Function that returns seconds.
        done: Finished trials of all processes that count, those of the initial schedules first.
        ran: Number of trials that finished here.
    """

    studies: Studies
    problem: SearchProblem
    objective: Callable[[Schedule], Score]
    on_trial: Callable[[Trial], object] = lambda trial: None
    corrected: bool = False
    clock: Callable[[], float] = time.monotonic
    done: list[Trial] = field(default_factory=list)
    ran: int = 0
    _known: dict[tuple[int, int], Trial] = field(default_factory=dict)

    def refresh(self, *, report: bool = True) -> None:
        """Take over the stored trials that count, in the order in which they began."""
        stored = [
            ((number, trial.number), trial)
            for number, study in enumerate((self.studies.initial, self.studies.proposed))
            for trial in finished(study)
        ]
        done, new = [], []
        for corrected in (False, True)[: 1 + self.corrected]:
            for place, trial in stored:
                if trial.user_attrs.get("corrected", False) != corrected:
                    continue
                if place not in self._known:
                    self._known[place] = _restored(trial, self.problem.predict_ms)
                    new.append(self._known[place])
                done.append(self._known[place])
        self.done[:] = done
        for each in new if report else ():
            self.on_trial(each)

    def entries(self, initial: Mapping[str, Schedule]) -> dict[str, Entry]:
        """Return the trials of the initial schedules that have not run, by key."""
        known = {trial.schedule for trial in self.done}
        entries: dict[str, Entry] = {}
        for name, schedule in initial.items():
            if schedule not in known:  # a schedule with two names runs under the first
                known.add(schedule)
                attributes = {"name": name, "schedule": encode(schedule)}
                entries[_key(schedule, self.corrected)] = Entry(attributes=attributes)
        return entries

    def proposals(self, count: int) -> dict[str, Entry]:
        """Return the trials of proposed schedules, by key: the knapsack's answer, then others."""
        if self.problem.goal.proposed(self.problem.space, {}) is None:
            return {}  # nothing is fast enough, whatever the weights are
        # The sampler learns from the knapsack's answer.
        answer = Entry(dict.fromkeys(self.problem.goal.parameters(self.problem.space), 0.0))
        return {str(number): Entry() if number else answer for number in range(count)}

    def run(
        self,
        initial: Mapping[str, Entry],
        proposed: Mapping[str, Entry],
        is_over: Callable[[], bool],
        is_closed: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run trials until all have finished, those that other processes run included.

        Args:
            initial: Trials of the initial schedules.
            proposed: Trials of proposed schedules.
            is_over: Function that returns True if no further schedule shall be proposed.
            is_closed: Function that returns True if no further trial shall run here at all.
        """
        first, second = self.studies.initial, self.studies.proposed
        seen: dict[int, float] = {}

        def is_ended() -> bool:
            return is_closed() or is_over()

        while True:
            run_all(self.studies, first, initial, self._run, self._after, is_closed)
            run_all(self.studies, second, proposed, self._run, self._after, is_ended)
            if self.studies.database is None or is_ended():
                return
            ended = all_ended(self.studies, seen, self.clock)
            self.refresh()
            if ended and not (unfinished(first, initial) or unfinished(second, proposed)):
                return
            time.sleep(POLL_S)

    def _after(self, trial: FrozenTrial) -> None:
        """Take note of a trial that ended here."""
        self.ran += is_finished(trial)
        self.refresh()

    def _run(self, trial: optuna.Trial) -> float:
        """Run a trial's schedule unless it ran before, store the result, and return its value."""
        self.refresh()
        goal = self.problem.goal
        name, schedule = self._schedule(trial)
        latency_ms = self.problem.predict_ms(schedule)
        trial.set_user_attr("name", name)
        trial.set_user_attr("schedule", encode(schedule))
        trial.set_user_attr("latency_ms", latency_ms)
        trial.set_user_attr("corrected", self.corrected)
        score, failure = self._score(schedule)
        # Every trial needs its constraint: Optuna takes a trial without one for feasible.
        mean = None if score is None else score.mean
        trial.set_constraint("excess", goal.excess(latency_ms, mean))
        if score is None:
            trial.set_user_attr("failure", failure)
            raise NoResult
        trial.set_user_attr("score", score.value)
        trial.set_user_attr("judged", score.judged)
        trial.set_user_attr("figures", dict(score.figures))
        return goal.value(latency_ms, score.value)

    def _schedule(self, trial: optuna.Trial) -> tuple[str, Schedule]:
        """Return the name and the schedule of a trial, proposed here unless it was given."""
        if "schedule" in trial.user_attrs:
            return trial.user_attrs["name"], decode(trial.user_attrs["schedule"])
        goal, space = self.problem.goal, self.problem.space
        weights = {
            each: trial.suggest_float(each, -LOG_WEIGHT, LOG_WEIGHT)
            for each in goal.parameters(space)
        }
        schedule = goal.proposed(space, weights)
        if schedule is None:  # weights do not change what is fast enough
            raise NoResult
        return f"search {int(trial.user_attrs[KEY]) + 1}", schedule

    def _score(self, schedule: Schedule) -> tuple[Score | None, str | None]:
        for earlier in self.done:
            if earlier.schedule == schedule:
                return earlier.score, earlier.failure
        try:
            score = self.objective(schedule)
        except Exception as error:
            if not is_failure(error):
                raise
            return None, f"{type(error).__name__}: {error}"
        if not math.isfinite(score.value):
            return None, f"its score is {score.value}"
        return score, None


def _key(schedule: Schedule, corrected: bool) -> str:
    """Return the key of the trial of an initial schedule."""
    text = json.dumps([encode(schedule), corrected], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _restored(trial: FrozenTrial, predict_ms: Callable[[Schedule], float]) -> Trial:
    stored = trial.user_attrs
    score = None
    if "score" in stored:
        score = Score(stored["score"], stored.get("figures", {}), stored.get("judged"))
    schedule = decode(stored["schedule"])
    latency_ms, failure = predict_ms(schedule), stored.get("failure")
    return Trial(stored["name"], schedule, latency_ms, score, failure, dict(trial.params))


def _value(trial: Trial) -> float:
    return math.inf if trial.score is None else trial.score.value


Optimize = Callable[[SearchProblem, Mapping[str, Schedule] | None], Found]
"""Function that solves a problem: `solve`, or `run_search` with its first arguments."""
