"""Is a training step faster with our pointwise convolutions, on a CPU without AVX-512?

    uv run python experiments/benchmarks/pointwise_step.py --out pointwise_step.json

For each backbone and depth: steps of the trained stages on features of noise that lie in memory, in
float32 on one thread, in turn: with ours, and with every ``PointwiseConvolution`` as torch has it.
Memory is allocated as in workers. CPUs with AVX-512 have none of ours.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compiled_step import stepper
from measurement import provenance, ratio_interval, shown
from torch import nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.convolutions import PointwiseConvolution
from search.tuning.tuner import WORKER_ENVIRONMENT

SIDES = ("ours", "torch")


def side_stepper(side: str, backbone: str, depth: int, options: argparse.Namespace) -> Callable:
    """Return a function that trains for one step, as one side does."""
    size_px = options.image_size_px
    module = ImageClassifier(
        backbone=backbone, num_classes=5, image_size_px=size_px, unfreeze_depth=depth
    )
    if side == "torch":
        # Frozen stages are shared between modules, and stay as they are.
        for convolution in module.backbone.stages[module.frozen_stages :].modules():
            if isinstance(convolution, PointwiseConvolution):
                convolution.forward = functools.partial(nn.Conv2d.forward, convolution)
    images = torch.randint(0, 256, (options.batch_size, 1, size_px, size_px), dtype=torch.uint8)
    labels = torch.randint(0, 5, (options.batch_size,))
    features = module.frozen_features(images, torch.arange(options.batch_size), epoch=None)
    return stepper(module, features, labels)


def measure(backbone: str, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time rounds of both sides in turn, at one depth."""
    steps = {side: side_stepper(side, backbone, depth, options) for side in SIDES}
    rounds: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(options.pairs + 1):
        for side in SIDES if index % 2 else SIDES[::-1]:
            start_s = time.perf_counter()
            for _ in range(options.steps):
                steps[side]()
            if index:  # the first round warms up
                rounds[side].append((time.perf_counter() - start_s) / options.steps)
    speed_up = ratio_interval([t / o for o, t in zip(*rounds.values(), strict=True)])
    medians = {f"{side}_step_s": statistics.median(values) for side, values in rounds.items()}
    print(f"{backbone} depth {depth}: {medians} {shown(speed_up)}", flush=True)
    return {"backbone": backbone, "depth": depth, **medians, "speed_up": speed_up}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ["mobilenet_v2", "resnet50", "efficientnet_b0"]
    parser.add_argument("--backbones", nargs="+", default=names)
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--image-size-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="a side and pair")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "pointwise_step.json"
    )
    options = parser.parse_args()
    if not WORKER_ENVIRONMENT.items() <= os.environ.items():  # read when a process starts
        environment = {**os.environ, **WORKER_ENVIRONMENT}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":
        sys.exit(f"this CPU computes with {capability}, where torch's own are taken")
    torch.set_num_threads(1)
    result = provenance("torch", "torchvision")
    rows = [measure(b, depth, options) for b in options.backbones for depth in options.depths]
    options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
