"""Figures equal scikit-learn's, weighted or not; what labels do not define is NaN, not an error."""

import warnings

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from lightning_modules.scores import (
    CALIBRATION,
    DECISION,
    NUM_BINS,
    PER_CLASS,
    confusion_matrix,
    reliability,
    score,
    score_calibration,
    score_decisions,
)

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


def draw(
    num_images: int, num_classes: int, seed: int, *, tied: bool = False
) -> tuple[Values, Labels]:
    """Probabilities that know something of the labels; tied: in tenths, so that many are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_classes, size=num_images)
    counts = rng.multinomial(9, np.full(num_classes, 1 / num_classes), num_images).astype(float)
    if not tied:
        counts = rng.dirichlet(np.ones(num_classes), num_images) * 9
    counts[np.arange(num_images), labels] += 1
    return counts / 10, labels


def sklearn_figures(
    probabilities: Values, labels: Labels, weights: Values | None = None
) -> dict[str, Values]:
    """All figures of one weighting by scikit-learn; every class has images."""
    num_classes = probabilities.shape[1]
    decided = probabilities.argmax(axis=1)
    of_class = np.eye(num_classes)[labels]
    told = np.eye(num_classes)[decided]
    w = {"sample_weight": weights}

    def each(figure: object, **options: object) -> list[float]:
        return [
            figure(of_class[:, c], told[:, c], zero_division=np.nan, **options, **w)  # type: ignore[operator]
            for c in range(num_classes)
        ]

    return {
        "macro_f1": metrics.f1_score(labels, decided, average="macro", **w),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, decided, **w),
        "accuracy": metrics.accuracy_score(labels, decided, **w),
        "mcc": metrics.matthews_corrcoef(labels, decided, **w),
        "nll": metrics.log_loss(labels, probabilities, labels=range(num_classes), **w),
        "brier": metrics.brier_score_loss(
            labels, probabilities, labels=range(num_classes), scale_by_half=False, **w
        ),
        "sensitivity": each(metrics.recall_score),
        "specificity": each(metrics.recall_score, pos_label=0),
        "ppv": each(metrics.precision_score),
        "npv": each(metrics.precision_score, pos_label=0),
        "f1": each(metrics.f1_score),
        "roc_auc": [
            metrics.roc_auc_score(of_class[:, c], probabilities[:, c], **w)
            for c in range(num_classes)
        ],
        "pr_auc": [
            metrics.average_precision_score(of_class[:, c], probabilities[:, c], **w)
            for c in range(num_classes)
        ],
        "confusion": metrics.confusion_matrix(labels, decided, **w),
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("num_images", "num_classes"), [(40, 2), (60, 3), (400, 5)])
def test_every_figure_is_scikit_learns(num_images: int, num_classes: int, tied: bool) -> None:
    probabilities, labels = draw(num_images, num_classes, seed=num_images, tied=tied)
    found = score(probabilities, labels)
    for name, value in sklearn_figures(probabilities, labels).items():
        np.testing.assert_allclose(found[name][0], value, rtol=1e-10, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
def test_weighted_figures_are_scikit_learns(tied: bool) -> None:
    probabilities, labels = draw(80, 4, seed=3, tied=tied)
    weights = np.random.default_rng(0).integers(0, 4, (6, 80)).astype(float)
    found = score(probabilities, labels, weights)
    for row in range(6):
        for name, value in sklearn_figures(probabilities, labels, weights[row]).items():
            np.testing.assert_allclose(found[name][row], value, rtol=1e-10, err_msg=name)


def test_every_figure_that_is_promised_is_there() -> None:
    found = score(*draw(20, 3, seed=0))
    assert set(found) == {*DECISION, *CALIBRATION, *PER_CLASS, "confusion"}
    assert all(found[name].shape == (1,) for name in (*DECISION, *CALIBRATION))
    assert all(found[name].shape == (1, 3) for name in PER_CLASS)


def test_a_class_without_an_image_is_not_defined_and_does_not_count() -> None:
    # Two images of a, one taken for c, of which there is none; one of b, right.
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.1, 0.7], [0.0, 1.0, 0.0]])
    found = score(probabilities, np.array([0, 0, 1]))
    for name in ("sensitivity", "ppv", "npv", "f1", "roc_auc", "pr_auc"):
        assert np.isnan(found[name][0, 2]), name
        assert not np.isnan(found[name][0, :2]).any(), name
    # a: sensitivity 1/2, F1 2/3; b: 1 and 1. Nothing was c, and 2 of 3 were not taken for it.
    assert found["balanced_accuracy"][0] == pytest.approx(0.75)
    assert found["macro_f1"][0] == pytest.approx(5 / 6)
    assert found["specificity"][0, 2] == pytest.approx(2 / 3)


def test_images_of_one_class_have_no_ranking_and_no_correlation() -> None:
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7]])
    found = score(probabilities, np.array([0, 0]))
    assert found["accuracy"][0] == 0.5
    assert found["macro_f1"][0] == pytest.approx(2 / 3)
    for name in ("mcc", "roc_auc", "pr_auc"):
        assert np.isnan(found[name]).all(), name


def test_deciding_for_one_class_only_has_no_correlation_with_two() -> None:
    found = score(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 1]))
    assert found["mcc"][0] == 0
    assert found["f1"][0].tolist() == [pytest.approx(2 / 3), 0]
    assert np.isnan(found["ppv"][0, 1])  # nothing was decided to be it
    assert found["roc_auc"][0].tolist() == [1, 1]  # but it is ranked rightly


def test_a_sure_and_wrong_answer_has_a_finite_loss() -> None:
    found = score_calibration(np.array([[1.0, 0.0]]), np.array([1]))
    assert found["nll"][0] == pytest.approx(-np.log(np.finfo(float).eps))
    assert found["brier"][0] == 2
    assert found["ece"][0] == 1


def test_ece_by_hand() -> None:
    # Bin (9/15, 10/15]: confidences .62 and .64, one right: gap |.63 - .5| of 2 of 4 images.
    # Bin (12/15, 13/15]: .84 twice, both right: gap .16 of the others.
    top = np.array([0.62, 0.64, 0.84, 0.84])
    found = score_calibration(np.stack([top, 1 - top], axis=1), np.array([0, 1, 0, 0]))
    assert found["ece"][0] == pytest.approx(0.5 * 0.13 + 0.5 * 0.16)


def test_ece_is_that_of_a_loop_over_bins() -> None:
    probabilities, labels = draw(500, 4, seed=1)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0.0
    for number in range(NUM_BINS):
        inside = (confidence > number / NUM_BINS) & (confidence <= (number + 1) / NUM_BINS)
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            expected += inside.mean() * gap
    assert score_calibration(probabilities, labels)["ece"][0] == pytest.approx(expected)
    bins = reliability(probabilities, labels)
    assert sum(part["num_images"] for part in bins) == 500
    assert expected == pytest.approx(
        sum(part["num_images"] * abs(part["confidence"] - part["accuracy"]) for part in bins) / 500
    )


def test_reliability_by_hand() -> None:
    top = np.array([0.62, 0.64, 1.0])
    bins = reliability(np.stack([top, 1 - top], axis=1), np.array([0, 1, 0]))
    assert [part["num_images"] for part in bins] == [2, 1]
    assert [part["accuracy"] for part in bins] == [0.5, 1]
    assert [part["confidence"] for part in bins] == pytest.approx([0.63, 1])


@given(
    num_classes=st.integers(2, 6),
    num_images=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
)
def test_any_few_images_have_figures_in_range_or_none(
    num_classes: int, num_images: int, seed: int, tied: bool
) -> None:
    probabilities, labels = draw(num_images, num_classes, seed, tied=tied)
    weights = np.random.default_rng(seed).integers(0, 2, (3, num_images)).astype(float)
    weights[:, 0] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = score(probabilities, labels, weights)
    for name, values in found.items():
        low = -1 if name == "mcc" else 0
        high = {"nll": np.inf, "brier": 2, "confusion": num_images}.get(name, 1)
        defined = values[~np.isnan(values)]
        assert ((defined >= low - 1e-9) & (defined <= high + 1e-9)).all(), name


def test_decisions_need_the_confusion_matrix_alone() -> None:
    probabilities, labels = draw(50, 3, seed=5)
    whole = score(probabilities, labels)
    alone = score_decisions(confusion_matrix(probabilities, labels))
    for name, values in alone.items():
        np.testing.assert_array_equal(values, whole[name])
