"""What goes wrong in trials while a sweep runs; trials are simulated, all the rest is the product.

What is seen of processes from outside, such as signals to the driver, is in ``test_signals``.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle, tune

from lightning_modules.data.phantom import PhantomSettings
from search.space import Float
from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import DataSettings, SchedulerSettings, SearchSettings, Sweep, TrainingSettings
from search.tuning import silence, tuner
from search.tuning.faults import AlikeFailuresError, read_fault
from search.tuning.local_ray import local_ray
from search.tuning.scheduler import ResumableASHA
from search.tuning.silence import EndSilentWorkers

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

# Workers do not have the tests' folder: what trials do is sent to them whole.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Called with the folder, the trial's config, and the epoch that is about to be reported.
Mishap = Callable[[Path, dict[str, Any], int], None]


def simulate(config: dict[str, Any], *, folder: Path, mishap: Mishap, epoch_s: float) -> None:
    """What a trial is to Ray: epochs, checkpoints, reports; and a mishap now and then."""
    resume = config["resume"]
    first = 1 if resume is None else resume["last"]["epoch"] + 1
    for epoch in range(first, 4):
        with (folder / "executed").open("a") as file:
            file.write(f"{config['number']} {epoch} {config['attempt']}\n")
        mishap(folder, config, epoch)
        time.sleep(epoch_s)
        loss = config["params"]["lr"] / epoch
        files = {}
        for kind in ("last", "best"):
            path = f"trials/{config['number']:05d}/{kind}-e{epoch}-a{config['attempt']}"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
            files[kind] = {"path": path, "digest": EMPTY, "epoch": epoch}
        metrics = {"val_loss": loss, "train_loss": loss, "val_macro_f1": 0.5, "val_accuracy": 0.5}
        tune.report(
            {"epoch": epoch, **metrics, "metrics": metrics, "confusion": [], "features": "",
             "leak": "", "ran_on": "", **files}
        )  # fmt: skip


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    with local_ray({"num_cpus": 4, "log_to_driver": False, "logging_level": 40}):
        yield


@pytest.fixture
def make_record(tmp_path: Path) -> Callable[..., Record]:
    def make(num_trials: int = 3, *, has_asha: bool = False) -> Record:
        sweep = Sweep(
            name="faulty",
            storage=str(tmp_path),
            metric="val_loss",
            data=DataSettings(phantom=PhantomSettings()),
            space={"lr": Float(low=1e-4, high=1e-1, log=True)},
            training=TrainingSettings(max_epochs=3),
            search=SearchSettings(num_trials=num_trials, sampler="random"),
            scheduler=SchedulerSettings(grace_period_epochs=1) if has_asha else None,
        )
        sweep.folder.mkdir(parents=True)
        return Record.create(sweep, {})

    return make


def run(
    record: Record, mishap: Mishap, *, workers: int = 2, epoch_s: float = 0.1
) -> dict[int, Trial]:
    """Run a sweep through Ray; return its trials as recorded."""
    folder = record.sweep.folder
    trainable = tune.with_parameters(simulate, folder=folder, mishap=mishap, epoch_s=epoch_s)
    with record.being_written():
        tuner.run_trials(
            record,
            tune.with_resources(trainable, {"cpu": 1.0}),
            max_concurrent_trials=workers,
            is_local=True,
        )
    return recorded(record)


def recorded(record: Record) -> dict[int, Trial]:
    return {trial.number: trial for trial in Record.open(record.sweep).trials()}


def executed(record: Record) -> list[tuple[int, int, int]]:
    """Every epoch that a worker began, in order: trial, epoch, attempt."""
    lines = (record.sweep.folder / "executed").read_text().splitlines()
    return [(int(n), int(epoch), int(attempt)) for n, epoch, attempt in map(str.split, lines)]


def no_mishap(folder: Path, config: dict[str, Any], epoch: int) -> None:
    pass


def kill_baseline_once(folder: Path, config: dict[str, Any], epoch: int) -> None:
    if (config["number"], epoch, config["attempt"]) == (0, 2, 0):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_trial_1_always(folder: Path, config: dict[str, Any], epoch: int) -> None:
    if config["number"] == 1 and epoch == 2:
        os.kill(os.getpid(), signal.SIGKILL)


def stop_trial_1_once(folder: Path, config: dict[str, Any], epoch: int) -> None:
    if (config["number"], epoch, config["attempt"]) == (1, 2, 0):
        (folder / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


def fail_at_first_epoch(folder: Path, config: dict[str, Any], epoch: int) -> None:
    if not (folder / "mended").exists():
        raise KeyError(f"a name that differs: {config['number']}")


def fail_in_trial_0(folder: Path, config: dict[str, Any], epoch: int) -> None:
    if config["number"] == 0:
        raise ValueError("these params\nare no good")


def run_out_of_memory(folder: Path, config: dict[str, Any], epoch: int) -> None:
    raise MemoryError("a single image")


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_trial_whose_worker_is_killed_goes_on_from_its_last_checkpoint(
    make_record: Callable[..., Record],
) -> None:
    record = make_record(has_asha=True)
    trials = run(record, kill_baseline_once, workers=1)
    assert all(trial.state in ("complete", "pruned") for trial in trials.values())
    assert trials[0].attempt == 1
    assert len(trials[0].faults) == 1
    assert trials[0].faults[0].startswith("worker lost")
    assert [epoch.epoch for epoch in trials[0].epochs] == [1, 2, 3]
    # The epoch that it died in is the only one that was begun twice.
    begun = [(number, epoch) for number, epoch, _ in executed(record)]
    assert sorted(b for b in begun if begun.count(b) > 1) == [(0, 2), (0, 2)]


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_trial_that_kills_each_of_its_workers_fails_after_three_restarts(
    make_record: Callable[..., Record],
) -> None:
    record = make_record()
    trials = run(record, kill_trial_1_always)
    assert [trials[number].state for number in (0, 2)] == ["complete"] * 2
    assert trials[1].state == "failed"
    assert "worker lost" in trials[1].reason
    assert trials[1].attempt == 3
    assert [a for number, epoch, a in executed(record) if (number, epoch) == (1, 2)] == [0, 1, 2, 3]
    assert len(trials[1].epochs) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_stopped_worker_is_ended_and_its_trial_runs_again(
    make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "LEAST_S", 10.0)
    record = make_record()
    start_s = time.monotonic()
    trials = run(record, stop_trial_1_once)
    assert {trial.state for trial in trials.values()} == {"complete"}
    assert "silent" in trials[1].faults[0]
    assert {epoch.last.path[-2:] for epoch in trials[1].epochs if epoch.last} == {"a0", "a1"}
    assert time.monotonic() - start_s < 120
    # Not merely given up: it holds memory, a device, and locks.
    stopped = Path(f"/proc/{(record.sweep.folder / 'stopped').read_text()}")
    deadline_s = time.monotonic() + 20
    while stopped.exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not stopped.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_two_trials_that_fail_alike_at_once_end_the_sweep_and_run_again_once_mended(
    make_record: Callable[..., Record],
) -> None:
    record = make_record(num_trials=5)
    with pytest.raises(AlikeFailuresError) as raised:
        run(record, fail_at_first_epoch, workers=1)
    assert "in fail_at_first_epoch" in raised.value.traceback
    assert raised.value.traceback.rstrip().endswith("a name that differs: 1'")
    # Not held against them, and no third was started.
    assert [trial.state for trial in recorded(record).values()] == ["running"] * 2
    (record.sweep.folder / "mended").touch()
    trials = run(Record.open(record.sweep), fail_at_first_epoch)
    assert [trial.state for trial in trials.values()] == ["complete"] * 5


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_a_trial_that_fails_alone_is_to_blame(make_record: Callable[..., Record]) -> None:
    trials = run(make_record(), fail_in_trial_0)
    assert [trial.state for trial in trials.values()] == ["failed", "complete", "complete"]
    assert trials[0].reason == "ValueError: these params"


@pytest.mark.slow
@pytest.mark.usefixtures("_cluster")
def test_running_out_of_memory_is_the_params_fault_however_often(
    make_record: Callable[..., Record],
) -> None:
    trials = run(make_record(), run_out_of_memory)
    assert {(trial.state, trial.reason) for trial in trials.values()} == {
        ("failed", "MemoryError: a single image")
    }


def test_a_trial_that_comes_back_counts_once_at_its_rungs(
    make_record: Callable[..., Record],
) -> None:
    scheduler = ResumableASHA(make_record(has_asha=True).sweep)
    result = {"epoch": 1, "val_loss": 1.0, "train_loss": 1.0}
    config = {"number": 4, "params": {"backbone": "mobilenet_v2"}}
    for trial_id in ("first worker", "second worker"):
        trial = SimpleNamespace(trial_id=trial_id, config=config)
        scheduler.on_trial_add(None, trial)
        scheduler.on_trial_result(None, trial, result)
        scheduler.on_trial_error(None, trial)
    [values] = [values for milestone, values in scheduler._brackets[0]._rungs if milestone == 1]
    assert values == {"second worker": -1.0}


# What Ray 2.60 writes, shortened.
RAISED = """Failure # 1 (occurred at 2026-11-22_19-59-39)
\x1b[36mray::ImplicitFunc.train()\x1b[39m (pid=30035, ip=192.0.2.2, repr=trainable)
  File "/site-packages/ray/air/_internal/util.py", line 98, in run
    self._ret = self._target(*self._args, **self._kwargs)
  File "/site-packages/trial.py", line 12, in trainable
    raise ValueError("bad thing")
    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
{said}
second line
"""
DIED = """Failure # 1 (occurred at 2026-11-22_20-00-11)
The actor died unexpectedly before finishing this task.
\tclass_name: ImplicitFunc
\tip: 192.0.2.2
{said}
"""


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        (RAISED.format(said="ValueError: bad thing"), "trial", "ValueError: bad thing"),
        (RAISED.format(said="torch.OutOfMemoryError: CUDA out of memory."), "memory", "torch.Out"),
        (RAISED.format(said="MemoryError"), "memory", "MemoryError"),
        (RAISED.format(said="OSError: [Errno 28] No space left"), "storage", "OSError: [Errno 28]"),
        (
            DIED.format(
                said="The actor is dead because its worker process has died. Worker exit type: "
                "SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection "
                "error code 2. End of file."
            ),
            "worker",
            "worker lost: worker unexpectedly exits with a connection error code 2",
        ),
        (
            DIED.format(said="killed due to the node running low on memory:\nray::Trial 3 GiB"),
            "worker",
            "worker lost: killed, since its node ran out of memory",
        ),
        (DIED.format(said="The node has died."), "worker", "worker lost: its node went away"),
        ("", "worker", "worker lost: it died"),
    ],
)
def test_what_ray_writes_of_a_failure_is_read(
    tmp_path: Path, text: str, kind: str, reason: str
) -> None:
    path = tmp_path / "error.txt"
    path.write_text(text)
    fault = read_fault(SimpleNamespace(error_file=str(path)))
    assert fault.kind == kind
    assert fault.reason.startswith(reason)
    # What becomes of a node that is gone says nothing of it.
    assert fault.node == ("192.0.2.2" if text and "node has died" not in text else "")
    if kind != "worker":
        assert fault.place.endswith("at /site-packages/trial.py:12")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [0.0]
    monkeypatch.setattr("search.tuning.silence.time.monotonic", lambda: now_s[0])
    return now_s


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    actors: list[Any] = []
    monkeypatch.setattr(ray, "kill", actors.append)
    return actors


def pass_seconds(watch: EndSilentWorkers, clock: list[float], trial: Any, seconds: float) -> None:
    """Let time pass as it does while Tune's controller turns."""
    for _ in range(int(seconds * 2)):
        clock[0] += 0.5
        watch.on_step_begin(0, [trial])


def test_silence_is_measured_by_a_trials_own_epochs(clock: list[float], killed: list[Any]) -> None:
    trial = SimpleNamespace(trial_id="a", temporary_state=SimpleNamespace(ray_actor="the worker"))
    watch = EndSilentWorkers()
    watch.on_trial_start(0, [trial], trial)
    pass_seconds(watch, clock, trial, 100)
    watch.on_trial_result(0, [trial], trial, {})
    # An epoch took 100 s: ten times that is allowed.
    pass_seconds(watch, clock, trial, 1000)
    assert not killed
    # The driver was stopped for a week: its silence, not the worker's.
    clock[0] += 604800
    watch.on_step_begin(0, [trial])
    assert killed == ["the worker"]  # 1,001 s by now


def test_a_driver_that_was_stopped_blames_nobody(clock: list[float], killed: list[Any]) -> None:
    trial = SimpleNamespace(trial_id="a", temporary_state=SimpleNamespace(ray_actor="worker"))
    watch = EndSilentWorkers()
    watch.on_trial_start(0, [trial], trial)
    pass_seconds(watch, clock, trial, 10)
    watch.on_trial_result(0, [trial], trial, {})
    pass_seconds(watch, clock, trial, 250)
    clock[0] += 604800
    watch.on_step_begin(0, [trial])
    assert not killed
