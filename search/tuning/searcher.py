"""Between Ray Tune and the record: which trial comes next, and what became of it."""

import contextlib
import dataclasses
import math
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.tune import Callback, Stopper
from ray.tune.search import Searcher

from search.cost_levels import CostLevels
from search.study.record import Record, encode_metrics
from search.study.recorded import CheckpointFile, Epoch, Trial
from search.study.storage import STORAGE_ERRORS
from search.sweep import METRIC_MODES
from search.tuning.checkpoint_files import newest_whole, remove_all_but
from search.tuning.scheduler import ResumableASHA

# What the operating system says when it is the storage's fault and not the trial's: no space left,
# read-only, not permitted, quota used up.
STORAGE_FAULTS = ("[Errno 28]", "[Errno 30]", "[Errno 13]", "[Errno 122]")

# What Ray says when a worker or its node went away, or was killed for memory: such a trial is not
# at fault, stays unfinished, and can be resumed.
WORKER_FAULTS = (
    "ActorDiedError",
    "ActorUnavailableError",
    "NodeDiedError",
    "WorkerCrashedError",
    "The actor died",
)


class StudySearcher(Searcher):
    """Hands out trials: first the unfinished ones of the record, then new ones.

    It only asks; ``StudyRecorder`` tells. Ray's own OptunaSearch tells a stopped trial as complete,
    leaves a diverged one running for ever, and cannot resume a durable study.

    Args:
        record: Where trials come from.
        unfinished: The trials to run again, in this order.
        recorder: Knows whether the sweep is to end.
    """

    def __init__(self, record: Record, unfinished: list[Trial], recorder: "StudyRecorder") -> None:
        super().__init__(metric=record.sweep.metric, mode=record.sweep.mode)
        self._record = record
        self._recorder = recorder
        self._unfinished = deque(unfinished)

    def suggest(self, trial_id: str) -> Any:
        """Return what a worker needs to run the next trial, or that there is none."""
        trial = None
        with self._recorder.storage_guard():
            if self._recorder.is_over():
                pass
            elif self._unfinished:
                trial = self._record.restart(self._unfinished.popleft().number)
            elif self._record.num_trials < self._record.sweep.search.num_trials:
                trial = self._record.draw()
        if trial is None:
            return Searcher.FINISHED
        return {
            "number": trial.number,
            "name": trial.name,
            "params": dataclasses.asdict(trial.params),
            "seed": trial.seed,
            "view_seed": trial.view_seed,
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
        storage_error: What was said, once storage has given out; trials that end after that are
            left as they are, to be resumed.
        deadline_s: When the time budget is used up, on the monotonic clock.
    """

    def __init__(self, record: Record, scheduler: ResumableASHA) -> None:
        self._record = record
        self._scheduler = scheduler
        self._levels = CostLevels(record.costs)
        # Of the best few of each cost: the score, and the number turned round, so that the earlier
        # one wins.
        self._kept: list[list[tuple[float, int]]] = [[] for _ in range(len(self._levels))]
        self.storage_error = ""
        self.deadline_s = time.monotonic() + (record.sweep.search.time_budget_s or math.inf)

    def is_over(self) -> bool:
        """Tell whether no trial is to be started any more."""
        return bool(self.storage_error) or time.monotonic() > self.deadline_s

    @contextlib.contextmanager
    def storage_guard(self) -> Iterator[None]:
        """Turn what a full or vanished storage raises into the end of the sweep."""
        try:
            yield
        except (OSError, *STORAGE_ERRORS) as error:
            self.storage_error = (str(error.__cause__ or error).splitlines() or [""])[0]

    def take_up(self) -> list[Trial]:
        """Bring the record in order after a kill; return the trials to run again.

        Checkpoints that should have gone go.
        """
        unfinished = []
        for trial in self._record.trials():
            if trial.state == "running":
                unfinished.append(trial)
            else:
                self._retain(trial.number, trial.epochs[-1].best if trial.epochs else None)
        return unfinished

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Commit an epoch, with the decision that the scheduler has just taken on it.

        If that ended the trial, its end is in the same commit.
        """
        stopped = ""
        if result.get("done"):
            at_end = result["epoch"] >= self._record.sweep.training.max_epochs
            otherwise = "max_epochs" if at_end else "time_budget"
            stopped = self._scheduler.reasons.get(trial.trial_id, otherwise)
        epoch = Epoch(
            epoch=result["epoch"],
            metrics=encode_metrics(result["metrics"]),
            confusion=result["confusion"],
            last=_file(result["last"]),
            best=_file(result["best"]),
            stopped=stopped,
            features=result["features"],
            ran_on=result["ran_on"],
        )
        if not self.storage_error:
            with self.storage_guard():
                self._record.add_epoch(trial.config["number"], epoch)
                if stopped:
                    self._retain(trial.config["number"], epoch.best)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Tell the study that a trial failed, unless its worker or the storage did."""
        text = Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        reason = lines[-1][:500] if lines else "its worker died"
        if any(fault in reason for fault in STORAGE_FAULTS):
            self.storage_error = reason
        elif not self.storage_error and not any(fault in text for fault in WORKER_FAULTS):
            with self.storage_guard():
                number = trial.config["number"]
                if self._record.state(number) == "running":
                    self._record.finish(number, "failed", reason)
                    self._retain(number, None)

    def _retain(self, number: int, best: CheckpointFile | None) -> None:
        """Keep the checkpoint of the best few only: disk does not grow with the trials."""
        sweep = self._record.sweep
        if self._record.state(number) == "failed":
            self._drop_checkpoints(number)
            return
        if number == 0:
            # The baseline's stays, whatever its rank: winners are compared with it.
            self._drop_checkpoints(number, keep=best)
            return
        value = self._record.best_value(number)
        score = -math.inf if value is None else (value if sweep.mode == "max" else -value)
        kept = self._kept[self._levels.of(self._record.backbone(number))]
        kept.append((score, -number))
        self._drop_checkpoints(number, keep=best)
        if len(kept) > sweep.search.keep_trials:
            worst = min(kept)
            kept.remove(worst)
            self._drop_checkpoints(-worst[1])

    def _drop_checkpoints(self, number: int, *, keep: CheckpointFile | None = None) -> None:
        folder = self._record.sweep.folder
        kept = [] if keep is None else [folder / keep.path]
        # A file that will not go is no reason to lose the trial; the next resume tries again.
        with contextlib.suppress(OSError):
            remove_all_but(folder / "trials" / f"{number:05d}", kept)


class EndOfSweep(Stopper):
    """Ends trials at their next report once time is over, and at once when storage gave out.

    Ray's own time budget takes running trials away without a word to searcher or callbacks.

    Args:
        recorder: Knows.
    """

    def __init__(self, recorder: StudyRecorder) -> None:
        self._recorder = recorder

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tell whether a trial that has just reported is to stop."""
        return self._recorder.is_over()

    def stop_all(self) -> bool:
        """Tell whether everything is to stop."""
        return bool(self._recorder.storage_error)


def _file(given: dict[str, Any] | None) -> CheckpointFile | None:
    return None if given is None else CheckpointFile(**given)
