"""A sweep that is killed and resumed ends as one that was left alone."""

import os
import secrets
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from marked_processes import marked_processes

from search.results import open_sweep, rank
from search.study.record import Record
from search.study.recorded import Trial

SWEEP = """
name: resumed
seed: 3
metric: val_loss
data:
  phantom: {num_patients: 30, slices_per_patient: 2, image_size_px: 32}
  image_size_px: 32
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 5, batch_size: 16}
space:
  unfreeze_depth: {low: 0, high: 5}
  dropout: {low: 0.1, high: 0.6}
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
training: {max_epochs: 4, precision: 32-true}
search: {num_trials: 6, max_concurrent_trials: 1, keep_trials: 2}
scheduler: {grace_period_epochs: 1, reduction_factor: 2}
"""

COMMAND = [sys.executable, "-m", "search.cli"]

# By which the processes of these sweeps are told from those of others on this machine.
MARK = f"NEUROSWEEP_TEST={secrets.token_hex(8)}"
ENVIRONMENT = os.environ | dict([MARK.split("=")])


@pytest.fixture(scope="module")
def sweep_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume") / "sweep.yaml"
    path.write_text(SWEEP)
    return path


class LeftAlone:
    """The sweep that nobody kills, run beside the one that is."""

    def __init__(self, sweep_file: Path) -> None:
        self.storage = sweep_file.parent / "left-alone"
        self.process = subprocess.Popen(
            [*COMMAND, "launch", str(sweep_file), "--storage", str(self.storage)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def trials(self) -> list[Trial]:
        """Its trials, once it has come to its end."""
        if self.process.returncode is None:
            output, _ = self.process.communicate(timeout=600)
            assert self.process.returncode == 0, output
        return read_trials(self.storage)


@pytest.fixture(scope="module")
def left_alone(sweep_file: Path) -> Iterator[LeftAlone]:
    sweep = LeftAlone(sweep_file)
    yield sweep
    sweep.process.kill()


def read_trials(storage: Path) -> list[Trial]:
    return Record.open(open_sweep("resumed", storage)).trials()


def num_epochs(storage: Path) -> int:
    """Epochs in the record, read beside the process that writes it."""
    database = storage / "resumed" / "study.db"
    if not database.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            query = "select count(*) from trial_user_attributes where key like 'epoch_%'"
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def outcome(trials: list[Trial]) -> list[object]:
    """Everything about trials that a kill must not change; how long they took may differ."""
    return [
        (
            trial.number,
            trial.params,
            trial.seed,
            trial.state,
            trial.reason,
            [
                (
                    epoch.epoch,
                    {name: v for name, v in epoch.metrics.items() if name != "epoch_s"},
                    epoch.confusion,
                    epoch.stopped,
                )
                for epoch in trial.epochs
            ],
        )
        for trial in trials
    ]


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_as_one_left_alone(
    sweep_file: Path, left_alone: LeftAlone
) -> None:
    storage = sweep_file.parent / "killed"
    # In the first trial's second epoch, and at the moment an epoch of a later one was recorded:
    # each has four at most.
    kills = [(1, 0.15), (7, 0.0)]
    command = [*COMMAND, "launch", str(sweep_file), "--storage", str(storage)]
    for epochs, delay_s in kills:
        driver = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        deadline_s = time.monotonic() + 300
        while num_epochs(storage) < epochs:
            assert driver.poll() is None, driver.communicate()[0].decode()
            assert time.monotonic() < deadline_s, "the sweep does not get on"
            time.sleep(0.005)
        time.sleep(delay_s)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        before = read_trials(storage)
        command = [*COMMAND, "resume", "resumed", "--storage", str(storage)]

    resumed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert resumed.returncode == 0, resumed.stderr
    after = read_trials(storage)

    expected = left_alone.trials()
    assert outcome(after) == outcome(expected)
    ranking = [trial.number for trial in rank(after, open_sweep("resumed", storage))]
    assert ranking == [trial.number for trial in rank(expected, open_sweep("resumed", storage))]
    # What was recorded before the last kill stands unchanged, and no finished trial ran again.
    assert any(trial.state != "running" for trial in before)
    for was, now in zip(before, after, strict=False):
        assert now.epochs[: len(was.epochs)] == was.epochs
        if was.state != "running":
            assert now == was

    # Nothing is left over: the baseline's checkpoint and two kept, no temporary file, no process.
    kept = sorted((storage / "resumed" / "trials").rglob("*.ckpt"))
    assert len(kept) == 3
    assert not list((storage / "resumed").rglob("*.tmp"))
    assert not processes(), "processes of a killed sweep live on"


@pytest.mark.slow
def test_resuming_a_finished_sweep_returns_at_once(
    left_alone: LeftAlone,
) -> None:
    expected = left_alone.trials()
    command = [*COMMAND, "resume", "resumed", "--storage", str(left_alone.storage)]
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert outcome(read_trials(left_alone.storage)) == outcome(expected)


def processes() -> list[str]:
    """Command lines of processes that this test's sweeps have left."""
    # Ray's agents look for their raylet now and then, and end when it was gone a few times.
    deadline_s = time.monotonic() + 60
    while (found := marked_processes(MARK)) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    return found
