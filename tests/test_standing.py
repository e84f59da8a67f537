"""Where a running sweep stands, counted by hand from events."""

import dataclasses

import pytest

from lightning_modules.data.phantom import PhantomSettings
from search.space import Float
from search.study.recorded import Epoch, State, Trial
from search.sweep import (
    DataSettings,
    SchedulerSettings,
    SearchSettings,
    Sweep,
    TrainingSettings,
    TrialParams,
)
from search.tuning.events import EpochDone, TrialEnded, TrialStarted
from search.tuning.forecast import Rung
from search.tuning.standing import Standing

SWEEP = Sweep(
    name="brain",
    data=DataSettings(phantom=PhantomSettings()),
    space={"lr": Float(low=1e-4, high=1e-2, log=True)},
    training=TrainingSettings(max_epochs=10),
    search=SearchSettings(num_trials=6),
    scheduler=SchedulerSettings(grace_period_epochs=3, reduction_factor=2),
)
MINIMISED = dataclasses.replace(SWEEP, metric="val_loss")


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def started(number: int, lr: float = 1e-3, epochs_done: int = 0) -> TrialStarted:
    params = dataclasses.asdict(TrialParams(lr=lr))
    return TrialStarted(trial=number, name=f"{number:05d}", params=params, epochs_done=epochs_done)


def epoch(number: int, epoch: int, value: float | None, best: float | None = None) -> EpochDone:
    return EpochDone(
        trial=number,
        name=f"{number:05d}",
        epoch=epoch,
        max_epochs=10,
        metric="val_macro_f1",
        value=value,
        best=value if best is None else best,
        metrics={},
        next_rung=None,
        cutoff=None,
        features="from the cache",
        left_s=None,
    )


def ended(number: int, event: str, reason: str, epochs: int) -> TrialEnded:
    return TrialEnded(
        event=event,  # type: ignore[arg-type]  # one of three words
        trial=number,
        name=f"{number:05d}",
        reason=reason,
        epochs=epochs,
        metric="val_macro_f1",
        value=0.5,
        best=0.5,
        cutoff=0.6 if reason == "asha" else None,
    )


def recorded(number: int, values: list[float], state: State, reason: str) -> Trial:
    epochs = tuple(
        Epoch(
            epoch=index + 1,
            metrics={"val_macro_f1": value},
            confusion=[],
            last=None,
            best=None,
            stopped="",
            features="computed and cached",
            ran_on="",
        )
        for index, value in enumerate(values)
    )
    return Trial(
        number=number,
        params=TrialParams(),
        seed=0,
        view_seed=0,
        state=state,
        epochs=epochs,
        attempt=0,
        reason=reason,
    )


def test_every_trial_is_running_waiting_or_ended() -> None:
    standing = Standing(SWEEP)
    for number in range(4):
        standing.take(started(number))
    standing.take(ended(0, "finished", "max_epochs", 10))
    standing.take(ended(1, "stopped", "asha", 3))
    standing.take(ended(2, "failed", "diverged", 1))
    assert standing.ended == {"complete": 1, "pruned": 1, "failed": 1}
    assert list(standing.running) == [3]
    assert standing.num_waiting == 2
    assert (standing.num_stopped, standing.spared_epochs) == (1, 7)
    assert [end.trial for end in standing.endings] == [2, 1, 0]  # newest first


def test_the_best_is_the_first_of_equals_with_its_searched_params() -> None:
    standing = Standing(SWEEP)
    standing.take(started(0, lr=0.002))
    standing.take(started(1, lr=0.003))
    standing.take(epoch(0, 1, 0.5))
    standing.take(epoch(1, 1, 0.5))
    standing.take(epoch(0, 2, None, best=0.5))  # not finite
    assert standing.best is not None
    assert (standing.best.value, standing.best.name, standing.best.epoch) == (0.5, "00000", 1)
    assert standing.best.params == {"lr": 0.002}
    standing.take(epoch(1, 2, 0.6))
    assert standing.best.name == "00001"


