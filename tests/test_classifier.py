"""Frozen is frozen, a run can be replayed and resumed bit for bit, and scores are right."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import Tensor, nn

from lightning_modules.backbones import build_network
from lightning_modules.classifier import ImageClassifier, lr_factor
from lightning_modules.data.datamodule import Batch, PackDataModule
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from search.study.sweep_files import LocalFiles
from search.tuning.checkpoint import AtomicCheckpointIO

Data = tuple[Manifest, Pack]
MakeData = Callable[..., Data]
MakeModule = Callable[..., ImageClassifier]
State = dict[str, Tensor]

# Lightning warns of what is meant here: frozen stages, few batches, no worker processes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
]

SIDE_PX = 32


@pytest.fixture(scope="session")
def live_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of MobileNetV2 whose BatchNorm statistics are those of noise.

    Without them, in eval mode, the features of all images are equal to nine digits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network("mobilenet_v2")
        for child in network.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.momentum = 1.0
        with torch.no_grad():
            network(torch.randn(32, 3, SIDE_PX, SIDE_PX))
        for child in network.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.num_batches_tracked.zero_()
    path = tmp_path_factory.mktemp("weights") / "live.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def make_module(live_weights: Path) -> MakeModule:
    def make(**changes: Any) -> ImageClassifier:
        settings: dict[str, Any] = {
            "backbone": "mobilenet_v2",
            "num_classes": 3,
            "image_size_px": SIDE_PX,
            "unfreeze_depth": 1,
            "lr": 1e-2,
            "seed": 5,
            "max_epochs": 4,
            "weights_path": str(live_weights),
        }
        return ImageClassifier(**(settings | changes))

    return make


def fit(
    module: ImageClassifier,
    data: Data,
    *callbacks: pl.Callback,
    max_epochs: int = 1,
    batch_size: int = 4,
    seed: int = 5,
    resume: Path | None = None,
    accelerator: str = "cpu",
) -> pl.Trainer:
    """Trains as a trial does, in float32."""
    manifest, pack = data
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=max_epochs,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO(LocalFiles("."))],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    datamodule = PackDataModule(manifest, pack, batch_size=batch_size, seed=seed)
    trainer.fit(module, datamodule=datamodule, ckpt_path=resume)
    return trainer


def copy_of(module: nn.Module) -> State:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


def changed(before: State, after: State) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class SaveAt(pl.Callback):
    """Saves a checkpoint at the end of an epoch, counted from 1, as a trial does."""

    def __init__(self, path: Path, epoch: int) -> None:
        self.path = path
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epoch:
            trainer.save_checkpoint(self.path)


class KeepMetrics(pl.Callback):
    """Keeps every epoch's metrics as they are when a trial reports them."""

    def __init__(self) -> None:
        self.epochs: dict[int, dict[str, float]] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.epochs[trainer.current_epoch] = metrics


# Freezing


@pytest.mark.parametrize(
    ("depth", "changes"),
    [
        (0, {}),
        (2, {}),
        (5, {}),
        pytest.param(1, {"backbone": "resnet50", "weights_path": None}, marks=pytest.mark.slow),
    ],
)
def test_a_frozen_stage_is_bit_identical_after_fit_and_a_trained_one_is_not(
    make_module: MakeModule, tiny_data: Data, depth: int, changes: dict[str, Any]
) -> None:
    # Without weight decay, only a gradient moves a weight.
    module = make_module(unfreeze_depth=depth, weight_decay=0.0, **changes)
    before = copy_of(module)
    fit(module, tiny_data)
    moved = changed(before, copy_of(module))
    assert moved >= {"head.weight", "head.bias"}
    for index, stage in enumerate(module.backbone.stages):
        prefix = f"backbone.stages.{index}."
        moved_here = {name for name in moved if name.startswith(prefix)}
        if index < 5 - depth:
            assert moved_here == set()
            continue
        # Every convolution, and every BatchNorm's statistics: 8 images, 4 a step.
        for name, child in stage.named_modules():
            if isinstance(child, nn.Conv2d):
                assert f"{prefix}{name}.weight" in moved_here
            if isinstance(child, nn.BatchNorm2d):
                assert f"{prefix}{name}.running_mean" in moved_here
                assert f"{prefix}{name}.running_var" in moved_here
                assert int(child.num_batches_tracked) == 2


