"""Between Ray Tune and the record: which trial comes next, and what became of it."""

import dataclasses
from collections import deque
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from search.checkpoint_files import newest_whole, remove_all_but
from search.record import CheckpointFile, Epoch, Record, State, Trial, encode_metrics
from search.results import score
from search.scheduler import ResumableASHA
from search.sweep import METRIC_MODES

# What the operating system says when it is the storage's fault and not the trial's: no space left,
# read-only, not permitted, quota used up.
STORAGE_FAULTS = ("[Errno 28]", "[Errno 30]", "[Errno 13]", "[Errno 122]")


class StudySearcher(Searcher):
    """Hands out trials: first the unfinished ones of the record, then new ones.

    It only asks; ``StudyRecorder`` tells. Ray's own OptunaSearch tells a stopped trial as complete,
    leaves a diverged one running for ever, and cannot resume a durable study.

    Args:
        record: Where trials come from.
        unfinished: The trials to run again, in this order.
    """

    def __init__(self, record: Record, unfinished: list[Trial]) -> None:
        super().__init__(metric=record.sweep.metric, mode=record.sweep.mode)
        self._record = record
        self._unfinished = deque(unfinished)
        self._num_drawn = len(record.trials())

    def suggest(self, trial_id: str) -> Any:
        """Return what a worker needs to run the next trial, or that there is none."""
        if self._unfinished:
            trial = self._record.restart(self._unfinished.popleft().number)
        elif self._num_drawn < self._record.sweep.search.num_trials:
            trial = self._record.draw()
            self._num_drawn += 1
        else:
            return Searcher.FINISHED
        return {
            "number": trial.number,
            "name": trial.name,
            "params": dataclasses.asdict(trial.params),
            "seed": trial.seed,
            "attempt": trial.attempt,
            "resume": self._resume_point(trial),
        }

    def _resume_point(self, trial: Trial) -> dict[str, Any] | None:
        sweep = self._record.sweep
        epoch = newest_whole(sweep.folder, trial.epochs)
        if epoch is None:
            return None
        so_far = dataclasses.replace(trial, epochs=trial.epochs[: epoch.epoch])
        best_metrics = {}
        for metric, mode in METRIC_MODES.items():
            best = so_far.best_epoch(metric, mode)
            if best is not None:
                best_metrics[metric] = best.metrics[metric]
        files = dataclasses.asdict(epoch)
        return {"last": files["last"], "best": files["best"], "best_metrics": best_metrics}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: the recorder, which sees every result, tells the study."""

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is the record."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing."""


class StudyRecorder(Callback):
    """Commits every epoch and every ending to the record as it arrives.

    Args:
        record: Written to.
        scheduler: Asked why a trial was stopped.

    Attributes:
        storage_error: What the operating system said, once storage has given out; trials that end
            after that are left as they are, to be resumed.
    """

    def __init__(self, record: Record, scheduler: ResumableASHA) -> None:
        self._record = record
        self._scheduler = scheduler
        self._kept = [t for t in record.trials() if t.state in ("complete", "pruned")]
        self.storage_error = ""

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Commit an epoch, with the decision that the scheduler has just taken on it."""
        stopped = ""
        if result.get("done"):
            stopped = self._scheduler.reasons.get(trial.trial_id, "time_budget")
        epoch = Epoch(
            epoch=result["epoch"],
            metrics=encode_metrics(result["metrics"]),
            confusion=result["confusion"],
            last=_file(result["last"]),
            best=_file(result["best"]),
            stopped=stopped,
            ran_on=result["ran_on"],
        )
        self._record.add_epoch(trial.config["number"], epoch)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the study how a trial ended."""
        if not self.storage_error:
            self.settle(self._record.trial(trial.config["number"]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the study that a trial failed, unless it is the storage that did."""
        text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[-1][:500] if lines else "its worker died"
        if any(fault in reason for fault in STORAGE_FAULTS):
            self.storage_error = reason
        else:
            self._finish(self._record.trial(trial.config["number"]), "failed", reason)

    def settle(self, trial: Trial) -> None:
        """Tell the study how a trial ended, by its last recorded epoch.

        A trial without an epoch ran out of time before its first.
        """
        stopped = trial.epochs[-1].stopped if trial.epochs else "time_budget"
        states: dict[str, State] = {"max_epochs": "complete", "diverged": "failed"}
        self._finish(trial, states.get(stopped, "pruned"), stopped)

    def _finish(self, trial: Trial, state: State, reason: str) -> None:
        self._record.finish(trial.number, state, reason)
        if state == "failed":
            self._drop_checkpoints(trial)
            return
        # Only the best few keep their checkpoint: a sweep's disk does not grow with its trials.
        sweep = self._record.sweep
        self._kept.append(trial)
        self._kept.sort(key=lambda kept: score(kept, sweep), reverse=True)
        self._drop_checkpoints(trial, keep_best=True)
        while len(self._kept) > sweep.search.keep_trials:
            self._drop_checkpoints(self._kept.pop())

    def _drop_checkpoints(self, trial: Trial, *, keep_best: bool = False) -> None:
        folder = self._record.sweep.folder
        best = trial.epochs[-1].best if trial.epochs else None
        keep = [folder / best.path] if best is not None and keep_best else []
        remove_all_but(folder / "trials" / f"{trial.number:05d}", keep)


class StopOnStorageError(Stopper):
    """Ends the sweep once storage has given out: no trial could be recorded any more.

    Args:
        recorder: Knows.
    """

    def __init__(self, recorder: StudyRecorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Stop no single trial."""
        return False

    def stop_all(self) -> bool:
        """Tell whether everything is to stop."""
        return bool(self._recorder.storage_error)


def _file(given: dict[str, Any] | None) -> CheckpointFile | None:
    return None if given is None else CheckpointFile(**given)
