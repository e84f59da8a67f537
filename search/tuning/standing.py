"""Where a running sweep stands: what its views show."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from search.study.recorded import Trial
from search.sweep import Sweep
from search.tuning.events import EpochDone, Event, TrialEnded, TrialStarted
from search.tuning.forecast import Rung, forecast

# Endings that are remembered to be shown; a view shows as many as it has room for.
NUM_ENDINGS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best trial so far.

    Attributes:
        value: Of the metric.
        name: The trial's.
        epoch: Which epoch reached it.
        params: Those that are searched.
    """

    value: float
    name: str
    epoch: int
    params: dict[str, Any]


@dataclass(slots=True)
class RunningTrial:
    """A trial that a worker has.

    Attributes:
        name: Its name.
        params: All of them.
        epochs: Epochs reported.
        value: The metric's last value.
        best: The metric's best value.
    """

    name: str
    params: dict[str, Any]
    epochs: int
    value: float | None = None
    best: float | None = None


class Standing:
    """Counts, the running trials, the best so far, and the time that is probably left.

    Its size does not grow with the number of trials.

    Args:
        sweep: Which one.
        trials: What the record holds before this run; empty for a new sweep.
        clock: Seconds, from any start.

    Attributes:
        ended: How many trials are complete, pruned, and failed.
        running: The trials that workers have, by number.
        endings: The last ones, newest first.
        features: Epochs by what became of the frozen stages' features.
        rungs: ASHA's, ascending, those below the last epoch, with all trials.
        rungs_of: The same by backbone: with what its trials are compared with.
        epochs: Epochs of all trials, those before a resume included.
        num_stopped: Trials that ASHA stopped.
        spared_epochs: What they would have run without it.
        best: None before the first epoch.
    """

    def __init__(
        self,
        sweep: Sweep,
        trials: Iterable[Trial] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sweep = sweep
        self.ended = {"complete": 0, "pruned": 0, "failed": 0}
        self.running: dict[int, RunningTrial] = {}
        self.endings: collections.deque[TrialEnded] = collections.deque(maxlen=NUM_ENDINGS)
        self.features: collections.Counter[str] = collections.Counter()
        self.rungs: tuple[Rung, ...] = ()
        self.rungs_of: dict[str, tuple[Rung, ...]] = {}
        self.epochs = 0
        self.num_stopped = 0
        self.spared_epochs = 0
        self.best: Best | None = None
        self._clock = clock
        self._start_s = clock()
        # Trials times seconds, until the last change of the number of trials that run.
        self._busy_s = 0.0
        self._changed_s = self._start_s
        self._epochs_here = 0
        self._num_slots = 1
        self._best_values: dict[int, float] = {}
        for trial in trials:
            self._recall(trial)

    def take(self, event: Event) -> None:
        """Bring everything up to date with an event."""
        match event:
            case TrialStarted():
                self._note_busy()
                self.running[event.trial] = RunningTrial(
                    name=event.name,
                    params=event.params,
                    epochs=event.epochs_done,
                    best=self._best_values.get(event.trial),
                )
                self._num_slots = max(self._num_slots, len(self.running))
            case EpochDone():
                trial = self.running[event.trial]
                trial.epochs, trial.value, trial.best = event.epoch, event.value, event.best
                self.epochs += 1
                self._epochs_here += 1
                self.features[event.features] += 1
                self._compare(event.value, trial.name, event.epoch, trial.params)
            case TrialEnded():
                self._note_busy()
                self.running.pop(event.trial, None)
                if event.reason == "worker":
                    if event.best is not None:
                        self._best_values[event.trial] = event.best
                else:
                    self._best_values.pop(event.trial, None)
                    self.ended[STATES[event.event]] += 1
                self.endings.appendleft(event)
                if event.reason == "asha":
                    self._count_stopped(event.epochs)

    @property
    def num_ended(self) -> int:
        """Trials that have ended."""
        return sum(self.ended.values())

    @property
    def num_waiting(self) -> int:
        """Trials that have yet to start, or to start again."""
        return max(0, self.sweep.search.num_trials - self.num_ended - len(self.running))

    @property
    def elapsed_s(self) -> float:
        """How long this run of the sweep has taken."""
        return self._clock() - self._start_s

    def best_of(self, number: int, value: float | None) -> float | None:
        """Return a running trial's best value, given a new one."""
        trial = self.running.get(number)
        so_far = None if trial is None else trial.best
        return so_far if value is None or not self._is_better(value, so_far) else value

    def left(self) -> tuple[float, float | None]:
        """Return the epochs that will probably still run, and the seconds; none if not known.

        Epochs are ASHA's chance; seconds are those times what an epoch has taken here so far, start
        of workers included, on as many trials at a time as there were at most. The longest trial
        cannot be shared out. What an epoch takes differs between trials: this is a mean.
        """
        scheduler = self.sweep.scheduler
        ahead = forecast(
            self.rungs,
            epochs_done=[trial.epochs for trial in self.running.values()],
            num_waiting=self.num_waiting,
            max_epochs=self.sweep.training.max_epochs,
            reduction_factor=2 if scheduler is None else scheduler.reduction_factor,
        )
        if not self._epochs_here:
            return ahead.epochs, None
        self._note_busy()
        epoch_s = self._busy_s / self._epochs_here
        left_s = epoch_s * max(ahead.epochs / self._num_slots, ahead.longest_trial_epochs)
        budget_s = self.sweep.search.time_budget_s
        if budget_s is not None:
            left_s = min(left_s, max(0.0, budget_s - self.elapsed_s))
        return ahead.epochs, left_s

    def reconsider(self, failed: str, trials: Callable[[], Iterable[Trial]]) -> None:
        """Look for the best anew if it was a trial that has failed since: that does not count.

        Args:
            failed: The trial's name.
            trials: Read from the record, if need be.
        """
        if self.best is None or self.best.name != failed:
            return
        self.best = None
        for trial in trials():
            self._compare_best(trial)

    def _note_busy(self) -> None:
        now_s = self._clock()
        self._busy_s += len(self.running) * (now_s - self._changed_s)
        self._changed_s = now_s

    def _recall(self, trial: Trial) -> None:
        """Count in what an earlier run of the sweep has recorded."""
        self.epochs += len(trial.epochs)
        for epoch in trial.epochs:
            self.features[epoch.features] += 1
        value = self._compare_best(trial)
        if trial.state != "running":
            self.ended[trial.state] += 1
        elif value is not None:
            self._best_values[trial.number] = value
        if trial.reason == "asha":
            self._count_stopped(len(trial.epochs))

    def _count_stopped(self, epochs: int) -> None:
        self.num_stopped += 1
        self.spared_epochs += self.sweep.training.max_epochs - epochs

    def _compare_best(self, trial: Trial) -> float | None:
        """Compare a recorded trial's best value, and return it; none if it has none."""
        best = trial.best_epoch(self.sweep.metric, self.sweep.mode)
        if best is None or trial.state == "failed":
            return None
        value = best.metrics[self.sweep.metric]
        self._compare(value, trial.name, best.epoch, dataclasses.asdict(trial.params))
        return value

    def _compare(self, value: float | None, name: str, epoch: int, params: dict[str, Any]) -> None:
        so_far = None if self.best is None else self.best.value
        if value is not None and self._is_better(value, so_far):
            searched = {key: params[key] for key in self.sweep.space}
            self.best = Best(value=value, name=name, epoch=epoch, params=searched)

    def _is_better(self, value: float, so_far: float | None) -> bool:
        if so_far is None:
            return True
        return value > so_far if self.sweep.mode == "max" else value < so_far


STATES = {"finished": "complete", "stopped": "pruned", "failed": "failed"}
