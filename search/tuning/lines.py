"""A running sweep as lines: for people where there is no terminal, and for programs as JSON."""

import dataclasses
import datetime
import json
import os
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from lightning_modules.errors import printable
from search.tuning.events import EpochDone, Event, TrialEnded
from search.tuning.standing import Standing


class Lines:
    """Prints a line an epoch and an ending.

    Args:
        standing: Which sweep it is of.
    """

    def __init__(self, standing: Standing) -> None:
        self._console = Console(highlight=False, soft_wrap=True, markup=False)
        self._metric = standing.sweep.metric

    def start(self) -> None:
        """Have nothing to prepare."""

    def show(self, event: Event) -> None:
        """Print what is worth a line."""
        match event:
            case EpochDone():
                line = Text(f"{event.name:<28} epoch {event.epoch:>3}/{event.max_epochs}  ")
                line.append(f"{event.metric} {shown(event.value)}")
                line.append(f"  train_loss {shown(event.metrics.get('train_loss'))}")
                self._console.print(line)
            case TrialEnded():
                self._console.print(Text.assemble(f"{event.name:<28} ", ending(event)))

    def refresh(self) -> None:
        """Have nothing that goes out of date."""

    def close(self) -> None:
        """Have nothing to restore."""


class JsonLines:
    """Prints every event as one JSON object a line on standard output.

    A reader that went away does not end the sweep: that is said once, and no more is written.

    Args:
        sweep: Its name.
    """

    def __init__(self, sweep: str) -> None:
        self._sweep = sweep
        self._is_read = True

    def start(self) -> None:
        """Have nothing to prepare."""

    def show(self, event: Event) -> None:
        """Print an event at once, also into a pipe."""
        if not self._is_read:
            return
        fields = dataclasses.asdict(event)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        head: dict[str, Any] = {"event": fields.pop("event"), "time": now, "sweep": self._sweep}
        try:
            print(json.dumps({**head, **fields}, allow_nan=False), flush=True)
        except BrokenPipeError:
            self._is_read = False
            # What is left in the buffer would fail once more when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print("nobody reads the events any more; the sweep goes on", file=sys.stderr)

    def refresh(self) -> None:
        """Have nothing that goes out of date."""

    def close(self) -> None:
        """Have nothing to restore."""


def ending(event: TrialEnded) -> Text:
    """Return how a trial ended, for people."""
    match event.reason:
        case "max_epochs":
            return Text(f"complete, best {shown(event.best)}", style="green")
        case "asha":
            is_low = (event.value or 0.0) < (event.cutoff or 0.0)
            told = f"{shown(event.value)} {'<' if is_low else '>'} {shown(event.cutoff)}"
            return Text(f"stopped by ASHA: {told} at epoch {event.epochs}", style="yellow")
        case "time_budget":
            return Text(f"out of time after epoch {event.epochs}", style="yellow")
        case "worker":
            told = "ended with the sweep" if event.fault is None else printable(event.fault)
            return Text(f"unfinished: {told}", style="yellow")
        case "diverged":
            return Text("failed: diverged, loss or metric is not finite", style="red")
        case reason:
            return Text(f"failed: {printable(reason)}", style="red")


def shown(value: float | None) -> str:
    """Return a metric as it is shown everywhere."""
    return "-" if value is None else f"{value:.4f}"
