"""Where the next trial's params come from: samplers that are built afresh for every trial.

A sampler here keeps nothing between trials. What it proposes is a function of the sweep seed, the
trial number and the trials in the study, so a sweep that is killed and resumed draws the params
that an unkilled one draws.
"""

import copy
import logging
import math
import random
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.samplers.gp_sampler import RungGPSampler
from search.samplers.space_sampler import RungSampler, SpaceSampler, others_of, rung_values
from search.space import Choice, Space, from_unit, grid_of, to_unit

SAMPLERS = ("tpe", "gp", "cma_es", "random", "grid")

# A model is fitted on a scratch study in memory, one for each proposal: not worth a line each.
logging.getLogger("optuna.storages._in_memory").setLevel(logging.WARNING)


def num_grid_points(space: Space) -> int:
    """Count the trials after which a grid search has tried everything.

    Args:
        space: The domain of each parameter.

    Returns:
        The number of points of the grid.
    """
    return math.prod(len(values) for values in grid_of(space).values())


def build_sampler(
    kind: str,
    *,
    space: Space,
    seed: int,
    trial_number: int,
    mode: str,
    rung_epochs: tuple[int, ...],
    costs: Mapping[str, float] = MappingProxyType({}),
) -> BaseSampler:
    """Build the sampler of one trial.

    Args:
        kind: One of `SAMPLERS`.
        space: The domain of each parameter.
        seed: The seed of the sweep.
        trial_number: The number of the trial in the study.
        mode: "max" or "min": which values of the metric are good.
        rung_epochs: The epochs at which trials are compared, ascending; the last is the longest
            training. Without early stopping it is the only one.
        costs: By backbone, where a cost is the second objective; only gp looks at it.

    Returns:
        A sampler for this trial only.

    Raises:
        InputError: There is no such sampler, or it cannot search this space.
    """
    trial_seed = derive_seed(seed, trial_number)
    match kind:
        case "tpe":
            return RungTPESampler(
                space=space,
                seed=seed,
                trial_number=trial_number,
                mode=mode,
                rung_epochs=rung_epochs,
            )
        case "gp":
            return RungGPSampler(
                space=space,
                seed=seed,
                trial_number=trial_number,
                mode=mode,
                rung_epochs=rung_epochs,
                costs=costs,
            )
        case "cma_es":
            return _CmaEsSampler(space=space, seed=trial_seed, mode=mode, rung_epochs=rung_epochs)
        case "random":
            return RandomSampler(seed=trial_seed)
        case "grid":
            return _GridSampler(space=space, seed=seed)
        case _:
            raise InputError(
                f"sampler must be one of {', '.join(SAMPLERS)}, got {kind!r}: choose one of them"
            )


def draw_params(
    sampler: BaseSampler,
    study: Study,
    trial_number: int,
    distributions: dict[str, BaseDistribution],
) -> dict[str, Any]:
    """Ask a sampler without creating a trial: `study.ask` commits param by param.

    Args:
        sampler: The trial's.
        study: The trials so far.
        trial_number: The number of the trial in the study.
        distributions: The distribution of each parameter.

    Returns:
        The value of each parameter.
    """
    stand_in = create_trial(state=TrialState.RUNNING)
    stand_in.number = trial_number
    drawn = dict(sampler.sample_relative(study, stand_in, distributions))
    for name, distribution in distributions.items():
        if name not in drawn:
            drawn[name] = sampler.sample_independent(study, stand_in, name, distribution)
    return drawn


