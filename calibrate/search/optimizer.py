"""The search: weights on the sensitivities, which the knapsack turns into feasible schedules.

Sensitivities say what each layer bears alone. What they miss are interactions between layers, and
Optuna corrects them: its parameters are the logarithms of weights on the damages of each layer, of
the query axis and of all operators but the first. For any weights the knapsack answers with the
schedule of least weighted damage within the budget, so that every trial is feasible by the latency
model and uses the budget up. (For the dual, `WithinDeviation`, it answers with the fastest schedule
of as much damage as is allowed.)

The schedules to start from (the knapsack's own answer, which is that of all weights 1, and at other
budgets, the scaled paper schedule, the best uniform ones) run before. Whatever ran is kept with its
latency and figures, so that the trade-off between latency and quality comes out of the same search.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from spark3r.schedule import Schedule

from ..clips import Split
from ..measure.cache import table_key
from ..measure.evaluator import DenseRuns, Evaluator, is_failure
from ..measure.quality import mean_figures
from ..settings import OPERATORS, Job, Settings
from . import candidates
from .problem import Goal, Problem, Space, WithinDeviation
from .storage import Storage, Studies, StudyError, decode, encode, finished, open_studies

LOG_WEIGHT = 1.5
"""Bound of a parameter: weights lie between e^-1.5 and e^1.5, a factor of twenty apart."""

_RANDOM_TRIALS = 5  # finished trials before the sampler trusts its model


@dataclass(frozen=True)
class Score:
    """How good a schedule is.

    Attributes:
        value: What the search minimises.
        figures: Everything else worth keeping, by name.
        judged: What schedules are judged by in the end, None where that is ``value``.
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
        name: Where it came from, such as ``knapsack`` or ``search 7``.
        schedule: What was run.
        latency_ms: What the latency model says of it.
        score: How good it is, None where it failed.
        failure: Why it failed, or None.
        parameters: What the sampler proposed; empty for a schedule that the search started from.
    """

    name: str
    schedule: Schedule
    latency_ms: float
    score: Score | None
    failure: str | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        trials: All finished trials, those to start from first.
        goal: What it was to reach.
        interrupted: Whether it was stopped by Ctrl-C before its last trial.
    """

    trials: tuple[Trial, ...]
    goal: Goal
    interrupted: bool = False

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


def search(
    space: Space,
    starts: Mapping[str, Schedule],
    objective: Callable[[Schedule], Score],
    predict_ms: Callable[[Schedule], float],
    goal: Goal,
    *,
    trials: int,
    seed: int = 0,
    storage: Storage = None,
    name: str = "search",
    resume: bool = False,
    timeout_s: float | None = None,
    on_trial: Callable[[Trial], object] = lambda trial: None,
    clock: Callable[[], float] = time.monotonic,
) -> Found:
    """Search the best schedule that a goal allows.

    Args:
        space: What to choose from.
        starts: Schedules to run first, by name; they may be outside what is allowed.
        objective: Runs a schedule. A trial for which it raises a `Spark3rError`, runs out of memory
            or returns NaN counts as failed, and the search goes on.
        predict_ms: The latency model. Trials that are gone on with are predicted anew.
        goal: What to reach.
        trials: Trials beyond those of ``starts``.
        seed: Of the sampler.
        storage: Where trials are kept; see `study.open_studies`.
        name: Name of the studies there.
        resume: Whether to go on with studies of this name.
        timeout_s: Propose no further trial after so many seconds; None for no limit.
        on_trial: Called with every trial that finished here.
        clock: Seconds; replaced in tests.

    Raises:
        StudyError: If the storage cannot be used; trials that finished before are kept.
    """
    begin = clock()
    run = _Run(objective, predict_ms, goal, on_trial)
    studies = open_studies(storage, name, _sampler(seed), resume)
    for study in (studies.starts, studies.proposed):
        run.done += [_restored(trial, predict_ms) for trial in finished(study)]
    # Continued searches draw on from where they were, whatever was lost in between.
    studies.proposed.sampler = _sampler(seed + len(finished(studies.proposed)))
    try:
        _run_starts(studies.starts, starts, run)
        _run_proposed(studies, space, run, trials, lambda: _is_over(clock() - begin, timeout_s))
    except KeyboardInterrupt:
        return Found(tuple(run.done), goal, interrupted=True)
    except (OSError, optuna.exceptions.StorageInternalError) as error:
        raise StudyError(
            f"the search stopped after {len(run.done)} trials, as the next could not be kept "
            f"({error}); they are, and --resume goes on there"
        ) from error
    return Found(tuple(run.done), goal)


@dataclass
class _Run:
    """What the trials of one search share."""

    objective: Callable[[Schedule], Score]
    predict_ms: Callable[[Schedule], float]
    goal: Goal
    on_trial: Callable[[Trial], object]
    done: list[Trial] = field(default_factory=list)

    def tell(self, study: optuna.Study, trial: optuna.Trial, name: str, schedule: Schedule) -> None:
        """Run a schedule, once, and store what came of it."""
        latency_ms = self.predict_ms(schedule)
        trial.set_user_attr("name", name)
        trial.set_user_attr("schedule", encode(schedule))
        trial.set_user_attr("latency_ms", latency_ms)
        try:
            score, failure = self._score(schedule)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        # In every trial that is told: without a constraint Optuna takes it for feasible.
        mean = None if score is None else score.mean
        trial.set_constraint("excess", self.goal.excess(latency_ms, mean))
        if score is None:
            trial.set_user_attr("failure", failure)
            study.tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("score", score.value)
            trial.set_user_attr("judged", score.judged)
            trial.set_user_attr("figures", dict(score.figures))
            study.tell(trial, self.goal.value(latency_ms, score.value))
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


