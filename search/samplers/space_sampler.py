"""What the samplers share: the space, Sobol points, and a trial's values at the rungs."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.space import Space, from_unit, to_distributions


class SpaceSampler(BaseSampler):
    """A sampler that draws every parameter of a known space jointly.

    Args:
        space: The domain of each parameter.
    """

    def __init__(self, space: Space) -> None:
        self._space = space

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Leave out what is fixed for an enqueued trial.

        Args:
            study: The sweep so far.
            trial: The trial to fill.

        Returns:
            The distribution of each parameter to draw.
        """
        fixed = trial.system_attrs.get("fixed_params", {})
        return {n: d for n, d in to_distributions(self._space).items() if n not in fixed}

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Refuse a parameter outside the space.

        Args:
            study: The sweep so far.
            trial: The trial to fill.
            param_name: The parameter.
            param_distribution: Its distribution.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"every parameter must be in the space, got {param_name!r}: add it to the space"
        )


class RungSampler(SpaceSampler):
    """A sampler that learns from the rungs of the trials before its own.

    Args:
        space: The domain of each parameter.
        seed: The seed of the sweep.
        trial_number: The number of the trial in the study.
        mode: "max" or "min".
        rung_epochs: The epochs at which trials are compared, ascending.
    """

    # Trials before there is a model, and the share of those after it that are drawn without.
    min_observations: ClassVar[int]
    random_share: ClassVar[float]

    def __init__(
        self,
        *,
        space: Space,
        seed: int,
        trial_number: int,
        mode: str,
        rung_epochs: tuple[int, ...],
    ) -> None:
        super().__init__(space)
        self._seed = seed
        self._trial_number = trial_number
        self._mode = mode
        self._rung_epochs = rung_epochs

    def is_blind(self, num_observed: int) -> bool:
        """Return whether the trial gets its params whatever the others reported.

        Args:
            num_observed: Trials that have reached the lowest rung.
        """
        is_random, _ = self._own_draws()
        return is_random or num_observed < self.min_observations

    def blind_point(self) -> dict[str, Any]:
        """Return the params of a trial that is drawn without the model: a Sobol sequence's."""
        return sobol_point(self._space, derive_seed(self._seed, "sobol"), self._trial_number)

    def _own_draws(self) -> tuple[bool, np.random.Generator]:
        """Return whether the trial is drawn at random, and where its other draws come from."""
        generator = np.random.default_rng(derive_seed(self._seed, self._trial_number))
        return generator.random() < self.random_share, generator


def others_of(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """Return a study's other trials, as far as they have params."""
    trials = study.get_trials(deepcopy=False)
    return [other for other in trials if other.number != trial.number and other.params]


def rung_values(trials: Sequence[FrozenTrial], epochs: Sequence[int], mode: str) -> np.ndarray:
    """Return each trial's best value up to each of some epochs.

    The best and not the last, since the best epoch's checkpoint is what a sweep keeps; the regret
    of the two could not be told apart. A complete trial that ended before the epoch had nothing
    more to gain, so it counts there too.

    Args:
        trials: Any trials.
        epochs: The rungs.
        mode: "max" or "min".

    Returns:
        Trials x rungs, float64; nan where a trial was stopped before, or diverged.
    """
    sign = 1.0 if mode == "max" else -1.0
    # All trials at once: every draw of a sweep asks for all that came before it.
    reports = [trial.intermediate_values for trial in trials]
    rows = np.repeat(np.arange(len(trials)), [len(report) for report in reports])
    steps = np.array([step for report in reports for step in report], int)
    values = sign * np.array([value for report in reports for value in report.values()], float)
    is_finite = np.isfinite(values)
    rows, steps, values = rows[is_finite], steps[is_finite], values[is_finite]
    last = np.zeros(len(trials))
    np.maximum.at(last, rows, steps)
    states = np.array([trial.state.value for trial in trials], int)
    last[states == TrialState.COMPLETE.value] = np.inf
    last[states == TrialState.FAIL.value] = -np.inf
    best = np.full((len(trials), len(epochs)), -np.inf)
    for rung, epoch in enumerate(epochs):
        is_seen = steps <= epoch
        np.maximum.at(best[:, rung], rows[is_seen], values[is_seen])
    is_known = np.isfinite(best) & (np.array(epochs) <= last[:, None])
    return np.where(is_known, sign * best, np.nan)


def sobol_point(space: Space, seed: int, index: int) -> dict[str, Any]:
    """Draw a point of a scrambled Sobol sequence: random, but more even than random points.

    Args:
        space: The domain of each parameter.
        seed: Which sequence.
        index: Which of its points.

    Returns:
        The value of each parameter.
    """
    # Here, not above: it takes a second to import, and most commands draw nothing.
    from scipy.stats import qmc  # type: ignore[import-untyped]

    engine = qmc.Sobol(len(space), scramble=True, rng=np.random.default_rng(seed))
    if index:
        engine.fast_forward(index)
    positions = engine.random(1)[0]
    return {
        name: from_unit(domain, float(position))
        for (name, domain), position in zip(space.items(), positions, strict=True)
    }
