"""Training from cached features is training without them, bit for bit; and caching knows when."""

import dataclasses
import errno
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules import feature_cache
from lightning_modules.backbones import build_network
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data import datamodule
from lightning_modules.data.datamodule import PackDataModule
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.feature_cache import FeatureCache
from lightning_modules.feature_store import Claim, FeatureStore, current_moment
from lightning_modules.step_cost import computes_in_bf16
from lightning_modules.weights import find_weights
from search.space import Choice, Float
from search.study.sweep_files import LocalFiles
from search.sweep import DataSettings, Sweep, TrialParams
from search.tuning.checkpoint import AtomicCheckpointIO

Data = tuple[Manifest, Pack]
MakeData = Callable[..., Data]

# Lightning warns of what is meant here: frozen stages, few batches, no worker processes.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
]

SIDE_PX = 32
NUM_EPOCHS = 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random weights whose BatchNorm statistics are those of noise, so that features differ."""
    folder, paths = tmp_path_factory.mktemp("weights"), {}
    for backbone in ("mobilenet_v2", "resnet50", "efficientnet_b0"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build_network(backbone)
            for child in network.modules():
                if isinstance(child, nn.BatchNorm2d):
                    child.momentum = 1.0
            with torch.no_grad():
                network(torch.randn(16, 3, SIDE_PX, SIDE_PX))
        paths[backbone] = folder / f"{backbone}.pth"
        torch.save(network.state_dict(), paths[backbone])
    return paths


@pytest.fixture(autouse=True)
def _reading_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are tiny here: what pays is tested by itself, not by the clock."""
    cost = feature_cache.Cost(num_bytes=4096, compute_s=1.0, round_trip_s=0.0)
    monkeypatch.setattr(FeatureCache, "cost", lambda *_: cost)


@pytest.fixture(scope="module")
def data(make_data: MakeData) -> Data:
    """21 images to train on and 19 to validate: neither fills a whole number of blocks."""
    return make_data(train=(9, 7, 5), val=(8, 6, 5), image_size_px=SIDE_PX)


Make = Callable[..., FeatureCache]


@pytest.fixture
def make(data: Data, weights: dict[str, Path], tmp_path: Path) -> Make:
    def make_cache(
        *,
        limit_mib: float = 100,
        cached: bool = True,
        views_are_shared: bool = True,
        weights_digest: str = "w",
        precision: str = "32-true",
        batch_size: int = 8,
        pack_digest: str = "0" * 64,
        seed: int = 5,
        cuts: tuple[int, ...] = (),
        **changes: Any,
    ) -> FeatureCache:
        settings: dict[str, Any] = {
            "backbone": "mobilenet_v2",
            "num_classes": 3,
            "image_size_px": SIDE_PX,
            "unfreeze_depth": 1,
            "dropout": 0.5,
            "lr": 1e-2,
            "seed": seed,
            "max_epochs": NUM_EPOCHS,
        }
        settings |= changes
        if settings["backbone"] in weights:  # a transformer has no BatchNorm: random ones will do
            settings.setdefault("weights_path", str(weights[settings["backbone"]]))
        module = ImageClassifier(**settings)
        manifest, pack = data
        pack = Pack(pack.path, pack_digest, SIDE_PX, {})
        datamodule = PackDataModule(manifest, pack, batch_size=batch_size, seed=seed)
        store = FeatureStore(
            tmp_path / "features", limit_bytes=int(limit_mib * 2**20), since=current_moment()
        )
        cache = FeatureCache(
            module,
            datamodule,
            store=store if cached else None,
            weights_digest=weights_digest,
            precision=precision,
            views_are_shared=views_are_shared,
            cuts=cuts,
        )
        datamodule.features_of = cache.features
        return cache

    return make_cache


