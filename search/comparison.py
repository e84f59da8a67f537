"""How sure one can be of which candidate is best, when each was trained with the same few seeds."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student_t  # type: ignore[import-untyped]

Floats = npt.NDArray[np.float64]

NUM_DRAWS = 100_000


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval; infinite where there is one seed only.

    Attributes:
        mean: Over seeds.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:.4f}"
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def interval(values: Floats) -> Interval:
    """Return the mean and its 95 % interval by Student's t.

    Args:
        values: Shape ``(N,)``, one a seed.
    """
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    reach = float(student_t.ppf(0.975, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def paired_difference(one: Floats, other: Floats) -> Interval:
    """Return how far one candidate is above another, seed by seed.

    Args:
        one: Shape ``(N,)``, one a seed.
        other: The same seeds.
    """
    return interval(one - other)


def probability_best(values: Floats, seed: int = 0) -> Floats:
    """Return each candidate's probability of having the highest mean.

    What a seed does to all candidates alike is taken out, and what is left is taken to be normal,
    with one variance for all: with three seeds there is none to estimate for each. The means are
    then drawn from their posterior under a flat prior, a Student's t of ``(K - 1)(N - 1)`` degrees
    of freedom.

    Args:
        values: Shape ``(K, N)``: candidates by seeds, higher is better.
        seed: Of the draws.

    Returns:
        Shape ``(K,)``, summing to 1. One seed says nothing: all are alike then.

    References:
        Box and Tiao, Bayesian Inference in Statistical Analysis (1973), sections 2.4 and 6.3.
    """
    num_candidates, num_seeds = values.shape
    if num_candidates == 1 or num_seeds == 1:
        return np.full(num_candidates, 1 / num_candidates)
    means = values.mean(axis=1)
    noise = values - means[:, None] - values.mean(axis=0) + values.mean()
    freedom = (num_candidates - 1) * (num_seeds - 1)
    variance = float((noise**2).sum()) / freedom
    rng = np.random.default_rng(seed)
    spread = np.sqrt(variance / num_seeds * freedom / rng.chisquare(freedom, (NUM_DRAWS, 1)))
    drawn = means + spread * rng.standard_normal((NUM_DRAWS, num_candidates))
    best = drawn == drawn.max(axis=1, keepdims=True)  # without noise, several are
    return np.asarray((best / best.sum(axis=1, keepdims=True)).mean(axis=0))
