"""Does a day of sweep leak? What is left when it has ended, or was interrupted?

    uv run python experiments/benchmarks/soak.py --out soak.json

2,880 trials are what one slot runs in 24 hours at half a minute each. Here they do not train, and
are run by two workers in minutes; everything else is the product: Ray as a sweep starts it, tuner,
searcher with the TPE sampler, recorder, and SQLite. Every process that the sweep starts bears
a mark in its environment, by which it is found: memory, open files, threads, and the number of
processes are read twice a second, and their slopes a trial are taken over the last three quarters.
Afterwards processes, temporary files, and shared memory that are left are named; a second sweep is
ended by Ctrl-C half way, and looked at in the same way.
"""

import argparse
import contextlib
import io
import json
import os
import secrets
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measurement import provenance

MARK = "NEUROSWEEP_SOAK"
PAUSE_S = 0.5

# What the last processes are given to end after the driver has.
GRACE_S = 10.0


def drive(folder: str, num_trials: int) -> None:
    """Run a sweep of trials that only report; the process that is watched."""
    from scale import WARM_S, make_sweep, report_trial

    from search.study.record import Record
    from search.tuning import tuner

    sweep = make_sweep(folder, num_trials, "tpe", max_concurrent_trials=2)
    record = Record.create(sweep, {})
    with tuner.connected(None), record.being_written(), contextlib.redirect_stdout(io.StringIO()):
        tuner.run_trials(
            record,
            tuner.tune.with_resources(
                tuner.tune.with_parameters(report_trial, sleep_s=0.0, max_epochs=3, warm_s=WARM_S),
                {"cpu": 1.0, "gpu": 0.0},
            ),
            max_concurrent_trials=2,
            is_local=True,
        )
    assert all(trial.state != "running" for trial in record.trials()), "a trial was lost"


class Watched:
    """A sweep in a process of its own.

    Args:
        folder: For its files, temporary ones too; short, for sockets.
        num_trials: How many it runs.
    """

    def __init__(self, folder: Path, num_trials: int) -> None:
        self.mark = f"{MARK}={secrets.token_hex(8)}"
        self.scratch = folder / "t"
        self.scratch.mkdir()
        self.storage = folder / "s"
        self.storage.mkdir()
        name, _, value = self.mark.partition("=")
        self.memory_before = shared_memory()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--drive", str(self.storage), "--trials", str(num_trials)],
            env=os.environ | {name: value, "TMPDIR": str(self.scratch)},
        )

    def pids(self) -> list[int]:
        """Return the processes that the sweep has started, and its own."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def num_trials(self) -> int:
        """Return how many trials the record has begun."""
        for database in self.storage.glob("*/study.db"):
            with (
                contextlib.suppress(sqlite3.Error),
                contextlib.closing(sqlite3.connect(database, timeout=5)) as connection,
            ):
                return int(connection.execute("select count(*) from trials").fetchone()[0])
        return 0

    def look(self) -> dict[str, float]:
        """Return what the sweep holds now."""
        found: dict[str, float] = dict.fromkeys(("all_mib", "files", "threads", "processes"), 0.0)
        found |= {"trials": float(self.num_trials()), "driver_mib": 0.0}
        for pid in self.pids():
            folder = Path("/proc", str(pid))
            with contextlib.suppress(OSError, IndexError, ValueError):
                mib = int((folder / "statm").read_text().split()[1]) * page_mib()
                found["files"] += sum(1 for _ in (folder / "fd").iterdir())
                found["threads"] += sum(1 for _ in (folder / "task").iterdir())
                found["processes"] += 1
                found["all_mib"] += mib
                if pid == self.process.pid:
                    found["driver_mib"] = mib
        return found

    def left(self) -> dict[str, list[str]]:
        """Return what has not gone with the driver."""
        deadline_s = time.monotonic() + GRACE_S
        while (pids := self.pids()) and time.monotonic() < deadline_s:
            time.sleep(PAUSE_S)
        return {
            "processes": [Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids],
            "temporary_files": [
                str(path.relative_to(self.scratch))
                for path in self.scratch.rglob("*")
                if path.is_file()
            ],
            "shared_memory_files": sorted(shared_memory() - self.memory_before),
        }


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def page_mib() -> float:
    return os.sysconf("SC_PAGE_SIZE") / 2**20


def soak(folder: Path, num_trials: int) -> dict[str, Any]:
    """Run a sweep to its end."""
    watched = Watched(folder, num_trials)
    start_s, seen = time.monotonic(), []
    while watched.process.poll() is None:
        seen.append(watched.look())
        time.sleep(PAUSE_S)
    wall_s = time.monotonic() - start_s
    assert watched.process.returncode == 0, "the sweep failed"
    late = [row for row in seen if num_trials / 4 <= row["trials"] < num_trials]
    trials = [row["trials"] for row in late]
    held = {}
    for name in ("driver_mib", "all_mib", "files", "threads", "processes"):
        values = [row[name] for row in late]
        held[name] = {
            "a_quarter_through": statistics.median(values[: len(values) // 10]),
            "at_the_end": statistics.median(values[-(len(values) // 10) :]),
            "a_thousand_trials": 1000 * statistics.linear_regression(trials, values).slope,
        }
    return {"trials": num_trials, "wall_s": wall_s, "held": held, "left": watched.left()}


def interrupt(folder: Path, num_trials: int) -> dict[str, Any]:
    """End a sweep by Ctrl-C half way."""
    watched = Watched(folder, num_trials)
    while watched.num_trials() < num_trials / 2:
        assert watched.process.poll() is None, "the sweep ended too soon"
        time.sleep(PAUSE_S)
    watched.process.send_signal(signal.SIGINT)
    start_s = time.monotonic()
    watched.process.wait(timeout=60)
    return {
        "trials": num_trials,
        "ended_after_s": time.monotonic() - start_s,
        "left": watched.left(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2880)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        try:
            drive(options.drive, options.trials)
        except KeyboardInterrupt:
            os._exit(130)  # as the command does: Ray would look for what was ended
        return
    found: dict[str, Any] = {}
    for name, measure, count in (
        ("to the end", soak, options.trials),
        ("Ctrl-C half way", interrupt, min(200, options.trials)),
    ):
        with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
            found[name] = measure(Path(folder), count)
        print(name, json.dumps(found[name], indent=1), flush=True)
    if options.out:
        head = provenance("ray", "optuna", "sqlalchemy", "scipy")
        options.out.write_text(json.dumps({**head, "found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
