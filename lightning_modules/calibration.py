"""Probabilities that mean what they say: temperature scaling of logits."""

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from scipy.special import log_softmax  # type: ignore[import-untyped]
from scipy.special import softmax as scipy_softmax

# Far beyond what networks need (Guo et al. report 1 to 3). Where the logits are never wrong, the
# likelihood rises for ever as the temperature falls, and the bound is the answer.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


def softmax(logits: npt.NDArray[np.floating], temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Return class probabilities, shape ``(N, C)``, of logits divided by a temperature.

    Above 1 it makes probabilities more even, below 1 more extreme; which class is the most
    probable stays the same.
    """
    scaled = logits.astype(np.float64) / temperature
    return np.asarray(scipy_softmax(scaled, axis=1), np.float64)


def fit_temperature(logits: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> float:
    """Return the temperature in [0.05, 20] at which the labels are the most likely.

    To be fitted on validation images, never on those that are reported. It is found to four
    digits, and is 1 where no other does better. It mends confidence only: not errors, and not
    classes that are miscalibrated in different directions.

    Args:
        logits: Shape ``(N, C)``.
        labels: Shape ``(N,)``, class indices.

    Raises:
        ValueError: If there is no image, or a logit is not finite.

    References:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2,
        https://arxiv.org/abs/1706.04599
    """
    if not len(labels) or not np.isfinite(logits).all():
        raise ValueError(f"finite logits of at least one image are needed, got {len(labels)}")
    true = np.arange(len(labels)), labels
    wide = logits.astype(np.float64)

    def nll(log_temperature: float) -> float:
        log_p = log_softmax(wide / np.exp(log_temperature), axis=1)
        return float(-log_p[true].mean())

    # Convex in 1/T, hence one minimum in log T, where equal steps are equal factors.
    found = minimize_scalar(
        nll,
        bounds=(np.log(MIN_TEMPERATURE), np.log(MAX_TEMPERATURE)),
        method="bounded",
        options={"xatol": 1e-5},
    )
    return float(np.exp(found.x)) if found.fun < nll(0.0) else 1.0
