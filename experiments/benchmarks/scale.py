"""What does a sweep's driver cost: memory a trial, results a second, time between two trials?

    uv run python experiments/benchmarks/scale.py --out scale.json

Trials here do not train: they are simulated in the driver's process, or are Ray workers that
report or sleep. Everything else is the product: searcher, recorder, scheduler, SQLite on disk, and
for the parts with Ray the tuner. Each part runs in a process of its own.
"""

import argparse
import contextlib
import datetime
import gc
import io
import itertools
import json
import logging
import math
import os
import platform
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Ray's workers unpickle the trainables below: this module must import nothing heavy.

MAX_EPOCHS = 3
WARM_S = 15.0
NUM_WARM_TRIALS = 500  # whatever is allocated once is there by then
DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def report_of(number: int, epoch: int, loss: float) -> dict[str, Any]:
    """What a worker reports of an epoch, in size and kind."""
    metrics = {
        "train_loss": loss + 0.01, "val_loss": loss, "val_macro_f1": 1 / (1 + loss),
        "val_accuracy": 1 / (1 + loss), "train_macro_f1": 1 / (1 + loss),
        "train_accuracy": 1 / (1 + loss), "epoch_s": 1.234567 + loss, "lr": 1e-3 / (1 + epoch),
    }  # fmt: skip
    files = {
        kind: {
            "path": f"trials/{number:05d}/{kind}-e{epoch:05d}-a0.ckpt",
            "digest": DIGEST,
            "epoch": epoch,
        }
        for kind in ("last", "best")
    }
    shown = {name: metrics[name] for name in ("train_loss", "val_loss", "val_macro_f1")}
    return {
        "epoch": epoch,
        **shown,
        "val_accuracy": metrics["val_accuracy"],
        "metrics": metrics,
        "confusion": [[37 + number % 7, 1, 2, 3, 4]] * 5,
        "features": "from the cache",
        "leak": "",
        "ran_on": f"host {os.getpid()}",
        **files,
    }


def loss_of(config: dict[str, Any], epoch: int) -> float:
    """A curve for ASHA to judge: about a third of the trials reach each next rung."""
    params = config["params"]
    return float(abs(math.log10(params["lr"]) + 3) + 0.1 * params["unfreeze_depth"] + 2 / epoch)


def make_sweep(folder: str, num_trials: int, sampler: str = "random", **search: Any) -> Any:
    from lightning_modules.data.phantom import PhantomSettings
    from search.sweep import (
        DataSettings,
        SchedulerSettings,
        SearchSettings,
        Sweep,
        TrainingSettings,
    )

    has_asha = search.pop("has_asha", True)
    max_epochs = search.pop("max_epochs", MAX_EPOCHS)
    sweep = Sweep(
        name=f"sweep-{time.monotonic_ns()}",
        storage=folder,
        metric="val_loss",
        data=DataSettings(phantom=PhantomSettings()),
        training=TrainingSettings(max_epochs=max_epochs),
        search=SearchSettings(num_trials=num_trials, sampler=sampler, **search),
        scheduler=SchedulerSettings(grace_period_epochs=1, reduction_factor=3)
        if has_asha
        else None,
    )
    sweep.folder.mkdir(parents=True)
    return sweep


def rss_kib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


# In the driver's process


