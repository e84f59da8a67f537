"""The baseline: the same trials as a competent user writes them from the libraries' guides.

    uv run python experiments/benchmarks/plain.py --params params.json --manifest manifest.csv \
        --weights FOLDER --epochs 10 --image-size-px 96 --out result.json

Ray Tune's function trainable with its Lightning callback and ASHA, torchvision's networks, Kornia's
augmentation, and a DataLoader that decodes the images in every epoch. Same images, splits, stages,
optimiser, schedule, loss, batch size, and number of steps as a sweep's. Where its guides leave a
choice, the cheap one was taken: no sanity check, progress bar, logger, or second checkpoint of
Lightning's, no dashboard, two checkpoints a trial.

It needs nothing of this repository. ``params.json`` is a list of ``TrialParams`` as mappings, each
with a ``seed``.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import pandas as pd
import pytorch_lightning as pl
import ray
import torch
import torch.nn.functional as F
from PIL import Image
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback
from ray.tune.schedulers import ASHAScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassF1Score
from torchvision import models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOBILENET_CUTS = ((0, 2), (2, 4), (4, 7), (7, 14), (14, 19))


class Slices(Dataset[tuple[Tensor, int]]):
    """One split of a manifest, decoded on access, as torchvision's ImageFolder does it."""

    def __init__(self, manifest: Path, split: str, image_size_px: int) -> None:
        rows = pd.read_csv(manifest, dtype=str)
        self.names = sorted(rows["label"].unique())
        rows = rows[rows["split"] == split]
        self.paths = [str(manifest.parent / path) for path in rows["path"]]
        self.labels = [self.names.index(label) for label in rows["label"]]
        self.transform = v2.Compose(
            [
                v2.Grayscale(3),
                v2.Resize((image_size_px, image_size_px)),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image), self.labels[index]


def build_network(params: dict[str, Any], num_classes: int, weights: Path | None) -> nn.Module:
    """Build a network with frozen stages in eval mode, and a new head."""
    with torch.random.fork_rng(devices=[]):
        network: Any = getattr(models, params["backbone"])()
    if weights is not None:
        path = next(weights.glob(f"{params['backbone']}*")) if weights.is_dir() else weights
        network.load_state_dict(torch.load(path, weights_only=True))
    if params["backbone"] == "mobilenet_v2":
        stages = [network.features[first:last] for first, last in MOBILENET_CUTS]
        network.classifier = nn.Sequential(
            nn.Dropout(params["dropout"]), nn.Linear(1280, num_classes)
        )
    else:
        stages = [nn.ModuleList([network.conv1, network.bn1])]
        stages += [network.layer1, network.layer2, network.layer3, network.layer4]
        network.fc = nn.Sequential(nn.Dropout(params["dropout"]), nn.Linear(2048, num_classes))
    for stage in stages[: len(stages) - params["unfreeze_depth"]]:
        stage.requires_grad_(False).eval()
    return network  # type: ignore[no-any-return]


def build_augmentation(strength: float) -> nn.Module:
    """Build Kornia's operators, drawn anew for each image."""
    return K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(
            degrees=15.0 * strength,
            translate=(0.06 * strength, 0.06 * strength),
            scale=(1 - 0.12 * strength, 1 + 0.12 * strength),
            shear=6.0 * strength,
            p=1.0,
        ),
        K.ColorJiggle(brightness=0.12 * strength, contrast=0.2 * strength, p=1.0),
        # In half of the images, Kornia's default: a network that is trained on noise alone, and
        # validated without, loses 0.06 of its macro-F1.
        K.RandomGaussianNoise(std=0.03 * strength, p=0.5),
        K.RandomErasing(scale=(0.01, 0.1 * strength), ratio=(0.5, 2.0), p=0.25 * strength),
        data_keys=["input"],
        same_on_batch=False,
    )


