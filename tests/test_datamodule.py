"""Batches come by row, in an order that is a function of (seed, epoch); test rows never do."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from lightning_modules.data.datamodule import (
    Batch,
    EpochOrder,
    PackDataModule,
    Steps,
    balanced_class_weights,
)
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack

Data = tuple[Manifest, Pack]
MakeData = Callable[..., Data]

ROWS = torch.arange(100, 125)


def orders(order: EpochOrder) -> list[list[int]]:
    ((_, steps),) = order
    return [rows.tolist() for rows in steps]


def batches_of(loader: Iterable[Steps]) -> list[Batch]:
    """An epoch's batches: to a loader they are one."""
    (steps,) = loader
    batches = list(steps)
    assert len(batches) == len(steps)
    return batches


def make_batches(epoch: int = 0, seed: int = 7, batch_size: int = 8) -> list[list[int]]:
    batches = EpochOrder(ROWS, batch_size=batch_size, seed=seed)
    batches.set_epoch(epoch)
    return orders(batches)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    torch.manual_seed(1)
    one = make_batches(epoch=3)
    torch.manual_seed(2)
    assert make_batches(epoch=3) == one
    assert make_batches(epoch=4) != one
    assert make_batches(epoch=3, seed=8) != one


def test_an_epoch_can_be_drawn_again() -> None:
    batches = EpochOrder(ROWS, batch_size=8, seed=7)
    first = orders(batches)
    batches.set_epoch(1)
    assert orders(batches) != first
    batches.set_epoch(0)
    assert orders(batches) == first


def test_drawing_an_order_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make_batches()
    assert torch.equal(torch.get_rng_state(), before)


def test_each_row_comes_once() -> None:
    drawn = [row for batch in make_batches(batch_size=5) for row in batch]
    assert drawn != ROWS.tolist()
    assert sorted(drawn) == ROWS.tolist()


def test_the_last_smaller_batch_is_left_out() -> None:
    # 25 rows: three batches of 8, one row over, another one each epoch.
    over = set()
    for epoch in range(20):
        batches = make_batches(epoch=epoch)
        assert [len(batch) for batch in batches] == [8, 8, 8]
        drawn = {row for batch in batches for row in batch}
        assert len(drawn) == 24
        over |= set(ROWS.tolist()) - drawn
    assert len(over) > 5


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(25, [25]), (26, [25]), (1000, [25]), (24, [24]), (12, [12, 12])]
)
def test_a_smaller_batch_stays_where_it_is_the_only_one(batch_size: int, sizes: list[int]) -> None:
    order = EpochOrder(ROWS, batch_size=batch_size, seed=0)
    assert [len(batch) for batch in orders(order)] == sizes
    assert order.num_steps == len(sizes)


def make_module(data: Data, *, batch_size: int = 4, balanced: bool = False) -> PackDataModule:
    manifest, pack = data
    return PackDataModule(manifest, pack, batch_size=batch_size, seed=7, balanced_sampling=balanced)


def test_a_batch_holds_the_rows_images_and_labels(tiny_data: Data) -> None:
    manifest, pack = tiny_data
    for images, features, labels, rows, _ in batches_of(make_module(tiny_data).train_dataloader()):
        assert features is None
        assert images.shape == (4, 1, 32, 32)
        assert (images.dtype, labels.dtype, rows.dtype) == (torch.uint8, torch.int64, torch.int64)
        for image, label, row in zip(images, labels, rows.tolist(), strict=True):
            assert np.array_equal(image[0].numpy(), pack.images()[row])
            assert f"class_{label}" == manifest.frame["label"][row]
            assert manifest.frame["split"][row] == "train"


def test_validation_comes_whole_and_in_row_order(make_data: MakeData) -> None:
    data = make_data(val=(60, 5, 5))
    batches = batches_of(make_module(data).val_dataloader())
    assert [len(batch.rows) for batch in batches] == [64, 6]
    rows = torch.cat([batch.rows for batch in batches])
    assert rows.tolist() == data[0].rows("val").tolist()
    assert rows.tolist() == sorted(rows.tolist())
    labels = torch.cat([batch.labels for batch in batches])
    assert labels.bincount().tolist() == [60, 5, 5]


