"""Ctrl-C and SIGTERM end a sweep in a moment, with nothing left running and nothing lost."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from marked_processes import marked_processes

from search.interruption import Interrupted, Interruption
from search.results import open_sweep
from search.study.record import Record
from search.study.recorded import Trial
from search.tuning.local_ray import processes_of

SWEEP = """
name: signalled
metric: val_loss
data: {phantom: {num_patients: 30, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 5, batch_size: 16}
space: {lr: {low: 1.0e-4, high: 1.0e-2, log: true}}
training: {max_epochs: 500, precision: 32-true}
search: {num_trials: 2, max_concurrent_trials: 2, sampler: random}
scheduler: null
"""

# Slurm gives 30 s.
GRACE_S = 30


class Driver:
    """A sweep in a process of its own, and in a process group of its own, as a shell has it."""

    def __init__(self, storage: Path, scratch: Path, *arguments: str) -> None:
        self.storage = storage
        self.mark = f"NEUROSWEEP_TEST={os.urandom(8).hex()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "search.cli", *arguments, "--storage", str(storage)],
            env=os.environ | {name: value, "TMPDIR": str(scratch)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for_epochs(self, more_than: int) -> None:
        self.wait_until(lambda: num_epochs(self.storage) > more_than, every_s=0.2)

    def wait_until(self, is_so: Callable[[], object], *, every_s: float) -> None:
        deadline_s = time.monotonic() + 300
        while not is_so():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline_s, "the sweep does not get on"
            time.sleep(every_s)

    def communicate(self) -> str:
        return self.process.communicate(timeout=2 * GRACE_S)[0]


def read_trials(storage: Path) -> list[Trial]:
    return Record.open(open_sweep("signalled", storage)).trials()


def num_epochs(storage: Path) -> int:
    if not (storage / "signalled" / "sweep.yaml").is_file():
        return 0
    return sum(len(trial.epochs) for trial in read_trials(storage))


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder for temporary files whose name is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_signal_ends_a_sweep_within_the_grace_time_and_resume_goes_on(
    tmp_path: Path, scratch: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    storage = tmp_path / "sweeps"
    hint = f"neurosweep resume signalled --storage {storage}"

    # To Ray's own processes alone SIGTERM means nothing: gone first, they would take the driver
    # with them before it has said how to resume.
    driver = Driver(storage, scratch, "launch", str(tmp_path / "sweep.yaml"))
    driver.wait_for_epochs(0)
    (ray_folder,) = scratch.glob("nsweep-*")
    rays = set(processes_of(ray_folder)) - {driver.process.pid}
    assert len(rays) > 4
    for pid in rays:
        with contextlib.suppress(ProcessLookupError):  # an idle worker's time may be up
            os.kill(pid, signal.SIGTERM)
    driver.wait_for_epochs(num_epochs(storage) + 2)

    # To the whole group, as Slurm sends it: Ray's own processes get it, too.
    start_s = time.monotonic()
    os.killpg(driver.process.pid, signal.SIGTERM)
    output = driver.communicate()
    assert driver.process.returncode == 143, output
    assert time.monotonic() - start_s < GRACE_S
    assert hint in output
    assert "Traceback" not in output
    assert not marked_processes(driver.mark)
    before = read_trials(storage)
    assert {trial.state for trial in before} == {"running"}
    assert sum(len(trial.epochs) for trial in before) > 2

    # Ctrl-C twice: the second one does not wait for anything, and the hint is there all the same.
    driver = Driver(storage, scratch, "resume", "signalled")
    driver.wait_for_epochs(sum(len(trial.epochs) for trial in before))
    os.kill(driver.process.pid, signal.SIGINT)
    time.sleep(0.1)
    os.kill(driver.process.pid, signal.SIGINT)
    output = driver.communicate()
    assert driver.process.returncode == 130, output
    assert hint in output
    assert not marked_processes(driver.mark)

    after = read_trials(storage)
    for was, now in zip(before, after, strict=True):
        assert now.epochs[: len(was.epochs)] == was.epochs
    # Ray's own folder is gone.
    assert not list(scratch.glob("nsweep-*"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_signal_while_ray_starts_ends_the_command_as_at_any_other_time(
    tmp_path: Path, scratch: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    driver = Driver(tmp_path / "sweeps", scratch, "launch", str(tmp_path / "sweep.yaml"))
    logs = "nsweep-*/session_*/logs/gcs_server.*"
    driver.wait_until(lambda: list(scratch.glob(logs)), every_s=0.02)
    # Ray's own handler is there by now, and none of its processes is of use yet.
    os.kill(driver.process.pid, signal.SIGTERM)
    output = driver.communicate()
    assert driver.process.returncode == 143, output
    assert "Traceback" not in output
    assert not marked_processes(driver.mark)
    assert not list(scratch.glob("nsweep-*"))
    assert not (tmp_path / "sweeps" / "signalled" / "study.db").exists()


def test_a_signal_unwinds_with_the_code_of_the_first_and_is_not_forgotten() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption()
    with interruption.taken():
        interruption.check()
        for number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(Interrupted) as raised:
                signal.raise_signal(number)
            assert raised.value.exit_code == 143
        # Its exception may have been lost in an object's end.
        with pytest.raises(Interrupted):
            interruption.check()
    with pytest.raises(Interrupted) as raised, interruption.taken():
        raise KeyboardInterrupt
    assert raised.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
