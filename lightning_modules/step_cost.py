"""What a training step takes on this device: measured, since no table knows tomorrow's."""

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules import backbones as networks
from lightning_modules import convolutions
from lightning_modules.backbones import GPU_BLOCK, Backbone, freeze_below, run_stages
from lightning_modules.data.datamodule import VAL_BATCH_SIZE
from lightning_modules.files import code_digest_of, write_atomically
from lightning_modules.stages import NUM_STAGES

# bf16 is taken where it is faster by this factor: less is not worth its rounding.
BF16_PAYS = 1.15

# Enough to keep the kernels that a real batch takes, and few enough to take seconds on a CPU.
TIMED_BATCH_SIZE = 16
NUM_TIMED_STEPS = 3

# What a process takes on a GPU before it allocates anything: the context and the kernels.
CONTEXT_BYTES = 600 * 2**20


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one training step takes.

    Attributes:
        step_s: Seconds, the fastest of a few.
        peak_bytes: Most that was reserved on a GPU, with a block of frozen stages' features before
            and a validation batch after the steps, and the process itself; 0 on a CPU.
    """

    step_s: float
    peak_bytes: int


def measure_step(
    backbone: str,
    *,
    unfreeze_depth: int,
    batch_size: int,
    image_size_px: int,
    precision: str,
    device: torch.device,
) -> StepCost:
    """Train on noise for a few steps, from normalised images to the optimizer's step.

    Args:
        backbone: One of ``BACKBONES``.
        unfreeze_depth: Stages trained.
        batch_size: Images a step.
        image_size_px: Height and width.
        precision: ``32-true`` or ``bf16-mixed``.
        device: Where.
    """
    with torch.random.fork_rng(devices=[]):
        network = Backbone(backbone, image_size_px=image_size_px)
        freeze_below(list(network.stages), unfreeze_depth)
        network.to(device).to(memory_format=torch.channels_last)
        head = torch.nn.Linear(network.num_features, 5, device=device)
        images = torch.randn(batch_size, 3, image_size_px, image_size_px, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    trained = [p for p in (*network.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")

    def pass_images(stages: Sequence[torch.nn.Module], num_images: int) -> None:
        given = images[:1].expand(num_images, -1, -1, -1)
        with torch.no_grad(), autocast():
            run_stages(stages, given.contiguous(memory_format=torch.channels_last))

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = F.cross_entropy(head(network(images)), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        # In a trial's order: what is left of it may be of no use to the steps.
        if unfreeze_depth < NUM_STAGES:
            pass_images(list(network.stages[: NUM_STAGES - unfreeze_depth]), GPU_BLOCK)
    step().item()
    times_s = []
    for _ in range(NUM_TIMED_STEPS):
        start_s = time.perf_counter()
        step().item()  # waits for a GPU
        times_s.append(time.perf_counter() - start_s)
    peak_bytes = 0
    if device.type == "cuda":
        pass_images(list(network.stages), VAL_BATCH_SIZE)
        peak_bytes = torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    return StepCost(step_s=min(times_s), peak_bytes=peak_bytes)


def choose_precisions(
    backbones: Sequence[str], *, image_size_px: int, device: torch.device, cache_dir: Path
) -> dict[str, str]:
    """Return what each backbone is trained in on this device: bf16-mixed where it pays.

    Measured once a device, backbone, image size, and version of torch and of our networks, and kept
    in the cache. On CPUs without instructions for bf16 there is nothing to measure.

    Args:
        backbones: Names.
        image_size_px: Height and width.
        device: Where trials will run.
        cache_dir: Where the measurements are kept.
    """
    if not computes_in_bf16(device):
        return dict.fromkeys(backbones, "32-true")
    path = cache_dir / "precisions.json"
    known: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_bytes()))
    code = code_digest_of(networks, convolutions)[:12]
    where = f"{name_of_device(device)} torch {torch.__version__} {torch.get_num_threads()} threads"
    chosen = {}
    for backbone in backbones:
        key = f"{where} {backbone} {image_size_px} px {code}"
        if known.get(key) not in ("32-true", "bf16-mixed"):
            step_s = {
                precision: measure_step(
                    backbone,
                    unfreeze_depth=5,
                    batch_size=TIMED_BATCH_SIZE,
                    image_size_px=image_size_px,
                    precision=precision,
                    device=device,
                ).step_s
                for precision in ("32-true", "bf16-mixed")
            }
            pays = step_s["32-true"] > BF16_PAYS * step_s["bf16-mixed"]
            known[key] = "bf16-mixed" if pays else "32-true"
            with contextlib.suppress(OSError):  # then it is measured again
                cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_atomically(path, json.dumps(known, indent=1).encode())
        chosen[backbone] = known[key]
    return chosen


def computes_in_bf16(device: torch.device) -> bool:
    """Tell whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def name_of_device(device: torch.device) -> str:
    """Return what a GPU or a CPU calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "cpu"
