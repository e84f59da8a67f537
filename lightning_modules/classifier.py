"""The one LightningModule: a backbone frozen below a depth, dropout, and a linear head."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from lightning_modules.augmentation import Views
from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.backbones import pool, run_stages
from lightning_modules.compiled_stages import Pass
from lightning_modules.data.datamodule import Batch, Steps
from lightning_modules.dropout import dropout_factors
from lightning_modules.errors import InputError
from lightning_modules.micro_batches import MicroBatches
from lightning_modules.seeds import derive_seed
from lightning_modules.stages import NUM_STAGES
from lightning_modules.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    initial_backbone,
    initial_digest,
)

# Images that frozen stages are given at once on a CPU.
FROZEN_BLOCK = 16

# What a vision transformer learns beside weights and biases; as there, they are not decayed.
EMBEDDINGS = ("class_token", "pos_embedding")


class ImageClassifier(pl.LightningModule):
    """Fine-tunes a backbone above a cut, on augmented views of grey images.

    Logged each epoch: ``train_loss``, ``train_macro_f1``, ``train_accuracy`` (over augmented
    batches, while the weights move), ``val_loss`` (cross-entropy, without class weights or
    smoothing, so that trials compare), ``val_macro_f1``, ``val_accuracy``.

    Two seeds govern it: ``view_seed``, shared by a sweep's trials, fixes the augmented images;
    ``seed``, the trial's own, fixes the head's initial values and dropout. The global generator is
    set from ``seed`` at every step, so that an epoch can be replayed without the ones before it.

    Where a step runs out of memory, its batch is passed in parts, halved until they fit, whose
    gradients add up to the batch's. Loss, learning rate, and the head's dropout stay the batch's;
    BatchNorm of unfrozen stages sees the parts, and stochastic depth is drawn for each anew.

    Its checkpoints hold what is trained and the digest of what is frozen; loading one builds the
    frozen part from ``weights_path`` again and compares.

    Args:
        backbone: One of ``BACKBONES``.
        num_classes: At least 2.
        unfreeze_depth: Stages trained, counted from the head, in [0, 5].
        dropout: Probability, before the linear layer.
        lr: AdamW's learning rate for the head, after warm-up.
        backbone_lr_factor: The unfrozen stages' learning rate, as a share of ``lr``.
        weight_decay: AdamW's, on weights; biases, norms, and embeddings are left out.
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

    Attributes:
        micro_batches: How many images are passed at once.
        pass_trained: Passes activations through the stages that are trained; may be compiled.

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
        # What Lightning takes for a batch is an epoch of steps, see ``Steps``.
        self.automatic_optimization = False
        # Plain values only: what Lightning stores must load with weights_only=True.
        self.save_hyperparameters(logger=False)
        self.lr = lr
        self.backbone_lr_factor = backbone_lr_factor
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.max_epochs = max_epochs
        self.warmup_epochs = warmup_epochs
        self.seed = seed
        self.micro_batches = MicroBatches()
        self.pass_trained: Pass = run_stages

        path = None if weights_path is None else Path(weights_path)
        self.backbone = initial_backbone(
            backbone,
            path,
            seed=weights_seed,
            unfreeze_depth=unfreeze_depth,
            image_size_px=image_size_px,
        )
        self.frozen_stages = NUM_STAGES - unfreeze_depth
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

        self.register_buffer("mean", _channels(IMAGENET_MEAN), persistent=False)
        self.register_buffer("std", _channels(IMAGENET_STD), persistent=False)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        scores = MetricCollection(
            {
                "macro_f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
                "accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            }
        )
        self.train_scores = scores.clone(prefix="train_")
        self.val_scores = scores.clone(prefix="val_")
        self.val_confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)

    def forward(self, intensities: Tensor) -> Tensor:
        """Return class logits.

        Args:
            intensities: Shape ``(B, 1, H, W)``, float grey in [0, 1].

        Returns:
            Shape ``(B, num_classes)``.
        """
        return self.logits(self.pass_frozen(self.normalise(intensities)))

    def normalise(self, intensities: Tensor) -> Tensor:
        """Return three channels ``(B, 3, H, W)``, channels last, as the initial weights expect."""
        images = (intensities - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def frozen_features(
        self, images: Tensor, rows: Tensor, *, epoch: int | None, cut: int | None = None
    ) -> Tensor:
        """Return what the frozen stages make of images; the normalised images if none is frozen.

        Args:
            images: Shape ``(B, 1, H, W)``, uint8 grey.
            rows: Shape ``(B,)``, int64: the images' row numbers.
            epoch: Whose views to take; none for the images as they are.
            cut: How many of the frozen stages; all if none is given.

        Returns:
            What ``logits`` takes, of all frozen stages. It has no gradient.
        """
        with torch.no_grad():
            if epoch is None:
                intensities = images.to(torch.float32) / 255
            else:
                intensities = self.views(images, epoch=epoch, samples=rows)
            return self.pass_frozen(self.normalise(intensities), cut=cut)

    def pass_frozen(
        self, activations: Tensor, first_stage: int = 0, cut: int | None = None
    ) -> Tensor:
        """Pass activations through the frozen stages, from one of them on.

        On a CPU the stages are always given the same number of images. Which kernel is chosen, and
        in which order it adds up, depends on that number: so an image's features are the same to
        the last bit whatever batch it comes in, and can be stored.

        Args:
            activations: What the stage before ``first_stage`` returns; normalised images for 0.
            first_stage: The stage to start from.
            cut: The stage to end before; the first that is trained if none is given.

        Returns:
            Shape ``(B, C, h, w)``, or tokens ``(B, T, C)``; ``(B, num_features)``, pooled, after
            the last of all stages.
        """
        cut = self.frozen_stages if cut is None else cut
        stages = self.backbone.stages[first_stage:cut]
        if not len(stages):
            return activations
        is_pooled = cut == len(self.backbone.stages)
        blocks = [activations]
        if activations.device.type == "cpu":
            padding = activations[:1].expand(
                -len(activations) % FROZEN_BLOCK, *activations.shape[1:]
            )
            padded = torch.cat([activations, padding]) if len(padding) else activations
            blocks = list(padded.split(FROZEN_BLOCK))
        outputs = []
        for block in blocks:
            block = run_stages(stages, block)
            outputs.append(pool(block) if is_pooled else block)
        return torch.cat(outputs)[: len(activations)]

    def logits(self, features: Tensor, *, kept: Tensor | None = None) -> Tensor:
        """Return class logits ``(B, num_classes)`` of what the frozen stages return.

        Args:
            features: What ``frozen_features`` returns.
            kept: Shape ``(B, num_features)``: what dropout multiplies by; if it is not given,
                torch's dropout draws it in training mode.
        """
        if self.frozen_stages < len(self.backbone.stages):
            trained = list(self.backbone.stages[self.frozen_stages :])
            features = pool(self.pass_trained(trained, features))
        dropped = self.dropout(features) if kept is None else features * kept
        return self.head(dropped)  # type: ignore[no-any-return]  # nn.Module: Any

    def loss_of(
        self, batch: Batch, *, whole: Batch | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits of a training step, on views of the current epoch.

        With image weights r the loss is the sum of r times each image's loss, over the sum of the
        images' class weights: an image of weight 2 pulls like two of weight 1.

        Args:
            batch: What is passed.
            whole: The batch that it is a part of, if it is: losses of parts add up to its loss.
            kept: What dropout multiplies by, see ``logits``.
        """
        logits = self.logits(self._features(batch, epoch=self.current_epoch), kept=kept)
        loss_of = functools.partial(
            F.cross_entropy,
            logits,
            batch.labels,
            weight=self.class_weights,
            label_smoothing=self.label_smoothing,
        )
        if batch.weights is None and whole is None:
            return loss_of(), logits
        losses = loss_of(reduction="none")
        total = (losses if batch.weights is None else batch.weights * losses).sum()
        labels = batch.labels if whole is None else whole.labels
        if self.class_weights is None:
            return total / len(labels), logits
        return total / self.class_weights[labels].sum(), logits

    def training_step(self, steps: Steps, batch_index: int) -> None:
        """Train on the views of one epoch, step by step."""
        optimizer: Any = self.optimizers()
        self.views.num_samples = len(steps.data.labels)
        logits, labels, losses = [], [], []
        for index, batch in enumerate(steps):
            self._set_lr(optimizer, self.current_epoch * len(steps) + index, len(steps))
            seed = derive_seed("step", self.seed, self.current_epoch, index)
            backward = functools.partial(self._backward, batch, seed, optimizer)
            loss, step_logits = self.micro_batches.shrink_to_fit(backward, len(batch.labels))
            # Lightning's autocast spans the whole epoch; it is meant for the way forward.
            with torch.autocast(self.device.type, enabled=False):
                optimizer.step()
            logits.append(step_logits)
            labels.append(batch.labels)
            losses.append(loss)
        self.train_scores.update(torch.cat(logits), torch.cat(labels))
        self.log_dict(self.train_scores, on_step=False, on_epoch=True, batch_size=1)
        self.log(
            "train_loss", torch.stack(losses).mean(), on_step=False, on_epoch=True, batch_size=1
        )

    def validation_step(self, steps: Steps, batch_index: int) -> None:
        """Score the validation images as they are."""
        parts, targets = [], []
        for batch in steps:
            score = functools.partial(self.score, batch)
            parts.append(self.micro_batches.shrink_to_fit(score, len(batch.labels)))
            targets.append(batch.labels)
        logits, labels = torch.cat(parts), torch.cat(targets)
        self.val_scores.update(logits, labels)
        self.val_confusion.update(logits, labels)
        self.log_dict(self.val_scores, batch_size=1)
        self.log("val_loss", F.cross_entropy(logits, labels), batch_size=1)

    def _backward(self, batch: Batch, seed: int, optimizer: Any) -> tuple[Tensor, Tensor]:
        """Leave a step's gradients on the parameters; return its loss and logits, detached."""
        # All that is drawn is a function of (seed, epoch, step), whatever was drawn before.
        self._seed_generator(seed)
        optimizer.zero_grad()
        parts = self.micro_batches.parts(batch)
        whole = batch if len(parts) > 1 else None
        kept = self.draw_kept(len(batch.labels), seed)
        logits, losses = [], []
        for part, part_kept in zip(parts, kept.tensor_split(len(parts)), strict=True):
            loss, part_logits = self.loss_of(part, whole=whole, kept=part_kept)
            with torch.autocast(self.device.type, enabled=False):
                loss.backward()
            logits.append(part_logits.detach())
            losses.append(loss.detach())
        return torch.stack(losses).sum(), torch.cat(logits)

    def draw_kept(self, num_images: int, seed: int) -> Tensor:
        """Return what the dropout of one step multiplies by, see ``dropout_factors``."""
        return dropout_factors(
            num_images, self.head.in_features, p=self.dropout.p, seed=seed, like=self.head.weight
        )

    def score(self, batch: Batch) -> Tensor:
        """Return the logits ``(B, num_classes)``, float32, of images as they are."""
        parts = self.micro_batches.parts(batch)
        return torch.cat([self.logits(self._features(b, epoch=None)).float() for b in parts])

    def _features(self, batch: Batch, *, epoch: int | None) -> Tensor:
        if batch.features is not None:
            return batch.features
        assert batch.images is not None  # noqa: S101  one of the two is there; narrows the type
        return self.frozen_features(batch.images, batch.rows, epoch=epoch)

    def _seed_generator(self, seed: int) -> None:
        """Set the global generator of this device alone.

        Where CUDA is not in use ``torch.manual_seed`` remembers every call, with its traceback, for
        the day that it is.
        """
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _set_lr(self, optimizer: Optimizer, step: int, steps_an_epoch: int) -> None:
        factor = lr_factor(
            step,
            warmup_steps=round(self.warmup_epochs * steps_an_epoch),
            total_steps=self.max_epochs * steps_an_epoch,
        )
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's confusion matrix; it is kept until then for whoever draws it."""
        self.val_confusion.reset()

    def configure_optimizers(self) -> AdamW:
        """Return AdamW over what is trained; its learning rates are set step by step."""
        groups = []
        for module, lr in (
            (self.head, self.lr),
            (self.backbone, self.lr * self.backbone_lr_factor),
        ):
            weights: list[nn.Parameter] = []
            others: list[nn.Parameter] = []
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    is_weight = parameter.ndim > 1 and not name.endswith(EMBEDDINGS)
                    (weights if is_weight else others).append(parameter)
            groups.append({"params": weights, "full_lr": lr, "weight_decay": self.weight_decay})
            groups.append({"params": others, "full_lr": lr, "weight_decay": 0.0})
        return AdamW([group for group in groups if group["params"]], fused=True)

    @functools.cached_property
    def frozen_digest(self) -> str:
        """SHA-256 of the frozen stages, which are what they were initially."""
        given = self.hparams["weights_path"]
        return initial_digest(
            self.backbone.name,
            None if given is None else Path(given),
            seed=self.hparams["weights_seed"],
            num_stages=self.frozen_stages,
            image_size_px=self.backbone.image_size_px,
        )

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
