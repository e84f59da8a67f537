"""How often do maps of a network trained on phantoms point at the lesion, for each backbone?

    uv run python experiments/benchmarks/pointing_game.py --backbone mobilenet_v2 \
        --weights FOLDER --out pointing_game_mobilenet_v2.json

Trains one network on simulated patients (a bare loop: no search, no views, images and their mirror
images), tests it on others, and plays the pointing game and the tests of maps on those.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from measurement import provenance
from torch import Tensor, nn

from lightning_modules.backbones import Backbone, freeze_below, run_stages
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.data.phantom import CLASSES, render_slice
from lightning_modules.explain import untrained_network
from lightning_modules.seeds import derive_seed
from lightning_modules.state_dicts import from_torchvision, match_state_dict, read_state_dict
from search.explanation.checks import point_at_phantoms, run_tests, to_intensities

BATCH_SIZE = 16


def phantoms(name: str, num_images: int, image_size_px: int) -> tuple[Tensor, Tensor]:
    """Return intensities and labels of simulated patients, two slices each."""
    labels = [index // 2 % len(CLASSES) for index in range(num_images)]
    slices = [
        render_slice(
            CLASSES[label],
            patient_seed=derive_seed(name, index // 2),
            slice_index=1 + index % 2,
            slices_per_patient=4,
            image_size_px=image_size_px,
        ).image
        for index, label in enumerate(labels)
    ]
    return to_intensities(np.stack(slices)), torch.tensor(labels)


def train(options: argparse.Namespace) -> BundledNetwork:
    """Fine-tune from ImageNet; frozen stages are computed once."""
    torch.manual_seed(0)
    backbone = Backbone(options.backbone, image_size_px=options.image_size_px)
    (path,) = options.weights.glob(f"{options.backbone}*")
    matched = match_state_dict(
        options.backbone, read_state_dict(path), path, image_size_px=options.image_size_px
    )
    backbone.load_state_dict(from_torchvision(backbone, matched.state))
    network = BundledNetwork(backbone, nn.Linear(backbone.num_features, len(CLASSES)))
    network.requires_grad_(True).train().to(memory_format=torch.channels_last)
    num_frozen = len(freeze_below(list(backbone.stages), options.unfreeze_depth))
    intensities, labels = phantoms("train", options.images, options.image_size_px)
    mirrored = torch.cat([intensities, intensities.flip(3)])
    labels = labels.repeat(2)
    features = []
    with torch.no_grad():
        for part in mirrored.split(BATCH_SIZE):
            values = (part - network.mean) / network.std
            values = values.contiguous(memory_format=torch.channels_last)
            for stage in backbone.stages[:num_frozen]:
                values = stage(values)
            features.append(values)
    given = torch.cat(features)
    rate = {"backbone": 5e-4, "head": 2e-3}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in getattr(network, name).parameters() if p.requires_grad]}
            for name in rate
        ],
        weight_decay=1e-4,
    )
    steps_an_epoch = options.images // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=list(rate.values()), total_steps=options.epochs * steps_an_epoch
    )
    for epoch in range(options.epochs):
        losses = []
        # Each image or its mirror image once an epoch.
        side = torch.randint(0, 2, (options.images,)) * options.images
        order = torch.randperm(options.images)
        for rows in order.split(BATCH_SIZE)[:steps_an_epoch]:
            taken = rows + side[rows]
            activations = run_stages(backbone.stages[num_frozen:], given[taken])
            loss = F.cross_entropy(network.head(activations.mean(dim=(2, 3))), labels[taken])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {np.mean(losses):.3f}", flush=True)
    return network.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", type=Path, required=True, help="folder of state dicts")
    parser.add_argument("--image-size-px", type=int, default=128)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--unfreeze-depth", type=int, default=5)
    parser.add_argument("--points", type=int, default=240)
    parser.add_argument("--tests", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {**provenance("torch", "captum"), "settings": {}}
    shown = ("backbone", "image_size_px", "images", "epochs", "unfreeze_depth")
    result["settings"] = {name: getattr(options, name) for name in shown}

    start_s = time.perf_counter()
    network = train(options)
    result["train_s"] = time.perf_counter() - start_s
    intensities, labels = phantoms("test", 200, options.image_size_px)
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(1) for part in intensities.split(BATCH_SIZE)])
    result["test_accuracy"] = float((predicted == labels).float().mean())
    start_s = time.perf_counter()
    result["pointing_game"] = point_at_phantoms(
        network, CLASSES, options.image_size_px, options.points, seed=0
    )
    result["pointing_game_s"] = time.perf_counter() - start_s
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    start_s = time.perf_counter()
    spread = torch.linspace(0, len(intensities) - 1, options.tests).long()
    result["tests"] = run_tests(
        network,
        untrained_network(network, intensities[spread], seed=1),
        intensities[spread],
        seed=0,
        progress=lambda what, done, total: None,
    )
    result["tests_s"] = time.perf_counter() - start_s
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("grad_cam", "integrated_gradients"):
        game = result["pointing_game"][name]
        print(name, game["share"], "random", game["random_point"], "other", game["other_lesion"])


if __name__ == "__main__":
    main()
