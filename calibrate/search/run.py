"""The search of a job: on clips, joined, or by the knapsack alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import optuna

from spark3r.errors import Spark3rError
from spark3r.schedule import Schedule

from ..clips import Split
from ..defaults import OPERATORS
from ..measure.cache import table_key
from ..measure.evaluator import DenseRuns, Evaluator
from ..measure.quality import mean_figures
from ..settings import Job
from . import candidates
from .joining import Joined, join, problem_document
from .optimizer import Found, Score, SearchOptions, Trial, optimize
from .problem import DeviationLimit, SearchProblem
from .storage import check_storage, is_shared


def search_options(job: Job, split: Split, frames: int) -> SearchOptions:
    """Return the options of a job's search at a target length.

    Without a storage the studies are kept in memory, so that the search can be continued.

    Raises:
        StudyError: If the storage cannot be opened, holds this search and `Settings.resume` is not
            set, or holds only others and it is.
    """
    settings = job.settings
    name = _search_name(job, split, frames)
    check_storage(settings.storage, name, settings.resume, job.reporter.say)
    return SearchOptions(
        trials=settings.trials,
        seed=settings.seed,
        storage=settings.storage or optuna.storages.InMemoryStorage(),
        name=name,
        resume=settings.resume,
    )


def _search_name(job: Job, split: Split, frames: int | None) -> str:
    """Return the name of a search's studies, or its beginning if the target length is not known.

    Its hash is one that only a search of the same model, clips and settings has.
    """
    settings = job.settings
    key = table_key(
        job,
        split.clips,
        OPERATORS,
        budget=None if settings.budget is None else settings.budget.text,
        max_deviation=settings.max_deviation,
        source=job.source,
        seed=settings.seed,
        choices=candidates.REVISION,
    )
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return f"{name}, " if frames is None else f"{name}, {frames} frames"


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
        repeated: Schedules to run beside the knapsack's answer after the latency model was
            corrected, instead of proposing any; None before. Rivals of other kinds are those that
            ran before and hold.
    """
    if repeated is None:
        step, initial = "search", problem.initial_schedules()
    else:
        step, initial = "search, corrected", dict(repeated)
        if (answer := problem.knapsack()) is not None:
            initial = {"knapsack": answer} | initial
        options = replace(options, trials=0, resume=True, corrected=True)
    if repeated is None and is_shared(options.storage):
        options = replace(options, document=problem_document(problem))
    total = len(initial) + options.trials
    ran = 0

    def on_trial(trial: Trial) -> None:
        nonlocal ran
        ran += 1
        job.reporter.progress(step, min(ran, total), total)

    job.reporter.progress(step, 0, total)
    objective = partial(_score, evaluator, dense)
    found = optimize(problem, initial, objective, options, on_trial=on_trial)
    job.reporter.progress(step, min(len(found.trials), total), total)  # not all if interrupted
    return found


def join_search(job: Job, split: Split, evaluator: Evaluator, dense: DenseRuns) -> Joined:
    """Run trials of a job's search that another process began.

    Args:
        job: The job.
        split: Clips by role.
        evaluator: Runs and scores.
        dense: Dense runs of the search clips.

    Raises:
        StudyError: As `calibrate.search.joining.join`.
    """
    settings = job.settings
    return join(
        settings.storage,
        _search_name(job, split, settings.target_frames),
        settings.seed,
        partial(_score, evaluator, dense),
        timeout_s=settings.time_limit_s,
        progress=job.reporter.step("search, all processes"),
        say=job.reporter.say,
    )


def _score(evaluator: Evaluator, dense: DenseRuns, schedule: Schedule) -> Score:
    """Return the score of a schedule on clips."""
    qualities = evaluator.qualities(schedule, dense)
    value, mean = evaluator.search_value(qualities, dense)
    return Score(value, mean_figures(qualities), mean)


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
