"""A study on a PostgreSQL server: written as in a file, by one process, through restarts."""

import contextlib
import dataclasses
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from servers import PASSWORD, PostgreSQL, postgresql
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from test_record import epoch_of, fill
from test_recovery import make_sweep, outcome, run

from lightning_modules.errors import InputError
from search.study import storage as study_storage
from search.study.record import Record
from search.study.storage import check_name_is_free, discard_empty_study
from search.sweep import Sweep
from search.tuning import patience
from search.tuning.recorder import StudyRecorder
from search.tuning.scheduler import ResumableASHA

pytestmark = pytest.mark.cluster

names = (f"simulated-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server() -> Iterator[PostgreSQL]:
    with postgresql() as started:
        yield started


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)


@pytest.fixture
def sweep(server: PostgreSQL, tmp_path: Path) -> Sweep:
    """Seven simulated trials of up to nine epochs; its files are in a folder."""
    return dataclasses.replace(make_sweep(tmp_path), name=next(names), study_url=server.url)


@pytest.fixture(scope="module")
def in_a_file(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What the same sweep comes to with its study in SQLite."""
    sweep = make_sweep(tmp_path_factory.mktemp("in-a-file"))
    sweep.folder.mkdir()
    run(Record.create(sweep, {}))
    return outcome(Record.open(sweep).trials())


def test_a_sweep_comes_to_the_same_as_in_a_file(sweep: Sweep, in_a_file: list[Any]) -> None:
    record = Record.create(sweep, {})
    with record.being_written():
        run(record)
    assert outcome(Record.open(sweep).trials()) == in_a_file


def test_optuna_reads_the_same_as_from_a_file(sweep: Sweep, tmp_path: Path) -> None:
    beside = dataclasses.replace(sweep, study_url=f"sqlite:///{tmp_path / 'study.db'}")
    found = []
    for one in (sweep, beside):
        record = Record.create(one, {"classes": ["glioma"]})
        fill(record)
        study = optuna.load_study(study_name=one.name, storage=one.study_url)
        assert study.user_attrs["classes"] == ["glioma"]
        found.append(
            [
                (
                    *(t.number, t.state, t.values, t.params, t.distributions),
                    *(t.intermediate_values, t.user_attrs, t.system_attrs, t.duration is None),
                )
                for t in study.get_trials()
            ]
        )
    assert len(found[0]) == 6
    assert found[0] == found[1]


def test_the_server_is_killed_again_and_again_and_nothing_is_lost_or_doubled(
    server: PostgreSQL, sweep: Sweep, in_a_file: list[Any]
) -> None:
    executed: list[tuple[int, int]] = []
    restarts: list[threading.Thread] = []

    def kill_now_and_then(number: int, epoch: int) -> None:
        executed.append((number, epoch))
        if len(executed) in (3, 10, 11):
            server.stop(signal.SIGQUIT)  # as after a crash: connections are cut, and it recovers
            restart = threading.Timer(1.5, server.start)
            restart.start()
            restarts.append(restart)

    record = Record.create(sweep, {})
    with record.being_written():
        run(record, kill_now_and_then)
    for restart in restarts:
        restart.join()
    assert len(restarts) == 3
    assert outcome(Record.open(sweep).trials()) == in_a_file
    assert len(executed) == len(set(executed)), "no epoch was run twice"


def test_a_server_that_stays_away_ends_the_sweep_which_then_goes_on(
    server: PostgreSQL, sweep: Sweep, in_a_file: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 2.0)
    num_executed = 0

    def kill_once(number: int, epoch: int) -> None:
        nonlocal num_executed
        num_executed += 1
        if num_executed == 8:
            server.stop(signal.SIGQUIT)

    record = Record.create(sweep, {})
    with record.being_written():
        run(record, kill_once)  # comes back: what is drawn next is nothing
    with pytest.raises(InputError, match="must be reachable") as error:
        Record.open(sweep)
    assert "\n" not in str(error.value)
    assert PASSWORD not in str(error.value)
    server.start()
    record = Record.open(sweep)
    assert sum(len(trial.epochs) for trial in record.trials()) == 7
    with record.being_written():
        run(record)
    assert outcome(Record.open(sweep).trials()) == in_a_file


HOLD = """
import sys, time
from pathlib import Path
from test_recovery import make_sweep
from search.study.record import Record
import dataclasses
sweep = dataclasses.replace(make_sweep(Path(sys.argv[1])), name=sys.argv[2], study_url=sys.argv[3])
with Record.open(sweep).being_written():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_and_a_killed_one_lets_go(sweep: Sweep) -> None:
    record = Record.create(sweep, {})
    command = [sys.executable, "-c", HOLD, sweep.storage, sweep.name, str(sweep.study_url)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(InputError) as error, record.being_written():
            pass
        assert str(error.value) == (
            f"a sweep runs in one process at a time; another runs {sweep.name}: wait for it, or "
            f"look with `neurosweep top {sweep.name} --storage {sweep.storage}`"
        )
        assert Record.open(sweep).trials() == [], "reading is free"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with record.being_written():
        record.draw()
    # Let go at the end, too.
    with Record.open(sweep).being_written():
        pass


def cut_connections(server: PostgreSQL) -> None:
    import psycopg

    with psycopg.connect(server.url, password=PASSWORD, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'neurosweep' AND pid <> pg_backend_pid()"
        )


def test_a_writer_that_was_cut_off_goes_on_if_nobody_has_taken_over(
    server: PostgreSQL, sweep: Sweep
) -> None:
    record = Record.create(sweep, {})
    with record.being_written():
        number = record.draw().number
        cut_connections(server)
        record.add_epoch(number, epoch_of(1, 3.0))
        with pytest.raises(InputError, match="another runs"), Record.open(sweep).being_written():
            pass
    assert record.trial(number).epochs == (epoch_of(1, 3.0),)


def test_a_writer_that_was_cut_off_writes_nothing_once_another_has_taken_over(
    server: PostgreSQL, sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_storage, "RECONNECT_S", 1.0)
    record, other = Record.create(sweep, {}), Record.open(sweep)
    with contextlib.ExitStack() as stack:
        stack.enter_context(record.being_written())
        number = record.draw().number
        cut_connections(server)
        with other.being_written():
            other.add_epoch(number, epoch_of(1, 2.0))
            with pytest.raises(InputError, match="another runs"):
                record.add_epoch(number, epoch_of(1, 3.0))
        # The other is done, and what this one knows of the trials is no longer so.
        for _ in range(2):
            with pytest.raises(InputError, match="another has gone on"):
                record.add_epoch(number, epoch_of(1, 3.0))
    assert Record.open(sweep).trial(number).epochs == (epoch_of(1, 2.0),)


def test_a_connection_lost_after_the_commit_adds_no_trial_twice(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record.create(sweep, {})
    begin, losses = Engine.begin, [True, False, True, False]

    @contextlib.contextmanager
    def lose_now_and_then(engine: Engine) -> Iterator[Any]:
        with begin(engine) as connection:
            yield connection
        if losses and losses.pop(0):
            raise OperationalError("COMMIT", {}, Exception("server closed the connection"))

    assert record.num_trials == 0
    recorder = StudyRecorder(record, ResumableASHA(sweep, []))
    monkeypatch.setattr(Engine, "begin", lose_now_and_then)
    drawn = recorder.store(record.draw)
    assert drawn is not None
    recorder.store(lambda: record.add_epoch(drawn.number, epoch_of(1, 3.0)))
    assert losses == []
    assert [trial.number for trial in Record.open(sweep).trials()] == [0]
    assert Record.open(sweep).trial(0).epochs == (epoch_of(1, 3.0),)


def test_two_readers_see_whole_epochs_while_a_sweep_is_written(sweep: Sweep) -> None:
    sweep = dataclasses.replace(sweep, search=dataclasses.replace(sweep.search, num_trials=40))
    record = Record.create(sweep, {})
    is_over = threading.Event()
    faults: list[str] = []
    num_reads = 0

    def read() -> None:
        nonlocal num_reads
        seen = 0
        while not is_over.is_set():
            beside = Record.open(sweep)
            trials = beside.trials()
            numbers = [trial.number for trial in trials]
            epochs = [[epoch.epoch for epoch in trial.epochs] for trial in trials]
            total = sum(map(len, epochs))
            if numbers != list(range(len(numbers))) or beside.num_trials < len(numbers):
                faults.append(f"trials {numbers}, then {beside.num_trials}")
            if any(found != list(range(1, len(found) + 1)) for found in epochs) or total < seen:
                faults.append(f"epochs {epochs}, {seen} before")
            seen = total
            num_reads += 1

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    with record.being_written():
        run(record)
    time.sleep(0.1)
    is_over.set()
    for reader in readers:
        reader.join()
    assert faults == []
    assert num_reads >= 10
    assert len(Record.open(sweep).trials()) == 40


def test_a_name_that_a_study_has_is_refused_unless_it_is_another_name(sweep: Sweep) -> None:
    Record.create(sweep, {})
    elsewhere = dataclasses.replace(sweep, storage="/elsewhere")
    with pytest.raises(InputError, match="the sweep's name must be new"):
        check_name_is_free(elsewhere)
    with pytest.raises(InputError, match="the sweep's name must be new"):
        Record.create(elsewhere, {})
    check_name_is_free(dataclasses.replace(sweep, name=next(names)))


def test_only_a_study_without_trials_is_discarded(sweep: Sweep) -> None:
    discard_empty_study(sweep)  # there is none
    Record.create(sweep, {"classes": ["glioma"]})
    discard_empty_study(sweep)
    check_name_is_free(sweep)
    record = Record.create(sweep, {})
    record.draw()
    discard_empty_study(sweep)
    assert len(Record.open(sweep).trials()) == 1


def test_other_sweeps_in_the_same_database_are_left_alone(sweep: Sweep) -> None:
    other = dataclasses.replace(sweep, name=next(names))
    first, second = Record.create(sweep, {}), Record.create(other, {})
    with first.being_written(), second.being_written():
        fill(first)
        second.draw()
    assert len(Record.open(sweep).trials()) == 6
    assert [trial.number for trial in Record.open(other).trials()] == [0]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://ada@127.0.0.1:9/postgres", "Connection refused"),
        ("postgresql://ada@127.0.0.1:{port}/nothing", 'database "nothing" does not exist'),
        ("postgresql://bob@127.0.0.1:{port}/postgres", "password authentication failed"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line(
    server: PostgreSQL, sweep: Sweep, url: str, said: str
) -> None:
    url = url.format(port=server.port)
    with pytest.raises(InputError) as error:
        check_name_is_free(dataclasses.replace(sweep, study_url=url))
    message = str(error.value)
    assert said in message
    assert "\n" not in message
    assert "ada@" not in message
    assert message.endswith(": check study_url, the server, and PGPASSWORD or ~/.pgpass")
