"""What does a classifier of each backbone cost whoever uses it?

    uv run python experiments/benchmarks/network_costs.py --out network_costs.json

Each backbone is written as a bundle's model.onnx is, and run on one image at a time, on one CPU
thread, in float32, in ONNX Runtime. The backbones take turns; the median of the rounds' medians is
shown with their range. Nothing else should run on the machine.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from measurement import provenance
from torch import nn

from lightning_modules.backbones import Backbone
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.network_cost import cost_of_file
from lightning_modules.network_files import write_onnx
from lightning_modules.stages import BACKBONES

NUM_CLASSES = 5
SIZES_PX = (96, 224)
NUM_ROUNDS = 7


def write_model(backbone: str, image_size_px: int, folder: Path) -> Path:
    stages = Backbone(backbone, image_size_px=image_size_px)
    network = BundledNetwork(stages, nn.Linear(stages.num_features, NUM_CLASSES))
    path = folder / f"{backbone}-{image_size_px}.onnx"
    write_onnx(network, image_size_px, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=NUM_ROUNDS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for image_size_px in SIZES_PX:
        with tempfile.TemporaryDirectory() as temporary:
            names = [name for name in BACKBONES if name != "vit_b_16" or image_size_px % 16 == 0]
            with torch.random.fork_rng():
                torch.manual_seed(0)
                models = {n: write_model(n, image_size_px, Path(temporary)) for n in names}
            latencies: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(options.rounds):
                for name, path in models.items():
                    cost = cost_of_file(path, image_size_px)
                    latencies[name].append(cost.latency_ms)
            for name, found in latencies.items():
                size_mib = models[name].stat().st_size / 2**20
                middle = statistics.median(found)
                rows.append(
                    {
                        "backbone": name,
                        "image_size_px": image_size_px,
                        "latency_ms": middle,
                        "latencies_ms": found,
                        "size_mib": size_mib,
                    }
                )
                print(
                    f"{name:16} {image_size_px:4} px  {middle:7.1f} ms "
                    f"[{min(found):.1f}, {max(found):.1f}]  {size_mib:6.1f} MiB"
                )
    if options.out:
        record = {**provenance("onnxruntime", "onnx", "torch"), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
