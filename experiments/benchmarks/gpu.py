"""On one GPU: how close is training to the bare step, and what does packing trials gain?

    uv run python experiments/benchmarks/gpu.py --out gpu.json

The bare step trains on one random batch that stays on the device: no images, views, Lightning, or
logging. End to end is a fit through Lightning, from a pack of random grey images to the logged
epoch. Both train everything, in turn. Packed trials are processes that share the device; the same
trials run one after another for comparison. ``--device cpu`` is for trying the script out.
"""

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from measurement import provenance, ratio_interval, shown

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import PackDataModule
from lightning_modules.data.manifest import COLUMNS, Manifest
from lightning_modules.data.pack import Pack

NUM_CLASSES = 5


def make_images(folder: Path, num_images: int, image_size_px: int) -> tuple[Manifest, Pack]:
    """Write a pack of random grey images, a tenth of them for validation."""
    generator = np.random.default_rng(0)
    shape = (num_images, image_size_px, image_size_px)
    path = folder / "pack.npy"
    np.save(path, generator.integers(0, 256, shape, dtype=np.uint8))
    rows = [
        (f"{i}.png", f"class_{i % NUM_CLASSES}", f"p{i}", "", "val" if i % 10 == 0 else "train")
        for i in range(num_images)
    ]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return Manifest(folder, frame), Pack(path, "0" * 64, image_size_px, {})


def make_module(options: argparse.Namespace, backbone: str, depth: int) -> ImageClassifier:
    return ImageClassifier(
        backbone=backbone,
        num_classes=NUM_CLASSES,
        image_size_px=options.image_size_px,
        unfreeze_depth=depth,
        max_epochs=options.epochs,
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_bare(options: argparse.Namespace, backbone: str, batch_size: int, steps: int) -> float:
    """Return images a second of the step alone, on a batch that is there already."""
    device = torch.device(options.device)
    module = make_module(options, backbone, depth=5).to(device).train()
    shape = (batch_size, 3, options.image_size_px, options.image_size_px)
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, NUM_CLASSES, (batch_size,), device=device)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    forward = torch.compile(module.logits) if options.compile else module.logits

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16-mixed"):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    for _ in range(options.warmup_steps):
        step()
    synchronize(device)
    start_s = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return steps * batch_size / (time.perf_counter() - start_s)


class TrainClock(pl.Callback):
    """Times the training part of every epoch but the first, and all of it."""

    def __init__(self) -> None:
        self.train_s: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronize(pl_module.device)
        self.start_s = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
    ) -> None:
        synchronize(pl_module.device)
        self.train_s.append(time.perf_counter() - self.start_s)


def fit(options: argparse.Namespace, backbone: str, depth: int, data: PackDataModule) -> TrainClock:
    """Train through Lightning, as a trial does, without reports and checkpoints."""
    clock = TrainClock()
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=1,
        precision=options.precision,
        max_epochs=options.epochs,
        callbacks=[clock],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_module(options, backbone, depth), datamodule=data)
    return clock


def time_end_to_end(
    options: argparse.Namespace, backbone: str, batch_size: int, images: tuple[Manifest, Pack]
) -> float:
    """Return images a second of training epochs after the first."""
    data = PackDataModule(*images, batch_size=batch_size, seed=0)
    clock = fit(options, backbone, 5, data)
    trained = data.train_order.num_steps * batch_size
    return trained * (options.epochs - 1) / sum(clock.train_s[1:])


def compare_steps(options: argparse.Namespace, backbone: str, batch_size: int) -> dict[str, Any]:
    """Time the bare step and the whole, in turn."""
    with tempfile.TemporaryDirectory() as scratch:
        images = make_images(Path(scratch), options.images, options.image_size_px)
        pairs = []
        for _ in range(options.pairs):
            bare = time_bare(options, backbone, batch_size, options.images // batch_size)
            whole = time_end_to_end(options, backbone, batch_size, images)
            pairs.append({"bare_images_per_s": bare, "end_to_end_images_per_s": whole})
    share = ratio_interval([p["end_to_end_images_per_s"] / p["bare_images_per_s"] for p in pairs])
    best = max(pair["bare_images_per_s"] for pair in pairs)
    print(
        f"{backbone:14} batch {batch_size:4}: bare {best:8.0f} images/s, whole {shown(share)} of it"
    )
    return {"backbone": backbone, "batch_size": batch_size, "share_of_bare": share, "pairs": pairs}


def compare_packing(options: argparse.Namespace) -> dict[str, Any]:
    """Run shallow trials as processes side by side, and one after another."""
    command = [sys.executable, __file__, "--one-trial", "--device", options.device]
    for name in ("precision", "image_size_px", "images", "epochs"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]

    def run(num_together: int) -> float:
        start_s = time.perf_counter()
        for first in range(0, options.packed, num_together):
            trials = range(first, min(first + num_together, options.packed))
            processes = [subprocess.Popen(command) for _ in trials]
            for process in processes:
                if process.wait() != 0:
                    raise SystemExit("a packed trial failed")
        return time.perf_counter() - start_s

    pairs = [
        {"packed_s": run(options.packed), "in_turn_s": run(1)} for _ in range(options.packed_pairs)
    ]
    gain = ratio_interval([pair["in_turn_s"] / pair["packed_s"] for pair in pairs])
    print(f"{options.packed} shallow trials packed, against one after another: {shown(gain)}")
    return {"trials": options.packed, "gain": gain, "pairs": pairs}


def run_one_trial(options: argparse.Namespace) -> None:
    """Train one shallow trial of MobileNetV2, as each of the packed ones is."""
    with tempfile.TemporaryDirectory() as scratch:
        images = make_images(Path(scratch), options.images, options.image_size_px)
        fit(options, "mobilenet_v2", 1, PackDataModule(*images, batch_size=32, seed=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--image-size-px", type=int, default=224)
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 128, 256])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--warmup-steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="the bare step, compiled")
    parser.add_argument("--packed", type=int, default=8)
    parser.add_argument("--packed-pairs", type=int, default=2)
    parser.add_argument("--one-trial", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if options.one_trial:
        run_one_trial(options)
        return
    head = provenance("torch", "torchvision", "pytorch-lightning")
    steps = [
        compare_steps(options, backbone, batch_size)
        for backbone in ("resnet50", "mobilenet_v2")
        for batch_size in options.batch_sizes
    ]
    record = {**head, "steps": steps, "packing": compare_packing(options)}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
