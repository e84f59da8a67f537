"""Is a CPU's step faster in bfloat16, with our depthwise convolutions and with torch's own?

    uv run python experiments/benchmarks/bf16_step.py --out bf16_step.json

For each backbone and depth: steps of the trained stages on features of noise that lie in memory, on
one thread, in turn: in float32, in bfloat16, and in bfloat16 with every ``DepthwiseConvolution`` as
torch has it. Memory is allocated as in workers. CPUs that compute in float32 alone are left out.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measurement import provenance, ratio_interval, shown
from torch import nn

from lightning_modules.classifier import ImageClassifier
from lightning_modules.depthwise_convolution import DepthwiseConvolution
from lightning_modules.step_cost import computes_in_bf16
from search.tuning.tuner import WORKER_ENVIRONMENT

STEPS_A_ROUND = 10
SIDES = ("float32", "bf16", "bf16_torch")


def stepper(side: str, backbone: str, depth: int, options: argparse.Namespace) -> Callable:
    """Return a function that trains for one step."""
    size_px = options.image_size_px
    module = ImageClassifier(
        backbone=backbone, num_classes=5, image_size_px=size_px, unfreeze_depth=depth
    ).train()
    module.backbone.stages[: module.frozen_stages].eval()
    if side == "bf16_torch":
        # Frozen stages are shared between modules, and stay as they are.
        for stage in module.backbone.stages[module.frozen_stages :]:
            for name, convolution in list(stage.named_modules()):
                if isinstance(convolution, DepthwiseConvolution):
                    torchs_own = nn.Conv2d.__new__(nn.Conv2d)
                    torchs_own.__dict__ = convolution.__dict__
                    stage.set_submodule(name, torchs_own)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    images = torch.randint(0, 256, (options.batch_size, 1, size_px, size_px), dtype=torch.uint8)
    labels = torch.randint(0, 5, (options.batch_size,))

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=side != "float32")

    with autocast():
        features = module.frozen_features(images, torch.arange(options.batch_size), epoch=None)

    def step() -> None:
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(module.logits(features), labels)
        loss.backward()
        optimizer.step()

    return step


def measure(backbone: str, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Time rounds of each side in turn, at one depth."""
    steps = {side: stepper(side, backbone, depth, options) for side in SIDES}
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
