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
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from spark3r.errors import Spark3rError
from spark3r.schedule import Schedule

from ..clips import Split
from ..defaults import LOG_WEIGHT, OPERATORS, RANDOM_TRIALS, TRIALS
from ..measure.cache import table_key
from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.quality import mean_figures
from ..settings import Job
from . import candidates
from .problem import DeviationLimit, Goal, SearchProblem
from .storage import Studies, check_storage, decode, encode, finished, open_studies
from .storage_errors import Storage, fail, is_of_storage


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
        on_trial: Callback for every trial that finishes here.
        clock: Function that returns seconds.

    Raises:
        StudyError: If the storage cannot be used. Trials that finished before are stored.
    """
    begin = clock()
    state = _SearchState(objective, problem, options.corrected, on_trial)
    studies = open_studies(options.storage, options.name, _sampler(options.seed, 0), options.resume)

    def is_over() -> bool:
        return options.timeout_s is not None and clock() - begin >= options.timeout_s

    try:
        state.restore(studies)
        _run_initial(studies.initial, initial, state)
        _run_proposed(studies.proposed, state, options, is_over)
    except KeyboardInterrupt:
        return Found(tuple(state.done), problem.goal, interrupted=True)
    except Exception as error:
        if not is_of_storage(error):
            raise
        problem_text = (
            f"the search stopped after {len(state.done)} trials, which are kept, because the next "
            "could not be stored; once it can, --resume continues from them"
        )
        fail(options.storage, problem_text, error)
    return Found(tuple(state.done), problem.goal)


@dataclass
class _SearchState:
    """The state that the trials of one search share."""

    objective: Callable[[Schedule], Score]
    problem: SearchProblem
    corrected: bool
    on_trial: Callable[[Trial], object]
    done: list[Trial] = field(default_factory=list)

    def restore(self, studies: Studies) -> None:
        """Take over the stored trials that count, in the order in which they ran."""
        stored = (*finished(studies.initial), *finished(studies.proposed))
        for corrected in (False, True)[: 1 + self.corrected]:
            self.done += [
                _restored(trial, self.problem.predict_ms)
                for trial in stored
                if trial.user_attrs.get("corrected", False) == corrected
            ]

    def run_trial(
        self, study: optuna.Study, trial: optuna.Trial, name: str, schedule: Schedule
    ) -> None:
        """Run a schedule unless it ran before, and store the result."""
        latency_ms, goal = self.problem.predict_ms(schedule), self.problem.goal
        trial.set_user_attr("name", name)
        trial.set_user_attr("schedule", encode(schedule))
        trial.set_user_attr("latency_ms", latency_ms)
        trial.set_user_attr("corrected", self.corrected)
        try:
            score, failure = self._score(schedule)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        # Every trial needs its constraint: Optuna takes a trial without one for feasible.
        mean = None if score is None else score.mean
        trial.set_constraint("excess", goal.excess(latency_ms, mean))
        if score is None:
            trial.set_user_attr("failure", failure)
            study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("score", score.value)
            trial.set_user_attr("judged", score.judged)
            trial.set_user_attr("figures", dict(score.figures))
            study.tell(trial, goal.value(latency_ms, score.value))
        self.done.append(Trial(name, schedule, latency_ms, score, failure, dict(trial.params)))
        self.on_trial(self.done[-1])

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


def _run_initial(study: optuna.Study, initial: Mapping[str, Schedule], state: _SearchState) -> None:
    known = {trial.schedule for trial in state.done}
    for name, schedule in initial.items():
        if schedule not in known:
            known.add(schedule)
            state.run_trial(study, study.ask(), name, schedule)


def _run_proposed(
    study: optuna.Study,
    state: _SearchState,
    options: SearchOptions,
    is_over: Callable[[], bool],
) -> None:
    goal, space = state.problem.goal, state.problem.space
    names = goal.parameters(space)
    number = len(finished(study))
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    if number == 0 and not waiting:  # the knapsack's answer, so that the sampler learns from it
        study.enqueue_trial(dict.fromkeys(names, 0.0))
    while number < options.trials and not is_over():
        # A sampler of its own for each trial: a search that was continued draws the same.
        study.sampler = _sampler(options.seed, number)
        trial = study.ask()
        weights = {each: trial.suggest_float(each, -LOG_WEIGHT, LOG_WEIGHT) for each in names}
        schedule = goal.proposed(space, weights)
        if schedule is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        number += 1
        state.run_trial(study, trial, f"search {number}", schedule)


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a trial, counted from 0, in the search of a seed."""
    own = int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
    # The score is constant over whole regions of weights, which does not suit a smooth surrogate.
    return optuna.samplers.TPESampler(seed=own, n_startup_trials=RANDOM_TRIALS)


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


