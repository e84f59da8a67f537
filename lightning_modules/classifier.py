"""The one LightningModule: a backbone frozen below a depth, dropout, and a linear head."""

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from lightning_modules.augmentation import Views
from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.backbones import freeze_below
from lightning_modules.data.datamodule import Batch
from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from lightning_modules.weights import IMAGENET_MEAN, IMAGENET_STD, digest_of, load_weights


class ImageClassifier(pl.LightningModule):
    """Fine-tunes a backbone above a cut, on augmented views of grey images.

    Logged each epoch: ``train_loss``, ``train_macro_f1``, ``train_accuracy`` (over augmented
    batches, while the weights move), ``val_loss`` (cross-entropy, without class weights or
    smoothing, so that trials compare), ``val_macro_f1``, ``val_accuracy``.

    Two seeds govern it: ``view_seed``, shared by a sweep's trials, fixes the augmented images;
    ``seed``, the trial's own, fixes the head's initial values and dropout. The global generator is
    set from ``seed`` at every step, so that an epoch can be replayed without the ones before it.

    Its checkpoints hold what is trained and the digest of what is frozen; loading one builds the
    frozen part from ``weights_path`` again and compares.

    Args:
        backbone: ``mobilenet_v2`` or ``resnet50``.
        num_classes: At least 2.
        unfreeze_depth: Stages trained, counted from the head, in [0, 5].
        dropout: Probability, before the linear layer.
        lr: AdamW's learning rate for the head, after warm-up.
        backbone_lr_factor: The unfrozen stages' learning rate, as a share of ``lr``.
        weight_decay: AdamW's, on weights; biases and BatchNorm are left out.
        label_smoothing: In [0, 1).
        max_epochs: Length of the cosine, whether or not training is stopped before.
        warmup_epochs: Linear warm-up, part of ``max_epochs``; a fraction of an epoch is fine.
        class_weights: Loss weight a class; none weighs all alike.
        weights_path: Local state dict of the backbone; none draws random weights.
        weights_seed: What random weights are drawn from; the sweep's, so that trials share them.
        seed: The trial's.
        view_seed: The sweep's.
        augmentation: Fields of ``AugmentationSettings`` that differ from its defaults.
        augmentation_strength: Scales all of them; 0 trains on the images as they are.
        image_size_px: Height and width.

    References:
        Loshchilov and Hutter, AdamW, https://arxiv.org/abs/1711.05101; cosine annealing,
        https://arxiv.org/abs/1608.03983.
    """

    mean: Tensor
    std: Tensor
    class_weights: Tensor | None

    def __init__(
        self,
        *,
        backbone: str,
        num_classes: int,
        image_size_px: int,
        unfreeze_depth: int = 1,
        dropout: float = 0.3,
        lr: float = 1e-3,
        backbone_lr_factor: float = 0.1,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        max_epochs: int = 10,
        warmup_epochs: float = 0.5,
        class_weights: list[float] | None = None,
        weights_path: str | None = None,
        weights_seed: int = 0,
        seed: int = 0,
        view_seed: int = 0,
        augmentation: Mapping[str, float] | None = None,
        augmentation_strength: float = 1.0,
    ) -> None:
        super().__init__()
        # Plain values only: what Lightning stores must load with weights_only=True.
        self.save_hyperparameters(logger=False)
        self.lr = lr
        self.backbone_lr_factor = backbone_lr_factor
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.max_epochs = max_epochs
        self.warmup_epochs = warmup_epochs
        self.seed = seed

        path = None if weights_path is None else Path(weights_path)
        self.backbone = load_weights(backbone, path, seed=weights_seed)
        self.frozen_stages = len(freeze_below(list(self.backbone.stages), unfreeze_depth))
        self.dropout = nn.Dropout(dropout)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("head", seed))
            self.head = nn.Linear(self.backbone.num_features, num_classes)
        self.views = Views(
            AugmentationSettings(**(augmentation or {})),
            strength=augmentation_strength,
            seed=view_seed,
            image_size_px=image_size_px,
        )
        self.to(memory_format=torch.channels_last)

        self.register_buffer("mean", _channels(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", _channels(IMAGENET_STD), persistent=False)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        scores = MetricCollection(
            {
                "macro_f1": MulticlassF1Score(num_classes, average="macro"),
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            }
        )
        self.train_scores = scores.clone(prefix="train_")
        self.val_scores = scores.clone(prefix="val_")
        self.val_confusion = MulticlassConfusionMatrix(num_classes)

    def forward(self, intensities: Tensor) -> Tensor:
        """Return class logits.

        Args:
            intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].

        Returns:
            Shape ``(B, num_classes)``.
        """
        images = (intensities - self.mean) / self.std
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        return self.head(self.dropout(features))  # type: ignore[no-any-return]  # nn.Module: Any

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Return the loss on the batch's views of this epoch."""
        images, labels, rows = batch
        # Dropout as a function of (seed, epoch, batch), whatever drew from the generator before.
        torch.manual_seed(derive_seed("step", self.seed, self.current_epoch, batch_index))
        logits = self(self.views(images, epoch=self.current_epoch, samples=rows))
        loss = F.cross_entropy(
            logits, labels, weight=self.class_weights, label_smoothing=self.label_smoothing
        )
        self.train_scores.update(logits.detach(), labels)
        self.log_dict(self.train_scores, on_step=False, on_epoch=True)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Score the batch's images as they are."""
        images, labels, _ = batch
        logits = self(images.to(torch.float32) / 255).float()
        self.val_scores.update(logits, labels)
        self.val_confusion.update(logits, labels)
        self.log_dict(self.val_scores)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=len(labels))

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's confusion matrix; it is kept until then for whoever draws it."""
        self.val_confusion.reset()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW over what is trained, with warm-up and a cosine, step by step."""
        groups = []
        for module, lr in (
            (self.head, self.lr),
            (self.backbone, self.lr * self.backbone_lr_factor),
        ):
            trained = [p for p in module.parameters() if p.requires_grad]
            weights = [p for p in trained if p.ndim > 1]
            scales = [p for p in trained if p.ndim <= 1]
            groups.append({"params": weights, "lr": lr, "weight_decay": self.weight_decay})
            groups.append({"params": scales, "lr": lr, "weight_decay": 0.0})
        optimizer = AdamW([group for group in groups if group["params"]])
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = round(self.warmup_epochs * total_steps / self.max_epochs)
        schedule = LambdaLR(
            optimizer,
            lambda step: lr_factor(step, warmup_steps=warmup_steps, total_steps=total_steps),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    @cached_property
    def frozen_digest(self) -> str:
        """SHA-256 of the frozen stages; they never change, so it is taken once."""
        return digest_of(self.backbone.stages[: self.frozen_stages])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained, and the digest of the rest."""
        checkpoint["frozen_digest"] = self.frozen_digest
        checkpoint["state_dict"] = {
            name: tensor
            for name, tensor in checkpoint["state_dict"].items()
            if not self._is_frozen(name)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the frozen stages back in, if they are the ones the checkpoint was trained on.

        Raises:
            InputError: If the checkpoint's keys are not this module's, or its frozen stages differ.
        """
        own = self.state_dict()
        given = checkpoint["state_dict"]
        expected = {name for name in own if not self._is_frozen(name)}
        if given.keys() != expected:
            foreign = sorted(given.keys() - expected)
            missing = sorted(expected - given.keys())
            raise InputError(
                f"checkpoint must hold this trial's trained tensors: {len(foreign)} foreign keys "
                f"{foreign[:1]}, {len(missing)} missing {missing[:1]}; use the trial's own file"
            )
        if checkpoint.get("frozen_digest") != self.frozen_digest:
            raise InputError(
                "checkpoint was trained on other initial weights: digest "
                f"{str(checkpoint.get('frozen_digest'))[:12]}, here {self.frozen_digest[:12]}; "
                "give the weights that the sweep started from"
            )
        checkpoint["state_dict"] = own | given

    def _is_frozen(self, name: str) -> bool:
        return any(
            name.startswith(f"backbone.stages.{stage}.") for stage in range(self.frozen_stages)
        )


def lr_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return the share of the full learning rate at a step: linear warm-up, then a half cosine.

    Example:
        >>> [round(lr_factor(s, warmup_steps=2, total_steps=10), 3) for s in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)
