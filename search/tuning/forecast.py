"""How many epochs a sweep will probably still run, with ASHA as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

# Trials that wait are looked at in so many portions at most: a forecast is drawn twice a second.
MAX_PORTIONS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Rung:
    """One of the epochs at which ASHA compares.

    Attributes:
        epoch: Counted from 1.
        num_values: Trials that were compared there.
        cutoff: What the next one has to reach; none while there was none.
    """

    epoch: int
    num_values: int
    cutoff: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is still to run.

    Attributes:
        epochs: Of all trials together.
        longest_trial_epochs: Of the trial with the most, which no other can take over.
    """

    epochs: float
    longest_trial_epochs: float


def forecast(
    rungs: Sequence[Rung],
    *,
    epochs_done: Sequence[int],
    num_waiting: int,
    max_epochs: int,
    reduction_factor: int,
) -> Forecast:
    """Return the epochs to expect if each trial is as likely as any other to be the better one.

    A sampler that learns draws better trials as it goes on, which are stopped less: then it takes
    longer.

    Args:
        rungs: Ascending, all below ``max_epochs``; empty where nothing is stopped.
        epochs_done: Of each running trial.
        num_waiting: Trials that have yet to start.
        max_epochs: Of a trial that is not stopped.
        reduction_factor: One in this many goes on.
    """
    counts = [float(rung.num_values) for rung in rungs]

    def expect(done: int, num_trials: float) -> float:
        epochs, reaching, since = 0.0, 1.0, done
        for index, rung in enumerate(rungs):
            if rung.epoch <= done:
                continue
            epochs += reaching * (rung.epoch - since)
            since = rung.epoch
            arriving = reaching * num_trials
            # As it is for the one in the middle of those who arrive there.
            before = counts[index] + max(0.0, arriving - 1) / 2
            reaching *= pass_probability(before, reduction_factor)
            counts[index] += arriving
        return epochs + reaching * (max_epochs - since)

    running = [expect(done, 1.0) for done in epochs_done]
    portions = min(num_waiting, MAX_PORTIONS)
    waiting = [expect(0, num_waiting / portions) for _ in range(portions)]
    return Forecast(
        epochs=sum(running) + sum(waiting) * num_waiting / max(1, portions),
        longest_trial_epochs=max([*running, *waiting[-1:]], default=0.0),
    )


def pass_probability(num_values: float, reduction_factor: int) -> float:
    """Return how likely a trial is to reach the cut-off of a rung where others have been.

    The cut-off is the (1 - 1/factor) percentile of n values, which lies (n - 1)(1 - 1/factor) steps
    above the lowest; of n + 1 places among n values that are as good as one's own, those above it
    are left.

    Example:
        >>> [round(pass_probability(n, 2), 3) for n in (0, 1, 3, 999)]
        [1.0, 0.5, 0.5, 0.5]
        >>> [round(pass_probability(n, 3), 3) for n in (0, 1, 4, 9999)]
        [1.0, 0.5, 0.4, 0.333]
    """
    if num_values < 1:
        return 1 - num_values / 2
    steps = (num_values - 1) * (1 - 1 / reduction_factor)
    return 1 - (steps + 1) / (num_values + 1)
