"""A sweep's trials, ranked."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.errors import InputError
from search.config import check_address, load_sweep, read_sweep
from search.study.record import Record
from search.study.recorded import Trial
from search.study.sweep_files import ObjectFiles, StorageError, is_object_storage, remedy_for
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


def with_checkpoint(trials: list[Trial], sweep: Sweep) -> list[Trial]:
    """Return the trials that ended well and still have the checkpoint of their best epoch."""
    there = set(sweep.files.names("trials"))
    return [
        trial
        for trial in trials
        if trial.epochs and trial.state != "failed"
        if (best := trial.epochs[-1].best) is not None and best.path in there
    ]


def open_sweep(name: str, storage: Path | str) -> Sweep:
    """Read the settings that a sweep was launched with.

    Args:
        name: The sweep's name, or the path or address of its folder.
        storage: The folder that sweeps are in, or its address in an object storage.

    Raises:
        InputError: If there is no such sweep; the ones in a folder are named.
    """
    if is_object_storage(name):
        storage, _, name = name.rstrip("/").rpartition("/")
    if isinstance(storage, str) and is_object_storage(storage):
        return _open_remote(name, storage)
    storage = Path(storage)
    folder = Path(name) if (Path(name) / "sweep.yaml").is_file() else storage / name
    if not (folder / "sweep.yaml").is_file():
        if (folder / ".lock").is_file():
            raise InputError(
                f"the sweep must have been launched; {folder.name} is being prepared, or was ended "
                "before its first trial: look again in a moment, or launch it again"
            )
        found = sorted(path.parent.name for path in storage.glob("*/sweep.yaml"))
        there = f"there are {', '.join(found[:10])}" if found else "there are none"
        raise InputError(
            f"the sweep must have been launched; no {folder / 'sweep.yaml'}: {there}, and "
            "`--storage` says where sweeps are, if you launched it in another folder"
        )
    # The folder may have been moved since.
    moved = {"storage": str(folder.resolve().parent)}
    return load_sweep(folder / "sweep.yaml", moved)


def _open_remote(name: str, storage: str) -> Sweep:
    check_address(storage)
    files = ObjectFiles(f"{storage.rstrip('/')}/{name}")
    try:
        content = files.open("sweep.yaml").read()
    except StorageError as error:
        raise InputError(
            f"a sweep's storage must be reachable; {error}: {remedy_for(str(error))}"
        ) from error
    except FileNotFoundError as error:
        raise InputError(
            f"the sweep must have been launched; no {error}: check its name; `--storage` says "
            "where sweeps are"
        ) from error
    source = f"{files.location}/sweep.yaml"
    return read_sweep(content, source, Path(), {"storage": storage})


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
