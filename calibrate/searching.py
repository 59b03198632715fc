"""The search as a calibration runs it: judged on clips, kept under a name of its own."""

from __future__ import annotations

import hashlib
import json

import optuna

from spark3r.schedule import Schedule

from . import damage
from .evaluation import DenseRuns
from .goal import WithinDeviation
from .judge import Judge
from .problem import Problem
from .quality import mean_figures
from .search import Found, Score, Trial, search
from .settings import OPERATORS, Job, Settings
from .splits import Split
from .table_cache import table_key


def storage_of(settings: Settings) -> optuna.storages.BaseStorage | str:
    """Return where trials are kept, in memory if nowhere else, so that a search can go on."""
    if settings.storage is None:
        return optuna.storages.InMemoryStorage()
    return settings.storage if isinstance(settings.storage, str) else str(settings.storage)


def study_name(job: Job, split: Split, frames: int) -> str:
    """Return a name that only a search of the same model, clips and settings has."""
    budget = job.settings.budget
    key = table_key(
        job.model,
        split.clips,
        OPERATORS,
        job.family,
        job.dtype,
        budget=None if budget is None else budget.text,
        max_deviation=job.settings.max_deviation,
        objective=job.settings.objective,
        source=job.source,
        frames=frames,
        seed=job.settings.seed,
        choices=damage.REVISION,
    )
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def searched(
    job: Job,
    judge: Judge,
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
        qualities = judge.qualities(schedule, dense)
        value, mean = judge.search_value(qualities, dense)
        return Score(value, mean_figures(qualities), mean)

    def tell(trial: Trial) -> None:
        nonlocal ran
        ran += 1
        job.progress(step, min(ran, total), total)

    step = "search" if others is None else "search, corrected"
    job.progress(step, 0, total)
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
    job.progress(step, min(len(found.trials), total), total)  # not all where it was stopped
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
