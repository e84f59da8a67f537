"""What a network costs whoever uses it: the time of one image on one CPU thread, and its size."""

import contextlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from lightning_modules.backbones import Backbone
from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.files import write_atomically
from lightning_modules.network_files import write_onnx
from lightning_modules.step_cost import name_of_device

MEASURED_ON = "one image, one CPU thread, float32, ONNX Runtime"

NUM_WARM_UP = 5
NUM_TIMED = 30


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """What a network costs whoever uses it.

    Attributes:
        latency_ms: Median time of one image on one CPU thread, in float32; decoding not counted.
        size_mib: Of the ONNX file.
    """

    latency_ms: float
    size_mib: float


def cost_of_file(model: Path, image_size_px: int) -> NetworkCost:
    """Measure an ONNX model of one's own: it is opened as it is.

    Args:
        model: A ``model.onnx`` that this process has written.
        image_size_px: Height and width of its input.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    image = np.random.default_rng(0).random((1, 1, image_size_px, image_size_px), np.float32)
    times_s = []
    for _ in range(NUM_WARM_UP + NUM_TIMED):
        start_s = time.perf_counter()
        session.run(None, {"intensities": image})
        times_s.append(time.perf_counter() - start_s)
    return NetworkCost(
        latency_ms=1000 * float(np.median(times_s[NUM_WARM_UP:])),
        size_mib=model.stat().st_size / 2**20,
    )


def measure_costs(
    backbones: Sequence[str],
    *,
    num_classes: int,
    image_size_px: int,
    cache_dir: Path,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, NetworkCost]:
    """Return what a classifier of each backbone costs, whatever its weights.

    Written as a bundle's model is, and measured as one. Once a CPU, backbone, image size, and
    version of ONNX Runtime; then kept in the cache.

    Args:
        backbones: Names.
        num_classes: Outputs.
        image_size_px: Height and width.
        cache_dir: Where the measurements are kept.
        tell: Given a line before each measurement.
    """
    path = cache_dir / "network_costs.json"
    known: dict[str, dict[str, float]] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_bytes()))
    where = f"{platform.node()} {name_of_device(torch.device('cpu'))} {os.cpu_count()} cores"
    costs = {}
    for backbone in backbones:
        key = (
            f"{where} onnxruntime {onnxruntime.__version__} {backbone} {image_size_px} px "
            f"{num_classes} classes"
        )
        try:
            costs[backbone] = NetworkCost(**known[key])
        except (KeyError, TypeError):
            tell(f"measures the cost of {backbone}")
            costs[backbone] = _measure(backbone, num_classes, image_size_px)
            known[key] = asdict(costs[backbone])
            with contextlib.suppress(OSError):  # then it is measured again
                cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_atomically(path, json.dumps(known, indent=1).encode())
    return costs


def _measure(backbone: str, num_classes: int, image_size_px: int) -> NetworkCost:
    with torch.random.fork_rng(devices=[]):
        stages = Backbone(backbone, image_size_px=image_size_px)
        network = BundledNetwork(stages, nn.Linear(stages.num_features, num_classes))
    with tempfile.TemporaryDirectory(prefix="neurosweep-") as folder:
        model = Path(folder) / "model.onnx"
        write_onnx(network, image_size_px, model)
        return cost_of_file(model, image_size_px)