@pytest.mark.parametrize("balanced", [False, True])
def test_test_rows_are_never_served(make_data: MakeData, balanced: bool) -> None:
    data = make_data(train=(4, 3, 1), val=(2, 2, 1), test=(9, 9, 9))
    module, served = make_module(data, balanced=balanced), set()
    for epoch in range(20):
        module.train_order.set_epoch(epoch)
        for loader in (module.train_dataloader(), module.val_dataloader()):
            served |= {row for batch in batches_of(loader) for row in batch.rows.tolist()}
    assert served == {*data[0].rows("train").tolist(), *data[0].rows("val").tolist()}
    assert not served & set(data[0].rows("test").tolist())


def test_balanced_sampling_draws_classes_equally(make_data: MakeData) -> None:
    data = make_data(train=(450, 90, 9), val=(1, 1, 1), test=(0, 0, 0), image_size_px=8)
    module, counts = make_module(data, batch_size=61, balanced=True), torch.zeros(3)
    for epoch in range(10):
        module.train_order.set_epoch(epoch)
        for _, _, labels, rows, _ in batches_of(module.train_dataloader()):
            assert set(rows.tolist()) <= set(data[0].rows("train").tolist())
            counts += labels.bincount(minlength=3)
    # 549 = 9 * 61 draws an epoch. A class's count has mean 1830 and standard deviation
    # sqrt(5490 * 1/3 * 2/3) = 34.9; five of them. Unbalanced, it would be 4500, 900, 90.
    assert counts.sum() == 5490
    assert (counts - 1830).abs().max() < 175


def test_balanced_sampling_draws_the_images_of_a_class_equally(make_data: MakeData) -> None:
    data = make_data(train=(45, 5), val=(1, 1), test=(0, 0), image_size_px=8)
    module, drawn = make_module(data, batch_size=50, balanced=True), []
    for epoch in range(200):
        module.train_order.set_epoch(epoch)
        drawn += [row for batch in orders(module.train_order) for row in batch]
    counts = torch.tensor(drawn).bincount(minlength=len(data[0].frame)).double()
    labels = torch.from_numpy(data[0].labels())
    rows = torch.from_numpy(data[0].rows("train"))
    # 10,000 draws: 111 +- 10.5 an image of the large class, 1000 +- 30 one of the small.
    common, rare = counts[rows[labels[rows] == 0]], counts[rows[labels[rows] == 1]]
    assert (common - 10_000 / 90).abs().max() < 5 * 10.5
    assert (rare - 1000).abs().max() < 5 * 30


class RecordRows(pl.LightningModule):
    """Learns nothing; writes down the rows it is given, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.seen: dict[int, list[list[int]]] = {}

    def training_step(self, steps: Steps, batch_index: int) -> Tensor:
        self.seen[self.current_epoch] = [rows.tolist() for rows in steps.rows]
        return self.layer(torch.ones(1, 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: RecordRows, data: Data, max_epochs: int, resume: Path | None = None) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=make_module(data), ckpt_path=resume, weights_only=True)
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_chooses_the_order_of_each_epoch_also_when_it_resumes(
    tiny_data: Data, tmp_path: Path
) -> None:
    batches = EpochOrder(torch.from_numpy(tiny_data[0].rows("train")), batch_size=4, seed=7)
    expected = {}
    for epoch in range(3):
        batches.set_epoch(epoch)
        expected[epoch] = orders(batches)
    assert expected[0] != expected[1] != expected[2]

    whole = RecordRows()
    fit(whole, tiny_data, max_epochs=3)
    assert whole.seen == expected

    start = RecordRows()
    fit(start, tiny_data, max_epochs=1).save_checkpoint(tmp_path / "epoch.ckpt")
    assert start.seen == {0: expected[0]}
    rest = RecordRows()
    fit(rest, tiny_data, max_epochs=3, resume=tmp_path / "epoch.ckpt")
    assert rest.seen == {1: expected[1], 2: expected[2]}


def test_class_weights_are_scikit_learns_balanced_ones(make_data: MakeData) -> None:
    manifest, _ = make_data(train=(6, 3, 1), val=(1, 9, 1))
    weights = balanced_class_weights(manifest)
    # 10 images, 3 classes: 10 / (3 * 6), 10 / (3 * 3), 10 / (3 * 1).
    assert weights == pytest.approx([5 / 9, 10 / 9, 10 / 3], rel=1e-12)
    labels = manifest.labels()[manifest.rows("train")]
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert weights == pytest.approx(expected.tolist(), rel=1e-12)
    assert np.mean(np.array(weights)[labels]) == pytest.approx(1)
