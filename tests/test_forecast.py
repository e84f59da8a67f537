"""How many epochs are left, against sums done by hand and against ASHA played out."""

import numpy as np
import pytest

from search.tuning.forecast import Rung, forecast, pass_probability


def rung(epoch: int, num_values: int) -> Rung:
    return Rung(epoch=epoch, num_values=num_values, cutoff=None if not num_values else 0.5)


def test_without_rungs_every_trial_runs_to_its_end() -> None:
    found = forecast([], epochs_done=[2, 0], num_waiting=3, max_epochs=10, reduction_factor=3)
    assert found.epochs == 8 + 10 + 3 * 10
    assert found.longest_trial_epochs == 10


def test_a_trial_at_a_rung_of_one_other_goes_on_with_one_chance_in_two() -> None:
    # 1 epoch to the rung, and 2 more with a chance of 1/2.
    found = forecast([rung(1, 1)], epochs_done=[], num_waiting=1, max_epochs=3, reduction_factor=2)
    assert found.epochs == 2


def test_a_rung_behind_a_trial_is_decided() -> None:
    rungs = [rung(1, 5), rung(3, 0)]
    # The first at 3 is never stopped there.
    found = forecast(rungs, epochs_done=[1], num_waiting=0, max_epochs=9, reduction_factor=3)
    assert found.epochs == 8


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("num_values", [1, 2, 5, 40])
def test_the_chance_to_pass_is_that_of_equals(factor: int, num_values: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.random((20_000, num_values))
    cutoffs = np.percentile(values, (1 - 1 / factor) * 100, axis=1)
    passed = (rng.random(20_000) >= cutoffs).mean()
    assert pass_probability(num_values, factor) == pytest.approx(passed, abs=0.012)


def test_a_whole_sweep_takes_what_asha_takes_when_it_is_played_out() -> None:
    rng = np.random.default_rng(1)
    epochs = [played_out(rng) for _ in range(150)]
    found = forecast(
        [rung(1, 0), rung(3, 0)],
        epochs_done=[],
        num_waiting=30,
        max_epochs=9,
        reduction_factor=3,
    )
    assert found.epochs == pytest.approx(np.mean(epochs), rel=0.05)


def played_out(rng: np.random.Generator) -> int:
    """Epochs of 30 trials one after another; what is good at a rung says nothing about the next."""
    epochs = 0
    seen: dict[int, list[float]] = {1: [], 3: []}
    for _ in range(30):
        done = 9
        for at in (1, 3):
            value = rng.random()
            is_out = bool(seen[at]) and value < np.percentile(seen[at], 100 * 2 / 3)
            seen[at].append(value)
            if is_out:
                done = at
                break
        epochs += done
    return epochs


def test_ten_thousand_waiting_trials_are_as_quick_to_look_at_as_a_hundred() -> None:
    few, many = (
        forecast([rung(1, 50)], epochs_done=[], num_waiting=n, max_epochs=3, reduction_factor=2)
        for n in (100, 10_000)
    )
    # Half of them go on, for 2 epochs.
    assert few.epochs == pytest.approx(200, rel=0.01)
    assert many.epochs == pytest.approx(20_000, rel=0.01)
