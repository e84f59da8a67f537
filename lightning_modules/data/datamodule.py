"""Batches out of a pack: gathered by row, never decoded, in an order that can be replayed."""

from collections.abc import Iterator

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.seeds import derive_seed

Batch = tuple[Tensor, Tensor, Tensor]

# Validation keeps no activations; this many images fill a device and fit in any.
VAL_BATCH_SIZE = 64


class PackDataset(Dataset[Batch]):
    """Images and labels of a pack, a whole batch at a time.

    Args:
        images: Shape ``(N, H, W)``, uint8 grey; may be memory-mapped.
        labels: Shape ``(N,)``, int64 class indices.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images = images
        self.labels = torch.from_numpy(labels)

    def __getitem__(self, rows: Tensor) -> Batch:
        """Return images ``(B, 1, H, W)`` uint8, labels ``(B,)``, and the rows themselves."""
        images = torch.from_numpy(self.images[rows.numpy()]).unsqueeze(1)
        return images, self.labels[rows], rows


class EpochBatches(Sampler[Tensor]):
    """Rows of the training split in a new order each epoch, a batch at a time.

    The order is a function of (seed, epoch). The last, smaller batch is left out where there is a
    full one: BatchNorm would estimate its statistics from a handful of images.

    Args:
        rows: Row numbers to draw from.
        batch_size: Rows a batch.
        seed: The trial's seed.
        row_weights: Draw with replacement, in proportion to these; each row once if not given.
    """

    def __init__(
        self, rows: Tensor, *, batch_size: int, seed: int, row_weights: Tensor | None = None
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.seed = seed
        self.row_weights = row_weights
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order that comes next; Lightning calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(1, len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        if self.row_weights is None:
            order = torch.randperm(len(self.rows), generator=generator)
        else:
            order = torch.multinomial(
                self.row_weights, len(self.rows), replacement=True, generator=generator
            )
        yield from self.rows[order].split(self.batch_size)[: len(self)]


class PackDataModule(pl.LightningDataModule):
    """Training and validation batches of one manifest and its pack.

    A batch is images ``(B, 1, H, W)`` uint8, labels ``(B,)`` int64, and row numbers ``(B,)`` int64,
    which the views are drawn from. Test rows are not served here: only an evaluation reads them.

    Args:
        manifest: Rows, labels, and splits.
        pack: The manifest's images.
        batch_size: Images a training batch.
        seed: The trial's seed, for the order.
        balanced_sampling: Draw every class equally often, rare images several times an epoch. The
            same image then shows the same view within an epoch.
    """

    def __init__(
        self,
        manifest: Manifest,
        pack: Pack,
        *,
        batch_size: int,
        seed: int,
        balanced_sampling: bool = False,
    ) -> None:
        super().__init__()
        labels = manifest.labels()
        self.dataset = PackDataset(pack.images(), labels)
        self.train_rows = torch.from_numpy(manifest.rows("train"))
        self.val_rows = torch.from_numpy(manifest.rows("val"))
        row_weights = None
        if balanced_sampling:
            train_labels = self.dataset.labels[self.train_rows]
            row_weights = 1.0 / torch.bincount(train_labels).double()[train_labels]
        self.train_batches = EpochBatches(
            self.train_rows, batch_size=batch_size, seed=seed, row_weights=row_weights
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training batches of the sampler's epoch."""
        return DataLoader(self.dataset, sampler=self.train_batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches, always in row order."""
        batches = self.val_rows.split(VAL_BATCH_SIZE)
        return DataLoader(self.dataset, sampler=batches, batch_size=None)


def balanced_class_weights(manifest: Manifest) -> list[float]:
    """Return loss weights inverse to the training split's class frequencies, mean 1 an image.

    Class c of k weighs n / (k n_c), as scikit-learn's ``class_weight="balanced"`` has it.
    """
    labels = manifest.labels()[manifest.rows("train")]
    counts = np.bincount(labels, minlength=len(manifest.classes))
    return [float(weight) for weight in len(labels) / (len(counts) * counts)]
