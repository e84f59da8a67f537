"""One trial, inside a warm Ray worker: from params to reported epochs."""

import functools
import importlib.metadata
import logging
import os
import shutil
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities import registry
from ray import tune

from lightning_modules.classifier import ImageClassifier
from lightning_modules.compiled_stages import check_compiler, compiled_pass, num_compiled
from lightning_modules.data.datamodule import (
    PackDataModule,
    balanced_class_weights,
    resident_images,
)
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack, default_cache_dir
from lightning_modules.errors import InputError
from lightning_modules.feature_cache import FeatureCache
from lightning_modules.feature_store import FeatureStore, Moment
from lightning_modules.stages import NUM_STAGES
from lightning_modules.weights import WeightOrigin, num_initial_backbones
from search.data import check_same_data, prepare_data
from search.space import Choice, grid_of
from search.study.sweep_files import StorageError, SweepFiles
from search.sweep import Sweep, TrialParams
from search.tuning.callbacks import Report, ReportEpoch
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.checkpoint_files import folder_of
from search.tuning.event_folder import EventFolder
from search.tuning.patience import patiently
from search.tuning.resources import values_of
from search.tuning.shared_weights import local_weights
from search.tuning.survey import check_joined_node
from search.tuning.trial_board import TrialBoard
from search.tuning.worker import WORKER

# Lightning warns of what is meant here: frozen stages in eval mode, batches without worker
# processes (there is nothing to decode), few batches an epoch.
for message in (
    ".*in eval mode at the start of training.*",
    ".*does not have many workers.*",
    ".*number of training batches.*",
    # Nor does it matter that srun is there, or how Lightning asks torch for a tree's leaves.
    ".*`srun` command is available.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
):
    warnings.filterwarnings("ignore", message=message)
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

