"""How fast are our views, beside Kornia's own pipeline with the same ranges?

    uv run python experiments/benchmarks/augmentation.py --out augmentation.json

``ours`` does what a training step does: uint8 grey in, augmented (erasing included), normalised,
three channels, channels last out. ``kornia`` runs five operators (flip, affine, brightness and
contrast, noise, normalise) on float images that already have three channels: neither the
conversion nor erasing is counted against it. ``kornia_grey`` gets one channel and widens it last,
as a careful user might. ``torchvision`` takes one image at a time. All draw for each image alone.

Each figure is taken twice: with glibc's allocator as it is, and as our workers set it. Where there
is a GPU, batches of 32 and 256 in bf16 and a MobileNetV2 training step follow.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from measurement import provenance, ratio_interval, shown
from torch import Tensor
from torchvision import models
from torchvision.transforms import v2

from lightning_modules.augmentation import Views
from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.weights import IMAGENET_MEAN, IMAGENET_STD

BASELINE = "kornia"
SETTINGS = AugmentationSettings()

# As dev-mri5 has with batches of 32: what views of an epoch are made with is prepared in the first.
STEPS_AN_EPOCH = 36

Step = Callable[[int], Tensor]


def build_ours(images: Tensor, dtype: torch.dtype) -> Step:
    """Build what ``ImageClassifier`` does to a training batch before its backbone."""
    device, batch = images.device, len(images)
    views = Views(SETTINGS, strength=1.0, seed=0, image_size_px=images.shape[-1]).to(device)
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(1, -1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(1, -1, 1, 1)
    views.num_samples = STEPS_AN_EPOCH * batch
    rows = torch.arange(views.num_samples, device=device).split(batch)

    def step(index: int) -> Tensor:
        epoch, place = divmod(index, STEPS_AN_EPOCH)
        normalised: Tensor = (views(images, epoch=epoch, samples=rows[place]) - mean) / std
        return normalised.to(dtype).contiguous(memory_format=torch.channels_last)

    return step


def build_kornia(images: Tensor, dtype: torch.dtype, *, channels: int) -> Step:
    """Build Kornia's operators with our ranges."""
    change = SETTINGS.translation
    color = K.ColorJiggle(brightness=SETTINGS.brightness, contrast=SETTINGS.contrast, p=1.0)
    normalize = K.Normalize(torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD))
    operators = [
        K.RandomHorizontalFlip(p=SETTINGS.flip_probability),
        K.RandomAffine(
            degrees=SETTINGS.rotation_deg,
            translate=(change, change),
            scale=(1 - SETTINGS.scaling, 1 + SETTINGS.scaling),
            shear=SETTINGS.shear_deg,
            p=1.0,
        ),
        color,
        K.RandomGaussianNoise(std=SETTINGS.noise, p=1.0),
    ]
    if channels == 3:
        operators.append(normalize)
    pipeline = K.AugmentationSequential(*operators, data_keys=["input"], same_on_batch=False)
    given = (images.to(dtype) / 255).expand(-1, channels, -1, -1).contiguous()

    def step(_: int) -> Tensor:
        augmented = pipeline(given)
        if channels == 1:
            augmented = normalize(augmented.expand(-1, 3, -1, -1))
        return augmented.contiguous(memory_format=torch.channels_last)  # type: ignore[no-any-return]

    return step


