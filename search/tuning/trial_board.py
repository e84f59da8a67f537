"""A trial's TensorBoard run, as its worker writes it: params and curves."""

import contextlib
import errno
import logging
import math
import os
import time
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hp
from torch.utils.tensorboard import SummaryWriter

from search.tuning.callbacks import BEST_OF, confusion_of, epoch_metrics
from search.tuning.event_folder import EventFolder
from search.tuning.patience import patiently

CURVES = (
    "train_loss",
    "val_loss",
    "train_macro_f1",
    "val_macro_f1",
    "train_accuracy",
    "val_accuracy",
    "lr",
)

# Drawing a confusion matrix takes as long as an epoch on cached features: only trials that take
# minutes draw any, each time after twice as long, for each takes 20 KiB. Those that are kept are
# drawn when the sweep has ended, see ``pictures``.
REDRAW_S = 60.0
CONFUSION_TAG = "pictures/confusion matrix"


class TrialBoard(pl.Callback):
    """Writes a trial's run, epoch by epoch, params first.

    The HParams tab shows a tag's last value, and users want the best: so the best so far is written
    under ``best/`` at every epoch, and the tab is pointed there. It is right at any moment, also
    for a trial that is stopped or fails.

    Args:
        events: The run's folder.
        name: The trial's.
        params: For the HParams tab.
        classes: Names for the confusion matrix.
        metric: What the best epoch is chosen by.
        may_end_at: The epochs after which a healthy trial may be ended. Their curves are waited
            for before they are reported, since nobody may wait for them afterwards. A storage
            that refuses them ends the sweep, as one that refuses a checkpoint does.
        resume: Where an earlier attempt got to, none if nowhere.
    """

    def __init__(
        self,
        *,
        events: EventFolder,
        name: str,
        params: dict[str, Any],
        classes: tuple[str, ...],
        metric: str,
        may_end_at: Collection[int],
        resume: dict[str, Any] | None,
    ) -> None:
        self.events = events
        self.classes = classes
        self.metric = metric
        self.may_end_at = may_end_at
        self.best: dict[str, float] = {} if resume is None else dict(resume["best_metrics"])
        # A confusion matrix that is better than the one that was drawn last, and when that was.
        self.undrawn: tuple[npt.NDArray[np.integer], int] | None = None
        self.drawn_s = time.monotonic()
        self.redraw_s = REDRAW_S
        # By name: two trials of the same params are two.
        self.hparams = hp.hparams_pb(params, trial_id=name)
        # What an interrupted attempt wrote of the epoch that is repeated is dropped.
        purge_step = None if resume is None else resume["last"]["epoch"] + 1
        self._patiently(lambda: self._open(purge_step))
        self.events.publish()

    def _open(self, purge_step: int | None) -> None:
        folder = self.events.path
        if not folder.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        self.writer = SummaryWriter(str(folder), purge_step=purge_step)
        self.file = self.writer._get_file_writer()
        self.file.add_summary(self.hparams)
        self.writer.flush()

    def _patiently(
        self, write: Callable[[], None], reopen: Callable[[], None] = lambda: None
    ) -> None:
        patiently(write, (OSError,), tell=logging.getLogger(__name__).warning, reopen=reopen)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the curves and the best values so far."""
        step = trainer.current_epoch + 1
        # A writer that has failed once fails for ever.
        self._patiently(
            lambda: self._write_epoch(trainer, pl_module, step), reopen=lambda: self._open(step)
        )
        if step in self.may_end_at:
            self._patiently(self.events.upload)
        else:
            self.events.publish()

    def _write_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        metrics = epoch_metrics(trainer, pl_module)
        for name in CURVES:
            self.writer.add_scalar(name, metrics[name], step)
        for name, better in BEST_OF.items():
            value = metrics[name]
            if not math.isfinite(value):
                continue
            improved = better(value, self.best.get(name, value)) == value
            if improved and value != self.best.get(name):
                self.best[name] = value
                if name == self.metric:
                    self.undrawn = confusion_of(pl_module).numpy(), step
            self.writer.add_scalar(f"best/{name}", self.best[name], step)
        if self.undrawn is not None and time.monotonic() - self.drawn_s > self.redraw_s:
            # Most trials draw nothing, and need not import matplotlib.
            from search.tuning.figures import draw_confusion

            counts, best_step = self.undrawn
            image = draw_confusion(counts, self.classes)
            self.writer.add_image(CONFUSION_TAG, image, best_step)
            self.drawn_s = time.monotonic()
            self.redraw_s *= 2
            self.undrawn = None
        self.writer.flush()

    def close(self, *, has_failed: bool) -> None:
        """Close the run, however the trial ended."""
        status = api_pb2.STATUS_FAILURE if has_failed else api_pb2.STATUS_SUCCESS
        self.file.add_summary(_session_end(status))
        self.writer.close()
        # Whole if they can be; a trial that has ended does not fail for them.
        with contextlib.suppress(OSError):
            self._patiently(self.events.upload)
        self.events.close()


def _session_end(status: int) -> summary_pb2.Summary:
    """Return the end of a trial for HParams; TensorBoard's own needs TensorFlow."""
    end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    told = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    summary = summary_pb2.Summary()
    summary.value.add(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(told),
        tensor=metadata.NULL_TENSOR,
    )
    return summary
