"""A sweep's trials, ranked."""

import math
from pathlib import Path

from lightning_modules.errors import InputError
from search.config import load_sweep
from search.record import Record
from search.recorded import Trial
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


def best_trial(record: Record) -> Trial:
    """Return the confirmed winner; where nothing was confirmed, the best trial that finished.

    Raises:
        InputError: If none has.
    """
    confirmation = record.facts.get("confirmation")
    if confirmation is not None:
        return record.trial(confirmation["winner"])
    finished = [t for t in record.trials() if t.state in ("complete", "pruned")]
    ranked = [t for t in rank(finished, record.sweep) if score(t, record.sweep) > -math.inf]
    if not ranked:
        raise InputError(
            f"a trial of {record.sweep.name} must have finished; none has: "
            f"`neurosweep resume {record.sweep.reference}`"
        )
    return ranked[0]