def build_torchvision(images: Tensor) -> Step:
    """Build torchvision's operators with our ranges, an image at a time as in a Dataset."""
    change = SETTINGS.translation
    pipeline = v2.Compose(
        [
            v2.RandomHorizontalFlip(SETTINGS.flip_probability),
            v2.RandomAffine(
                degrees=SETTINGS.rotation_deg,
                translate=(change, change),
                scale=(1 - SETTINGS.scaling, 1 + SETTINGS.scaling),
                shear=SETTINGS.shear_deg,
                interpolation=v2.InterpolationMode.BILINEAR,
            ),
            v2.ColorJitter(brightness=SETTINGS.brightness, contrast=SETTINGS.contrast),
            v2.GaussianNoise(sigma=SETTINGS.noise),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    given = (images.to(torch.float32) / 255).expand(-1, 3, -1, -1).contiguous()

    def step(_: int) -> Tensor:
        augmented = torch.stack([pipeline(image) for image in given])
        return augmented.contiguous(memory_format=torch.channels_last)

    return step


def build_train_step(images: Tensor, dtype: torch.dtype) -> Step:
    """Build a bare MobileNetV2 training step on a batch that is there already."""
    device, batch = images.device, len(images)
    network = models.mobilenet_v2().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")
    given = torch.randn(batch, 3, *images.shape[2:], device=device)
    given = given.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 5

    def step(_: int) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(network(given), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def time_step(step: Step, *, batch: int, device: torch.device, min_s: float) -> dict[str, float]:
    """Repeat a step for at least ``min_s``."""
    step(-1)  # of another epoch: the first that is timed prepares its own
    _synchronize(device)
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    done = 0
    while time.perf_counter() - start_s < min_s:
        step(done)
        done += 1
        if device.type == "cuda" and done % 20 == 0:
            _synchronize(device)  # else the queue runs ahead of the clock
    _synchronize(device)
    wall_s = time.perf_counter() - start_s
    return {
        "images_per_s": done * batch / wall_s,
        "cpu_ms_per_image": 1000 * (time.process_time() - start_cpu_s) / (done * batch),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(
    sides: dict[str, Step], *, batch: int, device: torch.device, pairs: int, min_s: float
) -> dict[str, Any]:
    """Time all sides in turn, again and again; the ratios are ours over each other side's."""
    raw: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(pairs):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            raw[name].append(time_step(sides[name], batch=batch, device=device, min_s=min_s))
    return {
        "sides": {
            name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for name, rows in raw.items()
        },
        "ratio_wall": _ratios(
            raw, lambda ours, other: ours["images_per_s"] / other["images_per_s"]
        ),
        "ratio_cpu": _ratios(
            raw, lambda ours, other: other["cpu_ms_per_image"] / ours["cpu_ms_per_image"]
        ),
        "raw": raw,
    }


def _ratios(
    raw: dict[str, list[dict[str, float]]],
    ratio: Callable[[dict[str, float], dict[str, float]], float],
) -> dict[str, Any]:
    return {
        name: ratio_interval([ratio(*both) for both in zip(raw["ours"], rows, strict=True)])
        for name, rows in raw.items()
        if name != "ours"
    }


def draw_images(batch: int, side_px: int, device: torch.device) -> Tensor:
    """Return grey noise: no side's time depends on what is in the images."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 1, side_px, side_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)


def run_cpu(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare on the CPU: sizes by numbers of threads."""
    cells = []
    device, dtype = torch.device("cpu"), torch.float32
    for side_px, threads in itertools.product(options.sizes_px, options.threads):
        torch.set_num_threads(threads)
        images = draw_images(32, side_px, device)
        sides = {
            "ours": build_ours(images, dtype),
            "kornia": build_kornia(images, dtype, channels=3),
            "kornia_grey": build_kornia(images, dtype, channels=1),
            "torchvision": build_torchvision(images),
        }
        result = compare(sides, batch=32, device=device, pairs=options.pairs, min_s=options.min_s)
        cells.append({"side_px": side_px, "threads": threads, "batch": 32, **result})
    return cells


def run_device(options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Compare on an accelerator in bf16, beside a training step."""
    cells = []
    for side_px, batch in itertools.product(options.sizes_px, options.device_batches):
        images = draw_images(batch, side_px, device)
        sides = {
            "ours": build_ours(images, torch.bfloat16),
            "kornia": build_kornia(images, torch.bfloat16, channels=3),
            "kornia_fp32": build_kornia(images, torch.float32, channels=3),
            "kornia_grey": build_kornia(images, torch.bfloat16, channels=1),
            "train_step": build_train_step(images, torch.bfloat16),
        }
        result = compare(
            sides, batch=batch, device=device, pairs=options.pairs, min_s=options.min_s
        )
        cells.append({"side_px": side_px, "device": str(device), "batch": batch, **result})
    return cells


def run_with_allocator(environment: dict[str, str], arguments: list[str]) -> list[dict[str, Any]]:
    """Run this script's CPU part in a process of its own: glibc reads its settings at the start."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *arguments, "--cells", file.name]
        subprocess.run(command, env={**os.environ, **environment}, check=True)
        return json.loads(Path(file.name).read_text())  # type: ignore[no-any-return]


def print_cells(title: str, cells: list[dict[str, Any]]) -> None:
    """Print medians, and ours over the baseline."""
    print(f"\n{title}: images/s, CPU ms an image; then ours over each other side, wall and CPU")
    for cell in cells:
        where = f"{cell['threads']} threads" if "threads" in cell else cell["device"]
        print(f"{cell['side_px']} px, {where}, batch {cell['batch']}")
        for name, side in cell["sides"].items():
            line = f"  {name:12}{side['images_per_s']:12.0f}{side['cpu_ms_per_image']:9.3f}"
            if name != "ours":
                line += f"   {shown(cell['ratio_wall'][name])}"
                line += f"; CPU {cell['ratio_cpu'][name]['median']:.2f}x"
            print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--min-s", type=float, default=1.0, help="a side and pair")
    parser.add_argument("--sizes-px", type=int, nargs="+", default=[224, 96])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device-batches", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--device", help="for the second part; cuda where there is one")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    parser.add_argument("--cells", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cells is not None:
        options.cells.write_text(json.dumps(run_cpu(options)))
        return

    from search.tuning.tuner import (
        WORKER_ENVIRONMENT,  # late: Ray is of no use to the other processes
    )

    record = provenance("torch", "torchvision", "kornia")
    # glibc as it is: a setting in this shell would make both alike.
    for name in WORKER_ENVIRONMENT:
        os.environ.pop(name, None)
    record["cpu"] = {}
    for name, environment in {"default": {}, "workers": WORKER_ENVIRONMENT}.items():
        cells = run_with_allocator(environment, sys.argv[1:])
        record["cpu"][f"allocator_{name}"] = cells
        print_cells(f"CPU, allocator {name}", cells)
    device = options.device or ("cuda" if torch.cuda.is_available() else None)
    if device is not None:
        record["device"] = run_device(options, torch.device(device))
        print_cells(f"{device}, bf16", record["device"])
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