class Classifier(pl.LightningModule):
    """Fine-tunes a network on augmented batches."""

    def __init__(
        self, params: dict[str, Any], epochs: int, labels: list[int], classes: int, weights: Any
    ) -> None:
        super().__init__()
        self.params, self.epochs = params, epochs
        self.network: Any = build_network(params, classes, weights)
        self.augmentation = build_augmentation(params["augmentation_strength"])
        self.normalize = K.Normalize(torch.tensor(MEAN), torch.tensor(STD))
        counts = torch.bincount(torch.tensor(labels), minlength=classes)
        self.register_buffer("class_weights", len(labels) / (classes * counts))
        self.val_macro_f1 = MulticlassF1Score(classes, average="macro")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, labels = batch
        if self.trainer.training:
            images = self.augmentation(images)
        return self.normalize(images), labels

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(
            self.network(images),
            labels,
            weight=self.class_weights,  # type: ignore[arg-type]
            label_smoothing=self.params["label_smoothing"],
        )
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        images, labels = batch
        logits = self.network(images)
        self.val_macro_f1.update(logits.float(), labels)
        self.log("val_macro_f1", self.val_macro_f1)
        self.log("val_loss", F.cross_entropy(logits, labels))
        self.log("optimizer_steps", float(self.trainer.global_step))

    def configure_optimizers(self) -> Any:
        is_resnet = self.params["backbone"] == "resnet50"
        head = self.network.fc if is_resnet else self.network.classifier
        heads = {id(parameter) for parameter in head.parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.network.parameters():
            if parameter.requires_grad:
                factor = 1.0 if id(parameter) in heads else self.params["backbone_lr_factor"]
                decay = self.params["weight_decay"] if parameter.ndim > 1 else 0.0
                groups.setdefault((self.params["lr"] * factor, decay), []).append(parameter)
        optimizer = torch.optim.AdamW(
            [{"params": ps, "lr": lr, "weight_decay": decay} for (lr, decay), ps in groups.items()]
        )
        total_steps = int(self.trainer.estimated_stepping_batches)
        warmup_steps = round(0.5 * total_steps / self.epochs)

        def factor_at(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(config: dict[str, Any], options: argparse.Namespace) -> None:
    """Train one trial."""
    params = config["params"]
    pl.seed_everything(params["seed"])
    train_set = Slices(options.manifest, "train", options.image_size_px)
    val_set = Slices(options.manifest, "val", options.image_size_px)
    loading = {
        "num_workers": options.num_workers,
        "persistent_workers": options.num_workers > 0,
        "pin_memory": options.gpus_per_trial > 0,
    }
    trainer = pl.Trainer(
        max_epochs=options.epochs,
        accelerator="gpu" if options.gpus_per_trial else "cpu",
        devices=1,
        precision=options.precision,
        callbacks=[TuneReportCheckpointCallback(on="validation_end")],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(
        params, options.epochs, train_set.labels, len(train_set.names), options.weights
    )
    trainer.fit(
        module,
        DataLoader(
            train_set, batch_size=params["batch_size"], shuffle=True, drop_last=True, **loading
        ),
        DataLoader(val_set, batch_size=64, **loading),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=Path, required=True)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--weights", type=lambda text: Path(text).resolve())
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--image-size-px", type=int, required=True)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--gpus-per-trial", type=float, default=0.0)
    parser.add_argument("--num-workers", type=int, default=0, help="processes of each DataLoader")
    parser.add_argument("--asha", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.manifest = options.manifest.resolve()

    ray.init(include_dashboard=False)
    with tempfile.TemporaryDirectory() as storage:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(train, options=options),
                {"cpu": 1, "gpu": options.gpus_per_trial},
            ),
            param_space={"params": tune.grid_search(json.loads(options.params.read_text()))},
            tune_config=tune.TuneConfig(
                metric="val_macro_f1",
                mode="max",
                scheduler=ASHAScheduler(
                    max_t=options.epochs,
                    grace_period=min(3, options.epochs),
                    reduction_factor=3,
                )
                if options.asha
                else None,
                max_concurrent_trials=options.concurrent,
                # Params are a mapping: too long for a file name.
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                storage_path=storage,
                checkpoint_config=tune.CheckpointConfig(
                    num_to_keep=2,
                    checkpoint_score_attribute="val_macro_f1",
                    checkpoint_score_order="max",
                ),
                verbose=0,
            ),
        )
        results = tuner.fit()
        trials = []
        for result in (results[index] for index in range(len(results))):
            assert result.metrics is not None
            assert result.config is not None
            epochs = result.metrics_dataframe
            trials.append(
                {
                    "params": result.config["params"],
                    "failed": result.error is not None,
                    "epochs": 0 if epochs is None else len(epochs),
                    "optimizer_steps": 0
                    if epochs is None
                    else int(epochs["optimizer_steps"].iloc[-1]),
                    "best_val_macro_f1": None
                    if epochs is None
                    else float(epochs["val_macro_f1"].max()),
                    "time_total_s": result.metrics.get("time_total_s"),
                    "epoch_s": []
                    if epochs is None
                    else [float(value) for value in epochs["time_this_iter_s"]],
                }
            )
    options.out.write_text(json.dumps({"trials": trials}, indent=1) + "\n")


if __name__ == "__main__":
    main()
