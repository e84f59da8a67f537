"""Does our sampler and scheduler find better params in the same number of epochs?

    uv run python experiments/benchmarks/search_quality.py --out search_quality.json
    uv run python experiments/benchmarks/search_quality.py --problem fine-tuning --seeds 40

Real learning curves without training: the LCBench surrogate, 34 tabular tasks, seven parameters,
1 to 52 epochs; or our own table of fine-tuned networks (``fine_tuning_curves.py``), one task, three
parameters, 1 to 12 epochs. Every method spends 60 full trainings, one trial at a time.

In our own table a configuration was trained with several seeds, and each look at it gives the curve
of one of them, as in a sweep. What counts is not the value that was seen, which is lucky more often
than not, but what so many epochs of the configuration give in the mean over seeds.
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
from dataclasses import dataclass
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
from search.sweep import DataSettings, SchedulerSettings, Sweep, TrainingSettings

GRACE_EPOCHS = 3
REDUCTION_FACTOR = 3
BUDGETS = (5, 10, 20, 40, 60)  # in full trainings
NUM_REFERENCE_CONFIGS = 2000
BASELINE = "asha + random"
TABLE = Path(__file__).with_name("results") / "fine_tuning_curves.json"

Config = dict[str, Any]
# What is seen of a configuration epoch by epoch, and what it is worth at each of them.
Curve = Callable[[Config], tuple[list[float], list[float]]]

LCBENCH_EPOCHS = 52
# In the order in which the model takes them. Batch size and units are whole numbers on a log scale.
LCBENCH_SPACE: Space = {
    "batch_size": Float(low=16, high=512, log=True),
    "learning_rate": Float(low=1e-4, high=1e-1, log=True),
    "momentum": Float(low=0.1, high=0.99),
    "weight_decay": Float(low=1e-5, high=1e-1),
    "num_layers": Int(low=1, high=5),
    "max_units": Float(low=64, high=1024, log=True),
    "max_dropout": Float(low=0.0, high=1.0),
}


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        name: The task's.
        space: Its parameters.
        max_epochs: Of a full training.
        curve: Trains a configuration.
        values: What configurations are worth at their best epoch.
    """

    name: str
    space: Space
    max_epochs: int
    curve: Curve
    values: Callable[[list[Config]], np.ndarray]

    @property
    def rung_epochs(self) -> tuple[int, ...]:
        """Where Ray's ASHA stops trials, and the end."""
        return Sweep(
            name="benchmark",
            data=DataSettings(path="none"),
            training=TrainingSettings(max_epochs=self.max_epochs),
            scheduler=SchedulerSettings(
                grace_period_epochs=GRACE_EPOCHS, reduction_factor=REDUCTION_FACTOR
            ),
        ).rung_epochs


