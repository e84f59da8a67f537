"""What a report says of one sweep, read from its record, its manifest, and bundles made of it.

Everything here may be shown to anybody: no image, folder, host, or group. What trials are compared
by is said in `Findings`, since early stopping makes some values incomparable.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_modules.data.manifest import COLUMNS, Manifest
from lightning_modules.errors import InputError
from search.report.bundles import BundleFindings
from search.results import rank, score
from search.shareable import count_images
from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import Sweep

# The best trials that are compared with all, and how many there have to be in all for that.
MIN_BEST = 5
MIN_COMPARED = 15

_MANY = 150


@dataclass(frozen=True)
class Compared:
    """Trials by their best value up to one epoch, which each of them has trained.

    Attributes:
        epoch: A rung of ASHA, or the longest training.
        values: By number, of the trials that got there.
        diverged: Numbers of those that diverged before; worse than any value.
    """

    epoch: int
    values: dict[int, float]
    diverged: tuple[int, ...]

    @property
    def num_trials(self) -> int:
        """How many trials are compared."""
        return len(self.values) + len(self.diverged)


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What there is to say of one sweep.

    Attributes:
        sweep: Its settings.
        facts: The record's, of the whole sweep.
        trials: All of them, by number.
        values: Each trial's best value, at whatever epoch: what the sweep ranks by. A trial that
            was stopped early had fewer epochs to reach it.
        rungs: The same trials at the epochs where they can be compared; the lowest has all.
        ended_s: Seconds from the first trial's beginning to each trial's end.
        epoch_s: Each trial's mean time of an epoch.
        data: Images and groups by split, class, and source; empty if the manifest is not there.
        bundles: Made of its trials.
    """

    sweep: Sweep
    facts: Mapping[str, Any]
    trials: Sequence[Trial]
    values: dict[int, float]
    rungs: tuple[Compared, ...]
    ended_s: dict[int, float]
    epoch_s: dict[int, float]
    data: Mapping[str, Any]
    bundles: tuple[BundleFindings, ...]

    @property
    def ranked(self) -> list[Trial]:
        """Trials best first, failed and unmeasured ones last."""
        return rank(list(self.trials), self.sweep)

    @property
    def best(self) -> Trial:
        """The trial that the sweep's own values put first."""
        return self.ranked[0]

    @property
    def chosen(self) -> int:
        """The number that `export` takes: the confirmed winner, else the best."""
        confirmation = self.facts.get("confirmation")
        if confirmation is not None and confirmation["num_trials"] == len(self.trials):
            return int(confirmation["winner"])
        return self.best.number

    @property
    def states(self) -> Counter[str]:
        """How many trials ended how."""
        return Counter(describe_state(trial) for trial in self.trials)

    @property
    def is_crowded(self) -> bool:
        """Whether trials are so many that marks have to be small."""
        return len(self.trials) > _MANY

    @property
    def num_epochs(self) -> int:
        """Epochs trained, of all trials."""
        return sum(len(trial.epochs) for trial in self.trials)


def read_findings(record: Record, bundles: Sequence[BundleFindings] = ()) -> Findings:
    """Read all that a report says of a sweep.

    Args:
        record: The sweep's; it may still run.
        bundles: Made of it.

    Raises:
        InputError: If no trial has reported a value yet.
    """
    sweep, trials = record.sweep, record.trials()
    sign = 1 if sweep.mode == "max" else -1
    scores = {trial.number: score(trial, sweep) for trial in trials}
    values = {number: sign * value for number, value in scores.items() if value > -float("inf")}
    if not values:
        raise InputError(
            f"a trial of {sweep.name} must have reported {sweep.metric} to be written about; none "
            f"has: look with `neurosweep top {sweep.reference}`"
        )
    times = record.times()
    start = min(began for began, _ in times.values())
    return Findings(
        sweep=sweep,
        facts=record.facts,
        trials=trials,
        values=values,
        rungs=compare_at_rungs(trials, sweep),
        ended_s={
            number: (ended - start).total_seconds()
            for number, (_, ended) in times.items()
            if ended is not None
        },
        epoch_s=_epoch_s(trials),
        data=_read_data(sweep, record.facts),
        bundles=tuple(bundles),
    )


def compare_at_rungs(trials: Sequence[Trial], sweep: Sweep) -> tuple[Compared, ...]:
    """Return the trials that can be compared at each rung, the lowest rung first.

    A trial counts by its best epoch up to the rung, as the sampler sees it. One that was stopped
    before is left out; one that failed for another reason than diverging says nothing.
    """
    found = []
    for epoch in sweep.rung_epochs:
        values, diverged = {}, []
        for trial in trials:
            if trial.state == "failed":
                if trial.reason == "diverged":
                    diverged.append(trial.number)
            elif len(trial.epochs) >= epoch:
                early = dataclasses.replace(trial, epochs=trial.epochs[:epoch])
                best = early.best_epoch(sweep.metric, sweep.mode)
                value = None if best is None else best.metrics[sweep.metric]
                if value is not None:
                    values[trial.number] = value
        found.append(Compared(epoch, values, tuple(diverged)))
    return tuple(found)


def describe_state(trial: Trial) -> str:
    """Return how a trial stands, in a few words."""
    if trial.state == "pruned":
        return "out of time" if trial.reason == "time_budget" else "stopped early"
    if trial.state == "failed":
        return "diverged" if trial.reason == "diverged" else "failed"
    return str(trial.state)


def _epoch_s(trials: Sequence[Trial]) -> dict[int, float]:
    found = {}
    for trial in trials:
        times = [epoch.metrics.get("epoch_s") for epoch in trial.epochs]
        known = [time for time in times if time is not None]
        if known:
            found[trial.number] = statistics.fmean(known)
    return found


def _read_data(sweep: Sweep, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return counts from the sweep's own manifest, if it is the one that it was launched with."""
    try:
        with sweep.files.local("manifest.csv") as path:
            frame = pd.read_csv(path, dtype=str, na_filter=False, usecols=list(COLUMNS))
    except (OSError, ValueError):
        return {}
    if Manifest(Path(), frame).digest != facts.get("manifest_digest"):
        return {}
    return {
        "all": count_images(frame),
        "class": {str(name): count_images(part) for name, part in frame.groupby("label")},
        "source": {str(name): count_images(part) for name, part in frame.groupby("source")},
        "every_image_is_a_group": frame["group_id"].nunique() == len(frame),
    }