# Each Trainer asks all installed packages for callbacks, which takes a quarter of the time until a
# warm worker's first step. They stay what they are while the process lives.
cached_entry_points = functools.cache(importlib.metadata.entry_points)
registry.entry_points = cached_entry_points  # type: ignore[assignment,attr-defined]  # no option


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all trials of one run of a sweep share.

    Attributes:
        sweep: Its settings.
        manifest: The images' labels and splits.
        pack: The images; decoded again if a node does not have them.
        weights: Each backbone's initial weights, as a file that every node can read, or fetch.
        precisions: What each backbone is trained in, as Lightning names it.
        gpu_share: Of a GPU, that a trial is given; 0 if none, where one may be visible.
        started: When the run began.
        source_digest: Of the code that every node of a cluster must have; none on one machine.
    """

    sweep: Sweep
    manifest: Manifest
    pack: Pack
    weights: dict[str, WeightOrigin]
    precisions: dict[str, str]
    gpu_share: float
    started: Moment
    source_digest: str | None

    @property
    def on_gpu(self) -> bool:
        """Whether trials train on GPUs."""
        return self.gpu_share > 0


def train_trial(config: dict[str, Any], *, run: Run) -> None:
    """Train one trial and report each epoch to Ray Tune, which may end it there.

    Args:
        config: What ``StudySearcher.suggest`` returned.
        run: What all trials share.
    """
    if not run.on_gpu:
        # The optimizer looks for GPUs at every step, which takes longer than a step of a head.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    here = patiently(
        lambda: _joined(run), (StorageError,), tell=logging.getLogger(__name__).warning
    )
    leak = WORKER.leak_before_trial(cache_sizes())
    board = TrialBoard(
        events=EventFolder(run.sweep.files, f"tensorboard/{config['name']}"),
        name=config["name"],
        params=config["params"],
        classes=run.manifest.classes,
        metric=run.sweep.metric,
        may_end_at=run.sweep.rung_epochs,
        resume=config["resume"],
    )
    has_failed = False
    try:
        fit_trial(
            config,
            here,
            files=run.sweep.files,
            report=tune.report,
            callbacks=[board],
            leak=leak,
        )
    except Exception:
        has_failed = True
        raise
    finally:
        # Lightning tears nothing down after an exception, and a stopped trial ends by one.
        board.close(has_failed=has_failed)


def fit_trial(
    config: dict[str, Any],
    run: Run,
    *,
    files: SweepFiles,
    report: Report,
    callbacks: Sequence[pl.Callback] = (),
    leak: str = "",
) -> None:
    """Train one trial in this process.

    Args:
        config: What ``StudySearcher.suggest`` returned.
        run: What all trials share; images and weights are here.
        files: Checkpoints go there; the sweep's, but for a trial that is only replayed.
        report: Takes each epoch, and may end the training by not returning.
        callbacks: Come before the report.
        leak: What earlier trials have left behind in this process.
    """
    sweep, resume = run.sweep, config["resume"]
    params = TrialParams(**config["params"])
    precision: Any = run.precisions[params.backbone]
    module = build_module(
        params,
        sweep=sweep,
        manifest=run.manifest,
        weights=run.weights,
        seed=config["seed"],
        view_seed=config["view_seed"],
    )
    if sweep.training.compile:
        check_compiler()
        module.pass_trained = compiled_pass(default_cache_dir())
    data = PackDataModule(
        run.manifest,
        run.pack,
        batch_size=params.batch_size,
        seed=config["seed"],
        balanced_sampling=sweep.data.class_balance == "balanced_sampling",
        source_weights=sweep.data.source_weights,
        gpu_share=run.gpu_share,
    )
    cache = feature_cache_of(run, module, data)
    data.features_of = cache.features
    checkpoint_io = AtomicCheckpointIO(files)
    report_epoch = ReportEpoch(
        trial_folder=folder_of(config["number"]),
        metric=sweep.metric,
        mode=sweep.mode,
        attempt=config["attempt"],
        resume=resume,
        checkpoint_io=checkpoint_io,
        cache=cache,
        leak=leak,
        report=report,
    )
    trainer = pl.Trainer(
        accelerator="gpu" if run.on_gpu else "cpu",
        devices=1,
        max_epochs=sweep.training.max_epochs,
        precision=precision,
        callbacks=[*callbacks, report_epoch],  # the report comes last: it may not return
        # Not Slurm's or another: a trial is one process, wherever it was launched.
        plugins=[LightningEnvironment(), checkpoint_io],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start_from = None if resume is None else resume["last"]["path"]
    trainer.fit(module, datamodule=data, ckpt_path=start_from)


def cache_sizes() -> tuple[int, ...]:
    """Return how many entries each cache of this process has."""
    return num_initial_backbones(), resident_images.cache_info().currsize, num_compiled()


def _joined(run: Run) -> Run:
    """Return what a trial needs on this node, which may have joined since all were asked."""
    if run.source_digest is not None:
        check_joined_node(run.sweep.location, run.source_digest)
    return on_this_node(run)


def on_this_node(run: Run) -> Run:
    """Fetch the weights and decode the images if this node does not have them."""
    run = replace(
        run, weights={name: local_weights(origin) for name, origin in run.weights.items()}
    )
    if run.pack.path.is_file():
        return run
    facts = {"manifest_digest": run.manifest.digest, "pack_digest": run.pack.digest}
    manifest, pack = prepare_data(run.sweep)
    check_same_data(facts, manifest, pack)
    return replace(run, manifest=manifest, pack=pack)


def are_views_shared(sweep: Sweep) -> bool:
    """Tell whether trials see the same views: not if each draws a strength of its own."""
    strength = sweep.space.get("augmentation_strength")
    return strength is None or isinstance(strength, Choice) or sweep.search.sampler == "grid"


@functools.cache
def feature_store(limit_gib: float | None, *, since: Moment) -> FeatureStore | None:
    """Return the node's store of features; none if it is turned off, or has no folder.

    Args:
        limit_gib: Its size; half of the memory, or of the disk's free space if that is less, where
            none is given: files that do not stay in memory are read from the disk every epoch.
        since: When the run began.
    """
    try:
        folder = default_cache_dir() / "features"
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        free_bytes = shutil.disk_usage(folder.parent).free
    except (InputError, OSError):
        return None
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = min(memory_bytes, free_bytes) / 2 if limit_gib is None else limit_gib * 2**30
    if limit == 0:
        return None
    return FeatureStore(folder, limit_bytes=int(limit), since=since)


def feature_cache_of(run: Run, module: ImageClassifier, data: PackDataModule) -> FeatureCache:
    """Return what gives a trial the features of its frozen stages."""
    backbone, sweep = module.backbone.name, run.sweep
    depths: Collection[Any] = ()
    # A confirmation's views are its own, and no depth is drawn there.
    if module.views.seed == sweep.seed:
        depths = values_of(sweep, "unfreeze_depth")
        if sweep.search.sampler == "grid" and "unfreeze_depth" in sweep.space:
            depths = grid_of(sweep.space)["unfreeze_depth"]
    return FeatureCache(
        module,
        data,
        store=feature_store(sweep.resources.feature_cache_gib, since=run.started),
        weights_digest=run.weights[backbone].digest,
        precision=run.precisions[backbone],
        views_are_shared=are_views_shared(sweep),
        cuts={NUM_STAGES - depth for depth in depths},
    )


def build_module(
    params: TrialParams,
    *,
    sweep: Sweep,
    manifest: Manifest,
    weights: dict[str, WeightOrigin],
    seed: int,
    view_seed: int,
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
        view_seed=view_seed,
        augmentation={
            name: getattr(sweep.augmentation, name)
            for name in sweep.augmentation.__dataclass_fields__
        },
        augmentation_strength=params.augmentation_strength,
    )