@functools.cache
def load_surrogate(data: Path) -> tuple[onnxruntime.InferenceSession, dict[str, int]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        data / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    codes = json.loads((data / "encoding.json").read_text())["OpenML_task_id"]
    return session, codes


def lcbench(data: Path, task: str, seed: int) -> Problem:
    """Return one of the tasks, which has no noise: what is seen is what it is worth."""

    def curve(config: Config) -> tuple[list[float], list[float]]:
        seen = lcbench_curves(data, task, [config])[0].tolist()
        return seen, seen

    def values(configs: list[Config]) -> np.ndarray:
        # A configuration is as good as its best epoch, since a sweep keeps that epoch's checkpoint.
        return np.asarray(lcbench_curves(data, task, configs).max(axis=1))

    return Problem(task, LCBENCH_SPACE, LCBENCH_EPOCHS, curve, values)


def lcbench_curves(data: Path, task: str, configs: list[Config]) -> np.ndarray:
    """Validation accuracy in percent, configurations x epochs, in one call of the model."""
    session, codes = load_surrogate(data)
    names = list(LCBENCH_SPACE)
    rows = np.array([[config[name] for name in names] for config in configs], dtype=np.float32)
    for name in ("batch_size", "max_units"):
        rows[:, names.index(name)] = np.round(rows[:, names.index(name)])
    epochs = np.tile(np.arange(1, LCBENCH_EPOCHS + 1, dtype=np.float32), len(configs))
    x_cont = np.column_stack([epochs, np.repeat(rows, LCBENCH_EPOCHS, axis=0)])
    x_cat = np.full((len(x_cont), 1), codes[task], dtype=np.int32)
    output = session.run(None, {"x_cat": x_cat, "x_cont": x_cont.astype(np.float32)})
    return np.asarray(output[0])[:, 1].reshape(len(configs), LCBENCH_EPOCHS)


def fine_tuning(seed: int) -> Problem:
    """Return our own table; between its learning rates and dropouts curves are interpolated.

    Args:
        seed: Of the noise: which seed's curve a look at a configuration gives.
    """
    table = json.loads(TABLE.read_text())
    depths, lrs, dropouts = (table["grid"][name] for name in ("unfreeze_depth", "lr", "dropout"))
    # Depths x rates x dropouts x seeds x epochs.
    measured = np.array(table["val_macro_f1"])
    noise = np.random.default_rng(seed)
    space: Space = {
        "unfreeze_depth": Int(low=min(depths), high=max(depths)),
        "lr": Float(low=min(lrs), high=max(lrs), log=True),
        "dropout": Float(low=min(dropouts), high=max(dropouts)),
    }

    def of_seeds(config: Config) -> np.ndarray:
        """Seeds x epochs."""
        cell = measured[depths.index(config["unfreeze_depth"])]
        for place, axis in (
            (np.log(config["lr"]), np.log(lrs)),
            (config["dropout"], np.array(dropouts)),
        ):
            below = int(np.clip(np.searchsorted(axis, place) - 1, 0, len(axis) - 2))
            share = (place - axis[below]) / (axis[below + 1] - axis[below])
            cell = (1 - share) * cell[below] + share * cell[below + 1]
        return np.asarray(cell)

    def worth(config: Config) -> np.ndarray:
        # Of a trial that is stopped early, the best of the epochs that it had.
        return np.asarray(np.maximum.accumulate(of_seeds(config), axis=1).mean(axis=0))

    def curve(config: Config) -> tuple[list[float], list[float]]:
        curves = of_seeds(config)
        return curves[noise.integers(len(curves))].tolist(), worth(config).tolist()

    def values(configs: list[Config]) -> np.ndarray:
        return np.array([worth(config)[-1] for config in configs])

    return Problem("fine-tuning", space, measured.shape[-1], curve, values)


class RandomSearcher:
    """Independent uniform draws."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._generator = np.random.default_rng(seed)

    def suggest(self, trial_id: str) -> Config:
        draw = self._generator.random
        return {name: from_unit(domain, draw()) for name, domain in self._space.items()}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        pass

    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None:
        pass


class OurSearcher:
    """A fresh sampler for each trial; stopped trials told as pruned."""

    def __init__(self, problem: Problem, kind: str, seed: int) -> None:
        self._problem = problem
        self._kind = kind
        self._seed = seed
        self._study = optuna.create_study(direction="maximize")

    def suggest(self, trial_id: str) -> Config:
        self._study.sampler = build_sampler(
            self._kind,
            space=self._problem.space,
            seed=self._seed,
            trial_number=int(trial_id),
            mode="max",
            rung_epochs=self._problem.rung_epochs,
        )
        self._trial = self._study.ask(to_distributions(self._problem.space))
        self._values: list[float] = []
        return self._trial.params

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._values.append(result["accuracy"])
        self._trial.report(result["accuracy"], result["training_iteration"])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any]) -> None:
        self.on_trial_result(trial_id, result)
        if result["training_iteration"] == self._problem.max_epochs:
            self._study.tell(self._trial, max(self._values))
        else:
            self._study.tell(self._trial, state=TrialState.PRUNED)


# Of every epoch that was paid for, in order: what was seen, and what it is worth.
Spent = list[tuple[float, float]]


def run_full(problem: Problem, searcher: Any) -> Spent:
    """Trains every trial to the end."""
    spent: Spent = []
    for number in range(BUDGETS[-1]):
        seen, worth = problem.curve(searcher.suggest(str(number)))
        spent += zip(seen, worth, strict=True)
        result = {"accuracy": max(seen), "training_iteration": problem.max_epochs}
        searcher.on_trial_complete(str(number), result)
    return spent


def run_asha(problem: Problem, searcher: Any) -> Spent:
    """Ray's own scheduler, driven in the order of its TuneController."""
    num_epochs = BUDGETS[-1] * problem.max_epochs
    scheduler = ASHAScheduler(
        metric="accuracy",
        mode="max",
        max_t=problem.max_epochs,
        grace_period=GRACE_EPOCHS,
        reduction_factor=REDUCTION_FACTOR,
    )
    spent: Spent = []
    number = 0
    while len(spent) < num_epochs:
        trial = SimpleNamespace(trial_id=str(number))
        curve = zip(*problem.curve(searcher.suggest(trial.trial_id)), strict=True)
        scheduler.on_trial_add(None, trial)
        for epoch, (value, worth) in enumerate(curve, start=1):
            spent.append((value, worth))
            result = {"accuracy": value, "training_iteration": epoch}
            if scheduler.on_trial_result(None, trial, result) == ASHAScheduler.STOP:
                break  # the searcher hears of this result only as the trial's last
            searcher.on_trial_result(trial.trial_id, result)
        scheduler.on_trial_complete(None, trial, result)
        searcher.on_trial_complete(trial.trial_id, result)
        number += 1
    return spent[:num_epochs]


def ray_searcher(problem: Problem, seed: int) -> OptunaSearch:
    return OptunaSearch(to_distributions(problem.space), metric="accuracy", mode="max", seed=seed)


METHODS: dict[str, Callable[[Problem, int], Spent]] = {
    "random": lambda problem, seed: run_full(problem, RandomSearcher(problem.space, seed)),
    "tpe": lambda problem, seed: run_full(problem, ray_searcher(problem, seed)),
    BASELINE: lambda problem, seed: run_asha(problem, RandomSearcher(problem.space, seed)),
    "ray: optuna + asha": lambda problem, seed: run_asha(problem, ray_searcher(problem, seed)),
    "ours: per-rung tpe + asha": lambda problem, seed: run_asha(
        problem, OurSearcher(problem, "tpe", seed)
    ),
    "ours: gp + asha": lambda problem, seed: run_asha(problem, OurSearcher(problem, "gp", seed)),
}


def run_task(make: Callable[[int], Problem], seeds: int) -> dict[str, Any]:
    """Runs every method on one task; at each budget, what the best that was seen is worth.

    Args:
        make: Returns the task, given a seed for its noise.
        seeds: How often each method searches.
    """
    silence()
    problem = make(0)
    reference = RandomSearcher(problem.space, seed=2**31)  # not the seed of any run
    samples = [reference.suggest("") for _ in range(NUM_REFERENCE_CONFIGS)]
    sample_values = problem.values(samples)
    best = float(sample_values.max())
    found: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {}
    for method, run in METHODS.items():
        start_s = time.perf_counter()
        found[method] = []
        for seed in range(seeds):
            # Seeds of its own for each task: with shared ones every task would start with the same
            # draws, and the mean over tasks would hide how much of it is luck.
            own = derive_seed(problem.name, seed)
            seen, worth = np.array(run(make(own), own)).T
            leaders = [int(seen[: budget * problem.max_epochs].argmax()) for budget in BUDGETS]
            found[method].append([float(worth[leader]) for leader in leaders])
            best = max(best, float(worth.max()))
        seconds[method] = time.perf_counter() - start_s
    return {
        "task": problem.name,
        "best": best,
        "median": float(np.median(sample_values)),
        "found": found,
        "seconds": seconds,
    }


def regrets_of(task: dict[str, Any]) -> dict[str, np.ndarray]:
    """The normalised regret of each seed at each budget.

    0 is the best accuracy that any method, any seed or the reference sample of random
    configurations has reached on the task, 1 the median of that sample.
    """
    scale = task["best"] - task["median"]
    return {
        method: (task["best"] - np.array(found)) / scale for method, found in task["found"].items()
    }


def summarise(tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over tasks, of a single one over seeds; the difference with the baseline, interval."""
    regrets = [regrets_of(task) for task in tasks]
    rows = {
        method: regrets[0][method]
        if len(tasks) == 1
        else np.array([regret[method].mean(axis=0) for regret in regrets])
        for method in METHODS
    }
    num_rows = len(rows[BASELINE])
    resamples = np.random.default_rng(0).integers(0, num_rows, (10_000, num_rows))
    summary = {}
    for method, values in rows.items():
        differences = values - rows[BASELINE]
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
    parser.add_argument("--problem", choices=("lcbench", "fine-tuning"), default="lcbench")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "lcbench")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", type=int, help="only the first so many tasks")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--quick", action="store_true", help="4 tasks, 1 seed")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.seeds = 4, 1

    makes: list[Callable[[int], Problem]] = [fine_tuning]
    if options.problem == "lcbench":
        space = json.loads((options.data / "config_space.json").read_text())
        names = sorted(space["hyperparameters"][0]["choices"])[: options.tasks]
        makes = [functools.partial(lcbench, options.data, name) for name in names]
    facts = provenance("optuna", "ray", "onnxruntime", "numpy")
    start_s = time.perf_counter()
    run = functools.partial(run_task, seeds=options.seeds)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        tasks = []
        for task in pool.imap(run, makes):
            tasks.append(task)
            print(f"\r{len(tasks)}/{len(makes)} tasks", end="", file=sys.stderr, flush=True)

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