def _run_starts(study: optuna.Study, starts: Mapping[str, Schedule], run: _Run) -> None:
    known = {trial.schedule for trial in run.done}
    for name, schedule in starts.items():
        if schedule not in known:
            known.add(schedule)
            run.tell(study, study.ask(), name, schedule)


def _run_proposed(
    studies: Studies, space: Space, run: _Run, trials: int, is_over: Callable[[], bool]
) -> None:
    study = studies.proposed
    names = run.goal.parameters(space)
    number = len(finished(study))
    if number == 0:  # the knapsack's own answer, so that the sampler knows of it
        study.enqueue_trial(dict.fromkeys(names, 0.0), skip_if_exists=True)
    while number < trials and not is_over():
        trial = study.ask()
        weights = {each: trial.suggest_float(each, -LOG_WEIGHT, LOG_WEIGHT) for each in names}
        schedule = run.goal.proposed(space, weights)
        if schedule is None:
            study.tell(trial, state=TrialState.FAIL)
            return
        number += 1
        run.tell(study, trial, f"search {number}", schedule)


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    # The score is constant over whole regions of weights, which a smooth surrogate takes badly.
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=_RANDOM_TRIALS)


def _restored(trial: FrozenTrial, predict_ms: Callable[[Schedule], float]) -> Trial:
    kept = trial.user_attrs
    score = None
    if "score" in kept:
        score = Score(kept["score"], kept.get("figures", {}), kept.get("judged"))
    schedule = decode(kept["schedule"])
    latency_ms, failure = predict_ms(schedule), kept.get("failure")
    return Trial(kept["name"], schedule, latency_ms, score, failure, dict(trial.params))


def _value(trial: Trial) -> float:
    return math.inf if trial.score is None else trial.score.value


def _is_over(taken_s: float, timeout_s: float | None) -> bool:
    return timeout_s is not None and taken_s >= timeout_s


def storage_of(settings: Settings) -> optuna.storages.BaseStorage | str:
    """Return where trials are kept, in memory if nowhere else, so that a search can go on."""
    if settings.storage is None:
        return optuna.storages.InMemoryStorage()
    return settings.storage if isinstance(settings.storage, str) else str(settings.storage)


def study_name(job: Job, split: Split, frames: int) -> str:
    """Return a name that only a search of the same model, clips and settings has."""
    budget = job.settings.budget
    key = table_key(
        job.runner,
        split.clips,
        OPERATORS,
        budget=None if budget is None else budget.text,
        max_deviation=job.settings.max_deviation,
        objective=job.settings.objective,
        source=job.source,
        frames=frames,
        seed=job.settings.seed,
        choices=candidates.REVISION,
    )
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def searched(
    job: Job,
    evaluator: Evaluator,
    dense: DenseRuns,
    storage: optuna.storages.BaseStorage | str,
    name: str,
    problem: Problem,
    *,
    trials: int,
    others: dict[str, Schedule] | None = None,
) -> Found:
    """Search, or go on with a search under a corrected latency model, which ``others`` come of."""
    settings = job.settings
    starts = problem.starts(at_the_goal=others is not None) | (others or {})
    total = len(starts) + trials
    ran = 0

    def objective(schedule: Schedule) -> Score:
        qualities = evaluator.qualities(schedule, dense)
        value, mean = evaluator.search_value(qualities, dense)
        return Score(value, mean_figures(qualities), mean)

    def tell(trial: Trial) -> None:
        nonlocal ran
        ran += 1
        job.reporter.progress(step, min(ran, total), total)

    step = "search" if others is None else "search, corrected"
    job.reporter.progress(step, 0, total)
    found = search(
        problem.space,
        starts,
        objective,
        problem.predict_ms,
        problem.goal,
        trials=trials,
        seed=settings.seed,
        storage=storage,
        name=name,
        resume=settings.resume or others is not None,
        timeout_s=settings.timeout_s,
        on_trial=tell,
    )
    job.reporter.progress(
        step, min(len(found.trials), total), total
    )  # not all where it was stopped
    return found


def nothing_ran(found: Found, problem: Problem) -> str:
    """Return why a search has nothing to export."""
    failures = [trial for trial in found.trials if trial.failure]
    if failures:
        return (
            f"{len(failures)} of {len(found.trials)} trials failed and no other is allowed, the "
            f"first ('{failures[0].name}') with {failures[0].failure}"
        )
    scores = [trial.score.mean for trial in found.trials if trial.score is not None]
    if isinstance(problem.goal, WithinDeviation) and scores:
        return (
            f"no schedule that was tried deviates at most {problem.goal.most:.2%} from dense, the "
            f"least is {min(scores):.2%}: allow more, or give more --trials"
        )
    return "the search was stopped before a schedule within the budget had run"
