"""Which features of frozen stages earlier sweeps have left on this machine."""

from dataclasses import replace

from lightning_modules.data.datamodule import PackDataModule
from search.tuning.trial import Run, build_module, feature_cache_of, feature_store, on_this_node


def stored_features(run: Run) -> frozenset[tuple[str, str, int, int]]:
    """Return the features that a sweep's trials will find: backbone, split, epoch, and cut.

    Of trials on CPUs, and where all have augmentation of the same strength; else none are told.
    """
    sweep = run.sweep
    store = feature_store(sweep.resources.feature_cache_gib, since=run.started)
    is_known = not run.on_gpu and "augmentation_strength" not in sweep.space
    if not is_known or store is None or not store.folder.is_dir():
        return frozenset()
    run = on_this_node(run)
    data = PackDataModule(run.manifest, run.pack, batch_size=1, seed=sweep.seed)
    found = set()
    for backbone in sweep.backbones:
        module = build_module(
            replace(sweep.params, backbone=backbone, unfreeze_depth=0),
            sweep=sweep,
            manifest=run.manifest,
            weights=run.weights,
            seed=sweep.seed,
            view_seed=sweep.seed,
        )
        found |= {(backbone, *place) for place in feature_cache_of(run, module, data).at_hand()}
    return frozenset(found)
