"""What features of frozen stages are stored under: a key of all that they are a function of."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lightning_modules import (
    augmentation,
    backbones,
    classifier,
    convolutions,
    stages,
    state_dicts,
)
from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.feature_store import FeatureStore
from lightning_modules.files import code_digest_of
from lightning_modules.stages import NUM_STAGES


@dataclass(frozen=True, kw_only=True)
class FeatureKeys:
    """Makes the keys of the features that one backbone's frozen stages make of one pack's images.

    Attributes:
        backbone: One of ``BACKBONES``.
        weights_digest: Of the whole backbone before training.
        pack_digest: The images'.
        rows: By split, the images' row numbers in the pack.
        augmentation: The views' ranges at strength 1.
        strength: Scales them.
        view_seed: What views are drawn from.
        precision: As the trainer names it.
        device: What computes them; one of another kind rounds otherwise.
    """

    backbone: str
    weights_digest: str
    pack_digest: str
    rows: Mapping[str, Tensor]
    augmentation: AugmentationSettings
    strength: float
    view_seed: int
    precision: str
    device: torch.device

    def of(self, split: str, epoch: int, cut: int) -> str:
        """Return a key.

        Args:
            split: ``train``, whose views are meant, or ``val``, whose images are.
            epoch: Counted from 0; images are the same at every epoch, and so are views of
                strength 0.
            cut: How many stages are frozen.
        """
        view = {}
        if split == "train" and self.strength > 0:
            view = {
                "settings": asdict(self.augmentation),
                "strength": self.strength,
                "seed": self.view_seed,
                "epoch": epoch,
            }
        facts = {**self._facts, "cut": cut, "rows": self._rows_digests[split], "view": view}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]

    def at_hand(self, store: FeatureStore, num_epochs: int) -> set[tuple[str, int, int]]:
        """Return split, epoch, and cut of what a store holds; images are told at epoch 0 alone."""
        if self.strength == 0:
            num_epochs = 1
        epochs = [("val", 0), *(("train", epoch) for epoch in range(num_epochs))]
        return {
            (split, epoch, cut)
            for split, epoch in epochs
            for cut in range(1, NUM_STAGES + 1)
            if store.has(self.of(split, epoch, cut))
        }

    @functools.cached_property
    def _facts(self) -> dict[str, str]:
        is_cpu = self.device.type == "cpu"
        return {
            "code": _code_digest(),
            "torch": torch.__version__,
            "backbone": self.backbone,
            "weights": self.weights_digest,
            "pack": self.pack_digest,
            "precision": self.precision,
            "device": torch.backends.cpu.get_cpu_capability()
            if is_cpu
            else torch.cuda.get_device_name(self.device),
        }

    @functools.cached_property
    def _rows_digests(self) -> dict[str, str]:
        return {
            split: hashlib.sha256(rows.numpy().tobytes()).hexdigest()
            for split, rows in self.rows.items()
        }


@functools.cache
def _code_digest() -> str:
    """Return what changes with the code that features are a result of."""
    return code_digest_of(augmentation, backbones, classifier, convolutions, stages, state_dicts)
