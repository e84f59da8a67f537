"""A sweep's trials, ranked."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.errors import InputError
from search.config import load_sweep
from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import Sweep


def score(trial: Trial, sweep: Sweep) -> float:
    """Return the best epoch's metric, turned so that higher is better; minus infinity if none."""
    best = trial.best_epoch(sweep.metric, sweep.mode)
    if best is None or trial.state == "failed":
        return -math.inf
    value = best.metrics[sweep.metric]
    return -math.inf if value is None else (value if sweep.mode == "max" else -value)


def rank(trials: list[Trial], sweep: Sweep) -> list[Trial]:
    """Return trials best first, failed and unmeasured ones last; equals in order of number."""
    return sorted(trials, key=lambda trial: (-score(trial, sweep), trial.number))


def has_checkpoint(trial: Trial, sweep: Sweep) -> bool:
    """Tell whether a trial that ended well still has the checkpoint of its best epoch."""
    best = trial.epochs[-1].best if trial.epochs and trial.state != "failed" else None
    return best is not None and (sweep.folder / best.path).is_file()


def open_sweep(name: str, storage: Path) -> Sweep:
    """Read the settings that a sweep was launched with.

    Args:
        name: The sweep's name, or the path of its folder.
        storage: The folder that sweeps are in.

    Raises:
        InputError: If there is no such sweep; the ones there are named.
    """
    folder = Path(name) if (Path(name) / "sweep.yaml").is_file() else storage / name
    if not (folder / "sweep.yaml").is_file():
        found = sorted(path.parent.name for path in storage.glob("*/sweep.yaml"))
        there = f"there are {', '.join(found[:10])}" if found else "there are none"
        raise InputError(
            f"the sweep must have been launched; no {folder / 'sweep.yaml'}: {there}, and "
            "`--storage` says where sweeps are"
        )
    # The folder may have been moved since.
    moved = {"storage": str(folder.resolve().parent)}
    return load_sweep(folder / "sweep.yaml", moved)


def verdict(confirmation: Mapping[str, Any]) -> str:
    """Return in one line what a confirmation says of its winner."""
    first = confirmation["candidates"][0]
    seeds = f"{confirmation['num_seeds']} fresh seed{'s' if confirmation['num_seeds'] > 1 else ''}"
    if first["over_rival_low"] is None or first["over_rival_low"] <= 0:
        return (
            f"no clear winner: trial {first['number']:05d} has the best mean, {first['mean']:.4f}, "
            f"not told from trial {first['rival']:05d} by {seeds} (best with a probability of "
            f"{first['probability_best']:.0%})"
        )
    return (
        f"confirmed by {seeds}: trial {first['number']:05d}, mean {first['mean']:.4f}, the best "
        f"with a probability of {first['probability_best']:.0%}"
    )


def best_trial(record: Record) -> Trial:
    """Return the confirmed winner; where nothing was confirmed, the best trial that finished.

    Raises:
        InputError: If none has.
    """
    confirmation = record.facts.get("confirmation")
    # Not if trials have been added since: one of them may be better.
    if confirmation is not None and confirmation["num_trials"] == record.num_trials:
        return record.trial(confirmation["winner"])
    finished = [t for t in record.trials() if t.state in ("complete", "pruned")]
    ranked = [t for t in rank(finished, record.sweep) if score(t, record.sweep) > -math.inf]
    if not ranked:
        raise InputError(
            f"a trial of {record.sweep.name} must have finished; none has: "
            f"`neurosweep resume {record.sweep.reference}`"
        )
    return ranked[0]
