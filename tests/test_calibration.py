"""A temperature that logits were divided by is found again; no answer changes by it."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import logit

from lightning_modules.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    fit_temperature,
    softmax,
)

Values = npt.NDArray[np.float64]


def calibrated(num_images: int, num_classes: int = 4) -> tuple[Values, npt.NDArray[np.int64]]:
    """Logits, and labels drawn by the probabilities that they stand for."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (num_images, num_classes))
    # Gumbel's trick: the argmax of noisy logits is a draw from their softmax.
    return logits, (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 2.5, 8.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    logits, labels = calibrated(20_000)
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.03)


def test_the_temperature_of_two_answers_is_known_exactly() -> None:
    # Three of four are right at a margin of 2: p = 3/4 needs a margin of log 3.
    logits = np.array([[2.0, 0.0]] * 4)
    found = fit_temperature(logits, np.array([0, 0, 0, 1]))
    assert found == pytest.approx(2 / float(logit(0.75)), rel=1e-4)


def test_no_other_temperature_is_likelier() -> None:
    logits, labels = calibrated(500)
    logits = (3 * logits).astype(np.float32)
    found = fit_temperature(logits, labels)

    def nll(temperature: float) -> float:
        return float(-np.log(softmax(logits, temperature)[np.arange(500), labels]).mean())

    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 2000)
    assert nll(found) <= min(map(nll, grid)) + 1e-9


def test_a_faultless_model_ends_at_the_bound() -> None:
    found = fit_temperature(np.array([[4.0, 0.0], [0.0, 3.0]]), np.array([0, 1]))
    assert MIN_TEMPERATURE <= found < 1


def test_logits_that_say_nothing_keep_their_temperature() -> None:
    assert fit_temperature(np.zeros((3, 2)), np.array([0, 1, 1])) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="finite logits"):
        fit_temperature(np.array([[value, 0.0]]), np.array([0]))


def test_no_image_has_no_temperature() -> None:
    with pytest.raises(ValueError, match="at least one image are needed, got 0"):
        fit_temperature(np.zeros((0, 2)), np.zeros(0, int))


def test_temperature_leaves_the_decision_unchanged() -> None:
    logits, _ = calibrated(1000)
    for temperature in (0.1, 1.0, 10.0):
        scaled = softmax(logits, temperature)
        np.testing.assert_array_equal(scaled.argmax(axis=1), logits.argmax(axis=1))
        np.testing.assert_allclose(scaled.sum(axis=1), 1)


def test_softmax_by_hand() -> None:
    logits = np.array([[np.log(3), 0.0]], np.float32)
    np.testing.assert_allclose(softmax(logits), [[0.75, 0.25]], rtol=1e-6)
    # The square root of 3 to 1.
    half = np.sqrt(3) / (1 + np.sqrt(3))
    np.testing.assert_allclose(softmax(logits, 2), [[half, 1 - half]], rtol=1e-6)


def test_softmax_of_huge_logits_is_finite() -> None:
    np.testing.assert_array_equal(softmax(np.array([[1e6, 0.0]], np.float32)), [[1, 0]])
