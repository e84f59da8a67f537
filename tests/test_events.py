"""``--json``: every line of standard output is an event, and the rest is for people."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from search.results import open_sweep
from search.study.record import Record
from search.tuning.events import EpochDone, SweepEnded, TrialEnded, TrialStarted
from search.tuning.lines import JsonLines, ending

SWEEP = """
name: told
data: {phantom: {num_patients: 25, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 0}
space: {lr: {low: 1.0e-4, high: 1.0e-1, log: true}}
training: {max_epochs: 3, precision: 32-true}
search: {num_trials: 4, max_concurrent_trials: 2, keep_trials: 2}
scheduler: {grace_period_epochs: 1, reduction_factor: 2}
"""

STARTED = TrialStarted(trial=0, name="00000-x", params={"lr": 0.1}, epochs_done=0)


def stopped(value: float, cutoff: float) -> TrialEnded:
    return TrialEnded(
        event="stopped", trial=1, name="00001-x", reason="asha", epochs=3, metric="val_loss",
        value=value, best=value, cutoff=cutoff,
    )  # fmt: skip


def test_an_event_is_one_line_with_its_kind_first(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonLines("brain")
    view.show(STARTED)
    view.show(stopped(0.5, 0.6))
    first, second = capsys.readouterr().out.splitlines()
    assert list(json.loads(first)) == [
        "event", "time", "sweep", "trial", "name", "params", "epochs_done",
    ]  # fmt: skip
    told = json.loads(second)
    assert (told["event"], told["sweep"], told["reason"]) == ("stopped", "brain", "asha")
    assert (told["value"], told["cutoff"]) == (0.5, 0.6)


def test_the_documented_fields_are_those_there_are() -> None:
    for kind in (TrialStarted, EpochDone, TrialEnded, SweepEnded):
        documented = str(kind.__doc__).split("Attributes:")[1]
        for name in kind.__dataclass_fields__:
            assert f"        {name}: " in documented, f"{kind.__name__}.{name}"


def test_people_read_which_side_of_the_cutoff_a_trial_was() -> None:
    assert ending(stopped(0.5, 0.6)).plain == "stopped by ASHA: 0.5000 < 0.6000 at epoch 3"
    assert ending(stopped(0.7, 0.6)).plain == "stopped by ASHA: 0.7000 > 0.6000 at epoch 3"


@pytest.mark.slow
def test_a_reader_that_went_away_does_not_end_the_sweep(tmp_path: Path) -> None:
    script = """if True:
        import sys, time
        from search.tuning.events import TrialStarted
        from search.tuning.lines import JsonLines
        view = JsonLines("brain")
        for number in range(3):
            view.show(TrialStarted(trial=number, name="x", params={}, epochs_done=0))
            if number == 0:
                time.sleep(2)
        print("went on", file=sys.stderr)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["trial"] == 0
    process.stdout.close()
    told = process.stderr.read().splitlines()
    assert told == ["nobody reads the events any more; the sweep goes on", "went on"]
    assert process.wait() == 0


def run(*arguments: str, cwd: Path) -> tuple[list[dict[str, Any]], str]:
    """The events on standard output, and what standard error says."""
    environment = {**os.environ, "SSH_CONNECTION": "192.0.2.7 50000 192.0.2.1 2222"}
    command = [sys.executable, "-m", "search.cli", *arguments, "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    (folder / "sweep.yaml").write_text(SWEEP)
    return folder


@pytest.fixture(scope="module")
def launched(folder: Path) -> tuple[list[dict[str, Any]], str]:
    return run("launch", "sweep.yaml", cwd=folder)


@pytest.mark.slow
def test_a_launch_tells_every_trial_and_epoch_that_it_records(
    launched: tuple[list[dict[str, Any]], str], folder: Path
) -> None:
    events, _ = launched
    record = Record.open(open_sweep("told", folder / "sweeps"))
    trials = record.trials()
    assert {event["trial"] for event in events if event["event"] == "started"} == {0, 1, 2, 3}
    for trial in trials:
        own = [event for event in events if event.get("trial") == trial.number]
        assert own[0]["event"] == "started"
        assert own[0]["params"]["lr"] == trial.params.lr
        epochs = own[1:-1]
        assert [event["metrics"] for event in epochs] == [epoch.metrics for epoch in trial.epochs]
        values = [epoch.metrics["val_macro_f1"] or 0.0 for epoch in trial.epochs]
        for index, event in enumerate(epochs):
            assert event["value"] == values[index]
            assert event["best"] == max(values[: index + 1])
            assert event["next_rung"] == (2 if index == 0 and len(values) > 1 else None)
            assert event["left_s"] >= 0
        last = own[-1]
        assert last["reason"] == trial.reason
        assert last["event"] == {"complete": "finished", "pruned": "stopped"}[trial.state]
        assert last["epochs"] == len(trial.epochs)
        assert (last["cutoff"] is None) == (last["reason"] != "asha")
        if last["reason"] == "asha":
            assert last["value"] < last["cutoff"]


@pytest.mark.slow
def test_the_last_line_says_how_the_sweep_ended(
    launched: tuple[list[dict[str, Any]], str], folder: Path
) -> None:
    events, _ = launched
    trials = Record.open(open_sweep("told", folder / "sweeps")).trials()
    end = events[-1]
    assert end["event"] == "ended"
    assert end["is_finished"]
    states = Counter(trial.state for trial in trials)
    assert end["trials"] == {
        name: states[name]  # type: ignore[index]  # one of the four
        for name in ("running", "complete", "pruned", "failed")
    }
    assert end["epochs"] == sum(len(trial.epochs) for trial in trials)
    assert end["best"] == max(
        epoch.metrics["val_macro_f1"] or 0.0 for trial in trials for epoch in trial.epochs
    )


@pytest.mark.slow
def test_people_are_told_on_standard_error_without_a_flood(
    launched: tuple[list[dict[str, Any]], str],
) -> None:
    _, told = launched
    assert "\nwatch   tensorboard --host 127.0.0.1 --logdir " in told
    # Came by ssh, at another port than ssh's own: how to see it at home.
    assert "ssh -N -L 6006:localhost:6006 -p 2222 " in told
    assert "@192.0.2.1   # at home, then http://localhost:6006" in told
    assert "val macro f1" in told
    assert "4 trials, " in told
    # Weights, images, plan, table, next commands: nothing of Ray's or Lightning's, no warnings.
    assert len(told.splitlines()) < 40
    for word in ("warn", "ray", "lightning", "epoch   1/3", "\x1b"):
        assert word not in told.lower().replace("array", "")


@pytest.mark.slow
def test_a_resume_of_what_is_finished_only_says_so(
    launched: tuple[list[dict[str, Any]], str], folder: Path
) -> None:
    events, _ = run("resume", "told", cwd=folder)
    assert [event["event"] for event in events] == ["ended"]
    assert events[0]["best"] == launched[0][-1]["best"]


@pytest.mark.slow
def test_a_confirmation_tells_its_runs_and_what_it_found(
    launched: tuple[list[dict[str, Any]], str], folder: Path
) -> None:
    events, told = run("confirm", "told", "--top", "1", "--seeds", "1", cwd=folder)
    kinds = Counter(event["event"] for event in events)
    runs = 2 if launched[0][-1]["best_trial"] else 1  # the best, and the baseline if it is another
    assert kinds == {"started": runs, "epoch": 3 * runs, "finished": runs, "ended": 1}
    assert {event["sweep"] for event in events[:-1]} == {"told-confirm"}
    confirmation = events[-1]["confirmation"]
    assert confirmation["num_seeds"] == 1
    assert confirmation["winner"] in {row["number"] for row in confirmation["candidates"]}
    assert "`neurosweep export` takes trial" in told