@pytest.mark.gpu
def test_a_frozen_stage_is_bit_identical_after_fit_on_a_gpu(
    make_module: MakeModule, tiny_data: Data, device: str
) -> None:
    module = make_module(unfreeze_depth=2)
    before = copy_of(module)
    fit(module, tiny_data, accelerator=device)
    moved = changed(before, copy_of(module))
    assert {name.split(".")[2] for name in moved if name.startswith("backbone.")} == {"3", "4"}


def test_a_frozen_backbone_is_in_eval_mode_during_fit_and_a_trained_one_is_not(
    make_module: MakeModule, tiny_data: Data
) -> None:
    class KeepModes(pl.Callback):
        modes: tuple[list[bool], ...] = ()

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
        ) -> None:
            stages = pl_module.backbone.stages
            modes = [{child.training for child in stage.modules()} for stage in stages]
            self.modes += (modes,)

    # The second epoch comes after a validation, which puts everything in eval mode.
    keep = KeepModes()
    fit(make_module(unfreeze_depth=2), tiny_data, keep, max_epochs=2)
    assert keep.modes == ([{False}, {False}, {False}, {True}, {True}],) * 4


# Learning


@pytest.mark.slow
def test_eight_noise_images_are_learnt_by_heart(
    make_module: MakeModule, tiny_data: Data, tmp_path: Path
) -> None:
    manifest, pack = tiny_data
    rows = manifest.rows("train")
    noise = np.random.default_rng(0).integers(0, 256, (len(manifest.frame), SIDE_PX, SIDE_PX))
    path = tmp_path / "noise.npy"
    # Validated on what it was trained on: the same eight images in the rows of both splits.
    frame = manifest.frame.iloc[[*rows, *rows]].reset_index(drop=True)
    frame["split"] = ["train"] * 8 + ["val"] * 8
    images = noise[[*rows, *rows]].astype(np.uint8)
    np.save(path, images)
    module = make_module(
        unfreeze_depth=5,
        backbone_lr_factor=1.0,
        lr=3e-3,
        dropout=0.0,
        augmentation_strength=0.0,
        max_epochs=40,
    )
    keep = KeepMetrics()
    data = Manifest(manifest.root, frame), Pack(path, pack.digest, SIDE_PX, {})
    fit(module, data, keep, max_epochs=40, batch_size=8)
    assert keep.epochs[0]["train_loss"] > 0.8
    assert keep.epochs[39]["train_loss"] < 0.02
    # By BatchNorm's running statistics, which are rough after so few and odd images: from an epoch,
    # and from a kind of CPU, to the next, an image more or less is told.
    assert min(metrics["val_loss"] for metrics in keep.epochs.values()) < 0.5
    assert max(metrics["val_accuracy"] for metrics in keep.epochs.values()) >= 7 / 8


