"""Images count in the training loss by their source; without that, nothing changes."""

import math
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import Batch, PackDataModule, source_loss_weights
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError

Data = tuple[Manifest, Pack]

# Lightning warns of what is meant here: frozen stages, few batches, no worker processes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
]

SIDE_PX = 32


@pytest.fixture
def data(tiny_data: Data) -> Data:
    """Of eight training images the first two are of "a", the next three of "b", the rest of "c"."""
    manifest, pack = tiny_data
    frame = manifest.frame.copy()
    frame["source"] = "c"
    rows = manifest.rows("train")
    frame.loc[rows[:2], "source"] = "a"
    frame.loc[rows[2:5], "source"] = "b"
    return Manifest(manifest.root, frame), pack


def make_module(**changes: Any) -> ImageClassifier:
    settings: dict[str, Any] = {
        "backbone": "mobilenet_v2",
        "num_classes": 3,
        "image_size_px": SIDE_PX,
        "unfreeze_depth": 0,
        "dropout": 0.0,
        "seed": 5,
    }
    return ImageClassifier(**(settings | changes))


def make_batch(weights: Tensor | None, copies: tuple[int, ...] = (1, 1, 1, 1)) -> Batch:
    """Four pooled features with large differences, each as often as is said."""
    features = torch.randn(4, 1280, generator=torch.Generator().manual_seed(0)) * 5
    labels = torch.tensor([0, 1, 2, 0])
    which = torch.repeat_interleave(torch.arange(4), torch.tensor(copies))
    return Batch(None, features[which], labels[which], which, weights)


# By row


def test_weights_have_mean_one_over_the_training_images(data: Data) -> None:
    manifest, _ = data
    weights = source_loss_weights(manifest, {"a": 4, "b": 1})
    # (2 * 4 + 3 * 1 + 3 * 1) / 8 = 1.75; "c" is not named and weighs 1, too.
    expected = [4 / 1.75] * 2 + [1 / 1.75] * 6
    rows = manifest.rows("train")
    assert weights[rows].tolist() == pytest.approx(expected)
    assert weights.dtype == torch.float32
    assert float(weights[rows].mean()) == pytest.approx(1)


def test_only_their_ratios_matter(data: Data) -> None:
    manifest, _ = data
    one = source_loss_weights(manifest, {"a": 2, "b": 1, "c": 0.5})
    other = source_loss_weights(manifest, {"a": 200, "b": 100, "c": 50})
    torch.testing.assert_close(one, other)


def test_a_source_that_no_image_has_is_an_error_that_names_those_there_are(data: Data) -> None:
    with pytest.raises(InputError) as error:
        source_loss_weights(data[0], {"a": 2, "figshar": 3})
    assert str(error.value) == (
        "data.source_weights must name sources of the images; got 'figshar', and there are a, b, c"
    )


def test_training_batches_carry_their_rows_weights_and_validation_none(data: Data) -> None:
    manifest, pack = data
    source_weights = {"a": 3.0}
    module = PackDataModule(manifest, pack, batch_size=4, seed=0, source_weights=source_weights)
    by_row = source_loss_weights(manifest, source_weights)
    (steps,) = module.train_dataloader()
    for batch in steps:
        assert batch.weights is not None
        assert torch.equal(batch.weights, by_row[batch.rows])
    (steps,) = module.val_dataloader()
    assert [batch.weights for batch in steps] == [None]


@pytest.mark.parametrize("nothing", [None, {}])
def test_without_source_weights_batches_carry_none(
    data: Data, nothing: dict[str, float] | None
) -> None:
    manifest, pack = data
    module = PackDataModule(manifest, pack, batch_size=4, seed=0, source_weights=nothing)
    (steps,) = module.train_dataloader()
    assert [batch.weights for batch in steps] == [None, None]


# In the loss


def test_the_loss_is_the_written_out_one_with_class_weights_and_smoothing() -> None:
    class_weights, smoothing, image_weights = [0.5, 2.0, 4.0], 0.1, [0.25, 2.0, 1.0, 0.75]
    module = make_module(class_weights=class_weights, label_smoothing=smoothing)
    batch = make_batch(torch.tensor(image_weights))
    with torch.no_grad():
        loss, logits = module.loss_of(batch)
    total = 0.0
    for scores, label, image_weight in zip(
        logits.tolist(), batch.labels.tolist(), image_weights, strict=True
    ):
        log_sum = math.log(sum(math.exp(score) for score in scores))
        losses = [w * (log_sum - score) for w, score in zip(class_weights, scores, strict=True)]
        total += image_weight * ((1 - smoothing) * losses[label] + smoothing * sum(losses) / 3)
    expected = total / sum(class_weights[label] for label in batch.labels.tolist())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_an_image_of_weight_two_pulls_like_two_images() -> None:
    module = make_module()
    loss, _ = module.loss_of(make_batch(torch.tensor([1.0, 2.0, 1.0, 3.0])))
    (weighted,) = torch.autograd.grad(loss * 4, module.head.weight)
    loss, _ = module.loss_of(make_batch(None, copies=(1, 2, 1, 3)))
    (repeated,) = torch.autograd.grad(loss * 7, module.head.weight)
    torch.testing.assert_close(weighted, repeated)
    assert float(repeated.abs().max()) > 0.1


@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 4.0]])
def test_without_weights_the_loss_is_torchs_own_to_the_bit(
    class_weights: list[float] | None,
) -> None:
    module = make_module(class_weights=class_weights, label_smoothing=0.1)
    batch = make_batch(None)
    loss, logits = module.loss_of(batch)
    weight = None if class_weights is None else torch.tensor(class_weights)
    expected = F.cross_entropy(logits, batch.labels, weight=weight, label_smoothing=0.1)
    assert torch.equal(loss, expected)
    same, _ = module.loss_of(make_batch(torch.ones(4)))
    torch.testing.assert_close(same, expected)


def fit(data: Data, source_weights: dict[str, float] | None) -> dict[str, float]:
    manifest, pack = data
    module = make_module(unfreeze_depth=1, lr=1e-2, max_epochs=2)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    datamodule = PackDataModule(manifest, pack, batch_size=4, seed=5, source_weights=source_weights)
    trainer.fit(module, datamodule=datamodule)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def test_training_sees_the_weights_and_one_weight_for_all_changes_nothing(data: Data) -> None:
    plain = fit(data, None)
    assert fit(data, {}) == plain
    assert fit(data, {"a": 7, "b": 7, "c": 7}) == pytest.approx(plain, rel=1e-3)
    weighted = fit(data, {"a": 50})
    assert abs(weighted["train_loss"] - plain["train_loss"]) > 0.01
    assert weighted["val_loss"] != plain["val_loss"]
