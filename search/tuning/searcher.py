"""Between Ray Tune and the record: which trial comes next."""

import dataclasses
from collections import deque
from typing import Any

from ray.tune.search import Searcher

from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import METRIC_MODES
from search.tuning.checkpoint_files import newest_whole
from search.tuning.recorder import StudyRecorder


class StudySearcher(Searcher):
    """Hands out trials: first the unfinished ones of the record, then new ones.

    A trial whose worker was lost is handed out once more before any new one.

    It only asks; ``StudyRecorder`` tells. Ray's own OptunaSearch tells a stopped trial as complete,
    leaves a diverged one running for ever, and cannot resume a durable study.

    Args:
        record: Where trials come from.
        unfinished: The trials to run again, in this order.
        recorder: Knows which trials are to run again, and whether the sweep is to end.
    """

    def __init__(self, record: Record, unfinished: list[Trial], recorder: StudyRecorder) -> None:
        super().__init__(metric=record.sweep.metric, mode=record.sweep.mode)
        self._record = record
        self._recorder = recorder
        self._unfinished = deque(trial.number for trial in unfinished)

    def suggest(self, trial_id: str) -> Any:
        """Return what a worker needs to run the next trial, or that there is none.

        None for now while trials run, since one of them may have to be run again.
        """
        recorder = self._recorder
        trial = None if recorder.is_over() else recorder.store(self._next)
        if trial is None:
            return None if recorder.open and not recorder.is_over() else Searcher.FINISHED
        resume = recorder.store(lambda: self._resume_point(trial))
        if recorder.storage_error:
            return Searcher.FINISHED
        recorder.open.add(trial.number)
        return {
            "number": trial.number,
            "name": trial.name,
            "params": dataclasses.asdict(trial.params),
            "seed": trial.seed,
            "view_seed": trial.view_seed,
            "attempt": trial.attempt,
            "resume": resume,
            # Read where the trial's resources are chosen.
            "avoided_nodes": recorder.nodes.avoided_by(trial.number),
        }

    def _next(self) -> Trial | None:
        for waiting in (self._recorder.again, self._unfinished):
            if waiting:
                trial = self._record.restart(waiting[0])
                waiting.popleft()
                return trial
        if self._record.num_trials < self._record.sweep.search.num_trials:
            return self._record.draw()
        return None

    def _resume_point(self, trial: Trial) -> dict[str, Any] | None:
        epoch = newest_whole(self._record.sweep.files, trial.epochs)
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
