"""What a running sweep says on the terminal: a line an event, and a line of where it stands."""

import time
from typing import Any

from ray.tune.progress_reporter import TrialProgressCallback
from rich.console import Console
from rich.live import Live
from rich.text import Text

from search.study.record import Record
from search.tuning.scheduler import ResumableASHA


class Progress(TrialProgressCallback):
    """Prints a line an epoch and an ending, above a line that is kept up to date.

    In the place of Ray's own, which Ray 2.60 adds where there is none of its kind, and which keeps
    every trial that ended, 60 KiB each, to print nothing.

    Args:
        record: Read for what is known so far.
        scheduler: Asked for cut-offs.
    """

    def __init__(self, record: Record, scheduler: ResumableASHA) -> None:
        super().__init__()
        self._record = record
        self._scheduler = scheduler
        console = Console(highlight=False, soft_wrap=True)
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._start_s = time.monotonic()
        self._counts = {"complete": 0, "pruned": 0, "failed": 0}
        for number in range(record.num_trials):
            self._count(number)
        self._running: set[int] = set()
        self._best: tuple[float, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the terminal out of Ray's snapshot, which is never read back."""
        return {}

    def setup(self, *arguments: Any, **info: Any) -> None:
        """Start the live line."""
        self._live.start()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count a trial as running."""
        self._running.add(trial.config["number"])
        self._update()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print an epoch."""
        sweep = self._record.sweep
        value = result["metrics"][sweep.metric]
        name = trial.config["name"]
        sign = 1 if sweep.mode == "max" else -1
        if value == value and (self._best is None or sign * value > sign * self._best[0]):
            self._best = (value, name)
        line = Text(f"{name:<28} epoch {result['epoch']:>3}/{sweep.training.max_epochs}  ")
        line.append(f"{sweep.metric} {value:.4f}  train_loss {result['metrics']['train_loss']:.4f}")
        reason = self._scheduler.reasons.get(trial.trial_id) if result.get("done") else None
        if reason == "asha":
            cutoff = self._scheduler.cutoffs[trial.trial_id]
            line.append(f"  stopped by ASHA, cut-off {cutoff:.4f}", style="yellow")
        elif reason == "diverged":
            line.append("  diverged: loss or metric is not finite", style="red")
        elif reason == "max_epochs":
            line.append("  complete", style="green")
        self._live.console.print(line, soft_wrap=True)
        self._update()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count an ending."""
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print why a trial failed, or was lost; nothing of one that ended with the sweep."""
        recorded = self._record.trial(trial.config["number"])
        said = f"failed: {recorded.reason}" if recorded.reason else "; ".join(recorded.faults[-1:])
        if said:
            self._live.console.print(Text(f"{trial.config['name']:<28} {said}", style="red"))
        self._end(trial)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Take the live line away."""
        self.stop()

    def stop(self) -> None:
        """Take the live line away, however the sweep ended."""
        self._live.stop()

    def _end(self, trial: Any) -> None:
        number = trial.config["number"]
        self._running.discard(number)
        self._count(number)
        self._update()

    def _count(self, number: int) -> None:
        state = self._record.state(number)
        if state != "running":
            self._counts[state] += 1

    def _update(self) -> None:
        done = sum(self._counts.values())
        elapsed_s = time.monotonic() - self._start_s
        parts = [
            f"{done}/{self._record.sweep.search.num_trials} trials done",
            f"{len(self._running)} running",
            f"{self._counts['pruned']} stopped early",
            f"{self._counts['failed']} failed",
            f"{elapsed_s:.0f} s",
        ]
        if self._best is not None:
            parts.append(f"best {self._best[0]:.4f} ({self._best[1]})")
        self._live.update(Text(" · ".join(parts), style="bold"))
