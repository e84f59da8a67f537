"""How many trials an hour, beside the same trials as a competent user writes them (``plain.py``)?

    uv run python experiments/benchmarks/trials_per_hour.py --setting shallow \
        --data MANIFEST.csv --weights FOLDER --out trials_per_hour.json

``shallow``: MobileNetV2, depths 0, 1, and 3, every trial to its end. ``mixed``: both backbones,
depth uniform over 0 to 5, ASHA on both sides. In a pair both sides get the same params, images,
splits, epochs, steps, and number of trials at a time; whoever goes first changes from pair to pair.
Each trains in its own default precision unless told otherwise: ours in what it measures to be
faster, plain in float32. The clock runs from a process's start to its exit, imports and decoding
included; our checkpoints, record, and TensorBoard curves are on. With ``--cold`` (the default) our
cache is empty at the start of each pair.
"""

import argparse
import dataclasses
import json
import os
import secrets
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from measurement import (
    ENVIRONMENT,
    REPOSITORY,
    SHARED,
    provenance,
    ratio_interval,
    run_command,
    shown,
)

from lightning_modules.data.manifest import read_manifest
from search.config import load_sweep
from search.results import open_sweep
from search.study.record import Record, Trial
from search.sweep import Sweep

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "ray", "optuna", "kornia", "torchmetrics")
SETTINGS: dict[str, dict[str, Any]] = {
    "shallow": {
        "params": {"backbone": "mobilenet_v2", "unfreeze_depth": 1},
        "space": {"unfreeze_depth": [0, 1, 3]},
        "scheduler": None,
    },
    "mixed": {
        "params": {"backbone": "mobilenet_v2", "unfreeze_depth": 2},
        "space": {
            "backbone": ["mobilenet_v2", "resnet50"],
            "unfreeze_depth": {"low": 0, "high": 5},
        },
        # Rungs at epochs 3 and 9, as in plain.py.
        "scheduler": {"reduction_factor": 3},
    },
}


