"""The TensorBoard run ``sweep``: what its first page shows."""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hp
from torch.utils.tensorboard import SummaryWriter

from search.space import Choice, Domain
from search.sweep import METRIC_MODES, TrialParams
from search.tuning.event_folder import EventFolder
from search.tuning.events import EpochDone, Event, TrialEnded
from search.tuning.standing import Standing

RUN_NAME = "sweep"

# TensorBoard puts groups of tags in the order of their names: this one comes before the trials'.
GROUP = "all trials"

FLUSH_S = 5


class SweepBoard:
    """Writes how the best value has grown, HParams' columns, and the layout of custom scalars.

    The columns are written once for the whole sweep, so that every trial has the same ones. A
    resumed sweep goes on where its run ends.

    Args:
        standing: Read for the best so far.
    """

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._by_trials = f"{GROUP}/1 best so far by trials"
        self._by_seconds = f"{GROUP}/2 best so far by seconds"
        self._own = f"{GROUP}/3 best of each trial"
        self._events = EventFolder(standing.sweep.files, f"tensorboard/{RUN_NAME}")
        self._writer: SummaryWriter | None = None
        self._best: float | None = None
        self._start_s = 0

    def start(self) -> None:
        """Open the run, and write what holds for the whole sweep."""
        folder = self._events.path
        with contextlib.suppress(OSError):
            self._events.fetch()
            self._start_s = _last_step(folder, self._by_seconds)
            self._writer = SummaryWriter(str(folder), flush_secs=FLUSH_S)
            self._writer.add_custom_scalars(self._layout())
            self._writer._get_file_writer().add_summary(self._columns())
            self._writer.flush()

    def show(self, event: Event) -> None:
        """Write a point when the best has grown, and when a trial has ended."""
        best = None if self._standing.best is None else self._standing.best.value
        if self._writer is None or best is None:
            return
        second = self._start_s + round(self._standing.elapsed_s)
        has_ended = isinstance(event, TrialEnded) and event.reason != "worker"
        if has_ended or (isinstance(event, EpochDone) and best != self._best):
            self._writer.add_scalar(self._by_seconds, best, second)
            self._best = best
        if isinstance(event, TrialEnded) and has_ended:
            self._writer.add_scalar(self._by_trials, best, self._standing.num_ended)
            if event.best is not None and event.event != "failed":
                self._writer.add_scalar(self._own, event.best, self._standing.num_ended)

    def refresh(self) -> None:
        """Put what the writer has flushed by itself where others see it."""
        if self._writer is not None:
            self._events.publish()

    def close(self) -> None:
        """Close the run."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._events.close()

    def _layout(self) -> dict[str, dict[str, list[Any]]]:
        metric = self._standing.sweep.metric
        return {
            "the sweep": {
                f"best {metric} so far, by trials ended": ["Multiline", [f"^{self._by_trials}$"]],
                f"best {metric} so far, by seconds": ["Multiline", [f"^{self._by_seconds}$"]],
                f"best {metric} of each trial": ["Multiline", [f"^{self._own}$"]],
            },
            "the trials, by epoch": {
                name: ["Multiline", [f"^{name}$"]]
                for name in dict.fromkeys([metric, "val_loss", "train_loss", "lr"])
            },
        }

    def _columns(self) -> Any:
        """Return the description of all params and metrics that HParams makes its columns of."""
        sweep = self._standing.sweep
        fixed = [name for name in TrialParams.__dataclass_fields__ if name not in sweep.space]
        summary = hp.hparams_config_pb(
            hparams=[
                hp.HParam(name, _domain(sweep.space.get(name), getattr(sweep.params, name)))
                for name in [*sweep.space, *fixed]
            ],
            metrics=[
                hp.Metric(f"best/{name}", display_name=f"best {name}")
                for name in sorted(METRIC_MODES, key=lambda name: name != sweep.metric)
            ],
        )
        # TensorBoard sorts by name, but those that differ come first, and five are shown at first.
        plugin_data = summary.value[0].metadata.plugin_data
        told = plugin_data_pb2.HParamsPluginData.FromString(plugin_data.content)
        for info in told.experiment.hparam_infos:
            info.differs = info.name in sweep.space
        plugin_data.content = told.SerializeToString()
        return summary


def _domain(domain: Domain | None, baseline: Any) -> hp.Domain:
    """Return a param's values as HParams filters by them; the baseline may be one more."""
    if domain is None or isinstance(domain, Choice):
        choices: Iterable[Any] = () if domain is None else domain.choices
        values = {*choices, baseline}
        is_text = isinstance(baseline, str)
        return hp.Discrete([str(value) if is_text else float(value) for value in values])
    return hp.RealInterval(float(min(domain.low, baseline)), float(max(domain.high, baseline)))


def _last_step(folder: Path, tag: str) -> int:
    """Return where an earlier run of the sweep has ended; 0 if there was none."""
    if not folder.is_dir():
        return 0
    events = EventAccumulator(str(folder))
    events.Reload()
    return int(events.Scalars(tag)[-1].step) if tag in events.Tags()["scalars"] else 0
