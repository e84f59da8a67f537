"""Where memory runs out, batches are passed in parts, and what is learned stays the same."""

import subprocess
import sys
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import Batch, PackDataModule
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.micro_batches import MicroBatches, is_out_of_memory

Data = tuple[Manifest, Pack]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
]


def make_batch(num_images: int) -> Batch:
    labels = torch.arange(num_images)
    return Batch(None, torch.rand(num_images, 3), labels, labels, None)


@pytest.mark.parametrize(
    ("num_images", "size", "sizes"),
    [(8, 8, [8]), (8, 4, [4, 4]), (33, 17, [17, 16]), (33, 9, [9, 8, 8, 8]), (3, 1, [1, 1, 1])],
)
def test_parts_are_as_equal_as_can_be_and_in_order(
    num_images: int, size: int, sizes: list[int]
) -> None:
    batch = make_batch(num_images)
    parts = batch.split(size)
    assert [len(part.labels) for part in parts] == sizes
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert all(part.images is None and part.weights is None for part in parts)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_parts_are_halved_until_they_fit_and_stay_so() -> None:
    batches, batch, tried = MicroBatches(), make_batch(32), []

    def compute() -> int:
        largest = max(len(part.labels) for part in batches.parts(batch))
        tried.append(largest)
        if largest > 5:
            raise MemoryError
        return largest

    assert batches.shrink_to_fit(compute, 32) == 4
    assert batches.shrink_to_fit(compute, 32) == 4
    assert tried == [32, 16, 8, 4, 4]


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    batches, tried = MicroBatches(), []

    def compute() -> None:
        tried.append(batches.size)
        raise MemoryError("too large")

    with pytest.raises(MemoryError, match="too large"):
        batches.shrink_to_fit(compute, 4)
    assert tried == [None, 2, 1]


def test_another_error_is_not_tried_again() -> None:
    tried = []

    def compute() -> None:
        tried.append(1)
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        MicroBatches().shrink_to_fit(compute, 4)
    assert tried == [1]


def train(data: Data, limit: float, **changes: Any) -> ImageClassifier:
    """Trains two epochs on a network that takes no more than ``limit`` images at once."""
    settings: dict[str, Any] = {"backbone": "vgg16", "unfreeze_depth": 1, "dropout": 0.5}
    module = ImageClassifier(
        **(settings | changes), num_classes=3, image_size_px=32, lr=1e-3, seed=5, max_epochs=2
    )
    run = module.logits

    def logits(features: Tensor, **options: Any) -> Tensor:
        if module.training and len(features) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return run(features, **options)

    module.logits = logits  # type: ignore[method-assign]  # the injected fault
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    manifest, pack = data
    trainer.fit(module, datamodule=PackDataModule(manifest, pack, batch_size=8, seed=5))
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"backbone": "mobilenet_v2", "unfreeze_depth": 0},
        {
            "backbone": "mobilenet_v2",
            "unfreeze_depth": 0,
            "class_weights": [0.5, 1.0, 3.0],
            "label_smoothing": 0.1,
        },
    ],
    ids=["plain", "weighted"],
)
def test_a_head_learns_the_same_in_parts(tiny_data: Data, changes: dict[str, Any]) -> None:
    whole = train(tiny_data, float("inf"), **changes)
    parts = train(tiny_data, 3, **changes)
    assert whole.micro_batches.size is None
    assert parts.micro_batches.size == 2
    # Dropout's draw included: a sum in another order is all that differs.
    for name, value in whole.head.state_dict().items():
        torch.testing.assert_close(parts.head.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert parts.trainer.callback_metrics["train_loss"] == pytest.approx(
        float(whole.trainer.callback_metrics["train_loss"]), rel=1e-5
    )


@pytest.mark.slow
def test_a_stage_without_batch_norm_learns_the_same_in_parts(tiny_data: Data) -> None:
    whole, parts = train(tiny_data, float("inf")), train(tiny_data, 3)
    assert parts.micro_batches.size == 2
    start = ImageClassifier(
        backbone="vgg16", num_classes=3, image_size_px=32, unfreeze_depth=1, seed=5
    )
    moved = 0.0
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, rtol=1e-3, atol=1e-5)
        moved += float((value - start.state_dict()[name]).abs().sum())
    assert moved > 1  # it has learned something at all


HUNGRY = """
import resource, torch
from lightning_modules.micro_batches import MicroBatches
from lightning_modules.data.datamodule import Batch

torch.set_num_threads(1)
rows = torch.arange(64)
batch = Batch(None, torch.rand(64, 1), rows, rows)
batches = MicroBatches()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))

def compute():
    # 64 MiB an image: a quarter of the batch fits into 1 GiB, half of it does not.
    return sum(float(torch.zeros(len(p.labels), 2**24)[0, 0]) for p in batches.parts(batch))

batches.shrink_to_fit(compute, 64)
print(batches.size)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_that_really_runs_out_is_survived() -> None:
    done = subprocess.run([sys.executable, "-c", HUNGRY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (4, 8)


@pytest.mark.gpu
def test_a_gpu_that_really_runs_out_of_memory_is_survived(device: str) -> None:
    batches, batch = MicroBatches(), make_batch(64)
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()

    def compute() -> int:
        sizes = [len(part.labels) for part in batches.parts(batch)]
        for size in sizes:
            # The whole batch asks for four times what there is.
            torch.empty(size * (free_bytes // 16), dtype=torch.uint8, device=device)
        return max(sizes)

    assert batches.shrink_to_fit(compute, 64) <= 16
