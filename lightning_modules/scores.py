"""Figures that a classifier is judged by, of many weightings of the same images at once.

A weighting is one row of weights, one weight an image: all ones is the data set as it is, and the
multiplicities of a bootstrap resample make it that resample. So an interval is computed by the
code that computes the value, and a thousand resamples cost a few array operations. Every figure
equals scikit-learn's with ``sample_weight``, where scikit-learn has it.

A figure that the labels do not define, such as the sensitivity of a class without an image, is
NaN, never 0 and never an error.
"""

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

# Of a decision, the most probable class; of the probabilities behind it; of each class.
DECISION = ("macro_f1", "balanced_accuracy", "accuracy", "mcc")
CALIBRATION = ("ece", "nll", "brier")
PER_CLASS = ("sensitivity", "specificity", "ppv", "npv", "f1", "roc_auc", "pr_auc")

# Guo et al. 2017, section 2.
NUM_BINS = 15


def score(
    probabilities: Values, labels: Labels, weights: Values | None = None
) -> dict[str, Values]:
    """Return every figure there is.

    Args:
        probabilities: Shape ``(N, C)``, rows that add up to 1.
        labels: Shape ``(N,)``, class indices.
        weights: Shape ``(B, N)``, not negative, a row for each of B weightings; all ones if none.

    Returns:
        ``DECISION`` and ``CALIBRATION``, shape ``(B,)``; ``PER_CLASS``, shape ``(B, C)``;
        ``confusion``, shape ``(B, C, C)``.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> figures = score(probabilities, np.array([0, 1, 1]))
        >>> figures["sensitivity"].tolist()
        [[1.0, 0.5]]
        >>> figures["confusion"].tolist()
        [[[1.0, 0.0], [1.0, 1.0]]]
    """
    weights = _weights(labels, weights)
    confusion = confusion_matrix(probabilities, labels, weights)
    return {
        **score_decisions(confusion),
        **score_calibration(probabilities, labels, weights),
        **_score_ranking(probabilities, labels, weights),
        "confusion": confusion,
    }


def confusion_matrix(
    probabilities: Values, labels: Labels, weights: Values | None = None
) -> Values:
    """Return how much weight of each class, down, was decided to be which class, across.

    Returns:
        Shape ``(B, C, C)``. Of equal probabilities, the first class is decided for.
    """
    num_classes = probabilities.shape[1]
    cells = np.eye(num_classes**2)[labels * num_classes + probabilities.argmax(axis=1)]
    counted: Values = _weights(labels, weights) @ cells
    return counted.reshape(-1, num_classes, num_classes)


def score_decisions(confusion: Values) -> dict[str, Values]:
    """Return what follows from a confusion matrix alone.

    Macro-F1 and balanced accuracy are means over the classes that occur in the labels. With all
    of them there, that is scikit-learn's macro average. MCC is Gorodkin's for many classes [1]_; 0
    where only one class was decided for. A class without an image has a specificity, and nothing
    else.

    Args:
        confusion: Shape ``(B, C, C)``, true classes down.

    Returns:
        ``DECISION``, shape ``(B,)``, and of ``PER_CLASS`` all but the areas, shape ``(B, C)``.

    References:
        .. [1] Gorodkin, "Comparing two K-category assignments by a K-category correlation
           coefficient", 2004, https://doi.org/10.1016/j.compbiolchem.2004.09.006
    """
    hit = np.diagonal(confusion, axis1=1, axis2=2)
    true, decided, total = confusion.sum(axis=2), confusion.sum(axis=1), confusion.sum(axis=(1, 2))
    everything = total[:, None]
    rejected = everything - true - decided + hit  # neither of the class nor decided for it
    sensitivity = _ratio(hit, true)
    absent = true == 0
    f1 = np.where(absent, np.nan, _ratio(2 * hit, true + decided))
    covariance = hit.sum(axis=1) * total - (true * decided).sum(axis=1)
    spread = total**2 - (true**2).sum(axis=1)
    spread_decided = total**2 - (decided**2).sum(axis=1)
    mcc = np.where(
        (spread > 0) & (spread_decided == 0),
        0,
        _ratio(covariance, np.sqrt(spread * spread_decided)),
    )
    return {
        "macro_f1": _mean_of_defined(f1),
        "balanced_accuracy": _mean_of_defined(sensitivity),
        "accuracy": _ratio(hit.sum(axis=1), total),
        "mcc": mcc,
        "sensitivity": sensitivity,
        "specificity": _ratio(rejected, everything - true),
        "ppv": np.where(absent, np.nan, _ratio(hit, decided)),
        "npv": np.where(absent, np.nan, _ratio(rejected, everything - decided)),
        "f1": f1,
    }


