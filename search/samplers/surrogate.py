"""The model of the gp sampler: a Gaussian process over params and rungs, and its expected gain."""

import math

import numpy as np
from scipy.linalg import cho_solve, lapack, solve_triangular  # type: ignore[import-untyped]
from scipy.optimize import minimize  # type: ignore[import-untyped]
from scipy.special import erfcx, ndtr  # type: ignore[import-untyped]

# Variances of a shift that all trials share and of one that all trials share at one rung. Large
# beside the values, whose variance is 1: where a rung lies is read from the trials that have
# reached it, with the help of what the same trials did below, so it does not matter that only good
# trials reach the upper rungs.
_SHIFT_VARIANCE = 1.0
_RUNG_SHIFT_VARIANCE = 1.0
_JITTER = 1e-6  # keeps the Cholesky factor real where two trials have the same params
# Gaussian priors of the logarithms, mean and standard deviation. Params and rungs lie in [0, 1],
# values have variance 1. Training is noisy, but far less than params are different.
_LENGTHSCALE_PRIOR = (0.0, 1.0)
_SIGNAL_PRIOR = (0.0, 1.0)
_NOISE_PRIOR = (math.log(1e-3), 1.5)
_LENGTHSCALE_BOUNDS = (-4.0, 4.0)
_SIGNAL_BOUNDS = (-4.0, 4.0)
_NOISE_BOUNDS = (math.log(1e-5), 0.0)
_FIRST_LENGTHSCALE = 0.7
_MAX_ITERATIONS = 15  # of L-BFGS, which takes most of a proposal's time
_SQRT_5 = math.sqrt(5)


