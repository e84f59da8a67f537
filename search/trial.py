"""One trial, inside a warm Ray worker: from params to reported epochs."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import PackDataModule, balanced_class_weights
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.weights import WeightOrigin
from search.callbacks import ReportEpoch, TensorBoardCurves
from search.checkpoint import AtomicCheckpointIO
from search.data import check_same_data, prepare_data
from search.sweep import Sweep, TrialParams

# Lightning warns of what is meant here: frozen stages in eval mode, batches without worker
# processes (there is nothing to decode), few batches an epoch.
for message in (
    ".*in eval mode at the start of training.*",
    ".*does not have many workers.*",
    ".*number of training batches.*",
):
    warnings.filterwarnings("ignore", message=message)
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)


def train_trial(
    config: dict[str, Any],
    *,
    sweep: Sweep,
    manifest: Manifest,
    pack: Pack,
    weights: dict[str, WeightOrigin],
    on_gpu: bool,
) -> None:
    """Train one trial and report each epoch to Ray Tune, which may end it there.

    Args:
        config: What ``StudySearcher.suggest`` returned.
        sweep: What all trials share.
        manifest: The images' labels and splits.
        pack: The images; decoded again if this node does not have them.
        weights: Each backbone's initial weights, as a file that every node can read.
        on_gpu: Whether the trial was given a GPU; one may be visible without.
    """
    params = TrialParams(**config["params"])
    curves = TensorBoardCurves(
        log_dir=sweep.folder / "tensorboard" / config["name"],
        params=config["params"],
        classes=manifest.classes,
        metric=sweep.metric,
        resume=config["resume"],
    )
    try:
        _fit(
            config, params, curves, sweep=sweep, manifest=manifest, pack=pack, weights=weights,
            on_gpu=on_gpu,
        )  # fmt: skip
    finally:
        # Lightning tears nothing down after an exception, and a stopped trial ends by one.
        curves.close()


def _fit(
    config: dict[str, Any],
    params: TrialParams,
    curves: TensorBoardCurves,
    *,
    sweep: Sweep,
    manifest: Manifest,
    pack: Pack,
    weights: dict[str, WeightOrigin],
    on_gpu: bool,
) -> None:
    resume = config["resume"]
    if not pack.path.is_file():
        facts = {"manifest_digest": manifest.digest, "pack_digest": pack.digest}
        manifest, pack = prepare_data(sweep)
        check_same_data(facts, manifest, pack)
    module = build_module(
        params, sweep=sweep, manifest=manifest, weights=weights, seed=config["seed"]
    )
    data = PackDataModule(
        manifest,
        pack,
        batch_size=params.batch_size,
        seed=config["seed"],
        balanced_sampling=sweep.data.class_balance == "balanced_sampling",
    )
    checkpoint_io = AtomicCheckpointIO()
    report = ReportEpoch(
        folder=sweep.folder,
        trial_folder=sweep.folder / "trials" / f"{config['number']:05d}",
        metric=sweep.metric,
        mode=sweep.mode,
        attempt=config["attempt"],
        resume=resume,
        checkpoint_io=checkpoint_io,
    )
    trainer = pl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=1,
        max_epochs=sweep.training.max_epochs,
        precision=choose_precision(sweep.training.precision, params.backbone, on_gpu=on_gpu),
        callbacks=[curves, report],  # the report comes last: it may not return
        # Not Slurm's or another: a trial is one process, wherever it was launched.
        plugins=[LightningEnvironment(), checkpoint_io],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start_from = None if resume is None else str(sweep.folder / resume["last"]["path"])
    trainer.fit(module, datamodule=data, ckpt_path=start_from)


def build_module(
    params: TrialParams,
    *,
    sweep: Sweep,
    manifest: Manifest,
    weights: dict[str, WeightOrigin],
    seed: int,
) -> ImageClassifier:
    """Build the module that a trial trains, at its initial weights."""
    origin = weights[params.backbone]
    weighted = sweep.data.class_balance == "weighted_loss"
    return ImageClassifier(
        backbone=params.backbone,
        num_classes=len(manifest.classes),
        image_size_px=sweep.data.image_size_px,
        unfreeze_depth=params.unfreeze_depth,
        dropout=params.dropout,
        lr=params.lr,
        backbone_lr_factor=params.backbone_lr_factor,
        weight_decay=params.weight_decay,
        label_smoothing=params.label_smoothing,
        max_epochs=sweep.training.max_epochs,
        warmup_epochs=sweep.training.warmup_epochs,
        class_weights=balanced_class_weights(manifest) if weighted else None,
        weights_path=origin.path,
        weights_seed=origin.seed,
        seed=seed,
        view_seed=sweep.seed,
        augmentation={
            name: getattr(sweep.augmentation, name)
            for name in sweep.augmentation.__dataclass_fields__
        },
        augmentation_strength=params.augmentation_strength,
    )


def choose_precision(setting: str, backbone: str, *, on_gpu: bool) -> Any:
    """Return the precision to train in: bf16-mixed where it is computed in hardware and pays.

    On CPUs with AMX, ResNet-50 trained about twice as fast in bf16 and MobileNetV2, whose
    depthwise convolutions are bound by memory, no faster.
    """
    if setting != "auto":
        return setting
    if on_gpu:
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    has_amx = torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if has_amx and backbone == "resnet50" else "32-true"