def score_calibration(
    probabilities: Values, labels: Labels, weights: Values | None = None
) -> dict[str, Values]:
    """Return how far probabilities are from frequencies: ``CALIBRATION``, shape ``(B,)``.

    ECE, the expected calibration error of the decided class in ``NUM_BINS`` bins of equal width
    [1]_; NLL, the mean of -log p of the true class, in nats, with p no less than float64's
    epsilon; Brier, the mean over images of the squared differences summed over classes, in [0, 2].

    References:
        .. [1] Guo et al., "On Calibration of Modern Neural Networks", 2017,
           https://arxiv.org/abs/1706.04599
    """
    weights = _weights(labels, weights)
    rows = np.arange(len(labels))
    total = weights.sum(axis=1)
    bins, excess = _bins(probabilities, labels)
    true = np.maximum(probabilities[rows, labels], np.finfo(np.float64).eps)
    distance = ((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(axis=1)
    gaps = weights @ (np.eye(NUM_BINS)[bins] * excess[:, None])
    return {
        "ece": _ratio(np.abs(gaps).sum(axis=1), total),
        "nll": _ratio(weights @ -np.log(true), total),
        "brier": _ratio(weights @ distance, total),
    }


def reliability(probabilities: Values, labels: Labels) -> list[dict[str, float]]:
    """Return the bins of a reliability diagram that hold images, from low confidence to high.

    Returns:
        Of each bin its ``confidence`` and ``accuracy``, means over its ``num_images``.
    """
    bins, excess = _bins(probabilities, labels)
    confidence = probabilities.max(axis=1)
    return [
        {
            "confidence": float(confidence[inside].mean()),
            "accuracy": float((confidence - excess)[inside].mean()),
            "num_images": int(inside.sum()),
        }
        for inside in (bins == number for number in np.unique(bins))
    ]


def _bins(probabilities: Values, labels: Labels) -> tuple[Labels, Values]:
    """Return every image's bin, and by how much its confidence exceeds its being right (0, 1)."""
    confidence = probabilities.max(axis=1)
    bins = np.clip(np.ceil(confidence * NUM_BINS) - 1, 0, NUM_BINS - 1).astype(np.int64)
    return bins, confidence - (probabilities.argmax(axis=1) == labels)


def _score_ranking(probabilities: Values, labels: Labels, weights: Values) -> dict[str, Values]:
    """Return one-vs-rest ROC-AUC, and PR-AUC as average precision; NaN without a rest."""
    shape = (len(weights), probabilities.shape[1])
    roc, pr = np.full(shape, np.nan), np.full(shape, np.nan)
    for index in range(shape[1]):
        of_class = labels == index
        if not 0 < of_class.sum() < len(labels):
            continue
        scores = probabilities[:, index]
        order = np.argsort(-scores, kind="stable")
        # Images of equal score are on the same side of any threshold.
        ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
        ordered = weights[:, order]
        positive = np.cumsum(ordered * of_class[order], axis=1)[:, ends]
        negative = np.cumsum(ordered, axis=1)[:, ends] - positive
        gained = np.diff(positive, axis=1, prepend=0)
        height = positive - gained / 2  # of the trapezoid
        area = (height * np.diff(negative, axis=1, prepend=0)).sum(axis=1)
        all_positive, all_negative = positive[:, -1], negative[:, -1]
        roc[:, index] = _ratio(area, all_positive * all_negative)
        precision = positive / np.maximum(positive + negative, np.finfo(np.float64).tiny)
        average = _ratio((gained * precision).sum(axis=1), all_positive)
        pr[:, index] = np.where(all_negative == 0, np.nan, average)
    return {"roc_auc": roc, "pr_auc": pr}


def _weights(labels: Labels, weights: Values | None) -> Values:
    return np.ones((1, len(labels))) if weights is None else weights


def _ratio(numerator: Values, denominator: Values) -> Values:
    """Divide; NaN where the denominator is 0."""
    defined = denominator != 0
    ratio = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    np.divide(numerator, denominator, out=ratio, where=defined)
    return ratio


def _mean_of_defined(values: Values) -> Values:
    """Return the mean over classes, leaving NaN out; NaN if all are."""
    defined = ~np.isnan(values)
    return _ratio(np.where(defined, values, 0).sum(axis=1), defined.sum(axis=1).astype(np.float64))
