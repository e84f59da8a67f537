"""Does a driver that is killed lose anything?

    uv run python experiments/benchmarks/kills.py --out kills.json

`simulated` kills, with SIGKILL at random moments, a process that drives a sweep's own parts
(searcher, scheduler, recorder, SQLite) in the order of Ray's controller; nothing is
trained, and checkpoints are small files. `real` kills the command line with Ray, workers, and
training. After each kill the study is read with SQLite alone and compared with what it held before.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from measurement import REPOSITORY, provenance

REAL_SWEEP = """
name: killed
metric: val_loss
data: {phantom: {num_patients: 30, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 0, batch_size: 16}
space: {lr: {low: 1.0e-4, high: 1.0e-2, log: true}, unfreeze_depth: {low: 0, high: 2}}
training: {max_epochs: 27, precision: 32-true}
search: {num_trials: 400, max_concurrent_trials: 2, sampler: random}
"""


@dataclass
class Ledger:
    """What the study has held so far, and what has become of it.

    Attributes:
        kills: Drivers killed.
        finished: State of each trial that had ended.
        epochs: What each recorded epoch reported.
        run_again: Trials that had ended, and ran again or changed.
        lost: Recorded epochs that are gone or changed.
        repeated: Epochs that were begun twice: at most the one under way at each kill.
    """

    kills: int = 0
    finished: dict[int, str] = field(default_factory=dict)
    epochs: dict[tuple[int, str], str] = field(default_factory=dict)
    run_again: set[int] = field(default_factory=set)
    lost: set[tuple[int, str]] = field(default_factory=set)
    repeated: set[tuple[int, int]] = field(default_factory=set)

    def compare(self, database: Path) -> None:
        """Read the study, and note what it has lost since it was read last."""
        finished, epochs = read_study(database)
        self.run_again |= {n for n, state in self.finished.items() if finished.get(n) != state}
        self.lost |= {key for key, said in self.epochs.items() if epochs.get(key) != said}
        self.finished, self.epochs = finished, epochs

    def summary(self) -> dict[str, Any]:
        return {
            "kills": self.kills,
            "trials": len(self.finished),
            "epochs": len(self.epochs),
            "finished_trials_run_again": len(self.run_again),
            "recorded_epochs_lost": len(self.lost),
        }


def read_study(database: Path) -> tuple[dict[int, str], dict[tuple[int, str], str]]:
    """Return the state of each trial that has ended, and every recorded epoch."""
    if not database.is_file():
        return {}, {}
    with contextlib.closing(sqlite3.connect(database)) as connection:
        try:
            states = connection.execute("select number, state from trials").fetchall()
            rows = connection.execute(
                "select number, key, value_json from trials join trial_user_attributes using "
                "(trial_id) where key like 'epoch_%'"
            ).fetchall()
        except sqlite3.OperationalError:  # killed before there were tables
            return {}, {}
    finished = {number: state for number, state in states if state != "RUNNING"}
    return finished, {(number, key): said for number, key, said in rows}


# Simulated


def simulated_sweep(folder: Path, num_trials: int) -> Any:
    from scale import make_sweep

    return make_sweep(str(folder), num_trials, "random", max_epochs=9)


def drive(sweep: Any, executed: Path) -> None:
    """Run a sweep from where its record stands, one trial at a time."""
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher
    from scale import loss_of, report_of

    from search.study.record import Record
    from search.tuning.recorder import EndOfSweep, StudyRecorder
    from search.tuning.scheduler import ResumableASHA
    from search.tuning.searcher import StudySearcher

    is_new = not (sweep.folder / "created").exists()
    record = Record.create(sweep, {}) if is_new else Record.open(sweep)
    (sweep.folder / "created").touch()
    scheduler = ResumableASHA(sweep, record.trials())
    recorder = StudyRecorder(record, scheduler)
    searcher = StudySearcher(record, recorder.take_up(), recorder)
    end = EndOfSweep(recorder)
    with record.being_written(), executed.open("a") as log:
        started = 0
        while (config := searcher.suggest(trial_id := f"{started:08x}")) != Searcher.FINISHED:
            started += 1
            trial = SimpleNamespace(trial_id=trial_id, config=config, error_file=None)
            scheduler.on_trial_add(None, trial)
            resume = config["resume"]
            for epoch in range(1 if resume is None else resume["last"]["epoch"] + 1, 10):
                log.write(f"{config['number']} {epoch}\n")
                log.flush()
                result = report_of(config["number"], epoch, loss_of(config, epoch))
                for kind in ("last", "best"):
                    file = result[kind]
                    file["path"] = file["path"].replace("-a0", f"-a{config['attempt']}")
                    content = file["path"].encode() * 50
                    file["digest"] = hashlib.sha256(content).hexdigest()
                    path = sweep.folder / file["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                decision = scheduler.on_trial_result(None, trial, result)
                result["done"] = end(trial_id, result) or decision == TrialScheduler.STOP
                recorder.on_trial_result(0, [], trial, result)
                if result["done"]:
                    scheduler.on_trial_complete(None, trial, result)
                    break


def fork(work: Any, *arguments: Any) -> int:
    """Run a function in a process of its own, which has imported everything; return its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(*arguments)
            code = 0
        finally:
            os._exit(code)
    return pid


def kill_simulated(folder: Path, num_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill a simulated sweep again and again; compare it with one that was left alone."""
    import scale  # noqa: F401  imported once, before the forks

    import search.tuning.tuner  # noqa: F401

    num_trials = 40 + 6 * num_kills
    alone, sweep = simulated_sweep(folder, num_trials), simulated_sweep(folder, num_trials)
    assert os.waitpid(fork(drive, alone, folder / "alone"), 0)[1] == 0
    most = 3 * len((folder / "alone").read_text().splitlines()) // (2 * num_kills)
    ledger, rng = Ledger(), random.Random(seed)
    executed, database = folder / "executed", sweep.folder / "study.db"
    executed.touch()
    has_ended = False
    while ledger.kills < num_kills and not has_ended:
        num_before = len(executed.read_text().splitlines())
        pid = fork(drive, sweep, executed)
        # Of the epochs that it begins, the one to kill it in or after; 0 while it opens the study.
        aim = num_before + rng.randint(0, most)
        while not has_ended and len(executed.read_text().splitlines()) < aim:
            time.sleep(0.001)
            has_ended = os.waitpid(pid, os.WNOHANG)[0] != 0
        time.sleep(rng.uniform(0, 1.0 if aim == num_before else 0.01))
        has_ended = has_ended or os.waitpid(pid, os.WNOHANG)[0] != 0
        if not has_ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ledger.kills += 1
        recorded = {(number, int(key[6:])) for number, key in ledger.epochs}
        begun = executed.read_text().splitlines()[num_before:]
        now = {(int(n), int(epoch)) for n, epoch in map(str.split, begun)}
        ledger.run_again |= {number for number, _ in now if number in ledger.finished}
        ledger.repeated |= now & recorded
        ledger.compare(database)
    if not has_ended:
        assert os.waitpid(fork(drive, sweep, executed), 0)[1] == 0
        ledger.compare(database)
    finished, epochs = read_study(alone.folder / "study.db")
    return {
        **ledger.summary(),
        "recorded_epochs_run_again": len(ledger.repeated),
        "epochs_begun": len(executed.read_text().splitlines()),
        "ends_as_left_alone": finished == ledger.finished
        and {key: outcome(said) for key, said in epochs.items()}
        == {key: outcome(said) for key, said in ledger.epochs.items()},
    }


def outcome(said: str) -> Any:
    """Everything of an epoch but its attempt and its process."""
    epoch = json.loads(json.loads(said))
    return epoch["epoch"], epoch["metrics"], epoch["stopped"]


# Real


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "search.cli", *arguments]


def environment(folder: Path) -> dict[str, str]:
    scratch = folder / "tmp"
    scratch.mkdir(exist_ok=True)
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(scratch)}


def kill_real(folder: Path, num_kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill the command line while it trains; each time once a random number of epochs is there."""
    (folder / "sweep.yaml").write_text(REAL_SWEEP)
    storage = folder / "sweeps"
    database = storage / "killed" / "study.db"
    ledger, rng, resumed_s = Ledger(), random.Random(seed), []
    arguments = ["launch", str(folder / "sweep.yaml")]
    while ledger.kills < num_kills:
        start_s, before = time.monotonic(), len(ledger.epochs)
        with (folder / "output").open("w") as output:
            driver = subprocess.Popen(
                command(*arguments, "--storage", str(storage)),
                env=environment(folder), stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        aim = before + rng.randint(1, 30)
        first_s = None
        while (num_epochs := len(read_only(database))) < aim:
            if num_epochs > before and first_s is None:
                first_s = time.monotonic() - start_s
            assert driver.poll() is None, (folder / "output").read_text()
            assert time.monotonic() - start_s < 600, "the sweep does not get on"
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 0.5))
        driver.kill()
        driver.wait()
        ledger.kills += 1
        ledger.compare(database)
        resumed_s.append(first_s or time.monotonic() - start_s)
        arguments = ["resume", "killed"]
        shutil.rmtree(folder / "tmp", ignore_errors=True)
    return {**ledger.summary(), "first_epoch_after_s": resumed_s}


def read_only(database: Path) -> set[tuple[int, str]]:
    """Return the recorded epochs, read beside the process that writes them."""
    if not database.is_file():
        return set()
    try:
        uri = f"file:{database}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
            query = "select trial_id, key from trial_user_attributes where key like 'epoch_%'"
            return set(connection.execute(query).fetchall())
    except sqlite3.OperationalError:
        return set()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulated", type=int, default=200, metavar="KILLS")
    parser.add_argument("--real", type=int, default=20, metavar="KILLS")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name, measure, count in (
        ("simulated", kill_simulated, options.simulated),
        ("real", kill_real, options.real),
    ):
        if count:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                found[name] = measure(Path(folder), count)
            print(name, json.dumps(found[name]), flush=True)
    if options.out:
        head = provenance("ray", "optuna", "sqlalchemy", "torch")
        options.out.write_text(json.dumps({**head, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
