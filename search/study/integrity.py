"""Whether a study holds what was written: checksums, SQLite's own check, what is said twice."""

import contextlib
import dataclasses
import json
import sqlite3
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from search.study.recorded import Trial
from search.sweep import Sweep

# The attribute that holds the others' checksum, beside those of a trial and of the study.
CHECKSUM = "checksum"


def checksum(texts: Mapping[str, str]) -> int:
    """Return the sum of attributes' checksums: what is replaced can be taken out of it."""
    return sum(zlib.crc32(f"{name} {text}".encode()) for name, text in texts.items()) % 2**32


def with_checksum(attributes: Mapping[str, Any], replaced: Mapping[str, str]) -> dict[str, Any]:
    """Return attributes to write, and the checksum of all that there will be.

    Args:
        attributes: Added or replaced.
        replaced: As JSON, those of the same names that are there, and the checksum.
    """
    before = dict(replaced)
    total = int(before.pop(CHECKSUM, "0")) - checksum(before)
    total += checksum({name: json.dumps(value) for name, value in attributes.items()})
    return {**attributes, CHECKSUM: total % 2**32}


def without_checksum(texts: Mapping[str, str], whose: str) -> dict[str, Any]:
    """Return the values of attributes that were read as JSON.

    Args:
        texts: All that there are.
        whose: For people.

    Raises:
        ValueError: If they are not what was written.
    """
    found = dict(texts)
    if found.pop(CHECKSUM, "") != json.dumps(checksum(found)):
        raise ValueError(f"what it holds of {whose} does not match its checksum")
    return {name: json.loads(text) for name, text in found.items()}


def check_file(path: Path) -> None:
    """Have SQLite check its file's structure; other databases look after theirs.

    Args:
        path: There.

    Raises:
        ValueError: If it is not sound.
        sqlite3.Error: If it cannot be read.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=60)) as database:
        [said] = database.execute("PRAGMA integrity_check(1)").fetchone()
        if said != "ok":
            raise ValueError(" ".join(said.replace("*", "").split()))
        if database.execute("PRAGMA foreign_key_check").fetchone() is not None:
            raise ValueError("it has rows of trials that are not there")


def check_consistency(sweep: Sweep, trials: list[Trial], known: list[FrozenTrial]) -> None:
    """Compare what the record reads of trials with what samplers do.

    The former bears a checksum; the latter is in tables of Optuna's that have none.

    Args:
        sweep: The study's.
        trials: By number, as the record reads them.
        known: By number, as samplers see them.

    Raises:
        ValueError: If they differ.
    """
    if len(trials) != len(known):
        raise ValueError(f"it has {len(trials)} trials in one place and {len(known)} in another")
    for trial, other in zip(trials, known, strict=True):
        params = dataclasses.asdict(trial.params)
        values = {
            epoch.epoch: value
            for epoch in trial.epochs
            if (value := epoch.metrics.get(sweep.metric)) is not None
        }
        ended_by = trial.epochs[-1].stopped if trial.epochs else ""
        if (
            other.params != {name: params[name] for name in sweep.space}
            or other.system_attrs.get("fixed_params", other.params) != other.params
            or other.intermediate_values != values
            or (trial.state == "running") == bool(trial.reason)
            or (trial.state in ("complete", "pruned") and trial.reason != ended_by)
        ):
            raise ValueError(f"it says two things of trial {trial.number}")