def test_the_loss_is_the_written_out_one_with_class_weights_and_smoothing(
    make_module: MakeModule,
) -> None:
    weights, smoothing = [0.5, 2.0, 4.0], 0.1
    module = make_module(
        unfreeze_depth=0, dropout=0.0, class_weights=weights, label_smoothing=smoothing
    )
    module.head.weight.data *= 20  # logits that differ
    generator = torch.Generator().manual_seed(0)
    shape = (5, 1, SIDE_PX, SIDE_PX)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels, rows = torch.tensor([0, 1, 2, 2, 0]), torch.tensor([3, 1, 4, 1, 5])
    with torch.no_grad():
        loss, _ = module.loss_of(Batch(images, None, labels, rows))
        logits = module(module.views(images, epoch=0, samples=rows)).tolist()
    total = 0.0
    for scores, label in zip(logits, labels.tolist(), strict=True):
        log_sum = math.log(sum(math.exp(score) for score in scores))
        losses = [weight * (log_sum - score) for weight, score in zip(weights, scores, strict=True)]
        total += (1 - smoothing) * losses[label] + smoothing * sum(losses) / 3
    expected = total / sum(weights[label] for label in labels.tolist())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    plain = make_module(unfreeze_depth=0, dropout=0.0)
    plain.head.load_state_dict(module.head.state_dict())
    with torch.no_grad():
        loss, _ = plain.loss_of(Batch(images, None, labels, rows))
        assert abs(float(loss) - expected) > 0.01


def test_a_grey_image_is_normalised_as_imagenet_was(make_module: MakeModule) -> None:
    module = make_module().eval()
    network = build_network("mobilenet_v2").eval()
    # The backbone's random weights under torchvision's names: both list stem first, head last.
    network.load_state_dict(
        dict(zip(network.state_dict(), module.backbone.state_dict().values(), strict=False)),
        strict=False,
    )
    network.classifier = module.head
    grey = torch.rand(2, SIDE_PX, SIDE_PX)
    colours = [
        (grey - mean) / std for mean, std in [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]
    ]
    with torch.no_grad():
        expected = network(torch.stack(colours, dim=1))
        torch.testing.assert_close(module(grey.unsqueeze(1)), expected)


# What is logged


def test_an_epoch_logs_these_metrics(make_module: MakeModule, tiny_data: Data) -> None:
    keep = KeepMetrics()
    fit(make_module(), tiny_data, keep)
    assert keep.epochs[0].keys() == {
        "train_loss", "train_macro_f1", "train_accuracy", "val_loss", "val_macro_f1", "val_accuracy"
    }  # fmt: skip


def test_train_loss_at_the_end_of_an_epoch_is_this_epochs(
    make_module: MakeModule, tiny_data: Data
) -> None:
    class LossByHand(pl.Callback):
        """Each step's loss before the weights move, from the backbone's features on."""

        def __init__(self) -> None:
            self.losses: dict[int, list[float]] = {}

        def on_train_batch_start(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
        ) -> None:
            self.batches = iter(list(batch))

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object
        ) -> None:
            images, _, labels, rows, _ = next(self.batches)
            with torch.no_grad():
                views = pl_module.views(images, epoch=trainer.current_epoch, samples=rows)
                scores = pl_module(views).exp()
            right = scores[range(len(labels)), labels]
            loss = -(right / scores.sum(1)).log().mean()
            self.losses.setdefault(trainer.current_epoch, []).append(float(loss))

    by_hand, keep = LossByHand(), KeepMetrics()
    module = make_module(unfreeze_depth=0, dropout=0.0, lr=0.05)
    fit(module, tiny_data, by_hand, keep, max_epochs=3)
    expected = [sum(by_hand.losses[epoch]) / 2 for epoch in range(3)]
    logged = [keep.epochs[epoch]["train_loss"] for epoch in range(3)]
    assert logged == pytest.approx(expected, rel=1e-5)
    assert min(abs(a - b) for a, b in pairwise(expected)) > 1e-3


