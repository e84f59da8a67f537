"""How much faster are training steps of the stages that are trained, compiled?

    uv run python experiments/benchmarks/compiled_step.py --out compiled_step.json

For each backbone and depth: steps on features of noise that lie in memory, compiled and not, in
turn, on one thread; and what compiling for training takes, in an empty cache of kernels. A GPU is
used where there is one.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measurement import provenance, ratio_interval, shown

from lightning_modules.classifier import ImageClassifier
from lightning_modules.compiled_stages import compiled_pass

STEPS_A_ROUND = 10


def stepper(
    module: ImageClassifier, features: torch.Tensor, labels: torch.Tensor, *, bf16: bool = False
) -> Callable:
    """Return a function that trains for one step, in float32 or in bfloat16."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], fused=True)
    module.train()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(module.logits(features), labels)
        loss.backward()
        optimizer.step()

    return step


def seconds(steps: Callable, device: torch.device) -> float:
    """Return what some steps take."""
    start_s = time.perf_counter()
    steps()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


def measure(backbone: str, depth: int, options: argparse.Namespace, cache: Path) -> dict[str, Any]:
    """Time pairs of rounds at one depth."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size_px = options.image_size_px
    plain = ImageClassifier(
        backbone=backbone, num_classes=5, image_size_px=size_px, unfreeze_depth=depth
    ).to(device)
    compiled = copy.deepcopy(plain)
    compiled.pass_trained = compiled_pass(cache)
    images = torch.randint(0, 256, (options.batch_size, 1, size_px, size_px), dtype=torch.uint8)
    rows = torch.arange(options.batch_size)
    features = plain.frozen_features(images.to(device), rows.to(device), epoch=None)
    labels = torch.randint(0, 5, (options.batch_size,), device=device)
    sides = {
        "plain": stepper(plain, features, labels),
        "compiled": stepper(compiled, features, labels),
    }
    compile_s = seconds(sides["compiled"], device)
    sides["plain"]()
    rounds: dict[str, list[float]] = {"plain": [], "compiled": []}
    for _ in range(options.pairs):
        for name, step in sides.items():
            taken_s = seconds(lambda step=step: [step() for _ in range(STEPS_A_ROUND)], device)
            rounds[name].append(taken_s / STEPS_A_ROUND)
    ratio = ratio_interval([p / c for p, c in zip(*rounds.values(), strict=True)])
    medians = {f"{name}_step_s": statistics.median(values) for name, values in rounds.items()}
    print(f"{backbone} depth {depth}: {shown(ratio)}, compiled in {compile_s:.0f} s", flush=True)
    return {
        "backbone": backbone,
        "depth": depth,
        "compile_s": compile_s,
        **medians,
        "speed_up": ratio,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbones", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--image-size-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "compiled_step.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = provenance("torch", "torchvision")
    rows = []
    for backbone in options.backbones:
        for depth in options.depths:
            with tempfile.TemporaryDirectory() as cache:
                rows.append(measure(backbone, depth, options, Path(cache)))
    options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
