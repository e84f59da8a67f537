"""What each kind of trial, a backbone and a depth, takes on a worker: measured in a few steps."""

import contextlib
import gc
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_modules.classifier import FROZEN_BLOCK, ImageClassifier
from lightning_modules.data.datamodule import VAL_BATCH_SIZE, Batch, PackDataModule, take_rows
from lightning_modules.step_cost import CONTEXT_BYTES
from search.study.sweep_files import SweepFiles
from search.sweep import TrialParams
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.trial import (
    Run,
    are_views_shared,
    build_module,
    feature_cache_of,
    feature_store,
    on_this_node,
)

# Timed after what is not: the first passes choose kernels and allocate.
NUM_TIMED = 3

# A few that together take so long say enough.
ENOUGH_S = 1.0

# Work that takes so long is timed the first time that it is done to all images: memory that is
# taken from the system then, up to a second of it, is a small part.
LONG_S = 6.0
FEW_IMAGES = 4

# A kind of trial: backbone, and unfreeze depth.
Kind = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class KindCost:
    """What trials of one backbone and depth take, alone on their share of a worker.

    Attributes:
        build_s: To build the module.
        compute_s: An image's view, and the frozen stages' features of it.
        feature_bytes: Of an image's features; 0 if none are stored.
        is_shared: Whether features are stored, and read by the trials that come later.
        read_s: To write an image's features and read them back.
        train_s: Of a training step, without the features, an image.
        val_s: Of validation, without the features, an image.
        save_s: To write an epoch's checkpoints.
        best_bytes: A checkpoint that is kept.
        last_bytes: A checkpoint to go on from.
        peak_bytes: Most memory that a block of features, a training step, and validation took: a
            GPU's, the process included; the process's own on a CPU, which gives nothing back; 0 if
            the system does not tell.
    """

    build_s: float
    compute_s: float
    feature_bytes: int
    is_shared: bool
    read_s: float
    train_s: float
    val_s: float
    save_s: float
    best_bytes: int
    last_bytes: int
    peak_bytes: int


def measure_kinds(run: Run, kinds: Sequence[Kind]) -> tuple[float, dict[Kind, KindCost]]:
    """Measure kinds of trials, one after another, in this process.

    Args:
        run: What trials share; checkpoints are timed among its sweep's files.
        kinds: Which ones; the shallow ones first, since a process's memory only grows.

    Returns:
        When this began, on the monotonic clock, and what each kind takes.
    """
    started_s = time.monotonic()
    gc.enable()  # off until all was imported
    if not run.on_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as trials do
    run = on_this_node(run)
    return started_s, {kind: _measure_kind(run, kind) for kind in kinds}


def _measure_kind(run: Run, kind: Kind) -> KindCost:
    sweep = run.sweep
    device = torch.device("cuda" if run.on_gpu else "cpu")
    params = replace(sweep.params, backbone=kind[0], unfreeze_depth=kind[1])
    precision = run.precisions[params.backbone]
    _reset_peak(device)
    start_s = time.perf_counter()
    module = build_module(
        params,
        sweep=sweep,
        manifest=run.manifest,
        weights=run.weights,
        seed=sweep.seed,
        view_seed=sweep.seed,
    ).to(device)
    module.train()
    build_s = time.perf_counter() - start_s
    data = _data(run, params, device)
    module.views.num_samples = len(data.labels)  # as in a trial
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        compute_s, cost = _time_features(run, module, data, params)
        # Of a block of images, again and again: what takes time is their number.
        features = _features(module, data, data.rows["train"][:FROZEN_BLOCK])
        train_s, optimizer = _time_training(module, data, features, params.batch_size)
        val_s = _time_validation(module, features)
    save_s, best_bytes, last_bytes = _time_checkpoints(module, optimizer, sweep.files)
    pays = cost is not None and cost.pays
    return KindCost(
        build_s=build_s,
        compute_s=compute_s,
        feature_bytes=cost.num_bytes if cost is not None and pays else 0,
        is_shared=pays and are_views_shared(sweep),
        read_s=cost.round_trip_s if cost is not None else 0.0,
        train_s=train_s,
        val_s=val_s,
        save_s=save_s,
        best_bytes=best_bytes,
        last_bytes=last_bytes,
        peak_bytes=_peak_bytes(device),
    )


