"""Weights of an ensemble, on cases where the best are known."""

import itertools

import numpy as np
import pytest

from search.bundles.ensemble_weights import greedy_weights, grid_weights

LABELS = np.array([0, 1, 2, 0, 1, 2])


def accuracy(mixed: np.ndarray) -> float:
    return float((mixed.argmax(axis=1) == LABELS).mean())


def answers(*classes: int, confidence: float = 0.9) -> np.ndarray:
    """One classifier's probabilities: so sure of these classes, the rest shared."""
    rest = (1 - confidence) / 2
    return np.eye(3)[list(classes)] * (confidence - rest) + rest


@pytest.mark.parametrize("weights_of", [greedy_weights, grid_weights])
def test_a_classifier_that_is_always_right_stands_alone(weights_of: object) -> None:
    assert callable(weights_of)
    perfect = answers(0, 1, 2, 0, 1, 2)
    wrong = answers(1, 2, 0, 1, 2, 0)
    weights = weights_of(np.stack([wrong, perfect, wrong]), accuracy)
    np.testing.assert_array_equal(weights, [0, 1, 0])


def test_two_that_are_wrong_on_other_images_are_right_together() -> None:
    # Each is sure where it is right, and unsure where it is wrong: the mean is right everywhere.
    first = np.concatenate([answers(0, 1, 2), answers(1, 2, 0, confidence=0.4)])
    second = np.concatenate([answers(1, 2, 0, confidence=0.4), answers(0, 1, 2)])
    both = np.stack([first, second])
    assert accuracy(first) == accuracy(second) == 0.5
    for weights in (greedy_weights(both, accuracy), grid_weights(both, accuracy)):
        assert accuracy(np.tensordot(weights, both, axes=1)) == 1.0


def test_greedy_is_never_worse_than_the_best_alone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        probabilities = rng.dirichlet(np.ones(3), size=(4, 6))
        weights = greedy_weights(probabilities, accuracy, num_rounds=8)
        mixed = accuracy(np.tensordot(weights, probabilities, axes=1))
        assert mixed >= max(map(accuracy, probabilities))
        assert weights.sum() == pytest.approx(1)


def test_the_grid_holds_the_best_of_all_shares() -> None:
    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.ones(3), size=(3, 6))
    weights = grid_weights(probabilities, accuracy, num_steps=4)
    # Written out: all triples of quarters.
    shares = [s for s in itertools.product(range(5), repeat=3) if sum(s) == 4]
    assert len(shares) == 15
    best = max(accuracy(np.tensordot(np.array(s) / 4, probabilities, axes=1)) for s in shares)
    assert accuracy(np.tensordot(weights, probabilities, axes=1)) == best


def test_a_grid_over_many_classifiers_is_coarser_but_ends() -> None:
    probabilities = np.stack([answers(0, 1, 2, 0, 1, 2)] * 12)
    weights = grid_weights(probabilities, accuracy)
    assert weights.sum() == pytest.approx(1)
    assert weights.max() == 1  # all alike: one alone is enough
