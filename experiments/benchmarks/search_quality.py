"""Does our sampler and scheduler find better params in the same number of epochs?

    uv run python experiments/benchmarks/search_quality.py --out search_quality.json

Real learning curves without training: the LCBench surrogate, 34 tabular tasks, seven parameters,
1 to 52 epochs. Every method spends 60 full trainings (60 x 52 epochs), one trial at a time.
"""

import argparse
import functools
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# One thread a process: the arrays are tiny, and --jobs uses the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import onnxruntime
import optuna
from measurement import SHARED, provenance
from optuna.trial import TrialState
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from lightning_modules.seeds import derive_seed
from search.samplers.sampler import build_sampler
from search.space import Float, Int, Space, from_unit, to_distributions

MAX_EPOCHS = 52
GRACE_EPOCHS = 3
REDUCTION_FACTOR = 3
# Where Ray's ASHA stops trials, and the end.
RUNG_EPOCHS = (3, 9, 27, MAX_EPOCHS)
BUDGETS = (5, 10, 20, 40, 60)  # in full trainings
NUM_EPOCHS = BUDGETS[-1] * MAX_EPOCHS
NUM_REFERENCE_CONFIGS = 2000
BASELINE = "asha + random"

# In the order in which the model takes them. Batch size and units are whole numbers on a log scale.
SPACE: Space = {
    "batch_size": Float(low=16, high=512, log=True),
    "learning_rate": Float(low=1e-4, high=1e-1, log=True),
    "momentum": Float(low=0.1, high=0.99),
    "weight_decay": Float(low=1e-5, high=1e-1),
    "num_layers": Int(low=1, high=5),
    "max_units": Float(low=64, high=1024, log=True),
    "max_dropout": Float(low=0.0, high=1.0),
}
Curves = Callable[[list[dict[str, Any]]], np.ndarray]