def simulate(folder: str, num_trials: int, sampler: str) -> dict[str, Any]:
    """Drives a sweep's own parts in the order of Ray's controller, one trial at a time."""
    from ray.tune.schedulers import TrialScheduler

    from search.study.record import Record
    from search.tuning.recorder import EndOfSweep, StudyRecorder
    from search.tuning.scheduler import ResumableASHA
    from search.tuning.searcher import StudySearcher

    sweep = make_sweep(folder, num_trials, sampler)
    record = Record.create(sweep, {})
    scheduler = ResumableASHA(sweep, record.trials())
    recorder = StudyRecorder(record, scheduler)
    searcher = StudySearcher(record, recorder.take_up(), recorder)
    end = EndOfSweep(recorder)
    num_results, warm_kib = 0, math.nan
    trial_s: list[float] = []
    with record.being_written():
        for started in range(num_trials):
            if started == min(NUM_WARM_TRIALS, num_trials // 2):
                warm_kib = rss_kib()
            start_s = time.perf_counter()
            trial_id = f"{started:08x}"
            config = searcher.suggest(trial_id)
            trial = SimpleNamespace(trial_id=trial_id, config=config, error_file=None)
            scheduler.on_trial_add(None, trial)
            for epoch in range(1, MAX_EPOCHS + 1):
                result = report_of(config["number"], epoch, loss_of(config, epoch))
                decision = scheduler.on_trial_result(None, trial, result)
                result["done"] = end(trial_id, result) or decision == TrialScheduler.STOP
                recorder.on_trial_result(0, [], trial, result)
                num_results += 1
                if result["done"]:
                    scheduler.on_trial_complete(None, trial, result)
                    recorder.on_trial_complete(0, [], trial)
                    break
            trial_s.append(time.perf_counter() - start_s)
    end_kib = rss_kib()
    num_measured = num_trials - min(NUM_WARM_TRIALS, num_trials // 2)
    window = max(10, num_trials // 20)
    return {
        "trials": num_trials,
        "results": num_results,
        "sampler": sampler,
        "kib_per_trial": (end_kib - warm_kib) / num_measured,
        "trials_per_s": num_trials / sum(trial_s),
        "results_per_s": num_results / sum(trial_s),
        "ms_per_trial": {
            str(at): 1e3 * statistics.median(trial_s[max(0, at - window) : at])
            for at in (10, 100, 1000, num_trials)
            if at <= num_trials
        },
        "disk_kib_per_trial": (sweep.folder / "study.db").stat().st_size / 1024 / num_trials,
    }


# Against the same, plainly used


def plain_optuna(storage: Any, num_trials: int) -> int:
    """One study, told the same of every epoch by Optuna's own means."""
    import optuna

    from search.space import to_distributions
    from search.sweep import DEFAULT_SPACE

    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=0))
    num_results = 0
    for number in range(num_trials):
        trial = study.ask(to_distributions(DEFAULT_SPACE))
        for epoch in range(1, MAX_EPOCHS + 1):
            result = report_of(number, epoch, loss_of({"params": trial.params}, epoch))
            trial.set_user_attr(f"epoch_{epoch:05d}", json.dumps(result))
            trial.report(result["val_loss"], epoch)
            num_results += 1
        study.tell(trial, result["val_loss"])
    return num_results


def plain_ray_searcher(num_trials: int) -> int:
    """Ray's searcher and scheduler without Ray; in memory, nothing survives the process."""
    import optuna
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.optuna import OptunaSearch

    from search.space import to_distributions
    from search.sweep import DEFAULT_SPACE

    searcher = OptunaSearch(
        to_distributions(DEFAULT_SPACE),
        metric="val_loss",
        mode="min",
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    scheduler = ASHAScheduler("epoch", "val_loss", "min", MAX_EPOCHS, 1, 3)
    num_results = 0
    for number in range(num_trials):
        trial = SimpleNamespace(trial_id=str(number))
        config = searcher.suggest(trial.trial_id)
        scheduler.on_trial_add(None, trial)
        for epoch in range(1, MAX_EPOCHS + 1):
            result = report_of(number, epoch, loss_of({"params": config}, epoch))
            # The key under which OptunaSearch looks for the step.
            result["training_iteration"] = epoch
            num_results += 1
            if scheduler.on_trial_result(None, trial, result) == ASHAScheduler.STOP:
                break
            searcher.on_trial_result(trial.trial_id, result)
        scheduler.on_trial_complete(None, trial, result)
        searcher.on_trial_complete(trial.trial_id, result)
    return num_results


def measure_throughput(folder: str, num_trials: int, num_rounds: int) -> dict[str, Any]:
    """Interleaved: each round runs every side once, so that a busy minute hits all of them."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    silence()

    def journal() -> Any:
        path = f"{folder}/{time.monotonic_ns()}.log"
        return optuna.storages.JournalStorage(JournalFileBackend(path))

    sides: dict[str, Callable[[], int]] = {
        "ours, durable": lambda: int(simulate(folder, num_trials, "random")["results"]),
        "ray OptunaSearch, in memory": lambda: plain_ray_searcher(num_trials),
        "optuna SQLite": lambda: plain_optuna(
            f"sqlite:///{folder}/{time.monotonic_ns()}.db", num_trials
        ),
        "optuna JournalFile": lambda: plain_optuna(journal(), num_trials),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, run in sides.items():
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
            num_results = run()
            wall_s, cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
            found[name].append(
                {
                    "trials_per_s": num_trials / wall_s,
                    "results_per_s": num_results / wall_s,
                    "cpu_ms_per_result": 1e3 * cpu_s / num_results,
                }
            )
    ours = found["ours, durable"]
    return {
        name: {
            **{key: statistics.median(row[key] for row in rows) for key in rows[0]},
            "ours_is_faster": interval(
                [a["results_per_s"] / b["results_per_s"] for a, b in zip(ours, rows, strict=True)]
            ),
        }
        for name, rows in found.items()
    }


def interval(ratios: list[float]) -> list[float]:
    """Median, and the 95 % interval of the median over resampled rounds."""
    import numpy as np

    generator = np.random.default_rng(0)
    medians = np.median(generator.choice(ratios, (5000, len(ratios))), axis=1)
    return [statistics.median(ratios), *np.percentile(medians, [2.5, 97.5]).tolist()]


# Through Ray


def report_trial(config: dict[str, Any], sleep_s: float, max_epochs: int, warm_s: float) -> None:
    """A trial that sleeps and reports; it says when, on its worker's clock."""
    from ray import tune

    started_s = time.time()
    if "SCALE_WARM" not in os.environ:
        # A worker's first trial waits for the other workers. Trials shorter than a worker's start
        # have Ray hand the one worker from trial to trial and call off every other start.
        os.environ["SCALE_WARM"] = "1"
        time.sleep(warm_s)
    for epoch in range(1, max_epochs + 1):
        time.sleep(sleep_s)
        params = config.get("params", config)
        result = report_of(config.get("number", 0), epoch, loss_of({"params": params}, epoch))
        result["metrics"] |= {"started_s": started_s, "ended_s": time.time()}
        tune.report(result)


class Memory(threading.Thread):
    """Reads the process's RSS beside the number of trials, five times a second."""

    def __init__(self, count: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self._count = count
        self.found: list[tuple[int, float]] = []

    def run(self) -> None:
        while True:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found.append((self._count(), pages * os.sysconf("SC_PAGE_SIZE") / 1024))
            time.sleep(0.2)

    def kib_per_trial(self) -> float:
        """The slope once the first trials are through."""
        import numpy as np

        last = self.found[-1][0]
        late = [row for row in self.found if row[0] >= last / 4]
        trials, kib = np.array(late).T
        return float(np.polyfit(trials, kib, 1)[0])


@contextlib.contextmanager
def ray_cluster() -> Iterator[None]:
    import secrets

    # Given here, so that Ray does not write one to the home folder.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    import ray

    ray.init(
        address="local", num_cpus=16, include_dashboard=False, _node_ip_address="127.0.0.1",
        log_to_driver=False, logging_level=logging.ERROR, object_store_memory=256 * 2**20,
    )  # fmt: skip
    silence()
    try:
        yield
    finally:
        ray.shutdown()


def run_ours(
    folder: str, num_trials: int, workers: int, sleep_s: float, has_asha: bool
) -> dict[str, Any]:
    """The product's tuner with trials that do not train."""
    from search.study.record import Record
    from search.tuning import tuner

    max_epochs = MAX_EPOCHS if has_asha else 1
    sweep = make_sweep(
        folder,
        num_trials,
        "tpe" if has_asha else "random",
        max_concurrent_trials=workers,
        has_asha=has_asha,
        max_epochs=max_epochs,
    )
    record = Record.create(sweep, {})
    memory = Memory(lambda: record.num_trials)
    with ray_cluster(), record.being_written(), contextlib.redirect_stdout(io.StringIO()):
        trainable = tuner.tune.with_parameters(
            report_trial, sleep_s=sleep_s, max_epochs=max_epochs, warm_s=WARM_S
        )
        memory.start()
        start_s = time.time()
        tuner.run_trials(
            record,
            tuner.tune.with_resources(trainable, {"cpu": 1.0, "gpu": 0.0}),
            max_concurrent_trials=workers,
            is_local=True,
        )
        wall_s = time.time() - start_s
    trials = record.trials()
    assert all(trial.state != "running" for trial in trials), "a trial was lost"
    spans: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        last = trial.epochs[-1]
        times = (last.metrics["started_s"], last.metrics["ended_s"])
        spans.setdefault(last.ran_on, []).append(times)  # type: ignore[arg-type]
    gaps_s, busy_s, there_s = [], 0.0, 0.0
    for worker in spans.values():
        worker.sort()
        del worker[0]  # which waited
        gaps_s += [b[0] - a[1] for a, b in itertools.pairwise(worker)]
        busy_s += sum(end - start for start, end in worker)
        there_s += worker[-1][1] - worker[0][0]
    return {
        "trials": len(trials),
        "workers": len(spans),
        "kib_per_trial": memory.kib_per_trial(),
        "trials_per_s": len(trials) / wall_s,
        "wall_s": wall_s,
        "efficiency": busy_s / there_s,
        "gap_ms": {
            "median": 1e3 * statistics.median(gaps_s),
            "p95": 1e3 * statistics.quantiles(gaps_s, n=20)[-1],
        },
    }


def run_rays(folder: str, num_trials: int, workers: int) -> dict[str, Any]:
    """Ray Tune with OptunaSearch, ASHA and its default loggers, and warm workers as ours."""
    with ray_cluster():
        from ray import tune
        from ray.tune.search.optuna import OptunaSearch

        from search.space import to_distributions
        from search.sweep import DEFAULT_SPACE

        class Count(tune.Callback):
            num_trials = 0

            def on_trial_complete(self, **info: Any) -> None:
                self.num_trials += 1

        count = Count()
        searcher = OptunaSearch(to_distributions(DEFAULT_SPACE), metric="val_loss", mode="min")
        trainable = tune.with_parameters(
            report_trial, sleep_s=0.0, max_epochs=MAX_EPOCHS, warm_s=WARM_S
        )
        tuner = tune.Tuner(
            tune.with_resources(trainable, {"cpu": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=tune.schedulers.ASHAScheduler(
                    "epoch", "val_loss", "min", MAX_EPOCHS, 1, 3
                ),
                num_samples=num_trials,
                max_concurrent_trials=workers,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0, callbacks=[count]),
        )
        memory = Memory(lambda: count.num_trials)
        memory.start()
        start_s = time.time()
        tuner.fit()
        wall_s = time.time() - start_s
    return {
        "trials": num_trials,
        "kib_per_trial": memory.kib_per_trial(),
        "trials_per_s": num_trials / wall_s,
        "wall_s": wall_s,
    }


# What runs where


def measures(options: argparse.Namespace) -> dict[str, list[Any]]:
    """What was asked for: a function of this module and its arguments."""
    everything = not (options.memory or options.throughput or options.scaling)
    share = 0.1 if options.quick else 1.0
    found: dict[str, list[Any]] = {}
    if options.memory or everything:
        found["simulated, random"] = ["simulate", int(10_000 * share), "random"]
        found["simulated, tpe"] = ["simulate", int(10_000 * share), "tpe"]
        found["simulated, gp"] = ["simulate", int(3_000 * share), "gp"]
        found["through ray, ours"] = ["run_ours", int(1500 * share) + 250, 2, 0.0, True]
        found["through ray, ray's default"] = ["run_rays", int(1500 * share) + 250, 2]
    if options.throughput or everything:
        found["throughput"] = ["measure_throughput", 100, 3 if options.quick else 9]
    if options.scaling or everything:
        for workers in (1, 4, 16) if options.quick else (1, 2, 4, 8, 16):
            num_trials = workers * (10 if options.quick else 30)
            found[f"{workers} workers"] = ["run_ours", num_trials, workers, 1.0, False]
    return found


def run_child(call: list[Any]) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(call)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_rows(rows: dict[str, Any]) -> None:
    print(f"{'':28}{'trials':>8}{'KiB/trial':>11}{'trials/s':>10}{'results/s':>11}")
    for name, row in rows.items():
        if name == "throughput":
            continue
        cells = (row["trials"], row["kib_per_trial"], row["trials_per_s"])
        line = f"{name:28}{cells[0]:>8}{cells[1]:>11.2f}{cells[2]:>10.1f}"
        if "results_per_s" in row:
            by_age = ", ".join(f"{ms:.1f} ms at {at}" for at, ms in row["ms_per_trial"].items())
            line += f"{row['results_per_s']:>11.0f}   {by_age}"
        if "efficiency" in row and name.endswith("workers"):
            line += f"   efficiency {row['efficiency']:.3f}, gap {row['gap_ms']['median']:.0f} ms"
            line += f" (p95 {row['gap_ms']['p95']:.0f} ms)"
        print(line)
    for name, row in rows.get("throughput", {}).items():
        ratio = "ours is {:.1f} times as fast [{:.1f}, {:.1f}]".format(*row["ours_is_faster"])
        print(
            f"{name:28}{row['trials_per_s']:10.0f} trials/s {row['results_per_s']:10.0f} results/s"
            f" {row['cpu_ms_per_result']:8.2f} CPU ms a result   {ratio}"
        )


def silence() -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", action="store_true", help="the driver's memory a trial")
    parser.add_argument("--throughput", action="store_true", help="results a second recorded")
    parser.add_argument("--scaling", action="store_true", help="1 to 16 workers, trials of 1 s")
    parser.add_argument("--quick", action="store_true", help="a tenth of the trials")
    parser.add_argument("--folder", help="where records are written; a temporary one by default")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, *arguments = json.loads(options.child)
        with tempfile.TemporaryDirectory(dir=os.environ.get("SCALE_FOLDER")) as folder:
            print(json.dumps(globals()[name](folder, *arguments)))
        return
    if options.folder:
        os.environ["SCALE_FOLDER"] = options.folder
    rows = {}
    for name, call in measures(options).items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows[name] = run_child(call)
    print_rows(rows)
    if options.out:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "hardware": {"cpu": cpu_name(), "cores": os.cpu_count()},
            "load_1min": os.getloadavg()[0],
            "versions": {
                "python": platform.python_version(),
                "sqlite": sqlite3.sqlite_version,
                **{name: version(name) for name in ("optuna", "ray", "sqlalchemy")},
            },
            "commit": commit(),
            "measures": rows,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
