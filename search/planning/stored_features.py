"""Which features of frozen stages earlier sweeps have left on this machine."""

import torch

from lightning_modules.data.datamodule import PackDataModule
from lightning_modules.feature_keys import FeatureKeys
from search.tuning.trial import Run, feature_store


def stored_features(run: Run) -> frozenset[tuple[str, str, int, int]]:
    """Return the features that a sweep's trials will find: backbone, split, epoch, and cut.

    Of trials on CPUs, and where all have augmentation of the same strength; else none are told.
    """
    sweep = run.sweep
    store = feature_store(sweep.resources.feature_cache_gib, since=run.started)
    if store is None or run.on_gpu or "augmentation_strength" in sweep.space:
        return frozenset()
    rows = PackDataModule(run.manifest, run.pack, batch_size=1, seed=sweep.seed).rows
    found = set()
    for backbone in sweep.backbones:
        keys = FeatureKeys(
            backbone=backbone,
            weights_digest=run.weights[backbone].digest,
            pack_digest=run.pack.digest,
            rows=rows,
            augmentation=sweep.augmentation,
            strength=sweep.params.augmentation_strength,
            view_seed=sweep.seed,
            precision=run.precisions[backbone],
            device=torch.device("cpu"),
        )
        at_hand = keys.at_hand(store, sweep.training.max_epochs)
        found |= {(backbone, *place) for place in at_hand}
    return frozenset(found)
