"""What happens in a running sweep, one event at a time; what ``--json`` prints.

Every line is one JSON object with ``event`` (its kind), ``time`` (UTC, ISO 8601), ``sweep`` (its
name), and the fields of the class that documents its kind. Numbers that are not finite are null.
"""

import collections
import math
from dataclasses import dataclass
from typing import Any, Literal

from search.results import rank, score
from search.study.reading import STATES
from search.study.record import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialStarted:
    """A trial begins, or goes on from its last checkpoint.

    Attributes:
        event: ``started``.
        trial: Its number; the baseline is 0.
        name: Names its TensorBoard run.
        params: All of them, searched or not.
        epochs_done: Epochs it goes on from; 0 for a fresh start.
    """

    trial: int
    name: str
    params: dict[str, Any]
    epochs_done: int
    event: Literal["started"] = "started"


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochDone:
    """A trial has reported an epoch.

    Attributes:
        event: ``epoch``.
        trial: Its number.
        name: Names its TensorBoard run.
        epoch: Counted from 1.
        max_epochs: Where it ends if nothing stops it.
        metric: What the sweep ranks by.
        value: The metric's value in this epoch.
        best: Its best value so far.
        metrics: Every metric by name.
        next_rung: The next epoch at which ASHA compares it; none if it will not any more.
        cutoff: What it would have to reach there, as of now; none if nobody has been there.
        features: What became of the frozen stages' features: cached, or computed, and why.
        left_s: How long the sweep will probably take from now on, in seconds; none if unknown.
    """

    trial: int
    name: str
    epoch: int
    max_epochs: int
    metric: str
    value: float | None
    best: float | None
    metrics: dict[str, float | None]
    next_rung: int | None
    cutoff: float | None
    features: str
    left_s: float | None
    event: Literal["epoch"] = "epoch"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialEnded:
    """A trial has come to an end, or was interrupted.

    Attributes:
        event: ``finished`` after all its epochs; ``stopped`` by ASHA, by the time budget, or
            because its worker went away; ``failed``.
        trial: Its number.
        name: Names its TensorBoard run.
        reason: ``max_epochs``, ``asha``, ``time_budget``, ``worker``, ``diverged``, or what the
            exception said.
        epochs: Epochs it ran, those before a resume included.
        metric: What the sweep ranks by.
        value: The metric's last value.
        best: Its best value.
        cutoff: What ASHA asked for; none if it was not ASHA.
        fault: Why its worker went away; none if it did not, or the sweep ended with it.
    """

    event: Literal["finished", "stopped", "failed"]
    trial: int
    name: str
    reason: str
    epochs: int
    metric: str
    value: float | None
    best: float | None
    cutoff: float | None
    fault: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepEnded:
    """The command is done with the sweep; the last line unless it failed, as exit codes say.

    Attributes:
        event: ``ended``.
        is_finished: Whether every trial has ended; if not, ``resume`` goes on.
        trials: How many are complete, pruned (stopped), failed, and running (interrupted).
        epochs: Epochs of all trials.
        metric: What the sweep ranks by.
        best_trial: The number of the best trial; none if there is none.
        best: Its value.
        elapsed_s: How long the command took.
        confirmation: What ``confirm`` found, as the record keeps it; none for other commands.
    """

    is_finished: bool
    trials: dict[str, int]
    epochs: int
    metric: str
    best_trial: int | None
    best: float | None
    elapsed_s: float
    confirmation: dict[str, Any] | None
    event: Literal["ended"] = "ended"


Event = TrialStarted | EpochDone | TrialEnded | SweepEnded


def sweep_ended(
    record: Record, *, elapsed_s: float, confirmation: dict[str, Any] | None
) -> SweepEnded:
    """Return what became of a sweep, as its record has it."""
    sweep, trials = record.sweep, record.trials()
    ranked = [trial for trial in rank(trials, sweep) if score(trial, sweep) > -math.inf]
    best = ranked[0].best_epoch(sweep.metric, sweep.mode) if ranked else None
    states = collections.Counter(trial.state for trial in trials)
    return SweepEnded(
        is_finished=record.is_finished(),
        trials={name: states[name] for name in STATES.values()},
        epochs=sum(len(trial.epochs) for trial in trials),
        metric=sweep.metric,
        best_trial=ranked[0].number if ranked else None,
        best=None if best is None else best.metrics[sweep.metric],
        elapsed_s=elapsed_s,
        confirmation=confirmation,
    )
