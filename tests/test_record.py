"""The study as the record of a sweep: what is kept in memory, what is on disk, and when."""

import dataclasses
import gc
import sqlite3
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from ray.tune.execution.tune_controller import TuneController
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lightning_modules.data.phantom import PhantomSettings
from search.study import storage as study_storage
from search.study.record import Record
from search.study.recorded import CheckpointFile, Epoch
from search.sweep import DataSettings, SearchSettings, Sweep, TrainingSettings
from search.tuning.ray_memory import forget_finished


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    sweep = Sweep(
        name="recorded",
        storage=str(tmp_path),
        metric="val_loss",
        data=DataSettings(phantom=PhantomSettings()),
        training=TrainingSettings(max_epochs=3),
        search=SearchSettings(num_trials=1000, sampler="random"),
        scheduler=None,
    )
    sweep.folder.mkdir()
    return sweep


def epoch_of(epoch: int, loss: float | None, stopped: str = "", classes: int = 5) -> Epoch:
    return Epoch(
        epoch=epoch,
        metrics={"val_loss": loss, "val_macro_f1": 0.5},
        confusion=[[7] * classes] * classes,
        last=CheckpointFile(path=f"last-{epoch}", digest="0" * 64, epoch=epoch),
        best=None,
        stopped=stopped,
        features="from the cache",
        ran_on="here",
    )


def fill(record: Record) -> None:
    """Trials of every ending, and one that goes on."""
    for losses, stopped in (
        ((3.0, 1.0, 2.0), "max_epochs"),
        ((3.0, 4.0), "asha"),
        ((3.0, None), "diverged"),
        ((5.0, 4.5), "time_budget"),
        ((2.5,), ""),
    ):
        number = record.draw().number
        for epoch, loss in enumerate(losses, start=1):
            ends = stopped if epoch == len(losses) else ""
            record.add_epoch(number, epoch_of(epoch, loss, ends))
    crashed = record.draw().number
    record.finish(crashed, "failed", "ValueError")


def test_optuna_reads_what_was_written(sweep: Sweep) -> None:
    record = Record.create(sweep, {"classes": ["glioma"]})
    fill(record)
    study = optuna.load_study(
        study_name="recorded", storage=f"sqlite:///{sweep.folder / 'study.db'}"
    )
    trials = study.get_trials()

    assert study.user_attrs.keys() == {"classes", "checksum"}
    assert study.user_attrs["classes"] == ["glioma"]
    assert [trial.state.name for trial in trials] == [
        "COMPLETE", "PRUNED", "FAIL", "PRUNED", "RUNNING", "FAIL",
    ]  # fmt: skip
    assert [trial.value for trial in trials] == [1.0, 4.0, None, 4.5, None, None]
    assert trials[0].intermediate_values == {1: 3.0, 2: 1.0, 3: 2.0}
    assert trials[2].intermediate_values == {1: 3.0}
    assert study.best_trial.number == 0
    for trial, recorded in zip(trials, record.trials(), strict=True):
        params = dataclasses.asdict(recorded.params)
        assert trial.params == {name: params[name] for name in sweep.space}
        assert trial.user_attrs["params"] == params
        assert (trial.datetime_complete is None) == (trial.state == TrialState.RUNNING)
        assert trial.datetime_start is not None
        # Local times, as Optuna's own.
        ended = trial.datetime_complete or trial.datetime_start
        assert abs((ended - trial.datetime_start).total_seconds()) < 60
    assert trials[0].system_attrs == {"fixed_params": trials[0].params}


def test_a_record_that_is_opened_anew_knows_the_same(sweep: Sweep) -> None:
    record = Record.create(sweep, {})
    fill(record)
    again = Record.open(sweep)
    # What samplers read; trials compare by all they hold.
    assert again._study.get_trials() == record._study.get_trials()
    assert again.trials() == record.trials()
    assert [again.best_value(number) for number in range(6)] == [1.0, 3.0, 3.0, 4.5, 2.5, None]
    assert again.draw() == dataclasses.replace(record.trials()[0], **fields_of(again, 6))


def fields_of(record: Record, number: int) -> dict[str, Any]:
    trial = record.trial(number)
    return {field.name: getattr(trial, field.name) for field in dataclasses.fields(trial)}


def test_recording_an_epoch_again_replaces_it(sweep: Sweep) -> None:
    record = Record.create(sweep, {})
    number = record.draw().number
    record.add_epoch(number, epoch_of(1, 3.0))
    record.add_epoch(number, epoch_of(1, 2.0))
    assert record.trial(number).epochs == (epoch_of(1, 2.0),)
    assert Record.open(sweep).best_value(number) == 2.0


