"""Sweeps from Python: the names, defaults, and errors of the command, results as data frames.

Importing this imports neither torch nor Ray, nor pandas.
"""

import argparse
import dataclasses
import functools
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from search.study.record import Record
    from search.study.recorded import Trial
    from search.sweep import Sweep

# Rows of the table that a notebook shows.
NUM_SHOWN = 20


def launch(
    sweep: str | Path,
    *,
    data: str | Path | None = None,
    weights: str | Path | Sequence[str | Path] | None = None,
    name: str | None = None,
    set: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    skip_bad_images: bool = False,
    group_duplicates: bool = False,
    allow_leakage: bool = False,
    budget: str | None = None,
    address: str | None = None,
    insecure: bool = False,
    wait_s: int = 0,
    export: str | Path | None = None,
) -> "Results":
    """Run a new sweep, as ``neurosweep launch`` does, and return its results.

    Args:
        sweep: The sweep file.
        data: Manifest CSV, or folder of class folders, instead of the file's.
        weights: ``imagenet``, ``random``, a state dict, a folder of them, or several to try.
        name: Instead of the sweep file's name.
        set: Settings that override the file's, by dotted key: ``{"search.num_trials": 16}``.
        storage: Where sweeps are, a folder or an address; ``sweeps`` below the current folder if
            not given.
        skip_bad_images: Go on without unreadable images.
        group_duplicates: Move images of one picture into one split.
        allow_leakage: Launch with copies in two splits.
        budget: Time to fit into, such as ``2h``; sets the number of trials.
        address: A running Ray cluster, or ``auto``; one is started here if not given.
        insecure: Use a cluster that asks for no token.
        wait_s: Wait so many seconds for a cluster that grows to start a node that a trial fits.
        export: Export the best to this folder at the end.

    Raises:
        InputError: Where the command exits with 2.
        RuntimeError: If every trial failed, or the first ones alike, whose traceback is then shown,
            or not every trial has ended; ``load_results`` has what was run.
        KeyboardInterrupt: If it was interrupted; ``neurosweep resume`` goes on.
    """
    from lightning_modules.errors import InputError
    from search import commands

    if group_duplicates and allow_leakage:
        raise InputError("group_duplicates and allow_leakage exclude each other: give one of them")
    given = [weights] if isinstance(weights, str | Path) else weights
    options = argparse.Namespace(
        sweep=Path(sweep),
        data=None if data is None else str(data),
        weights=None if given is None else [str(spec) for spec in given],
        name=name,
        storage=None if storage is None else str(storage),
        skip_bad_images=skip_bad_images,
        group_duplicates=group_duplicates,
        allow_leakage=allow_leakage,
        budget=budget,
        address=address,
        insecure=insecure,
        wait_s=wait_s,
        export=None if export is None else Path(export),
        json=False,
    )
    record, code = commands.start_sweep(options, dict(set or {}))
    trials = record.trials()
    if code and any(trial.state != "failed" for trial in trials):
        raise RuntimeError(
            f"not every trial has ended; go on with: neurosweep resume {record.sweep.reference}"
        )
    if code:
        reasons = sorted({trial.reason for trial in trials})
        raise RuntimeError(f"every trial of {record.sweep.name} failed: {'; '.join(reasons)}")
    return Results(record)


def load_results(name: str | Path, *, storage: str | Path = "sweeps") -> "Results":
    """Return the results of a sweep, also while it runs.

    Args:
        name: The sweep's name, or its folder or address.
        storage: The folder that sweeps are in, or its address in an object storage.

    Raises:
        InputError: If there is no such sweep; the ones there are named.
    """
    from search.results import open_sweep
    from search.study.record import Record

    return Results(Record.open(open_sweep(str(name), storage)))


class Results:
    """What a sweep has found, as it was when it was loaded.

    Attributes:
        sweep: Its settings.
        trials: Best first; failed and unmeasured ones last.
        confirmation: What ``confirm`` found; none if it has not been run.
    """

    def __init__(self, record: "Record") -> None:
        from search.results import rank

        self.sweep: Sweep = record.sweep
        self.trials: list[Trial] = rank(record.trials(), record.sweep)
        self.confirmation: dict[str, Any] | None = record.facts.get("confirmation")
        self._record = record

    @functools.cached_property
    def best(self) -> "Trial":
        """The confirmed winner; where nothing was confirmed, the best trial that finished.

        Raises:
            InputError: If none has.
        """
        from search.results import best_trial

        return best_trial(self._record)

    def dataframe(self) -> "pd.DataFrame":
        """Return one row a trial, best first: state, best value and its epoch, params."""
        import pandas as pd

        metric, mode = self.sweep.metric, self.sweep.mode
        rows = []
        for trial in self.trials:
            best = trial.best_epoch(metric, mode)
            rows.append(
                {
                    "trial": trial.number,
                    "state": trial.state,
                    "reason": trial.reason,
                    metric: None if best is None else best.metrics[metric],
                    "best_epoch": None if best is None else best.epoch,
                    "num_epochs": len(trial.epochs),
                    **dataclasses.asdict(trial.params),
                }
            )
        frame = pd.DataFrame(rows).astype(
            {metric: "float64", "best_epoch": "Int64"} if rows else {}
        )
        return frame.set_index("trial") if rows else frame

    def epochs(self) -> "pd.DataFrame":
        """Return one row an epoch, by trial and epoch: every metric, and why the trial ended."""
        import pandas as pd

        rows = [
            {
                "trial": trial.number,
                "epoch": epoch.epoch,
                **epoch.metrics,
                "stopped": epoch.stopped,
                "features": epoch.features,
            }
            for trial in sorted(self.trials, key=lambda trial: trial.number)
            for epoch in trial.epochs
        ]
        frame = pd.DataFrame(rows)
        return frame.set_index(["trial", "epoch"]) if rows else frame

    def __repr__(self) -> str:
        return f"<Results of {self._summary()}>"

    def _repr_html_(self) -> str:
        searched = list(self.sweep.space)
        frame = self.dataframe()
        if frame.empty:
            return f"<p>{html.escape(self._summary())}</p>"
        shown = frame.head(NUM_SHOWN)[
            ["state", self.sweep.metric, "best_epoch", "num_epochs", *searched]
        ]
        table = shown.to_html(float_format=lambda value: f"{value:.4g}", escape=True, border=0)
        more = len(frame) - len(shown)
        rest = f"<p>and {more} more</p>" if more > 0 else ""
        return f"<p>{html.escape(self._summary())}</p>{table}{rest}{self._verdict_html()}"

    def _verdict_html(self) -> str:
        from search.results import verdict

        if self.confirmation is None:
            return ""
        return f"<p>{html.escape(verdict(self.confirmation))}</p>"

    def _summary(self) -> str:
        sweep = self.sweep
        ended = sum(trial.state != "running" for trial in self.trials)
        text = f"{sweep.name}: {ended} of {sweep.search.num_trials} trials ended"
        best = self.trials[0].best_epoch(sweep.metric, sweep.mode) if self.trials else None
        if best is not None and self.trials[0].state != "failed":
            value = best.metrics[sweep.metric]
            text += f", best {sweep.metric} {value:.4f}, trial {self.trials[0].number:05d}"
        return text
