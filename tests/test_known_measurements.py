"""What was measured on this machine is known to the next sweep whose trials take the same."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_SWEEP, MakeData

from lightning_modules.augmentation import AugmentationSettings
from lightning_modules.feature_store import current_moment
from search.cli import main
from search.planning import known_measurements
from search.planning.kind_cost import KindCost
from search.planning.known_measurements import recall, remember
from search.planning.measurement import Measurement
from search.results import open_sweep
from search.space import Choice, Float, Int
from search.study.record import Record
from search.sweep import DataSettings, ResourceSettings, SearchSettings, Sweep, TrialParams
from search.tuning.trial import Run

WHOLE = {"cpu": 1.0, "gpu": 0.0}

COST = KindCost(
    build_s=0.25,
    compute_s=1 / 3,
    feature_bytes=5120,
    is_shared=True,
    read_s=1e-5,
    train_s=0.1,
    val_s=0.2,
    save_s=0.3,
    best_bytes=100,
    last_bytes=300,
    peak_bytes=2**30,
)

MEASURED = Measurement(
    costs={("mobilenet_v2", 0): COST, ("mobilenet_v2", 3): dataclasses.replace(COST, train_s=0.9)},
    worker_start_s=7.5,
)

Change = Callable[[Run], Run]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # Ray, which knows how many workers there are, is not started.
    monkeypatch.setattr(known_measurements, "max_concurrent", lambda whole: 2 / whole["cpu"])
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "measurements.json"


@pytest.fixture
def run(tmp_path: Path, make_data: MakeData) -> Run:
    manifest, pack = make_data()
    sweep = Sweep(
        name="measured",
        storage=str(tmp_path),
        metric="val_loss",
        data=DataSettings(path="/nowhere"),
        space={"unfreeze_depth": Choice(choices=(0, 3))},
        params=TrialParams(unfreeze_depth=0),
    )
    sweep.folder.mkdir()
    return Run(
        sweep=sweep,
        manifest=manifest,
        pack=pack,
        weights={},
        precisions={"mobilenet_v2": "32-true"},
        gpu_share=0.0,
        started=current_moment(),
        source_digest=None,
    )


def changed(**changes: Any) -> Change:
    return lambda run: dataclasses.replace(run, sweep=dataclasses.replace(run.sweep, **changes))


def test_what_was_measured_is_recalled_to_the_last_digit(run: Run) -> None:
    assert recall(run, WHOLE) is None
    remember(run, WHOLE, MEASURED)
    recalled = recall(run, WHOLE)
    assert recalled is not None
    assert 1 <= recalled.age_s < 60
    assert dataclasses.replace(recalled, age_s=0.0) == MEASURED


@pytest.mark.parametrize(
    "change",
    [
        changed(seed=7),
        changed(search=SearchSettings(num_trials=99, sampler="tpe")),
        changed(data=DataSettings(path="/elsewhere")),
        changed(
            space={
                "unfreeze_depth": Choice(choices=(0, 3)),
                "lr": Float(low=1e-5, high=1.0, log=True),
            }
        ),
    ],
    ids=["seed", "search", "path", "learning rates"],
)
def test_what_does_not_change_a_trials_steps_is_not_measured_again(
    run: Run, change: Change
) -> None:
    remember(run, WHOLE, MEASURED)
    assert recall(change(run), WHOLE) is not None


@pytest.mark.parametrize(
    "change",
    [
        changed(space={"unfreeze_depth": Int(low=0, high=3)}),
        changed(params=TrialParams(unfreeze_depth=0, batch_size=64)),
        changed(params=TrialParams(unfreeze_depth=0, augmentation_strength=0.5)),
        changed(data=DataSettings(path="/nowhere", image_size_px=96)),
        changed(data=DataSettings(path="/nowhere", class_balance="none")),
        changed(augmentation=AugmentationSettings(rotation_deg=1.0)),
        changed(resources=ResourceSettings(feature_cache_gib=0.0)),
        lambda run: dataclasses.replace(run, precisions={"mobilenet_v2": "bf16-mixed"}),
    ],
    ids=["depths", "batch", "strength", "px", "balance", "views", "features", "precision"],
)
def test_what_changes_a_trials_steps_is_measured(run: Run, change: Change) -> None:
    remember(run, WHOLE, MEASURED)
    assert recall(change(run), WHOLE) is None


def test_another_number_of_images_or_cpus_is_measured(run: Run, make_data: MakeData) -> None:
    remember(run, WHOLE, MEASURED)
    manifest, _ = make_data(train=(9, 9, 9))
    assert recall(dataclasses.replace(run, manifest=manifest), WHOLE) is None
    assert recall(run, {"cpu": 2.0, "gpu": 0.0}) is None


def test_what_is_older_than_a_week_is_forgotten(run: Run, cache: Path) -> None:
    remember(run, WHOLE, MEASURED)
    kept = json.loads(cache.read_bytes())
    (key,) = kept
    kept[key]["measured_at_s"] -= 7 * 24 * 3600
    cache.write_text(json.dumps(kept))
    assert recall(run, WHOLE) is None
    other = changed(params=TrialParams(unfreeze_depth=0, batch_size=64))(run)
    remember(other, WHOLE, MEASURED)
    assert key not in json.loads(cache.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[: len(whole) // 2],
        lambda whole: b"[1, 2]",
        lambda whole: whole.replace(b"0.25", b'"0.25"'),
        lambda whole: whole.replace(b"build_s", b"built_s"),
        lambda whole: whole.replace(b"mobilenet_v2 0", b"mobilenet_v2"),
        lambda whole: whole.replace(b"7.5", b"null"),
        lambda whole: whole.replace(b"measured_at_s", b"measured"),
        lambda whole: b"[" * 200_000,
        lambda whole: b"{}",
        lambda whole: whole.replace(b"mobilenet_v2 3", b"mobilenet_v2 4"),
        lambda whole: whole.replace(b"0.25", b"NaN"),
        lambda whole: whole.replace(b"0.25", b"Infinity"),
        lambda whole: whole.replace(b"0.25", b"-0.25"),
        lambda whole: whole.replace(b"0.25", b"true"),
        lambda whole: whole.replace(b"7.5", b'"nan"'),
        lambda whole: whole.replace(b"5120", b"1" + b"0" * 400),
        lambda whole: re.sub(rb'("measured_at_s": )[0-9.]+', rb"\g<1>1" + b"0" * 400, whole),
    ],
)
def test_a_damaged_file_is_measured_again_and_replaced(
    run: Run, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    remember(run, WHOLE, MEASURED)
    whole = cache.read_bytes()
    cache.write_bytes(damage(whole))
    assert cache.read_bytes() != whole, "the damage has done nothing"
    assert recall(run, WHOLE) is None
    remember(run, WHOLE, MEASURED)
    assert recall(run, WHOLE) is not None


def test_another_number_of_workers_beside_each_other_is_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    remember(run, WHOLE, MEASURED)
    monkeypatch.setattr(known_measurements, "max_concurrent", lambda whole: 16)
    assert recall(run, WHOLE) is None


def test_where_nobody_can_say_what_a_measurement_is_of_none_is_kept(run: Run, cache: Path) -> None:
    remember(dataclasses.replace(run, gpu_share=1.0), {"cpu": 1.0, "gpu": 1.0}, MEASURED)
    run.sweep.folder.rmdir()  # a storage that is gone for a moment
    remember(run, WHOLE, MEASURED)
    assert recall(run, WHOLE) is None
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_no_error(run: Run, cache: Path) -> None:
    cache.parent.write_text("in the way")
    remember(run, WHOLE, MEASURED)
    assert recall(run, WHOLE) is None


@pytest.mark.slow
def test_a_launch_after_a_plan_measures_nothing(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(TINY_SWEEP)
    given = [str(tmp_path / "sweep.yaml"), "--storage", str(tmp_path / "sweeps")]
    main(["plan", *given])
    assert " ago" not in capsys.readouterr().out
    measured = cache.read_bytes()
    main(["launch", *given, "--set", "search.num_trials=1"])
    assert "; measured " in capsys.readouterr().out
    assert cache.read_bytes() == measured
    told = Record.open(open_sweep("tiny", tmp_path / "sweeps")).facts["forecast"]
    assert told["measured_ago_s"] > 1
