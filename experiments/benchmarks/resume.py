"""How soon does a resume begin its first trial in a study of 1,000?

    uv run python experiments/benchmarks/resume.py --out resume.json

A study of 1,000 trials that have ended, two thirds of them after one epoch and a ninth after nine,
and of one that was interrupted, is written by the record itself. Measured are the seconds from the
call of `neurosweep resume` to the moment at which its searcher has handed out the interrupted one:
the sweep file, the images' pack looked up by sizes and times, the record opened, checked, and
compared, initial weights digested, all epochs replayed into the rungs, files tidied up, the last
checkpoint hashed. Not measured: the imports, Ray's start, and the worker's. Each time goes on from
a fresh copy of the folder; one before the first is not counted. Where others use the cores, too,
the seconds of CPU time say what it would be without them.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from measurement import provenance

SWEEP = """
name: resumed
metric: val_loss
data: {phantom: {num_patients: 30, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2}
training: {max_epochs: 9, precision: 32-true}
search: {sampler: random, max_concurrent_trials: 1}
"""
NODE = {"Alive": True, "Resources": {"CPU": 2.0}}
CHECKPOINT_BYTES = 18 * 2**20  # of MobileNetV2 trained whole, with its optimizer, about


class HandedOut(BaseException):
    """The searcher has handed out the first trial."""


def write_study(folder: Path, num_trials: int) -> Any:
    """Write a sweep as it is when its driver was killed; return its settings."""
    from lightning_modules.weights import find_weights
    from search.config import dump_sweep, load_sweep
    from search.data import prepare_data
    from search.study.record import Record

    (folder / "sweep.yaml").write_text(SWEEP)
    changes = {"storage": str(folder / "sweeps"), "search.num_trials": str(num_trials + 1)}
    sweep = load_sweep(folder / "sweep.yaml", changes)
    sweep.folder.mkdir(parents=True)
    manifest, pack = prepare_data(sweep)
    manifest.write(sweep.folder / "manifest.csv")
    (sweep.folder / "sweep.yaml").write_text(dump_sweep(sweep))
    weights = find_weights("random", backbone="mobilenet_v2", seed=sweep.seed)
    facts = {
        "classes": list(manifest.classes),
        "manifest_digest": manifest.digest,
        "pack_digest": pack.digest,
        "skipped_images": [],
        "weights": {"mobilenet_v2": asdict(weights)},
        "versions": {},
        "measured": {
            "precisions": {"mobilenet_v2": "32-true"},
            "gpu_peak_bytes": {},
            "gpu_total_bytes": 0,
        },
    }
    record = Record.create(sweep, facts)
    with record.being_written():
        for number in range(num_trials + 1):
            is_last = number == num_trials
            num_epochs = 9 if number % 9 == 0 else 3 if number % 3 == 0 else 1
            stopped = "" if is_last else "max_epochs" if num_epochs == 9 else "asha"
            write_trial(record, 2 if is_last else num_epochs, stopped)
    return sweep


def write_trial(record: Any, num_epochs: int, stopped: str) -> None:
    """Write a trial with what a worker reports; only an interrupted one has its checkpoints."""
    from scale import loss_of, report_of

    from lightning_modules.files import sha256_of
    from search.study.record import encode_metrics
    from search.study.recorded import CheckpointFile, Epoch

    trial = record.draw()
    for number in range(1, num_epochs + 1):
        result = report_of(trial.number, number, loss_of({"params": asdict(trial.params)}, number))
        files = {}
        for kind in ("last", "best"):
            path = record.sweep.folder / result[kind]["path"]
            if not stopped:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(os.urandom(CHECKPOINT_BYTES))
                result[kind]["digest"] = sha256_of(path)
            files[kind] = CheckpointFile(**result[kind])
        epoch = Epoch(
            epoch=number,
            metrics=encode_metrics(result["metrics"]),
            confusion=result["confusion"],
            last=files["last"],
            best=files["best"],
            stopped=stopped if number == num_epochs else "",
            features=result["features"],
            ran_on=result["ran_on"],
        )
        record.add_epoch(trial.number, epoch)


def time_resume(sweep: Any) -> tuple[float, float]:
    """Return the seconds, and those of CPU time, until the first trial was handed out."""
    from search.cli import main
    from search.tuning import tuner

    handed_out: list[dict[str, Any]] = []

    def hand_out(trainable: Any, *, tune_config: Any, run_config: Any) -> Any:
        def fit() -> None:
            handed_out.append(tune_config.search_alg.suggest("first"))
            raise HandedOut

        return SimpleNamespace(fit=fit)

    with (
        # In Ray's place.
        mock.patch.object(tuner, "connected", return_value=contextlib.nullcontext()),
        mock.patch.object(tuner.ray, "nodes", return_value=[NODE]),
        mock.patch.object(tuner.tune, "with_parameters", return_value=print),
        mock.patch.object(tuner.tune, "with_resources", return_value=print),
        mock.patch.object(tuner.tune, "Tuner", hand_out),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        with contextlib.suppress(HandedOut):
            main(["resume", sweep.name, "--storage", sweep.storage])
        seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    [config] = handed_out
    assert config["number"] == sweep.search.num_trials - 1
    assert config["resume"]["last"]["epoch"] == 2
    return seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "median": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "raw": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NEUROSWEEP_CACHE"] = str(Path(folder) / "cache")
        sweep = write_study(Path(folder), options.trials)
        written = Path(folder) / "written"
        sweep.folder.rename(written)
        seconds = []
        for _ in range(1 + options.times):
            shutil.copytree(written, sweep.folder)
            seconds.append(time_resume(sweep))
            shutil.rmtree(sweep.folder)
        study_mib = (written / "study.db").stat().st_size / 2**20
    found = {
        "trials_ended": options.trials,
        "study_mib": study_mib,
        "wall_s": summary([wall_s for wall_s, _ in seconds[1:]]),
        "cpu_s": summary([cpu_s for _, cpu_s in seconds[1:]]),
    }
    print(json.dumps(found, indent=1))
    if options.out:
        head = provenance("ray", "optuna", "sqlalchemy", "torch")
        options.out.write_text(json.dumps({**head, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
