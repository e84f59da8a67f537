"""Intervals and probabilities, against values worked out by hand and scipy's tests."""

import math

import numpy as np
import pytest
from scipy import stats

from search.comparison import interval, paired_difference, probability_best
from search.confirm import compare
from search.results import verdict
from search.study.recorded import Trial
from search.sweep import DataSettings, Sweep, TrialParams


def test_the_interval_of_three_values_is_students() -> None:
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(2, 0.975) = 4.302653.
    found = interval(np.array([1.0, 2.0, 3.0]))
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_one_value_has_no_interval() -> None:
    assert interval(np.array([0.7])).low == -math.inf


def test_a_difference_that_is_the_same_with_every_seed_is_certain() -> None:
    one = np.array([0.7, 0.5, 0.9])
    found = paired_difference(one, one - 0.1)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))


def test_of_two_candidates_the_probability_is_that_of_the_paired_t_test() -> None:
    one, other = np.array([0.81, 0.79, 0.84, 0.80]), np.array([0.80, 0.75, 0.84, 0.79])
    # A flat prior on the means: one minus the one-sided p-value.
    expected = 1 - stats.ttest_rel(one, other, alternative="greater").pvalue
    found = probability_best(np.stack([one, other]))
    assert found[0] == pytest.approx(expected, abs=0.005)
    assert found.sum() == pytest.approx(1)


def test_what_a_seed_does_to_all_alike_does_not_count() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 5))
    shifted = values + 100 * rng.normal(size=(1, 5))
    np.testing.assert_allclose(probability_best(values), probability_best(shifted), atol=1e-6)


def test_equal_candidates_are_equally_likely() -> None:
    noise = np.array([0.01, -0.01, 0.0])
    values = np.stack([np.roll(noise, shift) for shift in range(3)])
    np.testing.assert_allclose(probability_best(values), 1 / 3, atol=0.01)


def test_candidates_that_always_tie_are_equally_likely() -> None:
    np.testing.assert_allclose(probability_best(np.ones((4, 3))), 1 / 4)


@pytest.mark.parametrize("shape", [(1, 3), (4, 1)])
def test_one_candidate_or_one_seed_says_nothing(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_allclose(probability_best(values), 1 / shape[0])


def candidates(*numbers: int) -> list[Trial]:
    return [
        Trial(
            number=number,
            params=TrialParams(),
            seed=number,
            view_seed=0,
            state="complete",
            epochs=(),
            attempt=0,
            reason="",
        )
        for number in numbers
    ]


SWEEP = Sweep(name="s", data=DataSettings(path="images"))


def test_the_winner_has_the_best_mean_and_not_the_best_value() -> None:
    values = np.array([[0.80, 0.81, 0.82], [0.90, 0.60, 0.60], [0.70, 0.71, 0.72]])
    found = compare(candidates(5, 3, 0), values, SWEEP)
    assert found["winner"] == 5
    assert [row["number"] for row in found["candidates"]] == [5, 0, 3]
    first, second, _ = found["candidates"]
    assert first["rival"] == 0
    assert first["over_baseline_mean"] == pytest.approx(0.1)
    assert second["rival"] == 5
    assert second["over_rival_mean"] == pytest.approx(-0.1)


def test_a_winner_that_seeds_do_not_tell_from_the_next_is_none() -> None:
    close = compare(candidates(5, 0), np.array([[0.80, 0.90], [0.82, 0.85]]), SWEEP)
    assert verdict(close).startswith(
        "no clear winner: trial 00005 has the best mean, 0.8500, not told"
    )
    clear = compare(candidates(5, 0), np.array([[0.80, 0.90], [0.70, 0.801]]), SWEEP)
    assert verdict(clear).startswith("confirmed by 2 fresh seeds: trial 00005, mean 0.8500")
    single = compare(candidates(5, 0), np.array([[0.9], [0.1]]), SWEEP)
    assert "by 1 fresh seed (" in verdict(single)


def test_an_interval_ends_where_the_metric_does() -> None:
    values = np.array([[0.90, 0.99, 0.95], [0.10, 0.01, 0.05]])
    best, worst = compare(candidates(5, 0), values, SWEEP)["candidates"]
    # Student's reach of three seeds is 4.302653 standard errors: 0.112, beyond 1 and below 0.
    assert (best["low"], best["high"]) == (pytest.approx(0.9467 - 0.1120, abs=1e-3), 1.0)
    assert (worst["low"], worst["high"]) == (0.0, pytest.approx(0.0533 + 0.1120, abs=1e-3))
    loss = Sweep(name="s", metric="val_loss", data=DataSettings(path="images"))
    (row, _) = compare(candidates(5, 0), values, loss)["candidates"]
    assert row["low"] == 0.0
    assert compare(candidates(5, 0), values + 1, loss)["candidates"][1]["high"] > 2


def test_of_a_loss_the_lowest_wins() -> None:
    sweep = Sweep(name="s", metric="val_loss", data=DataSettings(path="images"))
    values = np.array([[0.5, 0.6], [0.3, 0.4]])
    found = compare(candidates(1, 0), values, sweep)
    assert found["winner"] == 0
    assert found["candidates"][0]["probability_best"] > 0.9
