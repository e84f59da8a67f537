"""Storage that vanishes for a while is waited for; one that takes no more ends the sweep."""

import sqlite3
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import small_sweep

from search.study import storage as study_storage
from search.study.record import Record
from search.study.sweep_files import LocalFiles
from search.sweep import Sweep
from search.tuning import patience
from search.tuning.callbacks import ReportEpoch
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.checkpoint_files import folder_of
from search.tuning.event_folder import EventFolder
from search.tuning.patience import StorageGoneError, patiently
from search.tuning.recorder import StudyRecorder
from search.tuning.scheduler import ResumableASHA
from search.tuning.searcher import StudySearcher
from search.tuning.trial_board import TrialBoard


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr("search.tuning.patience.time.monotonic", lambda: self.now_s)
        monkeypatch.setattr("search.tuning.patience.time.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_storage_that_comes_back_costs_a_wait_and_two_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, told = Clock(monkeypatch), list[str]()

    def write() -> str:
        if clock.now_s < 50:
            raise FileNotFoundError(2, "No such file or directory")
        return "written"

    assert patiently(write, (OSError,), tell=told.append) == "written"
    assert told == [
        "storage does not answer ([Errno 2] No such file or directory); waiting up to 120 s",
        "storage is back after 50 s",
    ]


def test_patience_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def write() -> None:
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageGoneError, match=r"not answered for 120 s \(\[Errno 5\]"):
        patiently(write, (OSError,), tell=lambda line: None)
    assert clock.now_s == 120


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(30, "Read-only file system"),
        PermissionError(13, "Permission denied"),
        sqlite3.OperationalError("database or disk is full"),
    ],
)
def test_storage_that_takes_no_more_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    clock = Clock(monkeypatch)

    def write() -> None:
        raise error

    with pytest.raises(type(error)):
        patiently(write, (OSError, sqlite3.Error), tell=lambda line: None)
    assert clock.now_s == 0


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    sweep = small_sweep(tmp_path, "vanishing")
    sweep.folder.mkdir()
    return sweep


class Away:
    """A folder that is somewhere else for a while."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(patience, "PAUSE_S", 0.05)
        elsewhere = folder.with_name("elsewhere")
        folder.rename(elsewhere)
        self._thread = threading.Thread(target=self._bring_back, args=(elsewhere, folder))
        self._thread.start()

    def _bring_back(self, elsewhere: Path, folder: Path) -> None:
        time.sleep(0.4)
        # Nothing was made in its place.
        assert not folder.exists()
        elsewhere.rename(folder)

    def wait(self) -> None:
        self._thread.join()


def test_the_record_goes_on_where_it_was_when_its_folder_is_back(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A log keeps its files open; without, each commit makes a file of its own.
    monkeypatch.setattr(study_storage, "LOCAL_FILE_SYSTEMS", set())
    record, told = Record.create(sweep, {}), list[str]()
    recorder = StudyRecorder(record, ResumableASHA(sweep), tell=told.append)
    searcher = StudySearcher(record, [], recorder)
    assert searcher.suggest("a")["number"] == 0
    away = Away(sweep.folder, monkeypatch)
    assert searcher.suggest("b")["number"] == 1
    away.wait()
    assert [line.split(" (")[0].split(" after")[0] for line in told] == [
        "storage does not answer",
        "storage is back",
    ]
    assert not recorder.storage_error
    assert [trial.number for trial in Record.open(sweep).trials()] == [0, 1]


def test_a_commit_whose_answer_was_lost_is_not_made_twice(sweep: Sweep) -> None:
    record = Record.create(sweep, {})
    first = record.draw()
    record._known.clear()  # as if the answer had not come
    assert record.draw() == first
    assert len(Record.open(sweep).trials()) == 1


def test_a_worker_waits_with_its_checkpoint_and_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sweep"
    files = LocalFiles(str(folder))
    for name in ("trials", "tensorboard"):
        (folder / name).mkdir(parents=True)
    checkpoint_io = AtomicCheckpointIO(files)

    def save_checkpoint(path: str, *, weights_only: bool) -> None:
        checkpoint_io.save_checkpoint({"weights_only": weights_only}, path)

    cache: Any = SimpleNamespace(outcome="")
    report = ReportEpoch(
        trial_folder=folder_of(3), metric="val_loss", mode="min",
        attempt=0, resume=None, checkpoint_io=checkpoint_io, cache=cache, leak="",
        report=lambda told: None,
    )  # fmt: skip
    trainer: Any = SimpleNamespace(save_checkpoint=save_checkpoint)
    away = Away(folder, monkeypatch)
    file = report._save(trainer, "last", 1, weights_only=False)
    away.wait()
    assert (folder / file.path).is_file()

    away = Away(folder, monkeypatch)
    curves = TrialBoard(
        events=EventFolder(files, "tensorboard/00003"), name="00003", params={}, classes=("a", "b"),
        metric="val_loss", may_end_at=(), resume=None,
    )  # fmt: skip
    away.wait()
    assert list((folder / "tensorboard" / "00003").iterdir())
    curves.close(has_failed=False)
