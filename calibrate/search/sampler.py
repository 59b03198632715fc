"""The sampler of a search's parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial

from ..defaults import RANDOM_TRIALS
from .queue import KEY


class KeyedSampler(optuna.samplers.BaseSampler):
    """Draws every trial with a TPE sampler of its own, seeded by the search's seed and its key.

    A search that was continued draws the same as an undisturbed one, and no two processes draw the
    same. A trial that another process runs counts as a bad one meanwhile (constant liar), so that
    processes do not crowd.

    Args:
        seed: Seed of the search.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._own = self._sampler(0)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        own = int(np.random.SeedSequence((self._seed, number)).generate_state(1)[0])
        # The score is constant over whole regions of weights, which does not suit a smooth
        # surrogate.
        return optuna.samplers.TPESampler(
            seed=own, n_startup_trials=RANDOM_TRIALS, constant_liar=True
        )

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Begin a trial, whose key is its number in the search."""
        key = str(trial.user_attrs.get(KEY, ""))
        self._own = self._sampler(int(key) if key.isdigit() else 0)
        self._own.before_trial(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that are drawn together."""
        return self._own.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return values of the parameters that are drawn together."""
        return self._own.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the value of one parameter."""
        return self._own.sample_independent(study, trial, param_name, param_distribution)
