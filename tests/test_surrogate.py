"""The Gaussian process against its textbook formulas, written out."""

import math

import numpy as np
import pytest
from scipy.integrate import quad  # type: ignore[import-untyped]
from scipy.stats import multivariate_normal, norm  # type: ignore[import-untyped]

from search.samplers.gp_sampler import compress
from search.samplers.surrogate import Surrogate, log_expected_improvement

UNORDERED = np.array([False, False, True])


def observations(count: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    points = generator.random((count, 3))
    points[:, 2] = generator.choice([0.25, 0.75], count)
    rungs = generator.choice([0.0, 0.5, 1.0], count)
    values = np.sin(5 * points[:, 0]) + points[:, 1] * (points[:, 2] > 0.5) + rungs
    return points, rungs, values


def fitted(count: int = 24) -> Surrogate:
    return Surrogate(*observations(count), unordered=UNORDERED, num_fitted=count)


def covariance(log_hyperparameters: np.ndarray, one: tuple, other: tuple) -> float:
    """Of two (params, rung), number by number."""
    *lengthscales, rung_lengthscale, signal, _ = np.exp(log_hyperparameters).tolist()
    (a, rung), (b, other_rung) = one, other
    square = ((a[0] - b[0]) / lengthscales[0]) ** 2 + ((a[1] - b[1]) / lengthscales[1]) ** 2
    square += (a[2] != b[2]) / lengthscales[2] ** 2
    root = math.sqrt(5 * square)
    matern = (1 + root + root**2 / 3) * math.exp(-root)
    decay = math.exp(-abs(rung - other_rung) / rung_lengthscale)
    return signal * matern * decay + 1 + (rung == other_rung)


def matrix(log_hyperparameters: np.ndarray, ones: list, others: list) -> np.ndarray:
    return np.array([[covariance(log_hyperparameters, a, b) for b in others] for a in ones])


def posterior(
    theta: np.ndarray, seen: list, values: np.ndarray, asked: list, mean: float
) -> tuple[np.ndarray, np.ndarray]:
    noisy = matrix(theta, seen, seen) + (math.exp(theta[-1]) + 1e-6) * np.eye(len(seen))
    gain = matrix(theta, asked, seen) @ np.linalg.inv(noisy)
    variance = np.diag(matrix(theta, asked, asked) - gain @ matrix(theta, seen, asked))
    return mean + gain @ (values - mean), np.sqrt(variance)


@pytest.mark.parametrize("rung", [0.5, 1.0])
def test_the_posterior_is_that_of_the_textbook(rung: float) -> None:
    points, rungs, values = observations()
    model = fitted()
    new = np.array([[0.1, 0.9, 0.25], [0.5, 0.5, 0.75], points[3]])
    seen = list(zip(points, rungs, strict=True))
    asked = [(point, rung) for point in new]
    mean, std = posterior(model.log_hyperparameters, seen, values, asked, values.mean())
    predicted_mean, predicted_std = model.predict(new, rung)
    assert predicted_mean == pytest.approx(mean, abs=1e-6)
    assert predicted_std == pytest.approx(values.std() * std, abs=1e-6)


def test_what_is_assumed_counts_as_seen_at_the_end() -> None:
    points, rungs, values = observations()
    model = fitted()
    assumed = np.array([[0.3, 0.3, 0.25], [0.6, 0.1, 0.75]])
    model.assume(assumed, np.array([5.0, -1.0]))
    seen = [*zip(points, rungs, strict=True), *((point, 1.0) for point in assumed)]
    new = np.array([[0.3, 0.3, 0.25], [0.5, 0.5, 0.75]])
    mean, std = posterior(
        model.log_hyperparameters,
        seen,
        np.concatenate([values, [5.0, -1.0]]),
        [(point, 1.0) for point in new],
        values.mean(),
    )
    predicted_mean, predicted_std = model.predict(new)
    assert predicted_mean == pytest.approx(mean, abs=1e-6)
    assert predicted_std == pytest.approx(values.std() * std, abs=1e-6)


def test_the_loss_is_the_likelihood_times_the_priors() -> None:
    points, rungs, values = observations()
    model = fitted()
    seen = list(zip(points, rungs, strict=True))
    scaled = (values - values.mean()) / values.std()

    def written_out(theta: np.ndarray) -> float:
        noisy = matrix(theta, seen, seen) + (math.exp(theta[-1]) + 1e-6) * np.eye(len(seen))
        priors = norm.logpdf(theta[:-1]).sum() + norm.logpdf(theta[-1], math.log(1e-3), 1.5)
        return float(-multivariate_normal.logpdf(scaled, cov=noisy) - priors)

    one, other = np.array([-0.5, 0.3, 0.1, 0.2, 0.4, -4.0]), np.array([0, 0, 0, 0, 0, -3.0])
    everything = np.arange(len(values))
    difference = model.loss(one, everything)[0] - model.loss(other, everything)[0]
    assert difference == pytest.approx(written_out(one) - written_out(other), rel=1e-6)


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    model = fitted()
    everything = np.arange(24)
    theta = np.array([-0.5, 0.3, 0.1, 0.2, 0.4, -4.0])
    slopes = []
    for step in 1e-5 * np.eye(len(theta)):
        above, below = (model.loss(theta + s, everything)[0] for s in (step, -step))
        slopes.append((above - below) / 2e-5)
    assert model.loss(theta, everything)[1] == pytest.approx(slopes, rel=1e-4, abs=1e-5)


def test_the_end_is_learned_although_only_the_best_reach_it() -> None:
    # Values grow by 3 from rung 0 to rung 1, and only the best five of thirty go on.
    x = np.linspace(0, 1, 30)
    low = 2 * x
    points = np.concatenate([x, x[-5:]])[:, None]
    rungs = np.concatenate([np.zeros(30), np.ones(5)])
    values = np.concatenate([low, low[-5:] + 3])
    model = Surrogate(points, rungs, values, unordered=np.array([False]), num_fitted=35)
    mean, _ = model.predict(np.array([[0.5]]))
    assert mean == pytest.approx([4.0], abs=0.2)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (2.0, 0.1), (-1.0, 0.4), (-6.0, 1.0)])
def test_the_expected_improvement_is_an_integral(mean: float, std: float) -> None:
    integral, _ = quad(
        lambda y: (y - 0.5) * norm.pdf(y, mean, std), 0.5, 0.5 + 12 * std + abs(mean), epsabs=0
    )
    logarithm = log_expected_improvement(np.array([mean]), np.array([std]), 0.5)
    assert logarithm == pytest.approx([math.log(integral)], rel=1e-6)


def test_the_expected_improvement_is_finite_and_ordered_far_below_the_best() -> None:
    means = -np.logspace(1, 7, 200)
    logarithms = log_expected_improvement(means, np.ones(200), 0.0)
    assert np.isfinite(logarithms).all()
    assert (np.diff(logarithms) < 0).all()


def test_compressed_values_keep_their_order() -> None:
    # The median is 4, the best 6: 5 lies half way up; 2 lies one such step below, 0 two.
    values = np.array([4.0, 6.0, 5.0, 2.0, 0.0])
    assert compress(values) == pytest.approx([0, 1, 0.5, -math.log(2), -math.log(3)])
    assert compress(np.array([1.0, 1.0])).tolist() == [0, 0]