def test_the_lower_loss_is_the_better() -> None:
    standing = Standing(MINIMISED)
    standing.take(started(0))
    standing.take(epoch(0, 1, 0.9))
    standing.take(epoch(0, 2, 0.7))
    standing.take(epoch(0, 3, 0.8, best=0.7))
    assert standing.best is not None
    assert standing.best.value == 0.7
    assert standing.best_of(0, 0.75) == 0.7
    assert standing.best_of(0, 0.65) == 0.65


def test_a_trial_that_has_failed_is_not_the_best() -> None:
    standing = Standing(SWEEP)
    standing.take(started(0))
    standing.take(started(1))
    standing.take(epoch(0, 1, 0.5))
    standing.take(epoch(1, 1, 0.8))
    in_record = [
        recorded(0, [0.5], "running", ""),
        recorded(1, [0.8], "failed", "diverged"),
    ]
    standing.reconsider("00001", lambda: in_record)
    assert standing.best is not None
    assert standing.best.name == "00000-mobilenet_v2-d2"


def test_a_resumed_sweep_goes_on_counting() -> None:
    standing = Standing(
        SWEEP,
        [
            recorded(0, [0.4, 0.6, 0.5], "pruned", "asha"),
            recorded(1, [0.7], "running", ""),
            recorded(2, [0.9], "failed", "diverged"),
        ],
    )
    assert standing.ended == {"complete": 0, "pruned": 1, "failed": 1}
    assert standing.epochs == 5
    assert standing.spared_epochs == 7
    assert standing.num_waiting == 4  # three that are new, and the one to be resumed
    assert standing.best is not None
    assert standing.best.value == 0.7  # that of a failed trial does not count
    standing.take(started(1, epochs_done=1))
    assert standing.best_of(1, 0.6) == 0.7


def test_a_trial_whose_worker_went_away_waits_again() -> None:
    standing = Standing(SWEEP)
    standing.take(started(0))
    standing.take(ended(0, "stopped", "worker", 2))
    assert standing.num_ended == 0
    assert standing.num_waiting == 6
    standing.take(started(0, epochs_done=2))
    assert standing.best_of(0, 0.2) == 0.5


def test_time_left_is_epochs_left_at_the_rate_so_far() -> None:
    clock = Clock()
    standing = Standing(dataclasses.replace(SWEEP, scheduler=None), clock=clock)
    standing.take(started(0))
    standing.take(started(1))
    assert standing.left() == (60, None)
    clock.now_s += 8
    standing.take(epoch(0, 1, 0.5))
    standing.take(epoch(1, 1, 0.5))
    # 16 seconds of trials for 2 epochs; 9 + 9 + 4 * 10 epochs left, two at a time.
    assert standing.left() == (58, 58 * 8 / 2)


def test_the_last_trial_cannot_be_shared_out() -> None:
    clock = Clock()
    sweep = dataclasses.replace(SWEEP, scheduler=None, search=SearchSettings(num_trials=2))
    standing = Standing(sweep, clock=clock)
    standing.take(started(0))
    standing.take(started(1))
    for number in range(1, 10):
        clock.now_s += 1
        standing.take(epoch(0, number, 0.5))
    standing.take(ended(0, "finished", "max_epochs", 10))
    # 18 seconds of trials for 9 epochs; trial 1 has ten to go, alone.
    assert standing.left() == (10, 20)


def test_a_time_budget_bounds_the_time_left() -> None:
    clock = Clock()
    search = SearchSettings(num_trials=6, time_budget_s=100)
    standing = Standing(dataclasses.replace(SWEEP, search=search), clock=clock)
    standing.take(started(0))
    clock.now_s += 60
    standing.take(epoch(0, 1, 0.5))
    assert standing.left()[1] == 40


def test_asha_makes_it_shorter() -> None:
    standing = Standing(SWEEP)
    whole, _ = standing.left()
    standing.rungs = (Rung(epoch=3, num_values=40, cutoff=0.5),)
    epochs, _ = standing.left()
    assert whole == 60
    assert epochs == pytest.approx(6 * (3 + 7 / 2), rel=0.05)