def _data(run: Run, params: TrialParams, device: torch.device) -> PackDataModule:
    data = PackDataModule(
        run.manifest, run.pack, batch_size=params.batch_size, seed=0, gpu_share=run.gpu_share
    )
    # All that the module asks its trainer for is where batches go.
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=device))
    data.trainer = trainer
    return data


def _time_features(
    run: Run, module: ImageClassifier, data: PackDataModule, params: TrialParams
) -> tuple[float, Any]:
    """Return the seconds that an image's features take, and the store's own account of it."""
    store = feature_store(run.sweep.resources.feature_cache_gib, since=run.started)
    if store is not None and module.frozen_stages:
        cost = feature_cache_of(run, module, data).cost("train", 0, module.frozen_stages)
        return cost.compute_s, cost
    rows = data.rows["train"][: params.batch_size]
    seconds = _time(lambda num: _features(module, data, rows[:num]), len(rows), data.device)
    return seconds, None


def _time_training(
    module: ImageClassifier, data: PackDataModule, features: Tensor, batch_size: int
) -> tuple[float, torch.optim.Optimizer]:
    device = features.device
    rows = data.rows["train"][:batch_size]
    features = _repeated(features, len(rows))
    labels, rows = data.labels[rows].to(device), rows.to(device)
    optimizer = module.configure_optimizers()

    def step(num: int) -> None:
        batch = Batch(None, features[:num], labels[:num], rows[:num])
        loss, _ = module.loss_of(batch, kept=module.draw_kept(num, seed=0))
        optimizer.zero_grad()
        with torch.autocast(device.type, enabled=False):
            loss.backward()
            optimizer.step()

    return _time(step, len(rows), device), optimizer


def _time_validation(module: ImageClassifier, features: Tensor) -> float:
    features = _repeated(features, VAL_BATCH_SIZE)
    module.eval()
    with torch.no_grad():
        return _time(lambda num: module.logits(features[:num]), len(features), features.device)


def _repeated(features: Tensor, num: int) -> Tensor:
    places = torch.arange(num, device=features.device) % len(features)
    return take_rows(features, places)


def _time_checkpoints(
    module: ImageClassifier, optimizer: torch.optim.Optimizer, files: SweepFiles
) -> tuple[float, int, int]:
    """Write what an epoch writes that is the best so far."""
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    checkpoint_io = AtomicCheckpointIO(files)
    folder = f".plan-{secrets.token_hex(8)}"
    best, last = f"{folder}/best", f"{folder}/last"
    try:
        start_s = time.perf_counter()
        checkpoint_io.save_checkpoint(checkpoint, best)
        checkpoint_io.save_checkpoint({**checkpoint, "optimizer": optimizer.state_dict()}, last)
        return time.perf_counter() - start_s, _num_bytes(files, best), _num_bytes(files, last)
    finally:
        files.remove([best, last])


def _num_bytes(files: SweepFiles, name: str) -> int:
    with files.open(name) as file:
        return file.seek(0, os.SEEK_END)


def _features(module: ImageClassifier, data: PackDataModule, rows: Tensor) -> Tensor:
    images = data.images
    taken = take_rows(images, rows.to(images.device)).unsqueeze(1).to(data.device)
    return module.frozen_features(taken, rows.to(data.device), epoch=0)


def _time(work: Callable[[int], object], num_images: int, device: torch.device) -> float:
    """Return the seconds an image that work takes, given their number; the mean of a few."""

    def timed(num: int) -> float:
        start_s = time.perf_counter()
        work(num)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start_s

    few = min(FEW_IMAGES, num_images)
    timed(few)
    if timed(few) * num_images / few < LONG_S:
        timed(num_images)
    times_s: list[float] = []
    while len(times_s) < NUM_TIMED and sum(times_s) < ENOUGH_S:
        times_s.append(timed(num_images))
    return sum(times_s) / len(times_s) / num_images


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts from here


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CONTEXT_BYTES
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
