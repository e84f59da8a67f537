"""Which params tell the best trials from the others, and how far that can be told from chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import optuna
from optuna.distributions import BaseDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from search.report.findings import MIN_BEST, Compared, Findings
from search.space import to_distributions
from search.study.tables import KnownTrials

NUM_RESAMPLES = 100

# PED-ANOVA compares the best share of the trials with all of them.
_BEST_SHARE = 0.1

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Importance:
    """One param's.

    Attributes:
        share: Of what all params tell together, 0 to 1.
        low: Lower end of the 95 % interval of the share over resampled trials.
        high: Upper end.
        p_value: How often values that are shuffled among the trials tell as much, by chance.
    """

    share: float
    low: float
    high: float
    p_value: float


def measure_importance(
    findings: Findings, compared: Compared, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> dict[str, Importance]:
    """Return how much each searched param has to do with being among the best at an epoch.

    PED-ANOVA: the best tenth of the trials, at least five, against all of them. What is compared
    are distributions of params as drawn, so that a sampler's liking for a region is no importance.

    Args:
        findings: The sweep's.
        compared: The trials, and what they are compared by.
        num_resamples: Of the trials, for the interval; as many shufflings for the p-value.
        seed: Of both.

    Returns:
        By param, the most important first.

    References:
        Watanabe et al., "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary
        Subspaces", https://arxiv.org/abs/2304.10255.
    """
    distributions = to_distributions(findings.sweep.space)
    names = list(distributions)
    trials = _as_complete(findings, compared, distributions)
    storage = InMemoryStorage()
    optuna.create_study(storage=storage, study_name="compared")
    evaluator = PedAnovaImportanceEvaluator(target_quantile=best_share(len(trials)))

    def evaluate(chosen: list[FrozenTrial]) -> Floats:
        found = evaluator.evaluate(KnownTrials("compared", storage, chosen), names)
        return np.array([found[name] for name in names])

    rng = np.random.default_rng(seed)
    raw = evaluate(trials)
    resampled, shuffled = [], []
    for _ in range(num_resamples):
        rows = rng.integers(0, len(trials), len(trials))
        resampled.append(_shares(evaluate([trials[row] for row in rows])))
        order = rng.permutation(len(trials))
        shuffled.append(evaluate(_with_values_of(trials, [trials[row] for row in order])))
    lows, highs = np.percentile(resampled, [2.5, 97.5], axis=0)
    # The order as it is counts as one of the shufflings: a p-value is never 0.
    p_values = (1 + (np.array(shuffled) >= raw).sum(axis=0)) / (1 + num_resamples)
    found = {
        name: Importance(*map(float, row))
        for name, *row in zip(names, _shares(raw), lows, highs, p_values, strict=True)
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].share))


def best_share(num_trials: int) -> float:
    """Return the share of the trials that count as the best."""
    return max(_BEST_SHARE, MIN_BEST / num_trials)


def _shares(raw: Floats) -> Floats:
    total = float(raw.sum())
    return raw / total if total > 0 else np.full(len(raw), 1 / len(raw))


def _as_complete(
    findings: Findings, compared: Compared, distributions: dict[str, BaseDistribution]
) -> list[FrozenTrial]:
    sign = -1.0 if findings.sweep.mode == "max" else 1.0
    losses = {number: sign * value for number, value in compared.values.items()}
    worst = max(losses.values(), default=0.0)
    losses |= dict.fromkeys(compared.diverged, math.nextafter(worst, math.inf))
    return [
        _complete(
            trial.number,
            losses[trial.number],
            {name: getattr(trial.params, name) for name in distributions},
            distributions,
        )
        for trial in findings.trials
        if trial.number in losses
    ]


def _with_values_of(
    trials: Sequence[FrozenTrial], others: Sequence[FrozenTrial]
) -> list[FrozenTrial]:
    return [
        _complete(trial.number, float(other.value or 0.0), trial.params, trial.distributions)
        for trial, other in zip(trials, others, strict=True)
    ]


def _complete(
    number: int, loss: float, params: dict[str, object], distributions: dict[str, BaseDistribution]
) -> FrozenTrial:
    # Not `create_trial`: PED-ANOVA tells trials apart by an id, and there all have the same.
    return FrozenTrial(
        number=number,
        state=TrialState.COMPLETE,
        value=loss,
        datetime_start=None,
        datetime_complete=None,
        params=params,
        distributions=distributions,
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )
