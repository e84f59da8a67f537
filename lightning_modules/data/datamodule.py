"""Batches out of a pack: gathered by row, never decoded, in an order that can be replayed."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_modules.data.manifest import Manifest, some_of
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed

# Validation keeps no activations; this many images fill a device and fit in any.
VAL_BATCH_SIZE = 64

# Images, and the features of either split, go to a GPU whole where each takes no more than this
# part of the trial's share of its memory.
RESIDENT_SHARE = 0.1


class Batch(NamedTuple):
    """What one step works on, on the trainer's device.

    Attributes:
        images: Shape ``(B, 1, H, W)``, uint8 grey; none where features stand in for them.
        features: What the frozen stages make of the images' views, channels last; none if it is
            not known.
        labels: Shape ``(B,)``, int64 class indices.
        rows: Shape ``(B,)``, int64 row numbers, which views are drawn from.
        weights: Shape ``(B,)``, float32: of each image's loss; none weighs all alike.
    """

    images: Tensor | None
    features: Tensor | None
    labels: Tensor
    rows: Tensor
    weights: Tensor | None = None

    def split(self, size: int) -> list["Batch"]:
        """Return parts of at most ``size`` images, as equal as can be, in the batch's order."""
        num_parts = -(-len(self.labels) // size)
        parts = [
            [None] * num_parts if values is None else values.tensor_split(num_parts)
            for values in self
        ]
        return [Batch(*part) for part in zip(*parts, strict=True)]


# Returns the features of all rows of a split at an epoch, in the split's order, or none.
FeaturesOf = Callable[[str, int], Tensor | None]


class Steps:
    """The batches of one epoch, each gathered when its turn comes.

    To Lightning this is one batch: its own cost of 1.0 to 1.4 ms a batch would be several times
    that of a step on cached features, and would keep a GPU waiting.

    Args:
        rows: Row numbers of each step.
        split: ``train`` or ``val``.
        epoch: Counted from 0.
        data: Gathers.
    """

    def __init__(
        self, rows: Sequence[Tensor], *, split: str, epoch: int, data: "PackDataModule"
    ) -> None:
        self.rows = rows
        self.split = split
        self.epoch = epoch
        self.data = data

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        device = self.data.device
        sizes = [len(rows) for rows in self.rows]
        rows = torch.cat(list(self.rows))
        features = self.data.features_of(self.split, self.epoch)
        # Gathered where they lie: what does not fit a GPU whole goes there batch by batch.
        values = self.data.images if features is None else features
        places = rows if features is None else self.data.place_in_split[rows]
        weights: Sequence[Tensor | None] = [None] * len(sizes)
        if self.split == "train" and self.data.loss_weights is not None:
            weights = self.data.loss_weights[rows].to(device).split(sizes)
        for taken, labels, on_device, weight in zip(
            places.to(values.device).split(sizes),
            self.data.labels[rows].to(device).split(sizes),
            rows.to(device).split(sizes),
            weights,
            strict=True,
        ):
            batch = take_rows(values, taken).to(device, non_blocking=True)
            if features is None:
                yield Batch(batch.unsqueeze(1), None, labels, on_device, weight)
            else:
                yield Batch(None, batch, labels, on_device, weight)


class EpochSteps(Dataset[Steps]):
    """Turns the rows of an epoch's steps into what Lightning is to take as one batch.

    Args:
        split: ``train`` or ``val``.
        data: Gathers.
    """

    def __init__(self, split: str, data: "PackDataModule") -> None:
        self.split = split
        self.data = data

    def __getitem__(self, epoch_rows: tuple[int, Sequence[Tensor]]) -> Steps:
        """Return the steps of an epoch."""
        epoch, rows = epoch_rows
        return Steps(rows, split=self.split, epoch=epoch, data=self.data)


class EpochOrder(Sampler[tuple[int, Sequence[Tensor]]]):
    """Rows of the training split in a new order each epoch, cut into steps.

    The order is a function of (seed, epoch). The last, smaller batch is left out where there is a
    full one: BatchNorm would estimate its statistics from a handful of images.

    Args:
        rows: Row numbers to draw from.
        batch_size: Rows a step.
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

    @property
    def num_steps(self) -> int:
        """Steps an epoch."""
        return max(1, len(self.rows) // self.batch_size)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[tuple[int, Sequence[Tensor]]]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, self.epoch))
        if self.row_weights is None:
            order = torch.randperm(len(self.rows), generator=generator)
        else:
            order = torch.multinomial(
                self.row_weights, len(self.rows), replacement=True, generator=generator
            )
        yield self.epoch, self.rows[order].split(self.batch_size)[: self.num_steps]


class PackDataModule(pl.LightningDataModule):
    """Training and validation steps of one manifest and its pack.

    Images are gathered by row from memory: the pack is mapped once a process, its pages are shared
    by all processes of the node, and a GPU gets a copy of its own where it fits. Test rows are not
    served here: only an evaluation reads them.

    Args:
        manifest: Rows, labels, and splits.
        pack: The manifest's images.
        batch_size: Images a training step.
        seed: The trial's seed, for the order.
        balanced_sampling: Draw every class equally often, rare images several times an epoch. The
            same image then shows the same view within an epoch.
        source_weights: By source: how much an image's training loss counts, see
            ``source_loss_weights``; none weighs all alike. Validation is never weighted.
        gpu_share: How much of a GPU is the trial's; of no meaning on a CPU.

    Attributes:
        features_of: Asked for a split's features before each epoch; knows none unless replaced.
    """

    def __init__(
        self,
        manifest: Manifest,
        pack: Pack,
        *,
        batch_size: int,
        seed: int,
        balanced_sampling: bool = False,
        source_weights: Mapping[str, float] | None = None,
        gpu_share: float = 1.0,
    ) -> None:
        super().__init__()
        self.pack = pack
        self.gpu_share = gpu_share
        self.labels = torch.from_numpy(manifest.labels())
        self.rows = {name: torch.from_numpy(manifest.rows(name)) for name in ("train", "val")}
        self.features_of: FeaturesOf = lambda split, epoch: None
        self.loss_weights = (
            source_loss_weights(manifest, source_weights) if source_weights else None
        )
        row_weights = None
        if balanced_sampling:
            train_labels = self.labels[self.rows["train"]]
            row_weights = 1.0 / torch.bincount(train_labels).double()[train_labels]
        self.train_order = EpochOrder(
            self.rows["train"], batch_size=batch_size, seed=seed, row_weights=row_weights
        )
        # Where in its split a row is: features are stored a split at a time.
        self.place_in_split = torch.full((len(self.labels),), -1)
        for rows in self.rows.values():
            self.place_in_split[rows] = torch.arange(len(rows))

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        if self.trainer is None:
            return torch.device("cpu")
        return self.trainer.strategy.root_device

    @property
    def images(self) -> Tensor:
        """All images of the pack: shape ``(N, H, W)``, uint8."""
        return resident_images(self.pack, self.device, self.gpu_share)

    def settle(self, features: Tensor) -> Tensor:
        """Return features on the GPU if there is one and they fit; else where they are."""
        return settle(features, self.device, self.gpu_share)

    def train_dataloader(self) -> DataLoader[Steps]:
        """Return the steps of the order's epoch, as one batch."""
        return DataLoader(EpochSteps("train", self), sampler=self.train_order, batch_size=None)

    def val_dataloader(self) -> DataLoader[Steps]:
        """Return the validation images, always in row order, as one batch."""
        order = [(0, self.rows["val"].split(VAL_BATCH_SIZE))]
        return DataLoader(EpochSteps("val", self), sampler=order, batch_size=None)


@functools.lru_cache(maxsize=4)
def resident_images(pack: Pack, device: torch.device, gpu_share: float) -> Tensor:
    """Return a pack's images, mapped, or on the device where they fit; once a process.

    Returns:
        Shape ``(N, H, W)``, uint8.
    """
    return settle(torch.from_numpy(pack.images()), device, gpu_share)


def settle(values: Tensor, device: torch.device, gpu_share: float) -> Tensor:
    """Return values on a GPU if they fit there; else where they are, to be gathered from."""
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        if values.nbytes <= RESIDENT_SHARE * min(free_bytes, gpu_share * total_bytes):
            return values.to(device)
    return values


def take_rows(values: Tensor, places: Tensor) -> Tensor:
    """Gather by the first dimension, channels last where there are channels.

    ``index_select`` copies rows whole where they are contiguous; an index in brackets takes ten
    times as long.
    """
    if values.ndim < 4:
        return torch.index_select(values, 0, places)
    return torch.index_select(values.permute(0, 2, 3, 1), 0, places).permute(0, 3, 1, 2)


def balanced_class_weights(manifest: Manifest) -> list[float]:
    """Return loss weights inverse to the training split's class frequencies, mean 1 an image.

    Class c of k weighs n / (k n_c), as scikit-learn's ``class_weight="balanced"`` has it.
    """
    labels = manifest.labels()[manifest.rows("train")]
    counts = np.bincount(labels, minlength=len(manifest.classes))
    return [float(weight) for weight in len(labels) / (len(counts) * counts)]


def source_loss_weights(manifest: Manifest, source_weights: Mapping[str, float]) -> Tensor:
    """Return the loss weight of every row by its source, mean 1 over the training rows.

    Args:
        manifest: Rows, sources, and splits.
        source_weights: Positive, by source; a source that is not named weighs 1.

    Returns:
        Shape ``(N,)``, float32.

    Raises:
        InputError: If a source is named that no image has.
    """
    sources = manifest.frame["source"]
    known = sorted(set(sources))
    unknown = sorted(set(source_weights) - set(known))
    if unknown:
        raise InputError(
            "data.source_weights must name sources of the images; got "
            f"{some_of([repr(source) for source in unknown])}, and there are {some_of(known)}"
        )
    weights = sources.map(lambda source: source_weights.get(source, 1.0)).to_numpy(np.float64)
    mean = weights[manifest.rows("train")].mean()
    return torch.from_numpy((weights / mean).astype(np.float32))
