"""How much faster is an epoch on cached features, and how much of what is possible is that?

    uv run python experiments/benchmarks/frozen_prefix.py --data MANIFEST.csv --weights FOLDER \
        --image-size-px 96 --out frozen_prefix.json

For each depth one fit through Lightning, whose epochs alternate: on cached features, and without. A
bare loop over the same trained part on features in memory (no Lightning, no cache, no logging)
follows every pair: what it takes is the bound, since the trained part has to be computed anyhow.
"""

import argparse
import copy
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from measurement import SHARED, provenance, ratio_interval, shown
from torch import Tensor

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import VAL_BATCH_SIZE, PackDataModule
from lightning_modules.data.manifest import Manifest, read_manifest
from lightning_modules.data.pack import Pack, build_pack
from lightning_modules.feature_cache import FeatureCache
from lightning_modules.feature_store import FeatureStore, current_moment
from lightning_modules.weights import find_weights

BATCH_SIZE = 32


class Clock(pl.Callback):
    """Times the training and the validation part of every epoch, and then the bare loop.

    Args:
        cache: Its module is what is trained.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.rows: list[dict[str, float]] = []
        self.start_s = 0.0

    def is_cached(self, trainer: pl.Trainer) -> bool:
        return trainer.current_epoch % 2 == 1

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        self.train_s = time.perf_counter() - self.start_s

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        side = "cached" if self.is_cached(trainer) else "uncached"
        if side == "uncached":
            self.rows.append({})
        self.rows[-1][f"{side}_train_s"] = self.train_s
        self.rows[-1][f"{side}_epoch_s"] = time.perf_counter() - self.start_s
        if side == "cached":
            self.rows[-1] |= bare_epoch(self.cache, trainer.current_epoch)


def bare_epoch(cache: FeatureCache, epoch: int) -> dict[str, float]:
    """Train a copy of the trained part for an epoch, on features that lie in memory."""
    data, module = cache.data, copy.deepcopy(cache.module)
    given = {split: cache.features(split, epoch) for split in ("train", "val")}
    train, val = (None if values is None else values.clone() for values in given.values())
    assert train is not None
    assert val is not None
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    places = torch.randperm(len(train)).split(BATCH_SIZE)[: len(train) // BATCH_SIZE]
    labels = data.labels[data.rows["train"]]
    module.train()
    start_s = time.perf_counter()
    for taken in places:
        optimizer.zero_grad()
        F.cross_entropy(module.logits(train[taken]), labels[taken]).backward()
        optimizer.step()
    train_s = time.perf_counter() - start_s
    module.eval()
    with torch.inference_mode():
        torch.cat([module.logits(part) for part in val.split(VAL_BATCH_SIZE)])
    return {"bare_train_s": train_s, "bare_epoch_s": time.perf_counter() - start_s}


def measure_depth(
    manifest: Manifest, pack: Pack, folder: Path, options: argparse.Namespace, depth: int
) -> dict[str, Any]:
    """Time pairs of epochs at one depth."""
    weights = find_weights(str(options.weights), backbone=options.backbone, seed=0)
    module = ImageClassifier(
        backbone=options.backbone,
        num_classes=len(manifest.classes),
        image_size_px=options.image_size_px,
        unfreeze_depth=depth,
        max_epochs=2 * options.pairs,
        weights_path=weights.path,
    )
    data = PackDataModule(manifest, pack, batch_size=BATCH_SIZE, seed=0)
    cache = FeatureCache(
        module,
        data,
        store=FeatureStore(folder, limit_bytes=16 * 2**30, since=current_moment()),
        weights_digest=weights.digest,
        precision="32-true",
        views_are_shared=True,
    )
    # Computed beforehand: the first trial that comes by pays for it, whoever comes later does not.
    start_s = time.perf_counter()
    epochs = range(1, 2 * options.pairs, 2)
    stored: list[Tensor | None] = [cache.features("train", epoch) for epoch in epochs]
    fill_s = (time.perf_counter() - start_s) / len(epochs)
    cache.features("val", 0)
    outcome, first = cache.outcome, stored[0]
    if first is None:
        return {"depth": depth, "outcome": outcome}
    clock = Clock(cache)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2 * options.pairs,
        callbacks=[clock],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data.features_of = lambda split, epoch: (
        cache.features(split, epoch) if clock.is_cached(trainer) else None
    )
    trainer.fit(module, datamodule=data)
    pairs = clock.rows

    def ratios(above: str, below: str) -> dict[str, Any]:
        return ratio_interval([row[above] / row[below] for row in pairs])

    return {
        "depth": depth,
        "outcome": outcome,
        "kib_per_image": first.nbytes / len(first) / 1024,
        "fill_s_per_epoch": fill_s,
        "median_s": {name: statistics.median(row[name] for row in pairs) for name in pairs[0]},
        "speedup": ratios("uncached_train_s", "cached_train_s"),
        "bound": ratios("uncached_train_s", "bare_train_s"),
        "share_of_bound": ratios("bare_train_s", "cached_train_s"),
        "speedup_with_validation": ratios("uncached_epoch_s", "cached_epoch_s"),
        "share_of_bound_with_validation": ratios("bare_epoch_s", "cached_epoch_s"),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "dev-mri5" / "manifest.csv")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--image-size-px", type=int, default=96)
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(options.threads)
    # As in a trial on CPUs: the optimizer looks for GPUs at every step.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    head = provenance("torch", "torchvision", "pytorch-lightning")
    manifest = read_manifest(options.data)
    with tempfile.TemporaryDirectory(prefix="frozen-prefix-") as scratch:
        cache_dir = Path(scratch)
        pack, manifest = build_pack(
            manifest, image_size_px=options.image_size_px, cache_dir=cache_dir
        )
        results = []
        print(f"{options.backbone}, {options.image_size_px} px, {options.threads} threads")
        print(
            f"{'depth':5} {'KiB':>6} {'uncached s':>11} {'cached s':>9}  speed-up, share of bound"
        )
        for depth in options.depths:
            result = measure_depth(manifest, pack, cache_dir / "features", options, depth)
            results.append(result)
            if "median_s" not in result:
                print(f"{depth:5} {result['outcome']}")
                continue
            seconds = result["median_s"]
            print(
                f"{depth:5} {result['kib_per_image']:6.0f} {seconds['uncached_train_s']:11.3f} "
                f"{seconds['cached_train_s']:9.4f}  {shown(result['speedup'])}, "
                f"{shown(result['share_of_bound'])}; with validation "
                f"{shown(result['speedup_with_validation'])}, "
                f"{shown(result['share_of_bound_with_validation'])}",
                flush=True,
            )
    if options.out:
        settings = {
            name: value.name if isinstance(value, Path) else value
            for name, value in vars(options).items()
        }
        record = {**head, "options": settings, "depths": results}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
