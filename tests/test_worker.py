"""What a trial leaves behind in a warm worker is noticed before the next one."""

import gc
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from search.sweep import DataSettings, Sweep, TrainingSettings
from search.tuning import worker
from search.tuning.scheduler import ResumableASHA
from search.tuning.worker import Footprint, Worker, measure_footprint

MIB = 2**20


def footprint(mib: float = 100, threads: int = 3, files: int = 20) -> Footprint:
    return Footprint(allocated_bytes=int(mib * MIB), num_threads=threads, num_open_files=files)


@pytest.mark.parametrize(
    ("now", "leak"),
    [
        (footprint(), ""),
        (footprint(mib=0, threads=1, files=1), ""),
        (footprint(mib=228, threads=11, files=36), ""),  # as much as is allowed
        (footprint(mib=229), "129 MiB"),
        (footprint(threads=12), "9 threads"),
        (footprint(files=37), "17 open files"),
        (footprint(mib=400, threads=30, files=90), "300 MiB, 27 threads, 70 open files"),
    ],
)
def test_what_is_beyond_the_baseline_is_named(now: Footprint, leak: str) -> None:
    assert now.beyond(footprint()) == leak


def test_a_baseline_belongs_to_one_filling_of_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    now = footprint()
    monkeypatch.setattr(worker, "measure_footprint", lambda: now)
    process = Worker()
    gc.disable()  # as while a worker imports
    assert process.leak_before_trial((0, 0)) == ""
    assert gc.isenabled()
    now = footprint(mib=500)  # a first trial has filled them
    assert process.leak_before_trial((1, 1)) == ""
    now = footprint(mib=600)
    assert process.leak_before_trial((1, 1)) == ""
    now = footprint(mib=900)  # another backbone was loaded
    assert process.leak_before_trial((2, 1)) == ""
    now = footprint(mib=1100)
    assert process.leak_before_trial((2, 1)) == "200 MiB"
    gc.unfreeze()  # what this process has made does not stay


def test_tensors_threads_and_files_that_stay_are_seen(tmp_path: Path) -> None:
    before = measure_footprint()
    kept = [torch.zeros(MIB // 4) for _ in range(200)]
    stop = threading.Event()
    threads = [threading.Thread(target=stop.wait) for _ in range(10)]
    files = [(tmp_path / str(number)).open("w") for number in range(20)]
    for thread in threads:
        thread.start()
    after = measure_footprint()
    stop.set()
    for thread in threads:
        thread.join()
    for file in files:
        file.close()
    assert after.allocated_bytes - before.allocated_bytes == pytest.approx(200 * MIB, rel=0.02)
    assert after.num_threads - before.num_threads == 10
    assert after.num_open_files - before.num_open_files == 20
    del kept
    freed = after.allocated_bytes - measure_footprint().allocated_bytes
    assert freed == pytest.approx(200 * MIB, rel=0.02)


class Trial(NamedTuple):
    """As much of Ray's as the scheduler looks at."""

    trial_id: str
    config: dict[str, Any]

    def __hash__(self) -> int:
        return hash(self.trial_id)


def make_result(**changes: Any) -> dict[str, Any]:
    finite = {"train_loss": 1.0, "val_loss": 1.0, "val_macro_f1": 0.5, "val_accuracy": 0.5}
    return {"epoch": 1, "leak": "", **finite, **changes}


@pytest.mark.parametrize(
    ("result", "reused"),
    [
        (make_result(epoch=9), True),
        (make_result(epoch=9, leak="300 MiB"), False),
        (make_result(epoch=1, leak="300 MiB"), True),  # it goes on, and is retired when it ends
    ],
)
def test_a_leaking_worker_ends_with_its_trial(result: dict[str, Any], reused: bool) -> None:
    sweep = Sweep(
        name="s",
        data=DataSettings(path="p"),
        scheduler=None,
        training=TrainingSettings(max_epochs=9),
    )
    trial = Trial("t", {"number": 0, "params": {"backbone": "resnet50"}})
    controller = SimpleNamespace(_started_actors={"a", "b"}, _trial_to_actor={trial: "a"})
    scheduler = ResumableASHA(sweep)
    scheduler.on_trial_add(controller, trial)
    scheduler.on_trial_result(SimpleNamespace(_tune_controller=controller), trial, result)
    assert controller._started_actors == ({"a", "b"} if reused else {"b"})


def test_installed_packages_are_looked_through_for_callbacks_once_a_process() -> None:
    from pytorch_lightning import Trainer

    from search.tuning.trial import cached_entry_points as lookup

    Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    before = lookup.cache_info()
    Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    after = lookup.cache_info()
    assert after.hits > before.hits
    assert after.misses == before.misses