def search_options(job: Job, split: Split, frames: int) -> SearchOptions:
    """Return the options of a job's search at a target length.

    The studies are named by a hash that only a search of the same model, clips and settings has.
    Without a storage they are kept in memory, so that the search can be continued.

    Raises:
        StudyError: If the storage cannot be opened, holds this search and `Settings.resume` is not
            set, or holds only others and it is.
    """
    settings = job.settings
    key = table_key(
        job,
        split.clips,
        OPERATORS,
        budget=None if settings.budget is None else settings.budget.text,
        max_deviation=settings.max_deviation,
        source=job.source,
        frames=frames,
        seed=settings.seed,
        choices=candidates.REVISION,
    )
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    check_storage(settings.storage, name, settings.resume, job.reporter.say)
    return SearchOptions(
        trials=settings.trials,
        seed=settings.seed,
        storage=settings.storage or optuna.storages.InMemoryStorage(),
        name=name,
        resume=settings.resume,
        timeout_s=settings.timeout_s,
    )


def run_search(
    job: Job,
    evaluator: Evaluator,
    dense: DenseRuns,
    options: SearchOptions,
    problem: SearchProblem,
    repeated: Mapping[str, Schedule] | None,
) -> Found:
    """Search on clips.

    Args:
        job: The job.
        evaluator: Runs and scores.
        dense: Dense runs of the search clips.
        options: Options of the search.
        problem: The problem.
        repeated: Further schedules to run after the latency model was corrected, instead of
            proposing any; None before.
    """
    step = "search"
    initial = problem.initial_schedules(at_the_goal=repeated is not None)
    if repeated is not None:
        step, initial = "search, corrected", initial | dict(repeated)
        options = replace(options, trials=0, resume=True, corrected=True)
    total = len(initial) + options.trials
    ran = 0

    def objective(schedule: Schedule) -> Score:
        qualities = evaluator.qualities(schedule, dense)
        value, mean = evaluator.search_value(qualities, dense)
        return Score(value, mean_figures(qualities), mean)

    def on_trial(trial: Trial) -> None:
        nonlocal ran
        ran += 1
        job.reporter.progress(step, min(ran, total), total)

    job.reporter.progress(step, 0, total)
    found = optimize(problem, initial, objective, options, on_trial=on_trial)
    job.reporter.progress(step, min(len(found.trials), total), total)  # not all if interrupted
    return found


def solve(problem: SearchProblem, repeated: Mapping[str, Schedule] | None) -> Found:
    """Return the knapsack's answer alone, which is not run.

    This is all there is with an earlier profile: sensitivities, but no clips to search on.
    """
    schedule = problem.knapsack()
    if schedule is None:
        return Found((), problem.goal, was_run=False)
    trial = Trial("knapsack", schedule, problem.predict_ms(schedule), None)
    return Found((trial,), problem.goal, was_run=False)


def require_result(found: Found) -> None:
    """Raise if a search found nothing to export.

    Raises:
        KeyboardInterrupt: If it was interrupted before that.
        Spark3rError: Otherwise, with the reason.
    """
    if found.is_usable:
        return
    if found.interrupted:
        raise KeyboardInterrupt
    failures = [trial for trial in found.trials if trial.failure]
    scores = [trial.score.mean for trial in found.trials if trial.score is not None]
    if failures:
        raise Spark3rError(
            f"{len(failures)} of {len(found.trials)} trials failed, and the goal allows no other. "
            f"The first failure ('{failures[0].name}') is {failures[0].failure}"
        )
    if isinstance(found.goal, DeviationLimit) and scores:
        raise Spark3rError(
            f"every schedule that was tried deviates more than {found.goal.most:.2%} from dense, "
            f"at least {min(scores):.2%}: allow more, or give more --trials"
        )
    raise Spark3rError("the search was stopped before a schedule within the budget had run")