def test_a_trial_that_has_ended_takes_no_more(sweep: Sweep) -> None:
    record = Record.create(sweep, {})
    number = record.draw().number
    record.add_epoch(number, epoch_of(1, 3.0, "asha"))
    before = record.trial(number)
    with pytest.raises(RuntimeError, match="trial 0 has ended: pruned"):
        record.add_epoch(number, epoch_of(2, 1.0))
    assert Record.open(sweep).trial(number) == before


def test_each_event_is_one_commit(sweep: Sweep) -> None:
    record = Record.create(sweep, {})
    for _ in range(2):
        record.draw()  # what is looked up once is by then
    commits = []

    def count(connection: Any) -> None:
        commits.append(connection)

    event.listen(Engine, "commit", count)
    try:
        fill(record)
    finally:
        event.remove(Engine, "commit", count)
    # Six trials drawn, ten epochs of which four ended theirs, and one ending without an epoch.
    assert len(commits) == 6 + 10 + 1


@pytest.mark.slow
def test_memory_does_not_grow_with_what_trials_report(sweep: Sweep) -> None:
    record = Record.create(sweep, {})

    def run(num_trials: int) -> None:
        for _ in range(num_trials):
            number = record.draw().number
            for epoch in (1, 2, 3):
                # 40 KiB of JSON: kept for each epoch, it would be 120 KiB a trial.
                record.add_epoch(number, epoch_of(epoch, 1.0, "asha" * (epoch == 3), classes=120))

    def grown_kib(num_trials: int) -> float:
        gc.collect()
        before_bytes = tracemalloc.get_traced_memory()[0]
        run(num_trials)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before_bytes) / 1024

    run(5)
    tracemalloc.start()
    # What is kept is kept each time; what another thread of this process does once is not ours.
    grown = min(grown_kib(10) for _ in range(3))
    tracemalloc.stop()
    assert grown / 10 < 4


def test_a_study_at_rest_is_one_file(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_storage, "LOCAL_FILE_SYSTEMS", all_file_systems())
    record = Record.create(sweep, {})
    with record.being_written():
        fill(record)
        names = {path.name for path in sweep.folder.iterdir()}
        assert "study.db-wal" in names
        # Beside the writer, as a dashboard would.
        with sqlite3.connect(f"file:{sweep.folder / 'study.db'}?mode=ro", uri=True) as reader:
            assert reader.execute("select count(*) from trials").fetchone() == (6,)
        reader.close()
    assert [path.name for path in sweep.folder.iterdir()] == ["study.db"]
    assert Record.open(sweep).trials() == record.trials()


def test_a_study_that_several_hosts_see_has_no_log(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_storage, "LOCAL_FILE_SYSTEMS", set())
    record = Record.create(sweep, {})
    with record.being_written():
        fill(record)
        assert [path.name for path in sweep.folder.iterdir()] == ["study.db"]


def all_file_systems() -> set[str]:
    """Whatever the tests run on."""
    return {line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}


class Ended:
    def __init__(self, trial_id: str, *, is_finished: bool = True) -> None:
        self.trial_id = trial_id
        self.is_finished = lambda: is_finished


def test_rays_controller_lets_go_of_trials_that_have_ended() -> None:
    running, ended = Ended("a", is_finished=False), [Ended("b"), Ended("c"), Ended("d")]
    controller = SimpleNamespace(
        _trials=[ended[0], running, *ended[1:]],
        _live_trials={running, ended[0]},
        _stopped_trials=set(ended),
        _failed_trials=set(),
        _trials_to_cache={running, *ended},
        _trial_metadata={"a": "{}", "b": "{}"},
    )
    seen = controller._trials  # the list that callbacks were given
    forget_finished(SimpleNamespace(_tune_controller=controller))
    # The last stays, since Ray looks for at least one in the end.
    assert seen == controller._trials == [running, ended[2]]
    assert controller._live_trials == {running}
    assert controller._stopped_trials == {ended[2]}
    assert controller._trials_to_cache == {running, ended[2]}
    assert controller._trial_metadata == {"a": "{}"}


def test_ray_has_what_is_taken_from_it_and_is_left_alone_if_not() -> None:
    forget_finished(SimpleNamespace())
    forget_finished(None)
    # Fails when a new Ray holds trials elsewhere: see what has become of them there.
    names = set(TuneController.__init__.__code__.co_names)
    sets = {"_live_trials", "_stopped_trials", "_failed_trials", "_trials_to_cache"}
    assert {"_trials", "_trial_metadata"} | sets <= names
