"""Trials that share a GPU: as many at a time as fit, all of them in workers that stay warm."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.weights import find_weights
from search.results import open_sweep
from search.space import Int
from search.study.record import Record
from search.sweep import DataSettings, SearchSettings, Sweep, TrainingSettings, TrialParams
from search.tuning import resources, tuner
from search.tuning.local_ray import local_ray

MakeData = Callable[..., tuple[Manifest, Pack]]

NUM_CPUS = 8
NUM_TRIALS = 9

# Three times the largest, with its margin, fit.
MEASURED: dict[str, Any] = {
    "precisions": {"mobilenet_v2": "32-true"},
    "gpu_peak_bytes": {f"mobilenet_v2 {depth} 32": 10 + 2 * depth for depth in (0, 5)},
    "gpu_total_bytes": 100,
}


@pytest.fixture
def record(tmp_path: Path, make_data: MakeData) -> Record:
    """Trials of depths 0 to 5 in turn, none of them begun."""
    manifest, pack = make_data()
    sweep = Sweep(
        name="packed",
        storage=str(tmp_path),
        metric="val_loss",
        data=DataSettings(path="/nowhere"),
        space={"unfreeze_depth": Int(low=0, high=5)},
        training=TrainingSettings(max_epochs=1),
        search=SearchSettings(num_trials=NUM_TRIALS, sampler="random"),
        scheduler=None,
    )
    sweep.folder.mkdir()
    weights = find_weights("random", backbone="mobilenet_v2", seed=0)
    facts = {
        "measured": MEASURED,
        "manifest_digest": manifest.digest,
        "pack_digest": pack.digest,
        "weights": {"mobilenet_v2": asdict(weights)},
    }
    record = Record.create(sweep, facts)
    with record.being_written():
        for number in range(NUM_TRIALS):
            params = replace(TrialParams(), unfreeze_depth=number % 6)
            record.add(params, seed=number, view_seed=0)
    return record


def most_at_once(spans: list[tuple[float, float]]) -> int:
    """How many of the spans, each from begin to end, hold one moment at most."""
    return max(sum(begun <= start < ended for begun, ended in spans) for start, _ in spans)


@pytest.mark.slow
def test_trials_of_all_depths_share_a_gpu_in_workers_that_stay_warm(
    record: Record, tmp_path: Path, make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"

    # Ray is told of a GPU that is not there, and places as it would on one. Trials only wait.
    def simulate(config: dict[str, Any], run: Any) -> None:
        from ray import tune

        begun_s = time.time()
        deadline_s = begun_s + 60
        # The first ones wait for each other, however long a worker takes to start.
        with log.open("a") as file:
            file.write("begun\n")
        while time.time() < deadline_s and log.read_text().count("begun") < 3:
            time.sleep(0.02)
        time.sleep(0.3)
        entry = {
            "begun_s": begun_s,
            "ended_s": time.time(),
            "pid": os.getpid(),
            "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        with log.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        shown = dict.fromkeys(("train_loss", "val_loss", "val_macro_f1", "val_accuracy"), 0.5)
        tune.report(
            {
                "epoch": 1,
                **shown,
                "metrics": shown,
                "confusion": [],
                "features": "",
                "leak": "",
                "ran_on": "here",
                "last": None,
                "best": None,
            }
        )

    @contextlib.contextmanager
    def with_gpu(address: str | None) -> Iterator[None]:
        with local_ray({"num_cpus": NUM_CPUS, "num_gpus": 1, "log_to_driver": False}):
            yield

    monkeypatch.setattr(tuner, "connected", with_gpu)
    monkeypatch.setattr(tuner, "train_trial", simulate)
    monkeypatch.setattr(tuner, "draw_kept", lambda *_: None)
    with record.being_written():
        tuner.resume_sweep(record, *make_data(), address=None, tell=lambda line: None)
    assert [trial.state for trial in record.trials()] == ["complete"] * NUM_TRIALS
    entries = [json.loads(line) for line in log.read_text().splitlines() if line != "begun"]
    assert len(entries) == NUM_TRIALS
    assert {entry["gpu"] for entry in entries} == {"0"}
    assert most_at_once([(entry["begun_s"], entry["ended_s"]) for entry in entries]) == 3
    assert len({entry["pid"] for entry in entries}) == 3


def test_a_sweep_that_was_measured_on_gpus_trains_on_cpus_where_there_are_none(
    record: Record, make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_nodes", lambda: [{"CPU": 2.0}])
    run, found = tuner._run_of(record.sweep, *make_data(), {}, MEASURED, is_local=True)
    assert not run.on_gpu
    assert found.each == {"cpu": 1.0, "gpu": 0.0}
    assert found.num_slots == 2


SWEEP = """
name: packed
metric: val_loss
data: {phantom: {num_patients: 100, slices_per_patient: 4, image_size_px: 96}, image_size_px: 96}
weights: random
params: {backbone: mobilenet_v2}
space:
  unfreeze_depth: {low: 2, high: 3}
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
training: {max_epochs: 100}
search: {num_trials: 8}
scheduler: null
"""


@pytest.mark.gpu
def test_trials_train_beside_each_other_on_a_gpu(tmp_path: Path, device: str) -> None:
    (tmp_path / "packed.yaml").write_text(SWEEP)
    command = [sys.executable, "-m", "search.cli", "launch", "packed.yaml"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    record = Record.open(open_sweep("packed", tmp_path / "sweeps"))
    trials = record.trials()
    assert [trial.state for trial in trials] == ["complete"] * 8
    assert all(device in epoch.ran_on for trial in trials for epoch in trial.epochs)
    assert all(epoch.micro_batch_size is None for trial in trials for epoch in trial.epochs)
    spans = []
    for trial in trials:
        events = EventAccumulator(str(tmp_path / "sweeps" / "packed" / "tensorboard" / trial.name))
        events.Reload()
        times_s = [event.wall_time for event in events.Scalars("train_loss")]
        spans.append((times_s[0], times_s[-1]))
    assert most_at_once(spans) >= min(4, os.cpu_count() or 1)
