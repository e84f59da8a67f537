"""What a trial does at the end of each epoch: checkpoints, curves, and one report to Ray Tune."""

import errno
import logging
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
from ray import tune
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import Steps
from lightning_modules.feature_cache import FeatureCache
from search.study.recorded import CheckpointFile
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.figures import draw_confusion, tile
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
BEST_OF = {"val_macro_f1": max, "val_accuracy": max, "val_loss": min}

# Drawing a confusion matrix takes as long as an epoch on cached features.
REDRAW_S = 10.0


class ReportEpoch(pl.Callback):
    """Saves what was trained and reports the epoch, once, when both its losses are known.

    Ray's own callback reports on validation, which Lightning runs inside the training epoch, so
    that its training loss is one epoch old; and it saves the whole model every time.

    Args:
        folder: The sweep's folder.
        trial_folder: The trial's, in it, where checkpoints go.
        metric: What the best epoch is chosen by.
        mode: ``max`` or ``min``.
        attempt: How often the trial was started before; part of the file names, so that a worker
            that outlives its sweep cannot touch the files of the one that took over.
        resume: Where an earlier attempt got to, none if nowhere.
        checkpoint_io: The trainer's.
        cache: Asked what became of the frozen stages' features.
        leak: What earlier trials have left behind in the worker; empty if nothing.
    """

    def __init__(
        self,
        *,
        folder: Path,
        trial_folder: Path,
        metric: str,
        mode: str,
        attempt: int,
        resume: dict[str, Any] | None,
        checkpoint_io: AtomicCheckpointIO,
        cache: FeatureCache,
        leak: str,
    ) -> None:
        self.folder = folder
        self.trial_folder = trial_folder
        self.metric = metric
        self.sign = 1.0 if mode == "max" else -1.0
        self.attempt = attempt
        self.checkpoint_io = checkpoint_io
        self.cache = cache
        self.leak = leak
        self.last: CheckpointFile | None = None
        self.best: CheckpointFile | None = None
        self.best_value = -math.inf
        if resume is not None:
            self.last = CheckpointFile(**resume["last"])
            if resume["best"] is not None:
                self.best = CheckpointFile(**resume["best"])
                self.best_value = self.sign * resume["best_metrics"][metric]
        self.epoch_start_s = 0.0
        self.superfluous: list[CheckpointFile] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the first epoch's clock; Lightning starts no epoch when it goes on from a file."""
        self.epoch_start_s = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the epoch's clock."""
        self.epoch_start_s = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, report, and delete what the report has made superfluous.

        The report returns when the driver has recorded it: only then may older files go. It does
        not return at all, but ends the thread, if the trial is stopped.
        """
        epoch = trainer.current_epoch + 1
        metrics = epoch_metrics(trainer, pl_module)
        metrics["epoch_s"] = time.perf_counter() - self.epoch_start_s
        superseded = [self.last]
        value = self.sign * metrics[self.metric]
        diverged = not all(math.isfinite(metrics[name]) for name in ("train_loss", "val_loss"))
        if value > self.best_value and not diverged:
            superseded.append(self.best)
            self.best = self._save(trainer, f"best-e{epoch:05d}", epoch, weights_only=True)
            self.best_value = value
        self.last = None
        if epoch < (trainer.max_epochs or 0) and not diverged:
            self.last = self._save(trainer, f"last-e{epoch:05d}", epoch, weights_only=False)
        tune.report(
            {
                "epoch": epoch,
                **{name: metrics[name] for name in ("train_loss", *BEST_OF)},
                "metrics": metrics,
                "confusion": _confusion(pl_module).tolist(),
                "last": None if self.last is None else asdict(self.last),
                "best": None if self.best is None else asdict(self.best),
                "features": self.cache.outcome,
                "leak": self.leak,
                "micro_batch_size": _classifier(pl_module).micro_batches.size,
                "ran_on": f"{socket.gethostname()} {pl_module.device} {trainer.precision}",
            }
        )
        # One epoch more is kept: should the newest file turn out torn, there is the one before.
        for file in self.superfluous:
            self.checkpoint_io.remove_checkpoint(self.folder / file.path)
        self.superfluous = [file for file in superseded if file is not None]

    def _save(
        self, trainer: pl.Trainer, stem: str, epoch: int, *, weights_only: bool
    ) -> CheckpointFile:
        path = self.trial_folder / f"{stem}-a{self.attempt}.ckpt"
        # Another trial's epoch tells the user, and so does this one's end.
        patiently(
            lambda: self._write(trainer, path, weights_only=weights_only),
            (OSError,),
            tell=logging.getLogger(__name__).warning,
        )
        return CheckpointFile(
            path=path.relative_to(self.folder).as_posix(),
            digest=self.checkpoint_io.last_digest,
            epoch=epoch,
        )

    def _write(self, trainer: pl.Trainer, path: Path, *, weights_only: bool) -> None:
        path.parent.mkdir(exist_ok=True)
        trainer.save_checkpoint(path, weights_only=weights_only)


class TensorBoardCurves(pl.Callback):
    """Writes a trial's TensorBoard run, epoch by epoch, params first.

    The HParams tab shows a tag's last value, and users want the best: so the best so far is written
    under ``best/`` at every epoch, and the tab is pointed there. It is right at any moment, also
    for a trial that is stopped or fails.

    Args:
        log_dir: The run's folder.
        params: For the HParams tab.
        classes: Names for the confusion matrix.
        metric: What the best epoch is chosen by.
        resume: Where an earlier attempt got to, none if nowhere.
    """

    def __init__(
        self,
        *,
        log_dir: Path,
        params: dict[str, Any],
        classes: tuple[str, ...],
        metric: str,
        resume: dict[str, Any] | None,
    ) -> None:
        self.log_dir = log_dir
        self.classes = classes
        self.metric = metric
        self.best: dict[str, float] = {} if resume is None else dict(resume["best_metrics"])
        # A confusion matrix that is better than the one that was drawn last, and when that was.
        self.undrawn: tuple[npt.NDArray[np.integer], int] | None = None
        self.drawn_s = time.monotonic()
        best_tags = {f"best/{name}": 0.0 for name in BEST_OF}
        self.hparams = hparams(params, best_tags)
        # What an interrupted attempt wrote of the epoch that is repeated is dropped.
        purge_step = None if resume is None else resume["last"]["epoch"] + 1
        self._patiently(lambda: self._open(purge_step))

    def _open(self, purge_step: int | None) -> None:
        if not self.log_dir.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.log_dir))
        self.writer = SummaryWriter(str(self.log_dir), purge_step=purge_step)
        experiment, start, self.end = self.hparams
        self.file = self.writer._get_file_writer()
        self.file.add_summary(experiment)
        self.file.add_summary(start)
        self.writer.flush()

    def _patiently(
        self, write: Callable[[], None], reopen: Callable[[], None] = lambda: None
    ) -> None:
        patiently(write, (OSError,), tell=logging.getLogger(__name__).warning, reopen=reopen)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Steps,
        batch_idx: int,
    ) -> None:
        """Show what the first batch of a trial looked like to the network."""
        if trainer.current_epoch == 0:
            assert isinstance(pl_module, ImageClassifier)  # noqa: S101  narrows the type
            rows = batch.rows[0][:16]
            images = batch.data.images[rows].unsqueeze(1).to(pl_module.device)
            views = pl_module.views(images, epoch=0, samples=rows)
            self.writer.add_image("views/augmented training images", tile(views), 0)
            self.writer.flush()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the curves, the best values so far, and the best epoch's confusion matrix."""
        step = trainer.current_epoch + 1
        # A writer that has failed once fails for ever.
        self._patiently(
            lambda: self._write_epoch(trainer, pl_module, step), reopen=lambda: self._open(step)
        )

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
                    self.undrawn = _confusion(pl_module).numpy(), step
            self.writer.add_scalar(f"best/{name}", self.best[name], step)
        if time.monotonic() - self.drawn_s > REDRAW_S:
            self._draw_confusion()
        self.writer.flush()

    def _draw_confusion(self) -> None:
        if self.undrawn is not None:
            counts, step = self.undrawn
            image = draw_confusion(counts, self.classes)
            self.writer.add_image("val_confusion_matrix/best epoch", image, step)
            self.drawn_s = time.monotonic()
            self.undrawn = None

    def close(self) -> None:
        """Close the run, however the trial ended."""
        self._draw_confusion()
        self.file.add_summary(self.end)
        self.writer.close()


def _confusion(module: pl.LightningModule) -> Tensor:
    counts: Tensor = _classifier(module).val_confusion.compute().cpu()
    return counts


def _classifier(module: pl.LightningModule) -> ImageClassifier:
    assert isinstance(module, ImageClassifier)  # noqa: S101  narrows the type
    return module


def epoch_metrics(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Return the finished epoch's metrics, and the head's learning rate at its end."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    metrics["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
    return metrics
