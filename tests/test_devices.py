"""Nothing of a step lies on another device than the rest, as on a GPU, where there is none.

Torch's fake tensors have shapes, dtypes, and devices, and refuse what mixes devices as a GPU
would; they have no values. Of a step there is all but the way back, for which torch asks a driver.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_modules.backbones import BACKBONES
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import datamodule
from lightning_modules.data.datamodule import PackDataModule
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.feature_cache import FeatureCache
from lightning_modules.feature_keys import FeatureKeys

MakeData = Callable[..., tuple[Manifest, Pack]]

GPU = torch.device("cuda:0")
SIDE_PX = 32


@contextlib.contextmanager
def fake_gpu(patch: pytest.MonkeyPatch, *, memory_bytes: int) -> Iterator[None]:
    """Have fake tensors, also on a GPU with so much memory, all of it free."""
    patch.setattr(torch.backends.cudnn, "enabled", False)  # its sampling has no fake
    patch.setattr(torch.cuda, "mem_get_info", lambda device: (memory_bytes, memory_bytes))
    datamodule.resident_images.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        datamodule.resident_images.cache_clear()


def to_gpu(module: torch.nn.Module) -> None:
    """Put a module on the fake GPU; ``Module.to`` refuses."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                there = torch.empty_like(parameter, device=GPU)
                child._parameters[name] = torch.nn.Parameter(there, parameter.requires_grad)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                child._buffers[name] = torch.empty_like(buffer, device=GPU)


def make_module(depth: int, backbone: str = "mobilenet_v2") -> ImageClassifier:
    module = ImageClassifier(
        backbone=backbone,
        num_classes=3,
        image_size_px=SIDE_PX,
        unfreeze_depth=depth,
        class_weights=[1.0, 1.0, 2.0],
    )
    trainer: Any = SimpleNamespace(current_epoch=0)
    module._trainer = trainer
    # Frozen stages are the process's, for all modules: what is put on the fake GPU is a copy.
    module.backbone = copy.deepcopy(module.backbone)
    return module


def make_steps(data: tuple[Manifest, Pack]) -> PackDataModule:
    manifest, pack = data
    sources = {source: 2.0 for source in manifest.frame["source"].unique()}
    steps = PackDataModule(manifest, pack, batch_size=4, seed=0, source_weights=sources)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=GPU))
    steps.trainer = trainer
    return steps


@pytest.fixture
def data(make_data: MakeData) -> tuple[Manifest, Pack]:
    return make_data(train=(4, 4, 4), val=(3, 3, 3), image_size_px=SIDE_PX)


@pytest.mark.parametrize(("depth", "memory_bytes"), [(0, 2**30), (2, 0), (5, 2**30), (5, 0)])
def test_a_step_mixes_no_devices(
    data: tuple[Manifest, Pack], monkeypatch: pytest.MonkeyPatch, depth: int, memory_bytes: int
) -> None:
    module, steps = make_module(depth), make_steps(data)
    # Torch's loader draws a number, which a fake tensor does not have.
    train, val = next(iter(steps.train_dataloader())), next(iter(steps.val_dataloader()))
    with fake_gpu(monkeypatch, memory_bytes=memory_bytes):
        to_gpu(module)
        module.views.num_samples = len(steps.labels)  # as a training step sets it
        assert (steps.images.device == GPU) == (memory_bytes > 0)
        for batch in train:
            kept = module.draw_kept(len(batch.labels), seed=0)
            loss, logits = module.loss_of(batch, kept=kept)
            assert loss.device == logits.device == GPU
        for batch in val:
            logits = module.score(batch)
            assert logits.device == GPU
            assert F.cross_entropy(logits, batch.labels).device == GPU


@pytest.mark.slow
@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "mobilenet_v2"])
def test_no_backbone_mixes_devices(
    data: tuple[Manifest, Pack], monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    module, steps = make_module(3, backbone), make_steps(data)
    train = next(iter(steps.train_dataloader()))
    with fake_gpu(monkeypatch, memory_bytes=2**30):
        to_gpu(module)
        batch = next(iter(train))
        assert module.loss_of(batch)[0].device == GPU


def test_features_are_computed_on_the_gpu_and_kept_off_it(
    data: tuple[Manifest, Pack], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, steps = make_module(2), make_steps(data)
    store: Any = SimpleNamespace(find=lambda key: None)
    cache = FeatureCache(
        module, steps, store=store, weights_digest="w", precision="32-true", views_are_shared=True
    )
    monkeypatch.setattr(FeatureKeys, "of", lambda *_: "key")
    train = next(iter(steps.train_dataloader()))
    with fake_gpu(monkeypatch, memory_bytes=2**30):
        to_gpu(module)
        (block,) = cache._blocks("train", epoch=1, cut=3)
        assert block.device.type == "cpu"
        steps.features_of = lambda split, epoch: steps.settle(block.permute(0, 3, 1, 2))
        for batch in train:
            assert batch.images is None
            assert module.loss_of(batch)[0].device == GPU


@pytest.mark.parametrize(
    ("gpu_share", "free_bytes", "is_there"),
    [
        (1.0, 10_000, True),  # a tenth of 10,000 is just enough
        (0.5, 10_000, False),  # half a GPU's tenth is 500
        (1.0, 9_999, False),  # another process has taken some
    ],
)
def test_what_lies_on_a_gpu_keeps_to_the_trials_share(
    monkeypatch: pytest.MonkeyPatch, gpu_share: float, free_bytes: int, is_there: bool
) -> None:
    with fake_gpu(monkeypatch, memory_bytes=0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 10_000))
        values = torch.zeros(1000, dtype=torch.uint8)
        assert (datamodule.settle(values, GPU, gpu_share).device == GPU) == is_there
