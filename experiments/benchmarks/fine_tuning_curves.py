"""How do networks do, fine-tuned to every depth, at every learning rate, with every dropout?

    uv run python experiments/benchmarks/fine_tuning_curves.py --storage FOLDER

Every point of a grid is trained with several seeds, to its end, by the product itself: a sweep
whose trials are given instead of drawn. ``search_quality.py --problem fine-tuning`` searches the
table. It can be interrupted: the same command goes on, or, with fewer ``--seeds``, makes a table of
those that are there. With ``--extend`` seeds that the table has already are not trained again. A
seed sets head, batch order, dropout, and augmented images.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measurement import SHARED, provenance

from lightning_modules.seeds import derive_seed
from search.data import prepare_data
from search.folder import lock
from search.notebook import launch
from search.results import open_sweep
from search.study.record import Record
from search.sweep import TrialParams

GRID: dict[str, list[Any]] = {
    "unfreeze_depth": [0, 1, 2, 3, 4, 5],
    "lr": [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2],
    "dropout": [0.1, 0.5],
}
MAX_EPOCHS = 12
NAME = "curves"

SWEEP = """
name: curves
data: {path: images, image_size_px: 64, duplicates: allow}
params: {backbone: mobilenet_v2, unfreeze_depth: 0, dropout: 0.1, lr: 1.0e-4}
space:
  unfreeze_depth: {low: 0, high: 5}
  dropout: {low: 0.1, high: 0.5}
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
search: {num_trials: 1, sampler: random, keep_trials: 1}
scheduler: null
"""


def begin(storage: Path, data: Path, weights: Path) -> None:
    """Launch the sweep with a baseline, which is not part of the table."""
    path = storage / "curves.yaml"
    storage.mkdir(parents=True, exist_ok=True)
    path.write_text(SWEEP)
    settings = {"training.max_epochs": MAX_EPOCHS}
    launch(path, data=data, weights=weights, storage=storage, set=settings)


def train(storage: Path, seeds: range) -> Record:
    """Give the sweep the points that it lacks, and run what has not ended."""
    record = Record.open(open_sweep(NAME, storage))
    there = {(trial.params, trial.seed): trial.state for trial in record.trials()}
    points = [*points_of(record.sweep.params, seeds)]
    if all(there.get(point, "running") != "running" for point in points):
        return record
    sweep = record.sweep
    manifest, pack = prepare_data(sweep)
    from search.tuning import tuner

    with lock(sweep), (record := Record.open(sweep)).being_written():
        view_seeds = {
            derive_seed("curves", index): derive_seed("curves, views", index) for index in seeds
        }
        for params, seed in points:
            if (params, seed) not in there:
                record.add(params, seed=seed, view_seed=view_seeds[seed])
        search = dataclasses.replace(sweep.search, num_trials=record.num_trials)
        record.sweep = dataclasses.replace(sweep, search=search)
        tuner.resume_sweep(record, manifest, pack, address=None, tell=print)
    return record


def points_of(base: TrialParams, seeds: range) -> Iterator[tuple[TrialParams, int]]:
    """Yield params and seed of each point, seed by seed: what is there early covers the grid."""
    for index, *values in itertools.product(seeds, *GRID.values()):
        params = dataclasses.replace(base, **dict(zip(GRID, values, strict=True)))
        yield params, derive_seed("curves", index)


def table_of(record: Record, seeds: range) -> list[Any]:
    """Return val macro-F1: depths x learning rates x dropouts x seeds x epochs.

    What has diverged scores 0 from there on.
    """
    points = {*points_of(record.sweep.params, seeds)}
    curves = {}
    for trial in record.trials():
        if (trial.params, trial.seed) not in points:
            continue
        if len(trial.epochs) < MAX_EPOCHS and trial.reason != "diverged":
            sys.exit(f"{trial.name} is {trial.state} ({trial.reason}): give the same command again")
        values = [epoch.metrics["val_macro_f1"] or 0.0 for epoch in trial.epochs]
        curves[trial.params, trial.seed] = values + [0.0] * (MAX_EPOCHS - len(values))
    base = record.sweep.params

    def nested(values: dict[str, Any], names: list[str]) -> list[Any]:
        if not names:
            params = dataclasses.replace(base, **values)
            return [curves[params, derive_seed("curves", index)] for index in seeds]
        first, *others = names
        return [nested({**values, first: value}, others) for value in GRID[first]]

    return nested({}, list(GRID))


def joined(one: list[Any], other: list[Any], levels: int = len(GRID)) -> list[Any]:
    """Return two tables as one: the seeds of the first, then those of the second."""
    if not levels:
        return one + other
    return [joined(a, b, levels - 1) for a, b in zip(one, other, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--storage", type=Path, required=True, help="where the sweep is kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "dev-mri5")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "fine_tuning_curves.json"
    )
    parser.add_argument("--extend", action="store_true", help="keep the seeds of the table")
    options = parser.parse_args()
    facts = provenance("torch", "ray", "optuna", "pytorch-lightning")
    start_s = time.monotonic()
    before: dict[str, Any] = json.loads(options.out.read_text()) if options.extend else {}
    if before and (before["grid"] != GRID or before["num_seeds"] >= options.seeds):
        sys.exit(f"{options.out} has another grid, or so many seeds: leave out --extend")
    seeds = range(before.get("num_seeds", 0), options.seeds)
    if not (options.storage / NAME / "sweep.yaml").is_file():
        begin(options.storage, options.data, options.weights)
    record = train(options.storage, seeds)
    values = table_of(record, seeds)
    table = {
        **facts,
        "wall_s_of_last_run": time.monotonic() - start_s,
        "backbone": record.sweep.params.backbone,
        "image_size_px": record.sweep.data.image_size_px,
        "num_seeds": options.seeds,
        "grid": GRID,
        "val_macro_f1": joined(before["val_macro_f1"], values) if before else values,
    }
    if before:
        earlier = {key: before[key] for key in ("date", "commit", "hardware", "num_seeds")}
        table["earlier"] = [*before.get("earlier", []), earlier]
    options.out.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
