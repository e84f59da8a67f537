"""ASHA, able to take up where a killed sweep left off, and never to wait for a diverged trial.

With a cost as the second objective, a trial is compared with those that cost no more: the best
cheap network may go on although dear ones are better, and a dear one that is no better than a cheap
one may not.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from search.cost_levels import CostLevels
from search.study.recorded import Trial
from search.sweep import Sweep
from search.tuning.forecast import Rung
from search.tuning.ray_memory import forget_finished


class ResumableASHA(ASHAScheduler):
    """Ray's ASHA with one bracket for each cost, its rungs filled from the record.

    Ray's own snapshot forgets the rungs, and its test `value < cut-off` is false for NaN, so that a
    diverged trial would run to the end. It stops trials; it never pauses or promotes one.

    Args:
        sweep: Its metric, epochs, and rungs.
        trials: What the record holds, empty for a new sweep.
        costs: By backbone, where the sweep has a cost as its second objective.

    Attributes:
        reasons: Why a trial was just stopped, by its id: ``asha``, ``diverged``, or ``max_epochs``.
        cutoffs: The value it had to reach to go on, by its id.

    References:
        Li et al., "A System for Massively Parallel Hyperparameter Tuning",
        https://arxiv.org/abs/1810.05934. Ray issue 30838 (schedulers are not restored).
    """

    def __init__(
        self,
        sweep: Sweep,
        trials: Iterable[Trial] = (),
        costs: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        rungs = sweep.rung_epochs
        factor = 2 if sweep.scheduler is None else sweep.scheduler.reduction_factor
        super().__init__(
            time_attr="epoch",
            metric=sweep.metric,
            mode=sweep.mode,
            max_t=sweep.training.max_epochs,
            grace_period=rungs[0],
            reduction_factor=factor,
        )
        self._levels = CostLevels(costs)
        [bracket] = self._brackets
        self._brackets = [copy.deepcopy(bracket) for _ in range(len(self._levels))]
        self._sweep = sweep
        self._sign = 1.0 if sweep.mode == "max" else -1.0
        self._unfinished: dict[int, Trial] = {}
        # Ray's name of each trial that was started and has not ended.
        self._ids: dict[int, str] = {}
        self.reasons: dict[str, str] = {}
        self.cutoffs: dict[str, float] = {}
        for trial in trials:
            if trial.state == "running":
                self._unfinished[trial.number] = trial
            else:
                # Under a name that no live trial has: only its place in the rungs is needed.
                self._replay(trial, f"recorded-{trial.number}")

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put a resumed trial's recorded epochs into the rungs under its new id.

        One whose worker was lost has them there, under the id that it had with that worker.
        """
        super().on_trial_add(tune_controller, trial)
        # Ray draws one at random.
        self._trial_info[trial.trial_id] = self._brackets[self._level(trial)]
        number = trial.config["number"]
        recorded = self._unfinished.pop(number, None)
        if recorded is not None:
            self._replay(recorded, trial.trial_id)
        earlier = self._ids.pop(number, None)
        for bracket in self._brackets:
            for _, values in bracket._rungs:
                if earlier in values:
                    values[trial.trial_id] = values.pop(earlier)
        self._ids[number] = trial.trial_id

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Forget a trial that failed, except what it reached; it may come back."""
        self.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        """Leave the order to Ray, which asks at every step and goes through all the trials."""
        forget_finished(tune_controller)
        return super().choose_trial_to_run(tune_controller)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide whether a trial goes on, and remember why not."""
        if not _is_finite(result):
            self.reasons[trial.trial_id] = "diverged"
            return str(TrialScheduler.STOP)
        # Before the trial's own value joins its rung.
        cutoff = self._cutoff(trial, result["epoch"])
        action = super().on_trial_result(tune_controller, trial, result)
        self._tell_dearer(trial, result)
        if action == TrialScheduler.STOP:
            finished = result["epoch"] >= self._max_t
            self.reasons[trial.trial_id] = "max_epochs" if finished else "asha"
            self.cutoffs[trial.trial_id] = cutoff
            if result.get("leak"):
                _retire_worker(tune_controller, trial)
        return str(action)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Forget a trial that ended; the value that diverged stays out of the rungs."""
        self.reasons.pop(trial.trial_id, None)
        self.cutoffs.pop(trial.trial_id, None)
        self._ids.pop(trial.config["number"], None)
        if _is_finite(result):
            super().on_trial_complete(tune_controller, trial, result)
            self._tell_dearer(trial, result)
        else:
            self.on_trial_remove(tune_controller, trial)

    def _level(self, trial: Any) -> int:
        return self._levels.of(trial.config["params"]["backbone"])

    def _tell_dearer(self, trial: Any, result: dict[str, Any]) -> None:
        """Put a value into the rungs of what costs more: it is what those have to beat."""
        for bracket in self._brackets[self._level(trial) + 1 :]:
            bracket.on_result(trial, result["epoch"], self._sign * result[self._sweep.metric])

    def rungs(self, backbone: str | None = None) -> tuple[Rung, ...]:
        """Return the rungs below the last epoch as they are now, ascending.

        Args:
            backbone: Those that its trials are compared at; if none, those that hold all trials.
        """
        bracket = self._brackets[-1 if backbone is None else self._levels.of(backbone)]
        return tuple(
            Rung(
                epoch=milestone,
                num_values=len(recorded),
                cutoff=self._shown_cutoff(bracket, recorded),
            )
            for milestone, recorded in reversed(bracket._rungs)
            if milestone < self._max_t
        )

    def _shown_cutoff(self, bracket: Any, recorded: dict[str, float]) -> float | None:
        cutoff: Any = bracket.cutoff(recorded)
        return None if cutoff is None else float(cutoff * self._sign)

    def _cutoff(self, trial: Any, epoch: int) -> float:
        bracket = self._brackets[self._level(trial)]
        for milestone, recorded in bracket._rungs:
            if milestone == epoch:
                cutoff = self._shown_cutoff(bracket, recorded)
                return math.nan if cutoff is None else cutoff
        return math.nan

    def _replay(self, trial: Trial, trial_id: str) -> None:
        for epoch in trial.epochs:
            value = epoch.metrics.get(self._sweep.metric)
            if value is not None and epoch.stopped != "diverged":
                stand_in: Any = SimpleNamespace(trial_id=trial_id)
                for bracket in self._brackets[self._levels.of(trial.params.backbone) :]:
                    bracket.on_result(stand_in, epoch.epoch, self._sign * value)


def _retire_worker(tune_controller: Any, trial: Any) -> None:
    """Have a trial's worker end with it: the next trial gets a fresh process.

    Ray 2.60 reuses a worker unless it has not started yet, and has no way to ask for anything else.
    """
    controller = getattr(tune_controller, "_tune_controller", None)
    if controller is not None:
        controller._started_actors.discard(controller._trial_to_actor.get(trial))


def _is_finite(result: dict[str, Any]) -> bool:
    return all(
        math.isfinite(value)
        for name, value in result.items()
        if name in ("train_loss", "val_loss", "val_macro_f1", "val_accuracy")
    )
