"""What a trial does at the end of each epoch: checkpoints, and one report to Ray Tune."""

import contextlib
import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from lightning_modules.classifier import ImageClassifier
from lightning_modules.feature_cache import FeatureCache
from search.study.recorded import CheckpointFile
from search.study.sweep_files import StorageError
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.patience import patiently

Report = Callable[[dict[str, Any]], object]

BEST_OF = {"val_macro_f1": max, "val_accuracy": max, "val_loss": min}


class ReportEpoch(pl.Callback):
    """Saves what was trained and reports the epoch, once, when both its losses are known.

    Ray's own callback reports on validation, which Lightning runs inside the training epoch, so
    that its training loss is one epoch old; and it saves the whole model every time.

    Args:
        trial_folder: The trial's, among the sweep's files, where checkpoints go.
        metric: What the best epoch is chosen by.
        mode: ``max`` or ``min``.
        attempt: How often the trial was started before; part of the file names, so that a worker
            that outlives its sweep cannot touch the files of the one that took over.
        resume: Where an earlier attempt got to, none if nowhere.
        checkpoint_io: The trainer's.
        cache: Asked what became of the frozen stages' features.
        leak: What earlier trials have left behind in the worker; empty if nothing.
        report: Takes an epoch; in a worker, Ray Tune. It may not return.
    """

    def __init__(
        self,
        *,
        trial_folder: str,
        metric: str,
        mode: str,
        attempt: int,
        resume: dict[str, Any] | None,
        checkpoint_io: AtomicCheckpointIO,
        cache: FeatureCache,
        leak: str,
        report: Report,
    ) -> None:
        self.trial_folder = trial_folder
        self.metric = metric
        self.sign = 1.0 if mode == "max" else -1.0
        self.attempt = attempt
        self.checkpoint_io = checkpoint_io
        self.cache = cache
        self.leak = leak
        self.report = report
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
        self.report(
            {
                "epoch": epoch,
                **{name: metrics[name] for name in ("train_loss", *BEST_OF)},
                "metrics": metrics,
                "confusion": confusion_of(pl_module).tolist(),
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
            # One that will not go is no reason to lose the trial; the next resume tries again.
            with contextlib.suppress(StorageError):
                self.checkpoint_io.remove_checkpoint(file.path)
        self.superfluous = [file for file in superseded if file is not None]

    def _save(
        self, trainer: pl.Trainer, stem: str, epoch: int, *, weights_only: bool
    ) -> CheckpointFile:
        path = f"{self.trial_folder}/{stem}-a{self.attempt}.ckpt"
        # Another trial's epoch tells the user, and so does this one's end.
        patiently(
            lambda: trainer.save_checkpoint(path, weights_only=weights_only),
            (OSError,),
            tell=logging.getLogger(__name__).warning,
        )
        return CheckpointFile(
            path=path,
            digest=self.checkpoint_io.last_digest,
            epoch=epoch,
        )


def confusion_of(module: pl.LightningModule) -> Tensor:
    """Return the finished epoch's confusion matrix of the validation images."""
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
