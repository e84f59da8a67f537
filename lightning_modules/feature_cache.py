"""Features of the frozen stages: computed once a node for each view, and shared by all trials."""

import contextlib
import functools
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.backbones import GPU_BLOCK
from lightning_modules.classifier import FROZEN_BLOCK, ImageClassifier
from lightning_modules.data.datamodule import PackDataModule, take_rows
from lightning_modules.feature_keys import FeatureKeys
from lightning_modules.feature_store import Claim, FeatureStore

# While another worker computes an epoch's features, this one computes those of later epochs.
AHEAD_EPOCHS = 3

# Reading must take less than this share of the time to compute: a worker that writes features which
# nobody else asks for, those of shallower cuts included, and reads them back, loses less than that.
READ_SHARE = 0.5

POLL_S = 0.02


class FeatureCache:
    """Gives a trial the features of its frozen stages, from the node's store where that pays.

    Features are what the stages below the cut make of all images of a split: of the views of one
    epoch, or of the images as they are. They are stored under a key of all that they are a function
    of, see ``FeatureKeys``, so that every trial which asks for the same gets the same, to the last
    bit what it would have computed itself (on a CPU; to rounding on a GPU).

    A worker that computes features stores those of shallower cuts on its way, where other trials
    may have such cuts: what is frozen is passed once for all depths, whoever comes first.

    Nothing is stored where that cannot pay: if no other trial will see the same views, if reading
    takes as long as computing, or if there is no room. Then trials compute, batch by batch.

    Args:
        module: The trial's; its frozen stages are used, in whatever precision it is asked in.
        data: The trial's.
        store: The node's; none computes everything.
        weights_digest: Of the whole backbone before training.
        precision: As the trainer names it.
        views_are_shared: Whether other trials see the same views.
        cuts: How many stages may be frozen in other trials that see the same views.

    Attributes:
        outcome: What became of the training features of the last epoch asked for, for people.
    """

    def __init__(
        self,
        module: ImageClassifier,
        data: PackDataModule,
        *,
        store: FeatureStore | None,
        weights_digest: str,
        precision: str,
        views_are_shared: bool,
        cuts: Collection[int] = (),
    ) -> None:
        self.module = module
        self.data = data
        self.store = store
        self.views_are_shared = views_are_shared or module.views.strength == 0
        self.cut = module.frozen_stages
        self.cuts = cuts
        self.outcome = ""
        self.weights_digest = weights_digest
        self.precision = precision

    @functools.cached_property
    def keys(self) -> FeatureKeys:
        """What features are stored under; asked for once the trial's device is known."""
        views = self.module.views
        return FeatureKeys(
            backbone=self.module.backbone.name,
            weights_digest=self.weights_digest,
            pack_digest=self.data.pack.digest,
            rows=self.data.rows,
            augmentation=views.settings,
            strength=views.strength,
            view_seed=views.seed,
            precision=self.precision,
            device=self.data.device,
        )

    def features(self, split: str, epoch: int) -> Tensor | None:
        """Return the features of all rows of a split, or none if they are to be computed.

        Args:
            split: ``train``, whose views are meant, or ``val``, whose images are.
            epoch: Counted from 0.

        Returns:
            Shape ``(N, C, h, w)``, channels last, tokens ``(N, T, C)``, or ``(N, num_features)``;
            mapped, or on the trial's device where they fit.
        """
        features, outcome = self._features(split, epoch)
        if split == "train":
            self.outcome = outcome
        if features is None:
            return None
        return self.data.settle(_channels_second(features))

    def stored(self, split: str, epoch: int = 0) -> Tensor | None:
        """Return what ``features`` does if it is at hand; compute nothing.

        Args:
            split: ``train`` or ``val``.
            epoch: Counted from 0.
        """
        if self.store is None or self.cut == 0:
            return None
        found = self.store.find(self.keys.of(split, epoch, self.cut))
        return None if found is None else self.data.settle(_channels_second(found))

    def _features(self, split: str, epoch: int) -> tuple[Tensor | None, str]:
        if self.cut == 0:
            return None, "nothing is frozen"
        if self.store is None:
            return None, "computed, the cache is off"
        if split == "train" and not self.views_are_shared:
            return None, "computed, no other trial sees the same views"
        key = self.keys.of(split, epoch, self.cut)
        found = self.store.find(key)
        if found is not None:
            return found, "from the cache"
        cost = self.cost(split, epoch, self.cut)
        if not cost.pays:
            return None, (
                f"computed, {cost.num_bytes / 1024:.0f} KiB an image take as long to read as to "
                "compute"
            )
        ahead_epoch = epoch
        try:
            while found is None:
                with self.store.claim(key) as claim:
                    found = self.store.find(key)  # another worker may have finished meanwhile
                    if found is None and claim is not None:
                        if not self._fill(claim, split, epoch, self.cut):
                            return None, "computed, the cache is full"
                        return self.store.find(key), "computed and cached"
                if found is None:
                    ahead_epoch = self._compute_ahead(split, epoch, ahead_epoch)
        except OSError as error:
            return None, f"computed, the cache could not be written ({error.strerror})"
        return found, "from the cache"

    def _compute_ahead(self, split: str, epoch: int, ahead_epoch: int) -> int:
        """Compute a later epoch's features, or wait a moment; return how far this worker got."""
        assert self.store is not None  # noqa: S101  narrows the type
        last = min(epoch + AHEAD_EPOCHS, self.module.max_epochs - 1) if split == "train" else epoch
        while ahead_epoch < last:
            ahead_epoch += 1
            key = self.keys.of(split, ahead_epoch, self.cut)
            if self.store.find(key) is None:
                with self.store.claim(key) as claim:
                    if claim is not None and self.store.find(key) is None:
                        self._fill(claim, split, ahead_epoch, self.cut)
                        return ahead_epoch
        time.sleep(POLL_S)
        return ahead_epoch

    def _fill(
        self, claim: Claim, split: str, epoch: int, cut: int, spare_s: float | None = None
    ) -> bool:
        """Compute a claimed key's features into the store; tell whether there was room.

        Args:
            claim: On the key of all that follows.
            split: Whose images.
            epoch: Whose views.
            cut: How many stages.
            spare_s: What it may take an image to write features of shallower cuts and read them
                back; what is left of this cut's own time if none is given.
        """
        num_images = len(self.data.rows[split])
        cost = self.cost(split, epoch, cut)
        worth_s = num_images * cost.compute_s
        room = num_images * cost.num_bytes
        if not claim.reserve(room, worth_s=worth_s, only_free=cut < self.cut):
            return False
        # Whatever goes wrong there, these features still fit.
        with contextlib.suppress(OSError):
            self._fill_shallower(split, epoch, cut, cost.spare_s if spare_s is None else spare_s)
        claim.write(self._blocks(split, epoch, cut), worth_s=worth_s)
        return True

    def _fill_shallower(self, split: str, epoch: int, cut: int, spare_s: float) -> None:
        """Store the deepest features on the way to a cut that other trials may ask for."""
        assert self.store is not None  # noqa: S101  narrows the type
        for shallower in sorted((c for c in self.cuts if 0 < c < cut), reverse=True):
            key = self.keys.of(split, epoch, shallower)
            if self.store.find(key) is not None:
                return
            cost = self.cost(split, epoch, shallower)
            if not cost.pays or cost.round_trip_s > spare_s:
                continue
            with self.store.claim(key) as claim:  # held by another, it is not waited for
                if claim is None:
                    continue
                # Another worker may have finished meanwhile.
                if self.store.find(key) is not None or self._fill(
                    claim, split, epoch, shallower, spare_s - cost.round_trip_s
                ):
                    return

    def _blocks(self, split: str, epoch: int, cut: int) -> Iterator[Tensor]:
        """Yield the features of a split block by block, from the deepest cut that is at hand."""
        assert self.store is not None  # noqa: S101  narrows the type
        rows = self.data.rows[split]
        device = self.data.device
        start, shallower = 0, None
        for at_hand in range(cut - 1, 0, -1):
            found = self.store.find(self.keys.of(split, epoch, at_hand))
            if found is not None:
                start, shallower = at_hand, _channels_second(found)
                break
        for places in torch.arange(len(rows)).split(_block_size(device)):
            if shallower is None:
                yield _channels_last(self._compute(rows[places], split, epoch, cut))
            else:
                given = take_rows(shallower, places).to(device)
                with torch.no_grad():
                    passed = self.module.pass_frozen(given, first_stage=start, cut=cut)
                yield _channels_last(passed)

    def _compute(self, rows: Tensor, split: str, epoch: int, cut: int) -> Tensor:
        images = self.data.images
        taken = take_rows(images, rows.to(images.device)).unsqueeze(1).to(self.data.device)
        views_of = epoch if split == "train" else None
        return self.module.frozen_features(
            taken, rows.to(self.data.device), epoch=views_of, cut=cut
        )

    def cost(self, split: str, epoch: int, cut: int) -> "Cost":
        """Measure, once a process, what computing and reading an image's features take.

        Args:
            split: Whose images.
            epoch: Whose views.
            cut: How many stages; as many as are frozen at most.
        """
        assert self.store is not None  # noqa: S101  narrows the type
        device = self.data.device
        name = (self.module.backbone.name, cut, self.data.pack.image_size_px)
        key = (*name, self.precision, str(device))
        if key not in _COSTS:
            rows = self.data.rows[split][: _block_size(device)]
            if cut == self.cut:  # what is only done the first time
                self._compute(rows, split, epoch, cut)
            _synchronize(device)
            start_s = time.perf_counter()
            block = _channels_last(self._compute(rows, split, epoch, cut))
            compute_s = time.perf_counter() - start_s
            _COSTS[key] = Cost(
                num_bytes=block.nbytes // len(rows),
                compute_s=compute_s / len(rows),
                round_trip_s=self.store.time_round_trip(block, device) / len(rows),
            )
        return _COSTS[key]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an image's features cost.

    Attributes:
        num_bytes: Room in the store.
        compute_s: From its pixels.
        round_trip_s: To write them, and to read them back to the device.
    """

    num_bytes: int
    compute_s: float
    round_trip_s: float

    @property
    def pays(self) -> bool:
        """Whether reading takes so much less than computing that it is worth the room."""
        return self.spare_s >= 0

    @property
    def spare_s(self) -> float:
        """What is left of the time that may be lost to writing and reading."""
        return self.compute_s * READ_SHARE - self.round_trip_s


_COSTS: dict[tuple[str | int, ...], Cost] = {}


def _block_size(device: torch.device) -> int:
    return FROZEN_BLOCK if device.type == "cpu" else GPU_BLOCK


def _channels_last(features: Tensor) -> Tensor:
    """Return features as they are stored: on the CPU, channels last in memory.

    Tokens ``(B, T, C)`` and pooled features ``(B, C)`` have them last as they are.
    """
    if features.ndim == 4:
        features = features.permute(0, 2, 3, 1)
    return features.contiguous().cpu()


def _channels_second(stored: Tensor) -> Tensor:
    """Return stored features as stages take them; nothing is copied."""
    return stored.permute(0, 3, 1, 2) if stored.ndim == 4 else stored


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
