"""The params that a sweep's trials get whatever the trials before them report."""

from typing import Any

import optuna
from optuna.samplers import RandomSampler

from search.samplers.sampler import build_sampler, draw_params
from search.samplers.space_sampler import RungSampler
from search.space import to_distributions
from search.sweep import Sweep


class BlindDraws:
    """Asks a sweep's own sampler, which knows beforehand what a model need not decide.

    A sampler that learns begins without a model: in a sweep of a few trials these are most of them.
    Left out are ``grid``, where it would take time with the square of the number of trials, and the
    first draws of ``cma_es``.

    Args:
        sweep: Which one.
    """

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._distributions = to_distributions(sweep.space)
        self._empty = optuna.create_study()
        self._drawn: dict[int, dict[str, Any]] = {}

    def params(self, number: int, num_observed: int) -> dict[str, Any] | None:
        """Return what is searched of a trial's params; none if it is not known beforehand.

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
            if not sampler.is_blind(num_observed):
                return None
        elif not isinstance(sampler, RandomSampler):
            return None
        if number not in self._drawn:
            self._drawn[number] = draw_params(sampler, self._empty, number, self._distributions)
        return self._drawn[number]
