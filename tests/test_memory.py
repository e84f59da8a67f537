"""What a sweep's driver keeps of trials that have ended: their record, and nothing in memory."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import small_sweep

from search.study.record import Record
from search.tuning.progress import Progress
from search.tuning.recorder import StudyRecorder
from search.tuning.scheduler import ResumableASHA
from search.tuning.searcher import StudySearcher
from search.tuning.silence import EndSilentWorkers

METRICS = {"train_loss": 0.5, "val_loss": 0.5, "val_macro_f1": 0.5, "val_accuracy": 0.5}
FILE = {"path": "trials/00000/best-e00003-a0.ckpt", "digest": "0" * 64, "epoch": 3}
RESULTS = [
    {
        **METRICS,
        "epoch": epoch,
        "metrics": METRICS,
        "confusion": [],
        "last": FILE,
        "best": FILE,
        "features": "",
        "leak": "",
        "ran_on": "here",
        "done": epoch == 3,
    }
    for epoch in (1, 2, 3)
]


class RayTrial:
    """What callbacks see of Ray's, of which each takes 60 KiB."""

    error_file = None

    def __init__(self, number: int, config: dict[str, Any]) -> None:
        self.trial_id = f"{number:08x}"
        self.config = config

    def __str__(self) -> str:
        return self.trial_id


@pytest.mark.usefixtures("capsys")
def test_nobody_keeps_a_trial_that_has_ended(tmp_path: Path) -> None:
    sweep = small_sweep(tmp_path, "kept")
    sweep.folder.mkdir()
    record = Record.create(sweep, {})
    scheduler = ResumableASHA(sweep)
    recorder = StudyRecorder(record, scheduler)
    searcher = StudySearcher(record, [], recorder)
    progress = Progress(record, scheduler, as_json=True)
    callbacks = [recorder, progress, EndSilentWorkers()]
    with record.being_written():
        progress.setup()
        gone = []
        for number in range(2):
            trial = RayTrial(number, searcher.suggest(f"{number:08x}"))
            scheduler.on_trial_add(None, trial)
            for callback in callbacks:
                callback.on_trial_start(0, [trial], trial)
            for result in RESULTS:
                scheduler.on_trial_result(None, trial, result)
                for callback in callbacks:
                    callback.on_trial_result(0, [trial], trial, result)
            scheduler.on_trial_complete(None, trial, RESULTS[-1])
            for callback in callbacks:
                callback.on_trial_complete(0, [trial], trial)
            searcher.on_trial_complete(trial.trial_id, RESULTS[-1])
            gone.append(weakref.ref(trial))
            del trial
        gc.collect()
        assert [trial() for trial in gone] == [None, None]
        progress.close()
    assert [trial.state for trial in record.trials()] == ["complete", "complete"]
