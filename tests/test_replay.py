"""A recorded trial comes out again, bit for bit; what does not is named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from search.cli import main
from search.replay import compare_epochs, compare_tensors
from search.results import open_sweep
from search.study.record import Record
from search.study.recorded import Epoch

SWEEP = """
name: replayed
data: {phantom: {num_patients: 25, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 3, batch_size: 8}
space: {dropout: {low: 0.1, high: 0.6}, unfreeze_depth: {low: 0, high: 3}}
training: {max_epochs: 2, precision: 32-true}
search: {num_trials: 2, max_concurrent_trials: 2, sampler: random, keep_trials: 1}
scheduler: null
"""


def epoch(number: int, **metrics: float | None) -> Epoch:
    return Epoch(
        epoch=number,
        metrics=dict(metrics),
        confusion=[[1, 0], [0, 1]],
        last=None,
        best=None,
        stopped="",
        features="",
        ran_on="",
    )


def report(**metrics: float) -> dict[str, Any]:
    return {"metrics": metrics, "confusion": [[1, 0], [0, 1]]}


def test_values_that_differ_by_one_bit_are_told_with_their_epoch() -> None:
    above = 0.1 + 2**-56 * 4
    assert above != 0.1
    count, differences = compare_epochs(
        [epoch(1, val_loss=0.1), epoch(2, val_loss=0.1)],
        [report(val_loss=0.1), report(val_loss=above)],
    )
    assert count == 4
    assert [(d.epoch, d.what, d.recorded, d.replayed) for d in differences] == [
        (2, "val_loss", 0.1, above)
    ]


def test_times_are_not_compared_and_a_loss_that_diverged_again_is_the_same() -> None:
    recorded = [epoch(1, epoch_s=3.0, train_loss=None)]
    count, differences = compare_epochs(recorded, [report(epoch_s=5.0, train_loss=float("nan"))])
    assert (count, differences) == (2, [])


def test_a_metric_that_is_missing_on_a_side_differs() -> None:
    _, differences = compare_epochs([epoch(1, old=1.0)], [report(new=1.0)])
    assert [difference.what for difference in differences] == ["new", "old"]


def test_another_confusion_matrix_differs() -> None:
    changed = {"metrics": {}, "confusion": [[0, 1], [0, 1]]}
    _, [difference] = compare_epochs([epoch(1)], [changed])
    assert difference.what == "confusion"


def test_tensors_are_compared_by_name_type_and_bit() -> None:
    one = torch.ones(2)
    then = {"same": one, "changed": one, "gone": one, "narrow": one}
    now = {
        "same": one.clone(),
        "changed": torch.nextafter(one, 2 * one),
        "new": one,
        "narrow": one.half(),
    }
    assert compare_tensors(then, now) == ["changed", "gone", "narrow", "new"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of a sweep of two trials: one of depth 3, and one of features that are cached."""
    return launch(SWEEP, tmp_path_factory.mktemp("replay"))


def launch(sweep: str, folder: Path) -> Path:
    (folder / "sweep.yaml").write_text(sweep)
    main(["launch", str(folder / "sweep.yaml"), "--storage", str(folder / "sweeps")])
    return folder / "sweeps"


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_replay_on_a_cpu_in_float32_is_equal_to_the_last_bit(
    storage: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    trial = Record.open(open_sweep("replayed", storage)).trial(number)
    best = trial.epochs[-1].best
    assert best is not None
    before = {path: path.stat().st_mtime_ns for path in storage.rglob("*.ckpt")}
    main(["replay", "replayed", str(number), "--storage", str(storage)])
    told = capsys.readouterr().out
    assert f"{trial.name}: 2 epochs, " in told
    assert "all as recorded, bit for bit" in told
    assert f"the same file, sha256 {best.digest}" in told
    # The sweep is only read.
    assert {path: path.stat().st_mtime_ns for path in storage.rglob("*.ckpt")} == before


@pytest.mark.slow
def test_a_replay_on_a_cpu_in_bfloat16_is_equal_to_the_last_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = launch(SWEEP.replace("32-true", "bf16-mixed"), tmp_path)
    for number in ("0", "1"):
        main(["replay", "replayed", number, "--storage", str(storage)])
        assert "all as recorded, bit for bit" in capsys.readouterr().out


@pytest.mark.slow
def test_a_replay_that_differs_names_what_and_exits_with_1(
    storage: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Record.trial

    def other_seed(record: Record, number: int) -> Any:
        return dataclasses.replace(read(record, number), seed=1)

    monkeypatch.setattr(Record, "trial", other_seed)
    with pytest.raises(SystemExit) as end:
        main(["replay", "replayed", "0", "--storage", str(storage)])
    assert end.value.code == 1
    told = capsys.readouterr().out
    assert "train_loss" in told
    assert "differ" in told


@pytest.mark.slow
def test_a_trial_that_is_not_there_is_refused(
    storage: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["replay", "replayed", "2", "--storage", str(storage)])
    assert end.value.code == 2
    assert "TRIAL must be one of the 2 trials of replayed, counted from 0; got 2" in (
        capsys.readouterr().err
    )
