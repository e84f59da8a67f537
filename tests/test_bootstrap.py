"""Resamples are of groups, as a loop would draw them; two models share them."""

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, f1_score

from lightning_modules.bootstrap import interval, paired_difference, resample
from lightning_modules.scores import confusion_matrix, score, score_decisions

Values = npt.NDArray[np.float64]


def clustered(
    num_groups: int, images_a_group: int, seed: int
) -> tuple[Values, npt.NDArray[np.int64], npt.NDArray[np.str_]]:
    """Probabilities of images whose group decides whether they are taken for the right class."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(num_groups) % 3, images_a_group)
    right = np.repeat(rng.random(num_groups) < 0.7, images_a_group)
    probabilities = rng.dirichlet(np.ones(3), len(labels)) * 0.2
    probabilities[np.arange(len(labels)), np.where(right, labels, (labels + 1) % 3)] += 0.8
    groups = np.repeat([f"patient {number}" for number in range(num_groups)], images_a_group)
    order = rng.permutation(len(labels))
    return probabilities[order], labels[order], groups[order]


def test_a_resample_is_the_images_of_the_drawn_groups() -> None:
    # The reference: draw groups, write their images one after another, ask scikit-learn.
    probabilities, labels, groups = clustered(12, 3, seed=0)
    found = resample(
        lambda times: score(probabilities, labels, times), groups, num_resamples=50, seed=7
    )
    names = sorted(set(groups.tolist()))
    drawn = np.random.default_rng(7).integers(len(names), size=(50, len(names)))
    for number, members in enumerate(drawn):
        rows = np.concatenate([np.flatnonzero(groups == names[member]) for member in members])
        decided = probabilities[rows].argmax(axis=1)
        assert found["accuracy"][number] == pytest.approx(accuracy_score(labels[rows], decided))
        present = np.unique(labels[rows])
        expected = f1_score(labels[rows], decided, labels=present, average="macro")
        assert found["macro_f1"][number] == pytest.approx(expected)


def test_resamples_do_not_depend_on_how_many_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = [str(number // 2) for number in range(20)]

    def draw() -> Values:
        return resample(lambda t: {"t": t}, groups, num_resamples=30, seed=3)["t"]

    whole = draw()
    monkeypatch.setattr("lightning_modules.bootstrap._MAX_CELLS", 7 * len(groups))
    np.testing.assert_array_equal(draw(), whole)


def test_every_resample_has_as_many_groups_and_whole_ones() -> None:
    groups = ["a", "b", "a", "c", "c", "c"]
    times = resample(lambda t: {"times": t}, groups, num_resamples=200, seed=0)["times"]
    assert times.shape == (200, 6)
    np.testing.assert_array_equal(times[:, 0], times[:, 2])
    np.testing.assert_array_equal(times[:, 3], times[:, 5])
    np.testing.assert_array_equal(times[:, [0, 1, 3]].sum(axis=1), np.full(200, 3))
    # Each of three groups is in a resample once on average: 200 draws of variance 2/3.
    np.testing.assert_allclose(times[:, [0, 1, 3]].mean(axis=0), 1, atol=5 * np.sqrt(2 / 3 / 200))


def test_equal_seeds_give_equal_resamples_and_others_do_not() -> None:
    groups = [str(number) for number in range(20)]

    def draw(seed: int) -> Values:
        return resample(lambda t: {"t": t}, groups, num_resamples=10, seed=seed)["t"]

    np.testing.assert_array_equal(draw(1), draw(1))
    assert (draw(1) != draw(2)).any()


def test_images_of_one_group_add_no_certainty() -> None:
    # Five equal images a patient: the interval of patients, where images alone would halve it.
    once, labels, groups = clustered(60, 1, seed=2)
    rows = np.repeat(np.arange(60), 5)

    def width(of_groups: npt.NDArray[np.str_]) -> float:
        samples = resample(
            lambda times: score_decisions(confusion_matrix(once[rows], labels[rows], times)),
            of_groups,
            num_resamples=2000,
            seed=0,
        )["accuracy"]
        low, high = interval(samples)
        return float(high - low)

    per_patient = width(groups[rows])
    per_image = width(np.array([str(row) for row in range(len(rows))]))
    p = float((once.argmax(axis=1) == labels).mean())
    assert per_patient == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / 60), rel=0.15)
    assert per_patient / per_image == pytest.approx(np.sqrt(5), rel=0.15)


def test_the_interval_is_the_middle_95_percent() -> None:
    low, high = interval(np.arange(1001.0))
    assert (float(low), float(high)) == pytest.approx((25, 975))


def test_resamples_without_a_value_are_left_out() -> None:
    samples = np.array([[0.0, np.nan, 3], [1, np.nan, np.nan], [2, np.nan, 3]])
    low, high = interval(samples)
    np.testing.assert_allclose(low, [0.05, np.nan, 3])
    np.testing.assert_allclose(high, [1.95, np.nan, 3])


def test_the_difference_is_of_the_same_resamples() -> None:
    ours, labels, groups = clustered(30, 2, seed=4)
    theirs = np.random.default_rng(5).permutation(ours)

    def figures(probabilities: Values, times: Values) -> dict[str, Values]:
        return score_decisions(confusion_matrix(probabilities, labels, times))

    both = [
        resample(lambda times, p=p: figures(p, times), groups, num_resamples=100, seed=9)
        for p in (ours, theirs)
    ]
    found = paired_difference(
        lambda times: figures(ours, times),
        lambda times: figures(theirs, times),
        groups,
        num_resamples=100,
        seed=9,
    )
    for name in ("accuracy", "macro_f1"):
        np.testing.assert_allclose(found[name], both[0][name] - both[1][name])
        assert found[name].std() > 0


def test_a_model_does_not_differ_from_itself() -> None:
    probabilities, labels, groups = clustered(10, 2, seed=6)

    def figures(times: Values) -> dict[str, Values]:
        return score_decisions(confusion_matrix(probabilities, labels, times))

    found = paired_difference(figures, figures, groups, num_resamples=20, seed=0)
    assert not found["accuracy"].any()
