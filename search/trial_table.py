"""A sweep's trials as a table in the terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from search.planning.span import compare_with_actual
from search.results import rank, verdict
from search.study.record import Record
from search.study.recorded import Trial


def print_trials(console: Console, record: Record, *, num_rows: int) -> list[Trial]:
    """Print the best trials of a sweep, best first; return all of them."""
    sweep = record.sweep
    searched = list(sweep.space)
    trials = record.trials()
    rows = []
    for trial in rank(trials, sweep)[:num_rows]:
        best = trial.best_epoch(sweep.metric, sweep.mode)
        rows.append(
            (
                f"{trial.number:05d}",
                _state(trial),
                "" if best is None else f"{best.metrics[sweep.metric]:.4f}",
                f"{'-' if best is None else best.epoch}/{len(trial.epochs)}",
                *(_cell(getattr(trial.params, name)) for name in searched),
            )
        )
    table = Table(
        title=f"{sweep.name}: best {sweep.metric} first; trial 00000 is the baseline",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    headers = ("trial", "state", sweep.metric, "epoch best/run", *searched)
    for index, header in enumerate(headers):
        # Headers may wrap at their words, values may not: 80 columns hold the default space.
        widest = max((min(len(row[index]), 40) for row in rows), default=0)
        table.add_column(header.replace("_", " "), min_width=widest, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if len(trials) > num_rows:
        console.print(f"and {len(trials) - num_rows} more")
    facts = record.facts
    if facts.get("leakage"):
        console.print(
            f"launched with {facts['leakage']['pictures']} pictures in two splits: scores flatter"
        )
    forecast = compare_with_actual(facts)
    if forecast is not None:
        console.print(forecast, soft_wrap=True)
    confirmation = facts.get("confirmation")
    if confirmation is not None:
        console.print(verdict(confirmation), soft_wrap=True)
    return trials


def _state(trial: Trial) -> str:
    state = str(trial.state)
    if trial.state == "pruned":
        state = "out of time" if trial.reason == "time_budget" else "stopped"
    elif trial.state == "failed":
        state = f"failed: {trial.reason}"
    notes = [state]
    if trial.faults and trial.state != "failed":
        notes.append(f"{len(trial.faults)} attempts lost")
    if trial.epochs and trial.epochs[-1].micro_batch_size is not None:
        notes.append(f"micro-batches of {trial.epochs[-1].micro_batch_size}")
    return ", ".join(notes)


def _cell(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
