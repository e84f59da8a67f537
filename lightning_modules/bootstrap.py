"""How far figures could have come out otherwise: a bootstrap over groups, not over images.

Slices of one patient resemble each other. Drawing single images would count each of them as a
patient and make intervals too narrow; so whole groups are drawn, with replacement, as many as
there are [1]_.

References:
    .. [1] Field and Welsh, "Bootstrapping clustered data", 2007,
       https://doi.org/10.1111/j.1467-9868.2007.00593.x
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

# Of an image, how often it is in each of some resamples, (B, N), to the figures of these resamples.
Score = Callable[[Values], Mapping[str, Values]]

COVERAGE = 0.95

# Bounds the memory: a few arrays of that many weights.
_MAX_CELLS = 2**20


def resample(
    score: Score, groups: Sequence[str] | npt.NDArray[np.str_], *, num_resamples: int, seed: int
) -> dict[str, Values]:
    """Return figures of resamples of the groups.

    Equal groups, number, and seed draw the same resamples, whatever is scored: figures of two
    models on the same images can be subtracted, resample by resample.

    Args:
        score: Takes how often each image is in each of B resamples, shape ``(B, N)``; returns
            figures whose first axis is B.
        groups: The group of each of N images.
        num_resamples: R.
        seed: Of the draws.

    Returns:
        The figures, first axis R.

    Example:
        >>> errors = np.array([0.0, 1.0, 1.0])
        >>> mean = lambda times: {"error": times @ errors / times.sum(axis=1)}
        >>> resample(mean, ["a", "a", "b"], num_resamples=4, seed=0)["error"].shape
        (4,)
    """
    parts = [score(times) for times in _draw(groups, num_resamples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def paired_difference(
    score: Score,
    other: Score,
    groups: Sequence[str] | npt.NDArray[np.str_],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Values]:
    """Return by how much figures of one model exceed another's, on the same resamples.

    What makes images easy or hard for both cancels: the interval of the difference is narrower
    than the intervals of the two suggest.

    Args:
        score: Of the model, as for `resample`.
        other: Of the model that it is compared with, on the same images.
        groups: The group of each image.
        num_resamples: R.
        seed: Of the draws.

    Returns:
        The differences of the figures that both have, first axis R.
    """

    def difference(times: Values) -> dict[str, Values]:
        ours, theirs = score(times), other(times)
        return {name: ours[name] - theirs[name] for name in ours if name in theirs}

    return resample(difference, groups, num_resamples=num_resamples, seed=seed)


def interval(samples: Values) -> tuple[Values, Values]:
    """Return both ends of the 95 % percentile interval over the first axis.

    Resamples in which a figure is not defined (NaN) are left out; NaN where all are.
    """
    tail = (1 - COVERAGE) / 2
    ends = np.full((2, *samples.shape[1:]), np.nan)
    if (defined := ~np.isnan(samples).all(axis=0)).any():
        ends[:, defined] = np.nanquantile(samples[:, defined], [tail, 1 - tail], axis=0)
    return ends[0], ends[1]


def _draw(
    groups: Sequence[str] | npt.NDArray[np.str_], num_resamples: int, seed: int
) -> Iterator[Values]:
    """Yield how often each image is in each resample, shape ``(B, N)``, R rows in all."""
    names, group_of_image = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    rows = max(1, _MAX_CELLS // len(group_of_image))
    for start in range(0, num_resamples, rows):
        num_rows = min(rows, num_resamples - start)
        drawn = rng.integers(len(names), size=(num_rows, len(names)))
        drawn += np.arange(num_rows)[:, None] * len(names)
        times = np.bincount(drawn.ravel(), minlength=num_rows * len(names))
        yield times.reshape(num_rows, -1)[:, group_of_image].astype(np.float64)