def write_sweep(options: argparse.Namespace, seed: int, folder: Path) -> Path:
    """Write the sweep file of one pair."""
    setting = SETTINGS[options.setting]
    document = {
        "name": "bench",
        "seed": seed,
        "data": {
            "path": str(options.data),
            "image_size_px": options.image_size_px,
            # plain.py does not look for copies; ours does, in this time, and leaves them there.
            "duplicates": "allow",
        },
        "weights": str(options.weights),
        "params": setting["params"],
        "space": {
            **setting["space"],
            "dropout": {"low": 0.1, "high": 0.6},
            "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        },
        "training": {"max_epochs": options.epochs, "precision": options.precision},
        "search": {
            "num_trials": options.trials,
            "sampler": "random",
            "max_concurrent_trials": options.concurrent,
        },
        "scheduler": setting["scheduler"],
        "resources": {"cpus_per_trial": 1, "gpus_per_trial": options.gpus_per_trial},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def draw_trials(sweep: Sweep, folder: Path) -> list[Trial]:
    """Draw what the sweep will draw: its sampler is a function of seed and trial number alone."""
    scratch = dataclasses.replace(sweep, study_url=f"sqlite:///{folder / 'draws.db'}")
    record = Record.create(scratch, {})
    return [record.draw() for _ in range(sweep.search.num_trials)]


def run_ours(
    sweep_file: Path, drawn: list[Trial], options: argparse.Namespace, folder: Path, cache: Path
) -> dict[str, Any]:
    """Launch the sweep as a user does, and read its record."""
    storage = folder / "sweeps"
    command = [sys.executable, "-m", "search.cli", "launch", str(sweep_file)]
    command += ["--storage", str(storage)]
    measured = run_side(command, folder / "ours.log", NEUROSWEEP_CACHE=str(cache))
    record = Record.open(open_sweep("bench", storage))
    trials = record.trials()
    if [(t.params, t.seed) for t in trials] != [(t.params, t.seed) for t in drawn]:
        sys.exit("the sweep did not draw the params that the plain side was given")
    num_train = len(read_manifest(options.data).rows("train"))
    outcomes = []
    for trial in trials:
        best = trial.best_epoch("val_macro_f1", "max")
        steps_an_epoch = num_train // trial.params.batch_size
        confirmed = None
        if best is not None and best.best is not None:
            checkpoint = storage / "bench" / best.best.path
            confirmed = _confirm_steps(checkpoint, best.epoch * steps_an_epoch)
        outcomes.append(
            {
                "params": dataclasses.asdict(trial.params),
                "failed": trial.state == "failed",
                "epochs": len(trial.epochs),
                "optimizer_steps": len(trial.epochs) * steps_an_epoch,
                "steps_confirmed": confirmed,
                "best_val_macro_f1": None if best is None else best.metrics["val_macro_f1"],
                "epoch_s": [epoch.metrics.get("epoch_s") for epoch in trial.epochs],
            }
        )
    disk_bytes = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return {**measured, "cache_gib": disk_bytes / 2**30, "trials": outcomes}


def _confirm_steps(checkpoint: Path, steps: int) -> bool | None:
    """Compare the steps that were counted with those of a checkpoint; none where it was deleted."""
    if not checkpoint.is_file():
        return None
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"]
    if stored != steps:
        print(f"WARNING: {checkpoint.name} says {stored} steps, counted were {steps}")
    return bool(stored == steps)


def run_plain(
    drawn: list[Trial], options: argparse.Namespace, folder: Path, cache: Path
) -> dict[str, Any]:
    """Train the same params by ``plain.py``."""
    params = [{**dataclasses.asdict(trial.params), "seed": trial.seed} for trial in drawn]
    (folder / "params.json").write_text(json.dumps(params))
    out = folder / "plain.json"
    command = [sys.executable, str(Path(__file__).with_name("plain.py"))]
    for name, value in {
        "params": folder / "params.json",
        "manifest": options.data,
        "weights": options.weights,
        "epochs": options.epochs,
        "image-size-px": options.image_size_px,
        "precision": options.plain_precision,
        "concurrent": options.concurrent,
        "gpus-per-trial": options.gpus_per_trial,
        "num-workers": options.plain_workers,
        "out": out,
    }.items():
        command += [f"--{name}", str(value)]
    if SETTINGS[options.setting]["scheduler"] is not None:
        command.append("--asha")
    return {**run_side(command, folder / "plain.log"), **json.loads(out.read_text())}


def run_side(command: list[str], log: Path, **environment: str) -> dict[str, Any]:
    """Run one side; what it cost."""
    env = {
        **ENVIRONMENT,
        "PYTHONPATH": str(REPOSITORY),
        # Under `uv run`, Ray would start every worker with uv again; and none of its tokens is to
        # be left in the home folder. Both as our own command has it.
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        **environment,
    }
    load = os.getloadavg()[0]
    cost = run_command(command, env=env, log=log, cwd=log.parent)
    if cost.returncode:
        sys.exit(f"{log.stem} ended with {cost.returncode}:\n{log.read_text()[-4000:]}")
    return {"load_1min_before": load, **dataclasses.asdict(cost)}


def totals(side: dict[str, Any]) -> dict[str, Any]:
    """Return a side's sums over trials."""
    trials = side["trials"]
    scores = [trial["best_val_macro_f1"] for trial in trials if not trial["failed"]]
    return {
        "trials_per_hour": 3600 * len(trials) / side["wall_s"],
        "wall_s": side["wall_s"],
        "cpu_s": side["cpu_s"],
        "peak_rss_gib": side["peak_rss_gib"],
        "epochs": sum(trial["epochs"] for trial in trials),
        "optimizer_steps": sum(trial["optimizer_steps"] for trial in trials),
        "failed": sum(trial["failed"] for trial in trials),
        "best_val_macro_f1": max(scores),
        "mean_val_macro_f1": statistics.fmean(scores),
    }


def summarise(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of each side and the ratios, all of them plain's over ours."""
    sums = {side: [totals(pair[side]) for pair in pairs] for side in ("plain", "ours")}

    def ratios(value: Any) -> dict[str, Any]:
        both = zip(sums["plain"], sums["ours"], strict=True)
        return ratio_interval([value(plain) / value(ours) for plain, ours in both])

    return {
        **{
            side: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for side, rows in sums.items()
        },
        "ratio_wall": ratios(lambda row: row["wall_s"]),
        "ratio_cpu": ratios(lambda row: row["cpu_s"]),
        # ASHA stops other trials on either side: these hold whatever it stopped.
        "ratio_wall_per_step": ratios(lambda row: row["wall_s"] / row["optimizer_steps"]),
        "ratio_cpu_per_step": ratios(lambda row: row["cpu_s"] / row["optimizer_steps"]),
        "val_macro_f1_ours_minus_plain": [
            ours["mean_val_macro_f1"] - plain["mean_val_macro_f1"]
            for plain, ours in zip(sums["plain"], sums["ours"], strict=True)
        ],
    }


def print_summary(summary: dict[str, Any], pairs: list[dict[str, Any]]) -> None:
    """Print every pair and the medians."""
    columns = list(summary["ours"])
    print(f"{'':12}" + "".join(f"{name.replace('_val_macro', ''):>17}" for name in columns))
    rows = [
        (f"{pair['seed']} {side}", totals(pair[side])) for pair in pairs for side in pair["order"]
    ]
    for label, row in [*rows, *((f"median {s}", summary[s]) for s in ("plain", "ours"))]:
        print(f"{label:12}" + "".join(f"{row[name]:17.5g}" for name in columns))
    for name in ("ratio_wall", "ratio_cpu", "ratio_wall_per_step", "ratio_cpu_per_step"):
        print(f"{name:20} {shown(summary[name])}")
    differences = summary["val_macro_f1_ours_minus_plain"]
    shown_differences = ", ".join(f"{value:+.3f}" for value in differences)
    print(f"mean val_macro_f1, ours minus plain, pair by pair: {shown_differences}")


def write_results(
    options: argparse.Namespace, facts: dict[str, Any], pairs: list[dict[str, Any]]
) -> None:
    """Write what there is, if that was asked for: the next pair takes a quarter of an hour."""
    if options.out:
        named = {name: v.name if isinstance(v, Path) else v for name, v in vars(options).items()}
        record = {**facts, "options": named, "summary": summarise(pairs), "pairs": pairs}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


def warm_up(manifest: Path, folder: Path) -> None:
    """Bring both sides' files into memory, so that the first pair is like the others."""
    for path in manifest.parent.rglob("*"):
        if path.is_file():
            path.read_bytes()
    modules = "search.cli, search.tuning.tuner, search.tuning.trial, torchvision.transforms.v2"
    modules += ", kornia.augmentation, ray.tune.integration.pytorch_lightning"
    run_side([sys.executable, "-c", f"import {modules}"], folder / "imports.log")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", choices=SETTINGS, default="shallow")
    parser.add_argument(
        "--data",
        type=Path,
        default=SHARED / "data" / "dev-mri5" / "manifest.csv",
        help="manifest with splits",
    )
    parser.add_argument("--weights", type=Path, default=SHARED / "weights", help="a folder")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--first-pair", type=int, default=0, help="its seed; take a new --out")
    parser.add_argument("--trials", type=int, default=4, help="a side and pair")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size-px", type=int, default=96)
    parser.add_argument("--precision", default="auto", help="ours")
    parser.add_argument(
        "--plain-precision", default="32-true", help="plain's; on a GPU, say what ours measured"
    )
    parser.add_argument("--concurrent", type=int, default=os.cpu_count())
    parser.add_argument("--gpus-per-trial", type=float, default=0.0)
    parser.add_argument("--plain-workers", type=int, default=0, help="of each of its DataLoaders")
    parser.add_argument(
        "--cold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="an empty cache for each pair",
    )
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    options.data, options.weights = options.data.resolve(), options.weights.resolve()

    facts = provenance(*PACKAGES)
    pairs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        warm_up(options.data, Path(scratch))
        for number in range(options.first_pair, options.first_pair + options.pairs):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            cache = (folder if options.cold else Path(scratch)) / "cache"
            sweep_file = write_sweep(options, number, folder)
            drawn = draw_trials(load_sweep(sweep_file), folder)
            order = ("ours", "plain") if number % 2 == 0 else ("plain", "ours")
            pair: dict[str, Any] = {"seed": number, "order": order}
            for side in order:
                if side == "ours":
                    pair[side] = run_ours(sweep_file, drawn, options, folder, cache)
                else:
                    pair[side] = run_plain(drawn, options, folder, cache)
            pairs.append(pair)
            write_results(options, facts, pairs)
            walls = ", ".join(f"{side} {pair[side]['wall_s']:.0f} s" for side in order)
            print(f"pair {number}: {walls}", file=sys.stderr, flush=True)
    print_summary(summarise(pairs), pairs)


if __name__ == "__main__":
    main()
