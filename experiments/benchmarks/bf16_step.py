"""Is a CPU's step faster in bfloat16, with our depthwise convolutions and with torch's own?

    uv run python experiments/benchmarks/bf16_step.py --out bf16_step.json

For each backbone and depth: steps of the trained stages on features of noise that lie in memory, on
one thread, in turn: in float32, in bfloat16, and in bfloat16 with every ``DepthwiseConvolution`` as
torch has it. Memory is allocated as in workers. CPUs that compute in float32 alone are left out.
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
from compiled_step import STEPS_A_ROUND, stepper
from measurement import provenance, ratio_interval, shown
from torch import nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.convolutions import DepthwiseConvolution
from lightning_modules.step_cost import computes_in_bf16
from search.tuning.tuner import WORKER_ENVIRONMENT

SIDES = ("float32", "bf16", "bf16_torch")


def side_stepper(side: str, backbone: str, depth: int, options: argparse.Namespace) -> Callable:
    """Return a function that trains for one step, as one side does."""
    bf16, size_px = side != "float32", options.image_size_px
    module = ImageClassifier(
        backbone=backbone, num_classes=5, image_size_px=size_px, unfreeze_depth=depth
    )
    if side == "bf16_torch":
        # Frozen stages are shared between modules, and stay as they are.
        for convolution in module.backbone.stages[module.frozen_stages :].modules():
            if isinstance(convolution, DepthwiseConvolution):
                convolution.forward = functools.partial(nn.Conv2d.forward, convolution)
    images = torch.randint(0, 256, (options.batch_size, 1, size_px, size_px), dtype=torch.uint8)
    labels = torch.randint(0, 5, (options.batch_size,))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        features = module.frozen_features(images, torch.arange(options.batch_size), epoch=None)
    return stepper(module, features, labels, bf16=bf16)


def measure(backbone: str, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time rounds of each side in turn, at one depth."""
    steps = {side: side_stepper(side, backbone, depth, options) for side in SIDES}
    rounds: dict[str, list[float]] = {side: [] for side in SIDES}
    for index in range(options.pairs + 1):
        for side, step in steps.items():
            start_s = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                step()
            if index:  # the first round warms up
                rounds[side].append((time.perf_counter() - start_s) / STEPS_A_ROUND)

    def gain(over: str) -> dict[str, Any]:
        return ratio_interval([o / b for o, b in zip(rounds[over], rounds["bf16"], strict=True)])

    gains = {f"speed_up_over_{side}": gain(side) for side in ("float32", "bf16_torch")}
    print(f"{backbone} depth {depth}: {', '.join(f'{k} {shown(v)}' for k, v in gains.items())}")
    medians = {f"{side}_step_s": statistics.median(values) for side, values in rounds.items()}
    return {"backbone": backbone, "depth": depth, **medians, **gains}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = ["mobilenet_v2", "resnet50", "efficientnet_b0"]
    parser.add_argument("--backbones", nargs="+", default=names)
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 3, 5])
    parser.add_argument("--image-size-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "bf16_step.json"
    )
    options = parser.parse_args()
    if not WORKER_ENVIRONMENT.items() <= os.environ.items():  # read when a process starts
        environment = {**os.environ, **WORKER_ENVIRONMENT}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    if not computes_in_bf16(torch.device("cpu")):
        sys.exit("this CPU has no instructions for bfloat16: training takes float32 here")
    torch.set_num_threads(1)
    result = provenance("torch", "torchvision")
    rows = [measure(b, depth, options) for b in options.backbones for depth in options.depths]
    options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
