"""Tells the views of a running sweep what Ray Tune tells its callbacks."""

import contextlib
import dataclasses
import os
import sys
from typing import Any, Literal

from ray.tune.progress_reporter import TrialProgressCallback

from lightning_modules.errors import InputError
from search.study.record import Record, encode_metrics
from search.tuning.events import EpochDone, Event, TrialEnded, TrialStarted
from search.tuning.lines import JsonLines, Lines
from search.tuning.scheduler import ResumableASHA
from search.tuning.screen import Screen
from search.tuning.standing import Standing
from search.tuning.sweep_board import SweepBoard

View = Screen | Lines | JsonLines | SweepBoard


class Progress(TrialProgressCallback):
    """Turns what happens to trials into events, and shows them in every view.

    In the place of Ray's own, which Ray 2.60 adds where there is none of its kind, and which keeps
    every trial that ended, 60 KiB each, to print nothing. It has to come after the recorder, which
    knows what became of a trial.

    Args:
        record: Read for what is known so far.
        scheduler: Asked for rungs, and why a trial was stopped.
        as_json: Whether standard output is for programs.
    """

    def __init__(self, record: Record, scheduler: ResumableASHA, *, as_json: bool) -> None:
        super().__init__()
        self._record = record
        self._scheduler = scheduler
        self._standing = Standing(record.sweep, record.trials())
        self._views: list[View] = [
            view_for(self._standing, as_json=as_json),
            SweepBoard(self._standing),
        ]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terminal out of Ray's snapshot, which is never read back."""
        return {}

    def setup(self, *arguments: Any, **info: Any) -> None:
        """Open the views."""
        self._look_at_rungs()
        for view in self._views:
            view.start()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell that a trial has started."""
        config = trial.config
        resume = config["resume"]
        self._tell(
            TrialStarted(
                trial=config["number"],
                name=config["name"],
                params=config["params"],
                epochs_done=0 if resume is None else resume["last"]["epoch"],
            )
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Tell of an epoch, and of the trial's end if it was the last."""
        sweep = self._record.sweep
        standing = self._standing
        number, name, epoch = trial.config["number"], trial.config["name"], result["epoch"]
        metrics = encode_metrics(result["metrics"])
        value = metrics[sweep.metric]
        best = standing.best_of(number, value)
        is_done = bool(result.get("done"))
        self._look_at_rungs()
        rungs = standing.rungs_of[trial.config["params"]["backbone"]]
        ahead = [rung for rung in rungs if rung.epoch > epoch and not is_done]
        report = EpochDone(
            trial=number,
            name=name,
            epoch=epoch,
            max_epochs=sweep.training.max_epochs,
            metric=sweep.metric,
            value=value,
            best=best,
            metrics=metrics,
            next_rung=ahead[0].epoch if ahead else None,
            cutoff=ahead[0].cutoff if ahead else None,
            features=result["features"],
            left_s=None,
        )
        standing.take(report)
        self._show(dataclasses.replace(report, left_s=standing.left()[1]))
        if is_done:
            at_end = epoch >= sweep.training.max_epochs
            reason = self._scheduler.reasons.get(
                trial.trial_id, "max_epochs" if at_end else "time_budget"
            )
            self._end(trial, reason, value=value, best=best)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell why a trial failed, or that its worker went away."""
        number = trial.config["number"]
        running = self._standing.running.get(number)
        reason, fault = "worker", None
        # Not from a storage that may be what went wrong.
        with contextlib.suppress(InputError):
            recorded = self._record.trial(number)
            reason = recorded.reason if recorded.state == "failed" else reason
            fault = recorded.faults[-1] if recorded.faults else None
        self._end(
            trial,
            reason,
            value=None if running is None else running.value,
            best=None if running is None else running.best,
            fault=fault,
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Do nothing, in the place of Ray's, which keeps it: its last result has told all."""

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Keep the clock going; Ray comes by ten times a second."""
        for view in self._views:
            with contextlib.suppress(OSError):
                view.refresh()

    def close(self) -> None:
        """Give the terminal back, however the sweep ended; twice does no harm."""
        for view in self._views:
            with contextlib.suppress(OSError):
                view.close()

    def _look_at_rungs(self) -> None:
        self._standing.rungs = self._scheduler.rungs()
        self._standing.rungs_of = {
            backbone: self._scheduler.rungs(backbone) for backbone in self._record.sweep.backbones
        }

    def _end(
        self,
        trial: Any,
        reason: str,
        *,
        value: float | None,
        best: float | None,
        fault: str | None = None,
    ) -> None:
        number, name = trial.config["number"], trial.config["name"]
        running = self._standing.running.get(number)
        event = TrialEnded(
            event=KINDS.get(reason, "failed"),
            trial=number,
            name=name,
            reason=reason,
            epochs=0 if running is None else running.epochs,
            metric=self._record.sweep.metric,
            value=value,
            best=best,
            cutoff=self._cutoff(trial) if reason == "asha" else None,
            fault=fault,
        )
        if event.event == "failed":
            self._standing.reconsider(name, self._record.trials)
        self._tell(event)

    def _cutoff(self, trial: Any) -> float | None:
        cutoff = self._scheduler.cutoffs[trial.trial_id]
        return cutoff if cutoff == cutoff else None

    def _tell(self, event: Event) -> None:
        self._standing.take(event)
        self._show(event)

    def _show(self, event: Event) -> None:
        for view in self._views:
            # A terminal that was closed, or a full disk, is no reason to end the sweep.
            with contextlib.suppress(OSError):
                view.show(event)


def view_for(standing: Standing, *, as_json: bool) -> View:
    """Return JSON for programs, one screen in a terminal that can have it, else plain lines."""
    if as_json:
        return JsonLines(standing.sweep.name)
    # Not what rich takes for a terminal: FORCE_COLOR asks for colours, not for a screen.
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
        return Screen(standing)
    return Lines(standing)


KINDS: dict[str, Literal["finished", "stopped"]] = {
    "max_epochs": "finished",
    "asha": "stopped",
    "time_budget": "stopped",
    "worker": "stopped",
}