class RungTPESampler(RungSampler):
    """TPE with a model of its own for each rung of ASHA, after BOHB.

    Optuna's TPE ranks a trial that was stopped after 3 epochs by its value there, beside trials
    that trained to the end; Ray's OptunaSearch even tells it as complete. As BOHB does (Falkner et
    al. 2018, arXiv 1807.01774), this one compares trials at one epoch only: that of the highest
    rung which enough trials have reached, for ASHA (Li et al. 2018, arXiv 1810.05934) leaves few at
    the top. Trials stopped below that rung are left out: placed behind those that reached it, they
    undo the gain, since early losers then decide what counts as bad.
    """

    # Levers set by measurement on 17 of the 34 tasks of experiments/benchmarks/search_quality.py,
    # the second on our own table, too; mean regret ± standard error over seeds, less is better.
    #
    # The model begins with so many trials at the lowest rung: at a budget of 10 full trainings
    # 0.283 ± 0.005 with 5, 0.314 ± 0.006 with 10, 0.322 ± 0.005 with 20 (30 seeds, a sixth random);
    # 3 is no better than 5.
    min_observations = 5
    # Then it looks at the highest rung that so many have reached. On smooth curves fewer would do:
    # at budgets of 10 and 60 0.330 and 0.153 with 5, 0.374 and 0.160 with 16 (all tasks, 5 seeds).
    # Where they are noisy, as fine-tuning's are, luck decides among few: at budgets of 40 and 60 on
    # our own table 0.384 and 0.337 with 5, 0.276 and 0.273 with 16 (80 seeds; it has a third seed
    # a network since 16 was chosen).
    min_higher = 16
    # What is drawn without the model keeps it from staying with what it found first. BOHB's own
    # share; a budget of 60 does not tell it from less: 0.116 ± 0.007, a sixth 0.118 ± 0.006, none
    # 0.128 ± 0.009. These trials, and those before the model, are points of a Sobol sequence, which
    # at a budget of 5 gives 0.414 ± 0.007 where plain random draws give 0.445 ± 0.008.
    random_share = 1 / 3

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose the params of a trial.

        Args:
            study: The sweep so far.
            trial: The trial to fill.
            search_space: The distribution of each parameter.

        Returns:
            The value of each parameter.
        """
        if not search_space:
            return {}
        trials = others_of(study, trial)
        values = rung_values(trials, self._rung_epochs, self._mode)
        num_known = np.isfinite(values).sum(axis=0).tolist()
        if self.is_blind(num_known[0]):
            return self.blind_point()
        rung = max(r for r, known in enumerate(num_known) if r == 0 or known >= self.min_higher)
        trial_seed = derive_seed(self._seed, self._trial_number)
        at_rung = [None if math.isnan(value) else value for value in values[:, rung].tolist()]
        observed = self._observations(trials, at_rung)
        return _propose(trial_seed, observed, search_space, self._mode)

    def _observations(
        self, trials: Sequence[FrozenTrial], values: Sequence[float | None]
    ) -> list[tuple[FrozenTrial, float | None]]:
        """Return what is known at a rung: trials and their value, None for those still running."""
        known = [value for value in values if value is not None]
        worst = min(known) if self._mode == "max" else max(known)
        observed: list[tuple[FrozenTrial, float | None]] = []
        for trial, value in zip(trials, values, strict=True):
            if value is not None:
                observed.append((trial, value))
            elif trial.state == TrialState.FAIL:
                # Diverged: no value, but bad everywhere, so it warns at every rung.
                observed.append((trial, worst))
            elif trial.state == TrialState.RUNNING:
                observed.append((trial, None))
        return observed


class _CmaEsSampler(SpaceSampler):
    """CMA-ES whose state is rebuilt from the finished trials for every proposal.

    Optuna's own keeps its optimizer as a pickle in the study, which nobody should have to load to
    resume a sweep, and it waits for complete trials, of which early stopping leaves few. Choices
    have no order, so they are drawn at random.
    """

    def __init__(self, *, space: Space, seed: int, mode: str, rung_epochs: tuple[int, ...]) -> None:
        super().__init__(space)
        self._seed = seed
        self._mode = mode
        self._rung_epochs = rung_epochs
        self._numeric = {
            name: domain for name, domain in space.items() if not isinstance(domain, Choice)
        }
        if not self._numeric:
            raise InputError(
                "cma_es needs at least one float or int parameter, got only choices: "
                "use the tpe sampler"
            )

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        # Here, not above: it takes a second to import, and most commands draw nothing.
        import cmaes  # type: ignore[import-untyped]

        dimension = len(self._numeric)
        optimizer = cmaes.CMA(
            mean=np.full(dimension, 0.5),
            sigma=1 / 6,  # so that the first generation covers the range: three sigmas a side
            bounds=np.tile([0.0, 1.0], (dimension, 1)),
            n_max_resampling=10 * dimension,
        )
        # In order of completion, so that a trial that ends late does not change generations past.
        finished = sorted(
            (t for t in study.get_trials(deepcopy=False) if t.state.is_finished()),
            key=lambda t: (t.datetime_complete, t.number),
        )
        size = optimizer.population_size
        for start in range(0, len(finished) - size + 1, size):
            generation = finished[start : start + size]
            ranked = sorted(generation, key=self._badness)
            optimizer.tell([(self._position(t), float(rank)) for rank, t in enumerate(ranked)])
        optimizer.reseed_rng(self._seed)
        positions = dict(zip(self._numeric, optimizer.ask(), strict=True))
        generator = np.random.default_rng(self._seed)
        return {
            name: from_unit(domain, float(positions.get(name, generator.random())))
            for name, domain in self._space.items()
        }

    def _position(self, trial: FrozenTrial) -> np.ndarray:
        return np.array([to_unit(d, trial.params[name]) for name, d in self._numeric.items()])

    def _badness(self, trial: FrozenTrial) -> tuple[float, float]:
        # CMA-ES looks at ranks only. A trial that got further beats one that was stopped before.
        values = rung_values([trial], self._rung_epochs, self._mode)[0].tolist()
        for epoch, value in zip(reversed(self._rung_epochs), reversed(values), strict=True):
            if not math.isnan(value):
                return -epoch, -value if self._mode == "max" else value
        return 0, math.inf


class _GridSampler(SpaceSampler):
    """Every point of the grid once, in an order shuffled by the sweep seed.

    Optuna's own draws from what is left, and begins anew without a word when nothing is.
    """

    def __init__(self, *, space: Space, seed: int) -> None:
        super().__init__(space)
        self._seed = seed

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        # Enqueued trials, such as the baseline, take a number but no point.
        earlier = study.get_trials(deepcopy=False)[: trial.number]
        index = sum("fixed_params" not in t.system_attrs for t in earlier)
        size = num_grid_points(self._space)
        if index >= size:
            raise InputError(
                f"a grid of {size} points gives {size} trials, got a request for one more: "
                "lower num_trials"
            )
        remainder = _permuted(index, size, self._seed)
        params = {}
        for name, values in grid_of(self._space).items():
            remainder, position = divmod(remainder, len(values))
            params[name] = values[position]
        return params


def _propose(
    seed: int,
    observed: Sequence[tuple[FrozenTrial, float | None]],
    distributions: dict[str, BaseDistribution],
    mode: str,
) -> dict[str, Any]:
    """Ask Optuna's TPE, over a scratch study of values at one rung."""
    trials = [
        FrozenTrial(
            number=number,
            # Running trials stay so: TPE keeps away from them (constant liar), so that workers that
            # ask at the same time do not get the same params.
            state=TrialState.RUNNING if value is None else TrialState.COMPLETE,
            value=value,
            datetime_start=None,
            datetime_complete=None,
            params={name: trial.params[name] for name in distributions},
            distributions=distributions,
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=number,
        )
        for number, (trial, value) in enumerate(observed, start=1)  # 0 is the one that is asked for
    ]
    scratch = optuna.create_study(
        storage=_Observations(trials),
        direction="maximize" if mode == "max" else "minimize",
        sampler=TPESampler(n_startup_trials=1, seed=seed),
    )
    return scratch.ask(distributions).params


class _Observations(InMemoryStorage):
    """A study of given trials. Optuna's own copies every trial that it is given, deeply.

    Args:
        trials: Numbered from 1, in order.
    """

    def __init__(self, trials: list[FrozenTrial]) -> None:
        super().__init__()
        self._trials = trials

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        trials = [trial for trial in self._trials if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


def _permuted(index: int, size: int, seed: int) -> int:
    """Return the number at an index of a shuffled range, without building the range."""
    generator = random.Random(seed)  # noqa: S311 - an order, not a secret
    moved: dict[int, int] = {}
    chosen = 0
    for step in range(index + 1):  # Fisher-Yates, only as far as asked
        pick = generator.randrange(step, size)
        chosen = moved.get(pick, pick)
        moved[pick] = moved.get(step, step)
    return chosen