class Keep(pl.Callback):
    """Every epoch's metrics, and what became of its features."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.metrics: list[dict[str, float]] = []
        self.outcomes: list[str] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})
        self.outcomes.append(self.cache.outcome)


def fit(cache: FeatureCache, precision: Any = "32-true", accelerator: str = "cpu") -> Keep:
    keep = Keep(cache)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_epochs=NUM_EPOCHS,
        callbacks=[keep],
        plugins=[AtomicCheckpointIO(LocalFiles("."))],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(cache.module, datamodule=cache.data)
    return keep


def state_of(cache: FeatureCache) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in cache.module.state_dict().items()}


def assert_equal_states(one: FeatureCache, other: FeatureCache) -> None:
    ours, theirs = state_of(one), state_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# Equal to training without


@pytest.mark.parametrize(
    ("backbone", "depth", "precision"),
    [
        ("mobilenet_v2", 0, "32-true"),
        ("mobilenet_v2", 1, "32-true"),
        pytest.param("mobilenet_v2", 2, "32-true", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 3, "32-true", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 4, "32-true", marks=pytest.mark.slow),
        pytest.param("resnet50", 0, "32-true", marks=pytest.mark.slow),
        pytest.param("resnet50", 2, "32-true", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 0, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 1, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 3, "bf16-mixed", marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 1, "32-true", marks=pytest.mark.slow),
        pytest.param("vit_b_16", 0, "32-true", marks=pytest.mark.slow),
        pytest.param("vit_b_16", 1, "32-true", marks=pytest.mark.slow),
        pytest.param(
            *("vit_b_16", 1, "bf16-mixed"),
            marks=[
                pytest.mark.slow,
                # Emulated, it takes most of a minute.
                pytest.mark.skipif(
                    not computes_in_bf16(torch.device("cpu")), reason="a CPU without bfloat16"
                ),
            ],
        ),
    ],
)
def test_cached_training_equals_uncached_training_bit_for_bit(
    make: Make, backbone: str, depth: int, precision: str
) -> None:
    settings = {"backbone": backbone, "unfreeze_depth": depth, "precision": precision}
    without = make(cached=False, **settings)
    expected = fit(without, precision)
    computed, found = make(**settings), make(**settings)
    first, second = fit(computed, precision), fit(found, precision)
    assert first.outcomes == ["computed and cached"] * NUM_EPOCHS
    assert second.outcomes == ["from the cache"] * NUM_EPOCHS
    assert first.metrics == expected.metrics
    assert second.metrics == expected.metrics
    assert expected.metrics[0]["train_loss"] != expected.metrics[1]["train_loss"]
    assert_equal_states(computed, without)
    assert_equal_states(found, without)


@pytest.mark.gpu
def test_a_head_trains_from_cached_features_as_without_to_rounding_on_a_gpu(
    make: Make, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    without = fit(make(cached=False, unfreeze_depth=0), accelerator=device)
    cached = fit(make(unfreeze_depth=0), accelerator=device)
    assert cached.outcomes == ["computed and cached"] * NUM_EPOCHS
    for ours, theirs in zip(cached.metrics, without.metrics, strict=True):
        for name in ("train_loss", "val_loss"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5)


def test_what_is_at_hand_is_known_to_trials_of_every_depth(make: Make) -> None:
    cache = make(unfreeze_depth=2)
    assert cache.store is not None
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == set()
    cache.features("train", 1)
    cache.features("val", 1)  # its images are the same at every epoch
    there = {("train", 1, 3), ("val", 0, 3)}
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == there
    assert make(unfreeze_depth=0).keys.at_hand(cache.store, NUM_EPOCHS) == there
    assert make(view_seed=1).keys.at_hand(cache.store, NUM_EPOCHS) == {("val", 0, 3)}


def test_a_forecast_sees_what_a_trial_has_stored(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search.planning.stored_features import stored_features
    from search.tuning.trial import Run, build_module, feature_cache_of

    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path))
    manifest, pack = data
    sweep = Sweep(
        name="stored",
        data=DataSettings(path="images", image_size_px=SIDE_PX),
        params=TrialParams(backbone="mobilenet_v2", unfreeze_depth=2, dropout=0.5),
        space={"dropout": Float(low=0.1, high=0.9)},
    )
    weights = {"mobilenet_v2": find_weights("random", backbone="mobilenet_v2", seed=0)}
    run = Run(
        sweep=sweep, manifest=manifest, pack=pack, weights=weights,
        precisions={"mobilenet_v2": "32-true"}, gpu_share=0.0, started=current_moment(),
        source_digest=None,
    )  # fmt: skip
    assert stored_features(run) == set()
    module = build_module(
        sweep.params, sweep=sweep, manifest=manifest, weights=weights, seed=5, view_seed=sweep.seed
    )
    cache = feature_cache_of(run, module, PackDataModule(manifest, pack, batch_size=8, seed=5))
    cache.features("train", 1)
    cache.features("val", 1)
    there = {("mobilenet_v2", "train", 1, 3), ("mobilenet_v2", "val", 0, 3)}
    assert stored_features(run) == there
    assert stored_features(dataclasses.replace(run, gpu_share=0.5)) == set()
    drawn = {"augmentation_strength": Choice(choices=(0.5, 1.0))}
    of_many = dataclasses.replace(run, sweep=dataclasses.replace(sweep, space=drawn))
    assert stored_features(of_many) == set()


@pytest.mark.gpu
@pytest.mark.parametrize("depth", [1, 3])
def test_cached_features_are_those_of_a_batch_to_rounding_on_a_gpu(
    make: Make, monkeypatch: pytest.MonkeyPatch, device: str, depth: int
) -> None:
    # Losses of trained stages would not do: BatchNorm over a few pixels makes much of rounding.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cache = make(unfreeze_depth=depth)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
    cache.data.trainer = trainer
    cache.module.to(device)
    stored = cache.features("train", 1)
    assert stored is not None
    rows = cache.data.rows["train"].to(device)
    for first in range(0, len(rows), 8):
        part = rows[first : first + 8]
        images = cache.data.images[part].unsqueeze(1)
        computed = cache.module.frozen_features(images, part, epoch=1)
        assert torch.allclose(stored[first : first + 8], computed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "depth", "batch_size", "bf16"),
    [
        *(("mobilenet_v2", 0, size, False) for size in (1, 5, 16, 21)),
        ("mobilenet_v2", 0, 5, True),
        pytest.param("vit_b_16", 2, 5, False, marks=pytest.mark.slow),
    ],
)
def test_an_images_features_do_not_depend_on_the_batch(
    make: Make, backbone: str, depth: int, batch_size: int, bf16: bool
) -> None:
    module = make(backbone=backbone, unfreeze_depth=depth).module
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (21, 1, 32, 32), np.uint8))
    rows = torch.arange(21)
    batches = rows.split(batch_size)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        whole = module.frozen_features(images, rows, epoch=3)
        parts = [module.frozen_features(images[part], part, epoch=3) for part in batches]
    assert whole.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert torch.equal(torch.cat(parts), whole)
    assert float(whole.std()) > 0


def test_trials_with_other_seeds_and_batch_sizes_share_features(make: Make) -> None:
    fit(make(seed=1, batch_size=4, dropout=0.1))
    assert fit(make(seed=2, batch_size=10, lr=0.5)).outcomes == ["from the cache"] * NUM_EPOCHS


def test_features_of_the_head_alone_are_pooled(make: Make) -> None:
    features = make(unfreeze_depth=0).features("train", 0)
    assert features is not None
    assert features.shape == (21, 1280)


def test_features_of_a_shallower_cut_are_channels_last(make: Make) -> None:
    features = make(unfreeze_depth=1).features("val", 0)
    assert features is not None
    assert features.shape == (19, 96, 2, 2)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_features_of_a_transformer_are_tokens(make: Make) -> None:
    features = make(backbone="vit_b_16", unfreeze_depth=1).features("val", 0)
    assert features is not None
    assert features.shape == (19, 1 + 2 * 2, 768)


# When it starts, and from where


@pytest.mark.parametrize(
    "backbone", ["mobilenet_v2", pytest.param("vit_b_16", marks=pytest.mark.slow)]
)
def test_a_deeper_cut_starts_from_the_deepest_one_at_hand(
    make: Make, monkeypatch: pytest.MonkeyPatch, backbone: str
) -> None:
    for depth in (4, 2):
        assert make(backbone=backbone, unfreeze_depth=depth).features("train", 0) is not None
    started_from = []
    original = ImageClassifier.pass_frozen

    def spy(
        self: ImageClassifier, activations: Tensor, first_stage: int = 0, cut: int | None = None
    ) -> Tensor:
        started_from.append(first_stage)
        return original(self, activations, first_stage, cut)

    monkeypatch.setattr(ImageClassifier, "pass_frozen", spy)
    continued = make(backbone=backbone, unfreeze_depth=1)
    features = continued.features("train", 0)
    assert set(started_from) == {3}
    images = continued.data.images[continued.data.rows["train"]].unsqueeze(1)
    expected = continued.module.frozen_features(images, continued.data.rows["train"], epoch=0)
    assert features is not None
    assert torch.equal(features, expected)


@pytest.mark.parametrize(
    ("backbone", "bf16"),
    [
        ("mobilenet_v2", False),
        ("mobilenet_v2", True),
        pytest.param("vit_b_16", False, marks=pytest.mark.slow),
    ],
)
def test_cuts_of_other_trials_are_stored_on_the_way_to_the_last_bit(
    make: Make, backbone: str, bf16: bool
) -> None:
    # The trials' depths are 0, 1, and 3.
    first = make(backbone=backbone, unfreeze_depth=0, cuts=(5, 4, 2))
    rows = first.data.rows["train"]
    images = first.data.images[rows].unsqueeze(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert first.features("train", 1) is not None
        stored = first.keys.at_hand(first.store, NUM_EPOCHS)
        assert stored == {("train", 1, cut) for cut in (2, 4, 5)}
        for depth in (0, 1, 3):
            trial = make(backbone=backbone, unfreeze_depth=depth)
            features = trial.features("train", 1)
            assert trial.outcome == "from the cache"
            assert features is not None
            assert torch.equal(features, trial.module.frozen_features(images, rows, epoch=1))


def test_cuts_that_do_not_pay_are_passed_by(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def cost(cache: FeatureCache, split: str, epoch: int, cut: int) -> feature_cache.Cost:
        return feature_cache.Cost(num_bytes=4096, compute_s=1.0, round_trip_s=float(cut == 4))

    monkeypatch.setattr(FeatureCache, "cost", cost)
    cache = make(unfreeze_depth=0, cuts=(5, 4, 2))
    assert cache.features("val", 0) is not None
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == {("val", 0, 5), ("val", 0, 2)}


def test_a_cut_that_another_worker_computes_is_not_waited_for(make: Make) -> None:
    cache = make(unfreeze_depth=0, cuts=(5, 4, 2))
    assert cache.store is not None
    with cache.store.claim(cache.keys.of("train", 0, 4)) as claim:
        assert claim is not None
        features = cache.features("train", 0)
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == {("train", 0, 5), ("train", 0, 2)}
    alone = make(unfreeze_depth=0, cached=False)
    rows = alone.data.rows["train"]
    images = alone.data.images[rows].unsqueeze(1)
    assert features is not None
    assert torch.equal(features, alone.module.frozen_features(images, rows, epoch=0))


def test_a_cut_that_another_worker_has_just_stored_is_not_stored_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, claim_key, written = Claim.write, FeatureStore.claim, []

    def count_and_write(claim: Claim, blocks: Iterable[Tensor], *, worth_s: float) -> None:
        written.append(claim.key)
        write(claim, blocks, worth_s=worth_s)

    def be_late(store: FeatureStore, key: str) -> Any:
        if key == shallower and not written:
            monkeypatch.setattr(FeatureStore, "claim", claim_key)
            assert make(unfreeze_depth=1).features("train", 0) is not None
        return claim_key(store, key)

    cache = make(unfreeze_depth=0, cuts=(5, 4))
    shallower = cache.keys.of("train", 0, 4)
    monkeypatch.setattr(Claim, "write", count_and_write)
    monkeypatch.setattr(FeatureStore, "claim", be_late)
    assert cache.features("train", 0) is not None
    assert written == [shallower, cache.keys.of("train", 0, 5)]


def test_what_is_stored_for_others_takes_its_time_from_ones_own(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cost(cache: FeatureCache, split: str, epoch: int, cut: int) -> feature_cache.Cost:
        # Half of 1.0 s may be lost: 0.1 s to one's own, 0.2 s to the next, 0.3 s is too much.
        round_trip_s = {5: 0.1, 4: 0.2, 2: 0.3}[cut]
        return feature_cache.Cost(num_bytes=4096, compute_s=1.0, round_trip_s=round_trip_s)

    monkeypatch.setattr(FeatureCache, "cost", cost)
    cache = make(unfreeze_depth=0, cuts=(5, 4, 2))
    assert cache.features("val", 0) is not None
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == {("val", 0, 5), ("val", 0, 4)}


def test_ones_own_features_are_stored_though_those_of_others_cannot_be(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Claim.write

    def write_or_fail(claim: Claim, blocks: Iterable[Tensor], *, worth_s: float) -> None:
        if claim.key == shallower:
            raise OSError(errno.ENOSPC, "no space left")
        write(claim, blocks, worth_s=worth_s)

    monkeypatch.setattr(Claim, "write", write_or_fail)
    cache = make(unfreeze_depth=0, cuts=(5, 4))
    shallower = cache.keys.of("train", 0, 4)
    assert cache.features("train", 0) is not None
    assert cache.outcome == "computed and cached"
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == {("train", 0, 5)}


def test_there_is_room_for_ones_own_cut_before_that_of_others(make: Make) -> None:
    # 21 images of 4096 bytes, as told, and a header: room for one, not for two.
    cache = make(unfreeze_depth=0, cuts=(5, 4), limit_mib=0.1)
    assert cache.features("train", 0) is not None
    assert cache.outcome == "computed and cached"
    assert cache.keys.at_hand(cache.store, NUM_EPOCHS) == {("train", 0, 5)}


def test_the_same_images_are_computed_once_for_all_epochs(make: Make, tmp_path: Path) -> None:
    outcomes = fit(make(augmentation_strength=0.0, views_are_shared=False)).outcomes
    assert outcomes == ["computed and cached", "from the cache"]
    assert len(list((tmp_path / "features").glob("*.features"))) == 2  # train and val


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_digest": "another"},
        {"pack_digest": "1" * 64},
        {"precision": "bf16-mixed"},
        {"unfreeze_depth": 2},
        {"view_seed": 1},
        {"augmentation_strength": 0.5},
        {"augmentation": {"noise": 0.5}},
    ],
)
def test_whatever_features_depend_on_changes_their_key(make: Make, changes: dict[str, Any]) -> None:
    key = make().keys.of("train", 0, make().cut)
    other = make(**changes)
    assert other.keys.of("train", 0, other.cut) != key
    assert make().keys.of("train", 1, make().cut) != key
    assert make().keys.of("val", 0, make().cut) != key
    assert make().keys.of("val", 0, make().cut) == make().keys.of("val", 1, make().cut)


# When it does not pay


def test_nothing_frozen_is_nothing_cached(make: Make, tmp_path: Path) -> None:
    cache = make(unfreeze_depth=5)
    assert cache.features("train", 0) is None
    assert cache.outcome == "nothing is frozen"
    assert not (tmp_path / "features").exists()


def test_views_that_no_other_trial_sees_are_not_cached_but_validation_is(make: Make) -> None:
    cache = make(views_are_shared=False)
    assert cache.features("train", 0) is None
    assert cache.outcome == "computed, no other trial sees the same views"
    assert cache.features("val", 0) is not None


def test_features_that_take_as_long_to_read_as_to_compute_are_not_cached(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cost = feature_cache.Cost(num_bytes=300 * 1024, compute_s=1.0, round_trip_s=0.6)
    monkeypatch.setattr(FeatureCache, "cost", lambda *_: cost)
    cache = make()
    assert cache.features("train", 0) is None
    assert cache.outcome == "computed, 300 KiB an image take as long to read as to compute"
    assert not (tmp_path / "features").exists()


def test_the_cost_of_features_is_measured(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(feature_cache, "_COSTS", {})
    cost = make(unfreeze_depth=0).cost("train", 0, 5)
    assert cost.num_bytes == 1280 * 4
    assert cost.compute_s > 0
    assert cost.round_trip_s > 0


def test_a_full_cache_computes(make: Make) -> None:
    cache = make(limit_mib=0.01)
    assert cache.features("train", 0) is None
    assert cache.outcome == "computed, the cache is full"


def test_a_cache_that_cannot_be_written_computes(make: Make, tmp_path: Path) -> None:
    (tmp_path / "features").write_text("a file where a folder is wanted")
    cache = make()
    assert cache.features("train", 0) is None
    assert cache.outcome == "computed, the cache could not be written (File exists)"


# Several workers


def test_while_another_worker_computes_an_epoch_this_one_computes_later_ones(
    make: Make, tmp_path: Path
) -> None:
    other, waiting = make(max_epochs=5), make(max_epochs=5)
    store = other.store
    assert store is not None
    got: list[Tensor | None] = []
    with store.claim(other.keys.of("train", 0, other.cut)) as claim:
        assert claim is not None
        thread = threading.Thread(target=lambda: got.append(waiting.features("train", 0)))
        thread.start()
        ahead = [other.keys.of("train", epoch, other.cut) for epoch in (1, 2, 3)]
        deadline_s = time.monotonic() + 60
        while not all(store.path_of(key).exists() for key in ahead):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        assert thread.is_alive()  # three epochs ahead it stops, and waits
        assert not store.path_of(other.keys.of("train", 4, other.cut)).exists()
        assert other._fill(claim, "train", 0, other.cut)
    thread.join(60)
    assert got[0] is not None
    assert waiting.outcome == "from the cache"


def test_when_the_worker_that_computes_dies_another_takes_over(make: Make) -> None:
    other, waiting = make(max_epochs=1), make(max_epochs=1)
    assert other.store is not None
    got: list[Tensor | None] = []
    with other.store.claim(other.keys.of("train", 0, other.cut)):
        thread = threading.Thread(target=lambda: got.append(waiting.features("train", 0)))
        thread.start()
        time.sleep(0.1)
        assert thread.is_alive()
    thread.join(60)
    assert got[0] is not None
    assert waiting.outcome == "computed and cached"


def test_what_is_stored_is_found_again_and_nothing_else_is_computed(make: Make) -> None:
    cache = make()
    assert cache.store is not None
    assert cache.stored("val") is None
    assert not cache.store.folder.exists()
    features = cache.features("val", 0)
    found = make(seed=6).stored("val")
    assert features is not None
    assert found is not None
    assert torch.equal(found, features)
    assert make(cached=False).stored("val") is None
    assert make(unfreeze_depth=5).stored("val") is None


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_pictures_score_validation_images_alike_with_stored_features_and_without(
    make: Make, data: Data, precision: str
) -> None:
    from search.tuning import pictures, trial

    manifest, pack = data
    run: Any = SimpleNamespace(
        sweep=SimpleNamespace(resources=SimpleNamespace(feature_cache_gib=1.0), space={}, seed=-1),
        manifest=manifest,
        pack=Pack(pack.path, "0" * 64, SIDE_PX, {}),
        weights={"mobilenet_v2": SimpleNamespace(digest="w")},
        precisions={"mobilenet_v2": precision},
        on_gpu=False,
        started=current_moment(),
    )
    cache = make(precision=precision)
    module = cache.module.eval()
    rows = manifest.rows("val")[::2].copy()
    images = np.asarray(pack.images()[rows])
    is_bf16 = precision == "bf16-mixed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "feature_store", lambda *_, **__: cache.store)
        computed = pictures._logits(rows, module, run)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            assert cache.features("val", 0) is not None
        # Trials on GPUs, drawn without one: in float32, whatever is stored.
        run.on_gpu = True
        in_float32 = pictures._logits(rows, module, run)
        run.on_gpu = False
        patch.setattr(datamodule, "resident_images", None)  # none is looked at any more
        looked_up = pictures._logits(rows, module, run)
    assert computed.shape == (len(rows), 3)
    assert torch.equal(looked_up, computed)
    assert torch.equal(in_float32, computed) != is_bf16
    with torch.inference_mode():
        assert torch.equal(in_float32, module(torch.from_numpy(images).unsqueeze(1) / 255))