def test_validation_scores_are_scikit_learns(make_module: MakeModule, make_data: MakeData) -> None:
    # Two batches of unequal size; class weights, which validation leaves out.
    manifest, pack = make_data(train=(4, 3, 1), val=(40, 25, 5))
    module = make_module(lr=0.03, unfreeze_depth=0, class_weights=[1.0, 3.0, 9.0])
    keep = KeepMetrics()
    fit(module, (manifest, pack), keep)
    module.eval()
    rows = manifest.rows("val")
    images = torch.from_numpy(pack.images()[rows]).unsqueeze(1).float() / 255
    with torch.no_grad():
        logits = module(images).double().numpy()
    labels, predicted = manifest.labels()[rows], logits.argmax(1)
    assert len(set(predicted)) > 1
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(rows)), labels]
    logged = keep.epochs[0]
    assert logged["val_macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert logged["val_accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert logged["val_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert module.val_confusion.compute().tolist() == confusion_matrix(labels, predicted).tolist()


# Replaying and resuming


@pytest.mark.slow
def test_two_fits_with_one_seed_are_bit_equal_and_another_seed_differs(
    make_module: MakeModule, tiny_data: Data
) -> None:
    states, metrics = [], []
    for seed in (5, 5, 6):
        torch.manual_seed(len(states))  # what came before does not matter
        keep = KeepMetrics()
        module = make_module(seed=seed)
        fit(module, tiny_data, keep, seed=seed)
        states.append(copy_of(module))
        metrics.append(keep.epochs)
    assert changed(states[0], states[1]) == set()
    assert metrics[0] == metrics[1]
    assert "head.weight" in changed(states[0], states[2])
    assert metrics[0] != metrics[2]


@pytest.mark.parametrize("depth", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_four_epochs_equal_two_and_two_resumed_bit_for_bit(
    make_module: MakeModule, tiny_data: Data, tmp_path: Path, depth: int
) -> None:
    path, whole, rest = tmp_path / "two.ckpt", KeepMetrics(), KeepMetrics()
    module = make_module(unfreeze_depth=depth, dropout=0.5)
    fit(module, tiny_data, SaveAt(path, epoch=2), whole, max_epochs=4)
    torch.manual_seed(123)
    resumed = make_module(unfreeze_depth=depth, dropout=0.5)
    fit(resumed, tiny_data, rest, max_epochs=4, resume=path)
    assert changed(copy_of(module), copy_of(resumed)) == set()
    assert list(rest.epochs) == [2, 3]
    assert rest.epochs == {epoch: whole.epochs[epoch] for epoch in (2, 3)}


@pytest.mark.slow
def test_an_epochs_loss_depends_on_the_weights_and_the_epoch_alone(
    make_module: MakeModule, tiny_data: Data, tmp_path: Path
) -> None:
    class Disturb(pl.Callback):
        """Draws numbers before every epoch that no other run draws."""

        def on_train_epoch_start(self, *_: object) -> None:
            torch.rand(torch.seed() % 1000)

    # At a learning rate of 0 the weights stay; dropout, order, and views go on.
    def run(*callbacks: pl.Callback, resume: Path | None = None) -> dict[int, float]:
        keep = KeepMetrics()
        module = make_module(unfreeze_depth=0, lr=0.0, dropout=0.5)
        fit(module, tiny_data, keep, *callbacks, max_epochs=2, resume=resume)
        return {epoch: metrics["train_loss"] for epoch, metrics in keep.epochs.items()}

    path = tmp_path / "one.ckpt"
    losses = run(SaveAt(path, epoch=1))
    assert losses[0] != losses[1]
    assert run(Disturb()) == losses
    assert run(Disturb(), resume=path) == {1: losses[1]}


def test_building_a_module_does_not_touch_the_global_generator(make_module: MakeModule) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make_module()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_trials_seed_draws_the_head_and_the_sweeps_the_backbone(
    make_module: MakeModule,
) -> None:
    state = copy_of(make_module(seed=1, weights_path=None, weights_seed=1))
    assert changed(state, copy_of(make_module(seed=2, weights_path=None, weights_seed=1))) == {
        "head.weight",
        "head.bias",
    }
    assert "head.weight" not in changed(
        state, copy_of(make_module(seed=1, weights_path=None, weights_seed=2))
    )


# The optimizer


def test_the_learning_rate_warms_up_and_follows_a_half_cosine() -> None:
    factors = [lr_factor(step, warmup_steps=2, total_steps=8) for step in range(9)]
    # 1/2, 2/2, then (1 + cos(pi k / 6)) / 2 for k = 0 ... 6.
    half = math.sqrt(3) / 4
    assert factors == pytest.approx([0.5, 1, 1, 0.5 + half, 0.75, 0.5, 0.25, 0.5 - half, 0])


@pytest.mark.parametrize(
    ("step", "warmup_steps", "total_steps", "factor"),
    [(0, 0, 10, 1), (5, 0, 10, 0.5), (99, 2, 10, 0), (0, 1, 1, 1), (1, 1, 1, 1), (9, 10, 10, 1)],
)
def test_the_schedules_ends(step: int, warmup_steps: int, total_steps: int, factor: float) -> None:
    got = lr_factor(step, warmup_steps=warmup_steps, total_steps=total_steps)
    assert got == pytest.approx(factor)


def test_head_and_backbone_take_their_own_learning_rates_step_by_step(
    make_module: MakeModule, tiny_data: Data
) -> None:
    class KeepRates(pl.Callback):
        def __init__(self) -> None:
            self.rates: list[list[float]] = []

        def on_before_optimizer_step(
            self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
        ) -> None:
            self.rates.append([group["lr"] for group in optimizer.param_groups])

    keep = KeepRates()
    module = make_module(lr=0.04, backbone_lr_factor=0.25, warmup_epochs=1.0)
    fit(module, tiny_data, keep, max_epochs=4)
    # Two steps an epoch; the warm-up is one epoch of four.
    half = math.sqrt(3) / 4
    factors = [0.5, 1, 1, 0.5 + half, 0.75, 0.5, 0.25, 0.5 - half]
    expected = [[0.04 * f, 0.04 * f, 0.01 * f, 0.01 * f] for f in factors]
    np.testing.assert_allclose(keep.rates, expected, rtol=1e-9)


@pytest.mark.parametrize("depth", [0, 2, 5])
def test_every_trained_parameter_is_optimized_once_and_only_weights_decay(
    make_module: MakeModule, tiny_data: Data, depth: int
) -> None:
    module = make_module(unfreeze_depth=depth, weight_decay=0.25)
    optimizer = fit(module, tiny_data).optimizers[0]
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    assert decay.keys() == {id(p) for p in module.parameters() if p.requires_grad}
    for child in module.modules():
        own = {name: decay.get(id(p)) for name, p in child.named_parameters(recurse=False)}
        if isinstance(child, nn.BatchNorm2d):
            assert own in ({"weight": 0.0, "bias": 0.0}, {"weight": None, "bias": None})
        elif isinstance(child, nn.Conv2d):
            assert own in ({"weight": 0.25}, {"weight": None})
        else:
            assert own in ({}, {"weight": 0.25, "bias": 0.0})  # the head


# Checkpoints


def train_and_save(module: ImageClassifier, path: Path, data: Data) -> ImageClassifier:
    fit(module, data, SaveAt(path, epoch=1))
    return module.eval()


@pytest.fixture(scope="module")
def trained(
    make_module: MakeModule, tiny_data: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ImageClassifier, Path]:
    """A module with one trained stage, and its checkpoint; not to be changed."""
    path = tmp_path_factory.mktemp("trained") / "trained.ckpt"
    return train_and_save(make_module(unfreeze_depth=1), path, tiny_data), path


def read_checkpoint(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def load(path: Path, **changes: Any) -> ImageClassifier:
    return ImageClassifier.load_from_checkpoint(path, weights_only=True, **changes).eval()


@pytest.mark.slow
def test_a_head_only_checkpoint_holds_the_head_alone(
    make_module: MakeModule, tiny_data: Data, tmp_path: Path
) -> None:
    path, images = tmp_path / "head.ckpt", torch.rand(2, 1, SIDE_PX, SIDE_PX)
    module = make_module(backbone="resnet50", unfreeze_depth=0, weights_path=None)
    train_and_save(module, path, tiny_data)
    state = read_checkpoint(path)["state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "head.weight": (3, 2048),
        "head.bias": (3,),
    }
    # The backbone has 94 MB; the head and AdamW's two moments, 74 kB.
    assert path.stat().st_size < 200_000
    with torch.no_grad():
        assert torch.equal(load(path)(images), module(images))


def test_a_checkpoint_holds_the_trained_stages_and_their_statistics(
    trained: tuple[ImageClassifier, Path],
) -> None:
    module, path = trained
    state = read_checkpoint(path)["state_dict"]
    kept = ("backbone.stages.4.", "head.")
    assert state.keys() == {name for name in module.state_dict() if name.startswith(kept)}
    assert "backbone.stages.4.0.conv.0.1.running_var" in state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "changes"),
    [
        (0, {"weights_path": None, "weights_seed": 8}),
        (1, {}),
        (5, {"augmentation": {"noise": 0.5}, "class_weights": [1.0, 2.0, 3.0]}),
    ],
)
def test_a_loaded_checkpoint_gives_equal_logits_and_needs_nothing_else(
    make_module: MakeModule, tiny_data: Data, tmp_path: Path, depth: int, changes: dict[str, Any]
) -> None:
    path = tmp_path / "trained.ckpt"
    module = train_and_save(make_module(unfreeze_depth=depth, **changes), path, tiny_data)
    loaded, images = load(path), torch.rand(4, 1, SIDE_PX, SIDE_PX)
    with torch.no_grad():
        assert torch.equal(loaded(images), module(images))
    assert loaded.hparams == module.hparams
    assert changed(copy_of(module), copy_of(loaded)) == set()
    if depth == 5:  # nothing is frozen: what it started from does not matter
        loaded = load(path, weights_path=None)
        assert changed(copy_of(module), copy_of(loaded)) == set()


@pytest.mark.parametrize(
    ("depth", "found"),
    [
        # 13 convolutions and as many BatchNorms in the last stage: 13 + 13 * 5 tensors; in the one
        # before, 7 blocks of 3.
        (0, "78 foreign keys ['backbone.stages.4.0.conv.0.0.weight'], 0 missing []"),
        (2, "0 foreign keys [], 126 missing ['backbone.stages.3.0.conv.0.0.weight']"),
    ],
)
def test_a_checkpoint_of_another_depth_is_refused(
    trained: tuple[ImageClassifier, Path], depth: int, found: str
) -> None:
    with pytest.raises(InputError) as error:
        load(trained[1], unfreeze_depth=depth)
    assert str(error.value) == (
        f"checkpoint must hold this trial's trained tensors: {found}; use the trial's own file"
    )


def test_a_checkpoint_trained_on_other_frozen_weights_is_refused(
    make_module: MakeModule, trained: tuple[ImageClassifier, Path], tiny_data: Data
) -> None:
    module, path = trained
    other = make_module(weights_path=None)
    assert other.frozen_digest != module.frozen_digest
    message = (
        "checkpoint was trained on other initial weights: digest "
        f"{module.frozen_digest[:12]}, here {other.frozen_digest[:12]}; give the weights that the "
        "sweep started from"
    )
    with pytest.raises(InputError) as error:
        load(path, weights_path=None)
    assert str(error.value) == message
    with pytest.raises(InputError) as error:
        fit(other, tiny_data, max_epochs=2, resume=path)
    assert str(error.value) == message


def test_a_checkpoint_without_a_digest_is_refused(
    trained: tuple[ImageClassifier, Path], tmp_path: Path
) -> None:
    checkpoint = read_checkpoint(trained[1])
    del checkpoint["frozen_digest"]
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(InputError, match=r"on other initial weights: digest None, here "):
        load(tmp_path / "changed.ckpt")
