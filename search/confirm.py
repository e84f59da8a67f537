"""The best trials again with fresh seeds: is the winner better, or was it lucky?

A confirmation is a small sweep of its own, in a folder of the sweep's: its trials are given instead
of drawn, none is stopped early, and everything that is cached is used again. It can be interrupted,
and widened by asking for more candidates or seeds.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.comparison import Interval, interval, paired_difference, probability_best
from search.config import dump_sweep
from search.folder import lock
from search.pareto import front
from search.results import rank, score, verdict, with_checkpoint
from search.study.record import Record
from search.study.recorded import Trial
from search.study.storage import discard_empty_study
from search.sweep import Sweep, TrialParams
from search.tuning import tuner


def confirm_sweep(
    record: Record,
    manifest: Manifest,
    pack: Pack,
    *,
    top: int,
    seeds: int,
    address: str | None,
    tell: tuner.Tell,
    wait_s: float = 0.0,
    as_json: bool = False,
) -> dict[str, Any]:
    """Train the best trials and the baseline anew, each with the same fresh seeds.

    A seed sets head, batch order, dropout, and augmented images. Every trial runs all its epochs.
    What comes of it is recorded in the sweep, as its confirmation.

    Args:
        record: The sweep's; held by the caller.
        manifest: Its images, split.
        pack: Its images, decoded.
        top: How many of the best trials, the baseline not counted.
        seeds: How many times each.
        address: A running Ray cluster's; none starts one on this machine.
        tell: Given a line for the user now and then.
        wait_s: How long to wait for a cluster that grows to have a node that a trial fits.
        as_json: Whether events go to standard output.

    Returns:
        The confirmation, as ``record.facts["confirmation"]`` holds it from now on.

    Raises:
        InputError: If no trial has finished, or training was interrupted.
    """
    candidates = _candidates(record, top)
    wanted = {
        (trial.number, index): (trial.params, *seeds_of(record.sweep, index))
        for trial in candidates
        for index in range(seeds)
    }
    confirming = _confirming(record.sweep, len(wanted))
    with lock(confirming), _open(confirming, record.facts, manifest) as runs:
        # One that failed for any reason but its params is run anew.
        there = {(run.params, run.seed) for run in runs.trials() if _counts(run)}
        for params, seed, view_seed in wanted.values():
            if (params, seed) not in there:
                runs.add(params, seed=seed, view_seed=view_seed)
        confirming = _confirming(record.sweep, runs.num_trials)
        confirming.files.write("sweep.yaml", dump_sweep(confirming).encode())
        runs.sweep = confirming
        tuner.resume_sweep(
            runs,
            manifest,
            pack,
            address=address,
            tell=tell,
            wait_s=wait_s,
            as_json=as_json,
        )
    values = _values(runs.trials(), confirming)
    missing = [run for run in wanted.values() if run[:2] not in values]
    if missing:
        raise InputError(
            f"a confirmation needs every run; {len(missing)} of {len(wanted)} have no result: give "
            f"the same command again to go on, or look with `neurosweep top {confirming.reference}`"
        )
    found = np.array(
        [
            [values[wanted[trial.number, index][:2]] for index in range(seeds)]
            for trial in candidates
        ]
    )
    confirmation = {
        "num_trials": record.num_trials,
        **compare(candidates, found, record.sweep),
    }
    record.add_fact("confirmation", confirmation)
    return confirmation


def print_confirmation(console: Console, confirmation: Mapping[str, Any]) -> None:
    """Say who won, and how sure that is."""
    table = Table(
        title=f"{confirmation['metric']} over {confirmation['num_seeds']} fresh seeds, with 95 % "
        "intervals; trial 00000 is the baseline",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for header in ("trial", "mean", "above baseline", "above the best other", "best with"):
        table.add_column(header)
    for row in confirmation["candidates"]:
        table.add_row(
            f"{row['number']:05d}",
            _shown(row, ""),
            _shown(row, "over_baseline_") if row["number"] else "",
            _shown(row, "over_rival_"),
            f"{row['probability_best']:.0%}",
        )
    console.print(table)
    console.print(verdict(confirmation), soft_wrap=True)
    console.print(f"`neurosweep export` takes trial {confirmation['winner']:05d} from now on")


def _shown(row: Mapping[str, Any], prefix: str) -> str:
    mean, low, high = (row.get(f"{prefix}{name}") for name in ("mean", "low", "high"))
    if mean is None:
        return ""
    sign = "+" if prefix else ""
    return f"{mean:{sign}.4f}" + ("" if low is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]")


def seeds_of(sweep: Sweep, index: int) -> tuple[int, int]:
    """Return a confirmation's trial seed and view seed, which no trial of the sweep had."""
    return derive_seed("confirm", sweep.seed, index), derive_seed(
        "confirm views", sweep.seed, index
    )


