"""The shipped quickstart, through the command, from launch to prediction."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torchvision.models import mobilenet_v2

from lightning_modules.data.phantom import render_slice
from search.results import open_sweep, rank
from search.study.record import Record
from search.study.recorded import Trial
from search.tuning.trial_board import CONFUSION_TAG, REDRAW_S

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def neurosweep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "search.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=cwd,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def launched(folder: Path) -> subprocess.CompletedProcess[str]:
    sweep = ROOT / "experiments" / "quickstart.yaml"
    # Random weights: a test machine must not depend on a download.
    run = neurosweep("launch", str(sweep), "--weights", "random", "--export", "bundle", cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def trials(launched: subprocess.CompletedProcess[str], folder: Path) -> list[Trial]:
    return Record.open(open_sweep("quickstart", folder / "sweeps")).trials()


def test_ten_trials_ran_and_asha_stopped_some(trials: list[Trial]) -> None:
    states = Counter(trial.state for trial in trials)
    assert len(trials) == 10
    assert states["running"] == 0
    assert states["failed"] == 0
    assert states["pruned"] >= 2
    assert states["complete"] >= 1
    for trial in trials:
        assert [epoch.epoch for epoch in trial.epochs] == list(range(1, len(trial.epochs) + 1))
        if trial.state == "pruned":
            assert len(trial.epochs) in (3, 6)  # the rungs below 8


def test_the_baseline_is_trial_0(trials: list[Trial], folder: Path) -> None:
    assert trials[0].params == open_sweep("quickstart", folder / "sweeps").params


def test_output_ends_with_a_table_and_commands(
    launched: subprocess.CompletedProcess[str], folder: Path
) -> None:
    logs = folder / "sweeps" / "quickstart" / "tensorboard"
    line = f"tensorboard --host 127.0.0.1 --logdir {logs}"
    assert launched.stdout.count(line) == 2  # at the start and the end
    assert "neurosweep top quickstart" in launched.stdout
    assert "10 trials" in launched.stdout
    assert launched.stderr == ""


def test_top_ranks_best_first(trials: list[Trial], folder: Path) -> None:
    top = neurosweep("top", "quickstart", cwd=folder)
    assert top.returncode == 0, top.stderr
    shown = [line.split()[0] for line in top.stdout.splitlines() if line.strip()[:5].isdigit()]
    sweep = open_sweep("quickstart", folder / "sweeps")
    assert shown == [f"{trial.number:05d}" for trial in rank(trials, sweep)]


def test_the_best_trials_keep_one_checkpoint_each(trials: list[Trial], folder: Path) -> None:
    sweep = open_sweep("quickstart", folder / "sweeps")
    kept = sorted(path.parent.name for path in (sweep.folder / "trials").rglob("*.ckpt"))
    others = [trial.number for trial in rank(trials, sweep) if trial.number != 0]
    assert kept == sorted(f"{number:05d}" for number in [0, *others[:5]])
    leftovers = [path for path in (sweep.folder / "trials").rglob("*") if path.suffix != ".ckpt"]
    assert all(path.is_dir() for path in leftovers)
    assert sorted(path.name for path in sweep.folder.iterdir()) == [
        ".lock", "manifest.csv", "study.db", "sweep.yaml", "tensorboard", "trials",
    ]  # fmt: skip


def test_every_trial_is_in_tensorboard(trials: list[Trial], folder: Path) -> None:
    for trial in trials:
        run = folder / "sweeps" / "quickstart" / "tensorboard" / trial.name
        events = EventAccumulator(str(run))
        events.Reload()
        for name in ("train_loss", "val_loss", "val_macro_f1", "val_accuracy", "lr"):
            curve = {event.step: event.value for event in events.Scalars(name)}
            assert curve == pytest.approx(
                {epoch.epoch: epoch.metrics[name] for epoch in trial.epochs}
            )
        # What the HParams tab shows: the last value of best/…, which is the best of the curve.
        best = max(epoch.metrics["val_macro_f1"] or 0 for epoch in trial.epochs)
        assert events.Scalars("best/val_macro_f1")[-1].value == pytest.approx(best)
        size_bytes = sum(path.stat().st_size for path in run.iterdir())
        assert size_bytes < 1_000_000


def test_hparams_come_first_and_are_complete(trials: list[Trial], folder: Path) -> None:
    for trial in trials:
        run = folder / "sweeps" / "quickstart" / "tensorboard" / trial.name
        events = EventAccumulator(str(run))
        events.Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
        assert start.hparams["backbone"].string_value == trial.params.backbone
        assert start.hparams["lr"].number_value == trial.params.lr
        assert start.hparams["unfreeze_depth"].number_value == trial.params.unfreeze_depth
        assert len(start.hparams) == 9
        first_curve_s = events.Scalars("train_loss")[0].wall_time
        assert start.start_time_secs <= first_curve_s


def test_only_kept_trials_have_pictures(trials: list[Trial], folder: Path) -> None:
    storage = folder / "sweeps" / "quickstart"
    for trial in trials:
        events = EventAccumulator(str(storage / "tensorboard" / trial.name))
        events.Reload()
        tags = events.Tags()["images"]
        if not any((storage / "trials" / f"{trial.number:05d}").glob("*.ckpt")):
            # A trial that takes more than a minute, as on a busy machine, draws one while it runs.
            last_s = max(event.wall_time for event in events.Scalars("val_macro_f1"))
            took_s = last_s - events.FirstEventTimestamp()
            assert tags == [] or (took_s > REDRAW_S - 1 and tags == [CONFUSION_TAG])
            continue
        assert sorted(tags) == [
            "pictures/augmented training images",
            "pictures/confusion matrix",
            "pictures/misclassified beside Grad-CAM",
            "pictures/reliability",
        ]
        best = trial.best_epoch("val_macro_f1", "max")
        assert best is not None
        assert [image.step for image in events.Images("pictures/reliability")] == [best.epoch]
        views = [image.step for image in events.Images("pictures/augmented training images")]
        assert views == sorted({1, (1 + best.epoch) // 2, best.epoch})


def test_the_sweeps_own_run_shows_the_best_so_far(trials: list[Trial], folder: Path) -> None:
    events = EventAccumulator(str(folder / "sweeps" / "quickstart" / "tensorboard" / "sweep"))
    events.Reload()
    best = max(epoch.metrics["val_macro_f1"] or 0 for trial in trials for epoch in trial.epochs)
    by_trials = events.Scalars("all trials/1 best so far by trials")
    assert [event.step for event in by_trials] == list(range(1, 11))
    by_seconds = events.Scalars("all trials/2 best so far by seconds")
    for curve in (by_trials, by_seconds):
        values = [event.value for event in curve]
        assert values == sorted(values)
        assert values[-1] == pytest.approx(best)
    own = sorted(event.value for event in events.Scalars("all trials/3 best of each trial"))
    assert own == pytest.approx(
        sorted(max(e.metrics["val_macro_f1"] or 0 for e in trial.epochs) for trial in trials)
    )


def test_the_bundle_predicts_without_the_sweep(
    launched: subprocess.CompletedProcess[str], folder: Path, tmp_path: Path
) -> None:
    slice_ = render_slice(
        "stroke", patient_seed=1, slice_index=0, slices_per_patient=4, image_size_px=128
    )
    Image.fromarray(slice_.image).save(tmp_path / "slice.png")
    (folder / "bundle").rename(tmp_path / "bundle")
    predicted = neurosweep("predict", "bundle", "slice.png", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert any(name in predicted.stdout for name in config["classes"])
    assert config["parity"]["largest_difference"] < 1e-3
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir()) == [
        "README.md", "config.json", "model.onnx", "model.pt2", "model.safetensors",
    ]  # fmt: skip
    # Anyone with torchvision can load the weights.
    network = mobilenet_v2(num_classes=5)
    network.load_state_dict(load_file(tmp_path / "bundle" / "model.safetensors"))
    network.eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