@functools.cache
def load_surrogate(data: Path) -> tuple[onnxruntime.InferenceSession, dict[str, int]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        data / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    codes = json.loads((data / "encoding.json").read_text())["OpenML_task_id"]
    return session, codes


def curves_of(data: Path, task: str, configs: list[dict[str, Any]]) -> np.ndarray:
    """Validation accuracy in percent, configurations x epochs, in one call of the model."""
    session, codes = load_surrogate(data)
    rows = np.array([[config[name] for name in SPACE] for config in configs], dtype=np.float32)
    for name in ("batch_size", "max_units"):
        column = list(SPACE).index(name)
        rows[:, column] = np.round(rows[:, column])
    epochs = np.tile(np.arange(1, MAX_EPOCHS + 1, dtype=np.float32), len(configs))
    x_cont = np.column_stack([epochs, np.repeat(rows, MAX_EPOCHS, axis=0)])
    x_cat = np.full((len(x_cont), 1), codes[task])
    x_cat = np.full((len(x_cont), 1), codes[task], dtype=np.int32)
    output = session.run(None, {"x_cat": x_cat, "x_cont": x_cont.astype(np.float32)})
    return np.asarray(output[0])[:, 1].reshape(len(configs), MAX_EPOCHS)


class RandomSearcher:
    """Independent uniform draws."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        return {name: from_unit(domain, self._generator.random()) for name, domain in SPACE.items()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None:
        pass


class OurSearcher:
    """A fresh sampler for each trial; stopped trials told as pruned."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._seed = seed
        self._study = optuna.create_study(direction="maximize")

    def suggest(self, trial_id: str) -> dict[str, Any]:
        self._study.sampler = build_sampler(
            self._kind,
            space=SPACE,
            seed=self._seed,
            trial_number=int(trial_id),
            mode="max",
            rung_epochs=RUNG_EPOCHS,
        )
        self._trial = self._study.ask(to_distributions(SPACE))
        self._values: list[float] = []
        return self._trial.params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._values.append(result["accuracy"])
        self._trial.report(result["accuracy"], result["training_iteration"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None:
        self.on_trial_result(trial_id, result)
        if result["training_iteration"] == MAX_EPOCHS:
            self._study.tell(self._trial, max(self._values))
        else:
            self._study.tell(self._trial, state=TrialState.PRUNED)


Curve = Callable[[dict[str, Any]], np.ndarray]


def run_full(searcher: Any, curve: Curve) -> list[float]:
    """Trains every trial to the end; the accuracies of all epochs, in order."""
    spent: list[float] = []
    for number in range(BUDGETS[-1]):
        values = curve(searcher.suggest(str(number))).tolist()
        spent += values
        result = {"accuracy": max(values), "training_iteration": MAX_EPOCHS}
        searcher.on_trial_complete(str(number), result)
    return spent


def run_asha(searcher: Any, curve: Curve) -> list[float]:
    """Ray's own scheduler, driven in the order of its TuneController."""
    scheduler = ASHAScheduler(
        metric="accuracy",
        mode="max",
        max_t=MAX_EPOCHS,
        grace_period=GRACE_EPOCHS,
        reduction_factor=REDUCTION_FACTOR,
    )
    spent: list[float] = []
    number = 0
    while len(spent) < NUM_EPOCHS:
        trial = SimpleNamespace(trial_id=str(number))
        values = curve(searcher.suggest(trial.trial_id)).tolist()
        scheduler.on_trial_add(None, trial)
        for epoch, value in enumerate(values, start=1):
            spent.append(value)
            result = {"accuracy": value, "training_iteration": epoch}
            if scheduler.on_trial_result(None, trial, result) == ASHAScheduler.STOP:
                break  # the searcher hears of this result only as the trial's last
            searcher.on_trial_result(trial.trial_id, result)
        scheduler.on_trial_complete(None, trial, result)
        searcher.on_trial_complete(trial.trial_id, result)
        number += 1
    return spent[:NUM_EPOCHS]


def ray_searcher(seed: int) -> OptunaSearch:
    return OptunaSearch(to_distributions(SPACE), metric="accuracy", mode="max", seed=seed)


METHODS: dict[str, Callable[[int, Curve], list[float]]] = {
    "random": lambda seed, curve: run_full(RandomSearcher(seed), curve),
    "tpe": lambda seed, curve: run_full(ray_searcher(seed), curve),
    BASELINE: lambda seed, curve: run_asha(RandomSearcher(seed), curve),
    "ray: optuna + asha": lambda seed, curve: run_asha(ray_searcher(seed), curve),
    "ours: per-rung tpe + asha": lambda seed, curve: run_asha(OurSearcher("tpe", seed), curve),
    "ours: gp + asha": lambda seed, curve: run_asha(OurSearcher("gp", seed), curve),
}


def run_task(data: Path, task: str, seeds: int) -> dict[str, Any]:
    """Runs every method on one task; the best accuracy so far at each budget."""
    silence()

    def curve(config: dict[str, Any]) -> np.ndarray:
        return curves_of(data, task, [config])[0]

    reference = RandomSearcher(seed=2**31)  # not the seed of any run
    samples = [reference.suggest("") for _ in range(NUM_REFERENCE_CONFIGS)]
    # A configuration is as good as its best epoch, since a sweep keeps that epoch's checkpoint.
    sample_values = curves_of(data, task, samples).max(axis=1)
    best = float(sample_values.max())
    found: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {}
    for method, run in METHODS.items():
        start_s = time.perf_counter()
        found[method] = []
        for seed in range(seeds):
            # Seeds of its own for each task: with shared ones every task would start with the same
            # draws, and the mean over tasks would hide how much of it is luck.
            so_far = np.maximum.accumulate(run(derive_seed(task, seed), curve))
            found[method].append([float(so_far[b * MAX_EPOCHS - 1]) for b in BUDGETS])
            best = max(best, float(so_far[-1]))
        seconds[method] = time.perf_counter() - start_s
    return {
        "task": task,
        "best": best,
        "median": float(np.median(sample_values)),
        "found": found,
        "seconds": seconds,
    }


def regrets_of(task: dict[str, Any]) -> dict[str, np.ndarray]:
    """Mean over seeds of the normalised regret at each budget.

    0 is the best accuracy that any method, any seed or the reference sample of random
    configurations has reached on the task, 1 the median of that sample.
    """
    scale = task["best"] - task["median"]
    return {
        method: ((task["best"] - np.array(found)) / scale).mean(axis=0)
        for method, found in task["found"].items()
    }


def summarise(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over tasks, and the paired difference with the baseline with its 95 % interval."""
    regrets = [regrets_of(task) for task in tasks]
    generator = np.random.default_rng(0)
    resamples = generator.integers(0, len(tasks), (10_000, len(tasks)))
    summary = {}
    for method in METHODS:
        values = np.array([regret[method] for regret in regrets])
        differences = values - np.array([regret[BASELINE] for regret in regrets])
        low, high = np.percentile(differences[resamples].mean(axis=1), [2.5, 97.5], axis=0)
        summary[method] = {
            "regret": values.mean(axis=0).tolist(),
            "difference": differences.mean(axis=0).tolist(),
            "difference_low": low.tolist(),
            "difference_high": high.tolist(),
        }
    return summary


def print_summary(title: str, summary: dict[str, Any]) -> None:
    print(f"\n{title}: regret, then the difference with {BASELINE} and its 95 % interval")
    print(f"{'full trainings':26}" + "".join(f"{budget:>8}" for budget in BUDGETS))
    for method, row in summary.items():
        print(f"{method:26}" + "".join(f"{regret:8.3f}" for regret in row["regret"]))
    for method, row in summary.items():
        if method != BASELINE:
            ranges = zip(*(row[key] for key in list(row)[1:]), strict=True)
            cells = (f"{mean:+9.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in ranges)
            print(f"{method:26}" + "".join(cells))


def silence() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "lcbench")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, help="only the first so many tasks")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="4 tasks, 1 seed")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.seeds = 4, 1

    space = json.loads((options.data / "config_space.json").read_text())
    names = sorted(space["hyperparameters"][0]["choices"])[: options.tasks]
    facts = provenance("optuna", "ray", "onnxruntime", "numpy")
    start_s = time.perf_counter()
    run = functools.partial(run_task, options.data, seeds=options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        tasks = []
        for task in pool.imap(run, names):
            tasks.append(task)
            print(f"\r{len(tasks)}/{len(names)} tasks", end="", file=sys.stderr, flush=True)

    # The levers of our samplers were chosen on every other task, so the rest are the fair half.
    groups = {"all": tasks} | ({"held out": tasks[1::2]} if len(tasks) > 1 else {})
    summaries = {name: summarise(group) for name, group in groups.items()}
    print(f"\nMean normalised regret (0 best known, 1 median configuration), {options.seeds} seeds")
    for name, summary in summaries.items():
        print_summary(f"{name}, {len(groups[name])} tasks", summary)
    seconds = {method: sum(task["seconds"][method] for task in tasks) for method in METHODS}
    print("\n" + ", ".join(f"{method} {spent:.0f} s" for method, spent in seconds.items()))
    if options.out:
        record = {
            **facts,
            "hardware": {**facts["hardware"], "jobs": options.jobs},
            "wall_s": time.perf_counter() - start_s,
            "seconds": seconds,
            "seeds": options.seeds,
            "budgets": BUDGETS,
            "summary": summaries,
            "tasks": tasks,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