class Surrogate:
    """A Gaussian process of the metric over params and rungs, fitted to values of all rungs.

    The covariance of two values is signal x Matern 5/2 of the params (a lengthscale each) x
    exp(-|rung - rung'| / lengthscale), plus the two shifts above. A param without an order is at
    distance 0 from itself and 1 from everything else.

    Args:
        points: Params, values x params, in [0, 1].
        rungs: Where each value was seen: 1 is the end of the training, 0 the first rung.
        values: More is better.
        unordered: Which params have no order.
        num_fitted: The hyperparameters are fitted to at most so many of the values, evenly chosen;
            the posterior uses all of them.

    References:
        Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006, chapters 2, 4, 5.
    """

    def __init__(
        self,
        points: np.ndarray,
        rungs: np.ndarray,
        values: np.ndarray,
        *,
        unordered: np.ndarray,
        num_fitted: int,
    ) -> None:
        self._unordered = unordered
        self._mean = float(values.mean())
        self._std = float(values.std()) or 1.0
        self._points, self._rungs = points, rungs
        self._values = (values - self._mean) / self._std
        chosen = np.unique(np.linspace(0, len(values) - 1, num_fitted).astype(int))
        self.log_hyperparameters = self._fit(chosen)
        self._condition()

    def predict(self, points: np.ndarray, rung: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Predict the metric without noise.

        Args:
            points: Params, predictions x params, in [0, 1].
            rung: Where in the training, 1 its end.

        Returns:
            Mean and standard deviation of each prediction.
        """
        rungs = np.full(len(points), rung)
        cross = self._covariance(points, rungs, self._points, self._rungs)
        mean = cross @ self._weights
        explained = solve_triangular(self._factor, cross.T, lower=True, check_finite=False)
        prior = math.exp(self.log_hyperparameters[-2]) + _SHIFT_VARIANCE + _RUNG_SHIFT_VARIANCE
        variance = np.maximum(prior - (explained**2).sum(axis=0), 1e-10)
        return self._mean + self._std * mean, self._std * np.sqrt(variance)

    def assume(self, points: np.ndarray, values: np.ndarray) -> None:
        """Take values at the end of the training as seen, without a new fit.

        Args:
            points: Params, values x params, in [0, 1].
            values: One for each point.
        """
        self._points = np.vstack([self._points, points])
        self._rungs = np.concatenate([self._rungs, np.ones(len(points))])
        self._values = np.concatenate([self._values, (values - self._mean) / self._std])
        self._condition()

    def loss(self, log_hyperparameters: np.ndarray, chosen: np.ndarray) -> tuple[float, np.ndarray]:
        """Compute what the fit minimises: negative log of marginal likelihood x priors.

        Args:
            log_hyperparameters: The lengthscale of each param, that of the rungs, the signal
                variance, the noise variance.
            chosen: Which of the values to fit.

        Returns:
            The loss up to a constant, and its gradient.
        """
        squares = _squared_differences(self._points[chosen], self._points[chosen], self._unordered)
        gaps = np.abs(np.subtract.outer(self._rungs[chosen], self._rungs[chosen]))
        return self._loss(log_hyperparameters, squares, gaps, self._values[chosen])

    def _fit(self, chosen: np.ndarray) -> np.ndarray:
        squares = _squared_differences(self._points[chosen], self._points[chosen], self._unordered)
        gaps = np.abs(np.subtract.outer(self._rungs[chosen], self._rungs[chosen]))
        num_params = len(self._unordered)
        first = [math.log(_FIRST_LENGTHSCALE)] * num_params + [0.0, 0.0, _NOISE_PRIOR[0]]
        fitted = minimize(
            self._loss,
            np.array(first),
            args=(squares, gaps, self._values[chosen]),
            jac=True,
            method="L-BFGS-B",
            bounds=[_LENGTHSCALE_BOUNDS] * (num_params + 1) + [_SIGNAL_BOUNDS, _NOISE_BOUNDS],
            options={"maxiter": _MAX_ITERATIONS},
        )
        return np.asarray(fitted.x)

    def _loss(
        self, log_hyperparameters: np.ndarray, squares: np.ndarray, gaps: np.ndarray, y: np.ndarray
    ) -> tuple[float, np.ndarray]:
        count, _, num_params = squares.shape
        inverse_squares = np.exp(-2 * log_hyperparameters[:num_params])
        rung_lengthscale, signal, noise = np.exp(log_hyperparameters[num_params:])
        root = _SQRT_5 * np.sqrt(squares @ inverse_squares)
        decay = signal * np.exp(-root - gaps / rung_lengthscale)
        process = (1 + root + root**2 / 3) * decay
        covariance = process + _SHIFT_VARIANCE + _RUNG_SHIFT_VARIANCE * (gaps == 0)
        covariance[np.diag_indices(count)] += noise + _JITTER
        factor, failed = lapack.dpotrf(covariance, lower=1)
        if failed:
            return 1e10, np.zeros_like(log_hyperparameters)
        lower, _ = lapack.dpotri(factor, lower=1)
        inverse = np.tril(lower) + np.tril(lower, -1).T
        weights = inverse @ y
        # d loss / d covariance; the chain rule does the rest.
        slope = 0.5 * (inverse - np.outer(weights, weights))
        gradient = np.empty_like(log_hyperparameters)
        through_root = slope * decay * (5 / 3) * (1 + root)
        gradient[:num_params] = (
            through_root.ravel() @ squares.reshape(-1, num_params) * inverse_squares
        )
        gradient[num_params] = (slope * process * gaps).sum() / rung_lengthscale
        gradient[num_params + 1] = (slope * process).sum()
        gradient[num_params + 2] = noise * np.trace(slope)
        priors = [_LENGTHSCALE_PRIOR] * (num_params + 1) + [_SIGNAL_PRIOR, _NOISE_PRIOR]
        prior_mean, prior_std = np.array(priors).T
        deviations = (log_hyperparameters - prior_mean) / prior_std
        loss = 0.5 * (y @ weights + deviations @ deviations) + np.log(np.diag(factor)).sum()
        return float(loss), gradient + deviations / prior_std

    def _condition(self) -> None:
        covariance = self._covariance(self._points, self._rungs, self._points, self._rungs)
        noise = math.exp(self.log_hyperparameters[-1])
        covariance[np.diag_indices(len(covariance))] += noise + _JITTER
        self._factor = np.linalg.cholesky(covariance)
        self._weights = cho_solve((self._factor, True), self._values)

    def _covariance(
        self, points: np.ndarray, rungs: np.ndarray, others: np.ndarray, other_rungs: np.ndarray
    ) -> np.ndarray:
        inverse = np.exp(-self.log_hyperparameters[:-3])
        rung_lengthscale, signal, _ = np.exp(self.log_hyperparameters[-3:])
        ordered = ~self._unordered
        # |a - b|^2 by a matrix product, without an array of all the differences.
        a, b = points[:, ordered] * inverse[ordered], others[:, ordered] * inverse[ordered]
        squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
        for column in np.flatnonzero(self._unordered):
            squares += np.not_equal.outer(points[:, column], others[:, column]) * (
                inverse[column] ** 2
            )
        root = _SQRT_5 * np.sqrt(np.maximum(squares, 0))
        gaps = np.abs(np.subtract.outer(rungs, other_rungs))
        process = signal * (1 + root + root**2 / 3) * np.exp(-root - gaps / rung_lengthscale)
        return np.asarray(process + _SHIFT_VARIANCE + _RUNG_SHIFT_VARIANCE * (gaps == 0))


def log_expected_improvement(mean: np.ndarray, std: np.ndarray, best: float) -> np.ndarray:
    """Compute the logarithm of the gain over a value that is expected of a Gaussian.

    Args:
        mean: Of each Gaussian.
        std: Of each Gaussian.
        best: What counts as no gain.

    Returns:
        The logarithms. They stay finite and ordered far below the best, where the gain itself is 0
        in floating point (Ament et al. 2023, arXiv 2310.20708).
    """
    z = (mean - best) / std
    near = np.maximum(z, -1.0)
    log_near = np.log(np.exp(-0.5 * near**2) / math.sqrt(2 * math.pi) + near * ndtr(near))
    far = np.minimum(z, -1.0)
    # 1 - sqrt(pi / 2) |z| erfcx(|z| / sqrt(2)), which tends to 1 / z^2 and cancels on its way.
    tail = 1 + math.sqrt(math.pi / 2) * far * erfcx(-far / math.sqrt(2))
    tail = np.where(far < -1e4, 1 / far**2, tail)
    log_far = -0.5 * far**2 - 0.5 * math.log(2 * math.pi) + np.log(tail)
    return np.asarray(np.where(z > -1, log_near, log_far) + np.log(std))


def _squared_differences(
    points: np.ndarray, others: np.ndarray, unordered: np.ndarray
) -> np.ndarray:
    differences = points[:, None, :] - others[None, :, :]
    return np.asarray(np.where(unordered, differences != 0, differences**2), dtype=float)
