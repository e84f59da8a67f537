"""How much each of several classifiers should count, chosen by their validation probabilities."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Score = Callable[[Floats], float]

# Beyond, a grid over all shares takes longer than training.
MAX_GRID_POINTS = 20_000


def greedy_weights(probabilities: Floats, score: Score, *, num_rounds: int = 50) -> Floats:
    """Choose classifiers one by one, with replacement, each time the one that helps most.

    Args:
        probabilities: Shape ``(K, N, C)``: of K classifiers, on N images.
        score: Of mixed probabilities ``(N, C)``; higher is better.
        num_rounds: How many are chosen; the best number of them counts.

    Returns:
        Shape ``(K,)``, summing to 1. The first of equals: never worse than the best single one.

    References:
        Caruana et al., "Ensemble Selection from Libraries of Models", ICML 2004.
    """
    counts = np.zeros(len(probabilities))
    total = np.zeros(probabilities.shape[1:])
    best, best_score = counts, -math.inf
    for chosen in range(1, num_rounds + 1):
        scores = [score((total + one) / chosen) for one in probabilities]
        helps_most = int(np.argmax(scores))
        total = total + probabilities[helps_most]
        counts = counts.copy()
        counts[helps_most] += 1
        if scores[helps_most] > best_score:
            best, best_score = counts / chosen, scores[helps_most]
    return best


def grid_weights(probabilities: Floats, score: Score, *, num_steps: int = 10) -> Floats:
    """Try all shares on a grid.

    Args:
        probabilities: Shape ``(K, N, C)``.
        score: Of mixed probabilities ``(N, C)``; higher is better.
        num_steps: Shares are multiples of one over this; fewer steps are taken where there would
            be more than ``MAX_GRID_POINTS``.

    Returns:
        Shape ``(K,)``, summing to 1; of equals the one that is nearest to a single classifier.

    References:
        Talukder et al., https://arxiv.org/abs/2305.12844, weight classifiers by a grid search.
    """
    num_classifiers = len(probabilities)
    while math.comb(num_steps + num_classifiers - 1, num_steps) > MAX_GRID_POINTS:
        num_steps -= 1
    points = [np.array(point) / num_steps for point in _compositions(num_steps, num_classifiers)]
    # Concentrated ones first: of equals the first is taken.
    points.sort(key=lambda point: -float((point**2).sum()))
    scores = [score(np.tensordot(point, probabilities, axes=1)) for point in points]
    return points[int(np.argmax(scores))]


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write a number as an ordered sum of so many numbers from 0 up."""
    for bars in itertools.combinations(range(total + parts - 1), parts - 1):
        edges = (-1, *bars, total + parts - 1)
        yield tuple(b - a - 1 for a, b in itertools.pairwise(edges))
