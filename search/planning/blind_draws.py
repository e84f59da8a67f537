"""The params that a sweep's trials get whatever the trials before them report."""

from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState, create_trial

from search.samplers.sampler import build_sampler
from search.samplers.space_sampler import RungSampler
from search.space import to_distributions
from search.sweep import Sweep


class BlindDraws:
    """Asks a sweep's own sampler, as far as it needs no trial's results.

    A sampler that learns begins without: in a sweep of a few trials these are most of them. What
    ``grid`` and ``cma_es`` draw is left open.

    Args:
        sweep: Which one.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._distributions = to_distributions(sweep.space)
        self._empty = optuna.create_study()
        self._drawn: dict[int, dict[str, Any]] = {}

    def params(self, number: int, num_observed: int) -> dict[str, Any] | None:
        """Return what is searched of a trial's params; none if results decide.

        Args:
            number: The trial's; not the baseline's.
            num_observed: Trials that have reached the lowest rung.
        """
        sweep = self._sweep
        sampler = build_sampler(
            sweep.search.sampler,
            space=sweep.space,
            seed=sweep.seed,
            trial_number=number,
            mode=sweep.mode,
            rung_epochs=sweep.rung_epochs,
        )
        if isinstance(sampler, RungSampler):
            return sampler.blind_point(num_observed)
        if not isinstance(sampler, RandomSampler):
            return None
        if number not in self._drawn:
            trial = create_trial(state=TrialState.RUNNING)
            trial.number = number
            self._drawn[number] = {
                name: sampler.sample_independent(self._empty, trial, name, distribution)
                for name, distribution in self._distributions.items()
            }
        return self._drawn[number]
