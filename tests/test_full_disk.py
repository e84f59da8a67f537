"""A disk that fills while a sweep runs: a file system of its own, too small for the checkpoints."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.results import open_sweep
from search.study.record import Record

# Trained whole, a checkpoint to go on from takes 27 MB and the best weights 9 MB, each kept until
# its successor is there: one trial fits, its second epoch and another trial do not.
SIZE_MIB = 60

SWEEP = """
name: filled
metric: val_loss
data: {phantom: {num_patients: 25, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 5, batch_size: 16}
space: {lr: {low: 1.0e-4, high: 1.0e-2, log: true}}
training: {max_epochs: 3, precision: 32-true}
search: {num_trials: 2, max_concurrent_trials: 1, sampler: random}
scheduler: null
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    mount, folder = shutil.which("mount"), tmp_path / "disk"
    folder.mkdir()
    command = [mount or "", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m", "neurosweep", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_that_fills_ends_the_sweep_in_one_line_and_resume_goes_on(
    tmp_path: Path, disk: Path
) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "search.cli", *arguments, "--storage", str(disk)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)

    (tmp_path / "sweep.yaml").write_text(SWEEP)
    ended = run("launch", "sweep.yaml")
    assert ended.returncode == 2, ended.stdout + ended.stderr
    [line] = ended.stderr.splitlines()
    assert "No space left on device" in line or "disk is full" in line
    assert f"then `neurosweep resume filled --storage {disk}`" in line
    before = Record.open(open_sweep("filled", disk)).trials()
    assert before[0].epochs, "it filled in mid sweep"
    assert all(trial.state == "running" for trial in before)

    subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
    resumed = run("resume", "filled")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = Record.open(open_sweep("filled", disk)).trials()
    assert [trial.state for trial in after] == ["complete"] * 2
    for was, now in zip(before, after, strict=False):
        assert now.epochs[: len(was.epochs)] == was.epochs, "a recorded epoch is lost"