def compare(candidates: list[Trial], values: Any, sweep: Sweep) -> dict[str, Any]:
    """Return what the runs say of their candidates.

    Args:
        candidates: The baseline is trial 0.
        values: Shape ``(K, N)``: the metric of each candidate (in order) with each seed.
        sweep: Says which way the metric is better.

    Returns:
        Plain values: ``winner``, ``num_seeds``, ``metric``, and by candidate its mean with
        interval, its difference from the runner-up (the winner, for all others) and from the
        baseline, and the probability that it is the best.
    """
    sign = 1.0 if sweep.mode == "max" else -1.0
    order = np.argsort(-sign * values.mean(axis=1), kind="stable")
    probabilities = probability_best(sign * values)
    winner = int(order[0])
    rival_of = {row: winner for row in range(len(candidates))}
    rival_of[winner] = int(order[1]) if len(order) > 1 else winner
    baseline = next((row for row, trial in enumerate(candidates) if trial.number == 0), None)
    rows = []
    for row in map(int, order):
        rows.append(
            {
                "number": candidates[row].number,
                "values": [float(value) for value in values[row]],
                **_plain("", _possible(interval(values[row]), sweep.metric)),
                "probability_best": float(probabilities[row]),
                "rival": candidates[rival_of[row]].number,
                **_plain("over_rival_", paired_difference(values[row], values[rival_of[row]])),
                **(
                    _plain("over_baseline_", paired_difference(values[row], values[baseline]))
                    if baseline is not None
                    else {}
                ),
            }
        )
    return {
        "winner": candidates[winner].number,
        "metric": sweep.metric,
        "num_seeds": int(values.shape[1]),
        "candidates": rows,
    }


def _possible(found: Interval, metric: str) -> Interval:
    """Return an interval without what a metric cannot be; Student's t knows of no bounds."""
    highest = math.inf if metric == "val_loss" else 1.0
    if not math.isfinite(found.low):
        return found
    return dataclasses.replace(found, low=max(found.low, 0.0), high=min(found.high, highest))


def _plain(prefix: str, found: Any) -> dict[str, float | None]:
    return {
        f"{prefix}{name}": value if math.isfinite(value) else None
        for name, value in dataclasses.asdict(found).items()
    }


def _candidates(record: Record, top: int) -> list[Trial]:
    """Return the best trials that can be exported, and the baseline."""
    trials = record.trials()
    finished = with_checkpoint(trials, record.sweep)
    ranked = [t for t in rank(finished, record.sweep) if score(t, record.sweep) > -math.inf]
    if not ranked:
        raise InputError(
            f"a trial of {record.sweep.name} must have finished to be confirmed; none has: "
            f"`neurosweep resume {record.sweep.reference}`"
        )
    best = ranked[:top]
    if record.costs:
        # Where cost counts, the best at each cost are winners of their own.
        cheap = [point.trial for point in front(record) if point.trial in ranked]
        best += [trial for trial in cheap if trial not in best]
    baseline = [trial for trial in trials if trial.number == 0 and trial not in best]
    return [*best, *baseline]


def _confirming(sweep: Sweep, num_trials: int) -> Sweep:
    """Return the sweep that a confirmation is: nothing is drawn, and nothing stopped early."""
    search = dataclasses.replace(
        sweep.search, sampler="random", num_trials=num_trials, time_budget_s=None, keep_trials=1
    )
    return dataclasses.replace(
        sweep,
        name=f"{sweep.name[:56]}-confirm",
        storage=sweep.location,
        objectives=None,
        search=search,
        scheduler=None,
    )


@contextlib.contextmanager
def _open(confirming: Sweep, facts: dict[str, Any], manifest: Manifest) -> Iterator[Record]:
    """Open the confirmation's record for writing; a new one with the sweep's facts if need be."""
    if confirming.files.has("sweep.yaml"):
        record = Record.open(confirming)
    else:
        # Left by a command that was killed before there was anything to go on with.
        discard_empty_study(confirming)
        kept = {name: value for name, value in facts.items() if name != "confirmation"}
        record = Record.create(confirming, kept)
        # For nodes that have yet to decode the images.
        confirming.files.write("manifest.csv", manifest.csv())
        confirming.files.write("sweep.yaml", dump_sweep(confirming).encode())
    with record.being_written():
        yield record


def _counts(run: Trial) -> bool:
    """Tell whether a run says something of its params; one that diverged does."""
    return run.state != "failed" or run.reason == "diverged"


def _values(runs: list[Trial], sweep: Sweep) -> dict[tuple[TrialParams, int], float]:
    values = {}
    for run in runs:
        best = run.best_epoch(sweep.metric, sweep.mode)
        value = None if best is None else best.metrics[sweep.metric]
        if run.state != "running" and _counts(run) and value is not None:
            values[run.params, run.seed] = value
    return values
