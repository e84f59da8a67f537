"""What a sweep will take is foretold from measured steps and simulated trials."""

import dataclasses
import json
import math
from pathlib import Path

import optuna
import pytest
import torch
from conftest import TINY_SWEEP

from lightning_modules.errors import InputError
from search.cli import main
from search.planning import kind_cost, simulation
from search.planning.blind_draws import BlindDraws
from search.planning.duration import in_words, parse_duration
from search.planning.kind_cost import Kind, KindCost
from search.planning.measurement import deal, kinds_of
from search.planning.plan import fitting_num_trials, foretell
from search.planning.simulation import Setting, Simulation
from search.planning.span import compare_with_actual
from search.planning.words import describe_space
from search.results import open_sweep
from search.space import Choice, Float, Int, Space
from search.study.record import Record
from search.study.recorded import Epoch
from search.sweep import (
    DataSettings,
    SchedulerSettings,
    SearchSettings,
    Sweep,
    TrainingSettings,
    TrialParams,
)
from search.tuning.forecast import Rung, forecast

DEPTHS = range(6)


def cost(**changes: float) -> KindCost:
    """Whole seconds, so that sums can be checked by hand; no network is as slow."""
    zero = dict.fromkeys((f.name for f in dataclasses.fields(KindCost)), 0.0)
    return KindCost(**{**zero, "is_shared": False, **changes})  # type: ignore[arg-type]


def setting(costs: dict[Kind, KindCost], num_slots: int = 1, **changes: float) -> Setting:
    values = {"num_train": 10, "num_val": 2, "worker_start_s": 0.0, "store_bytes": 1e9}
    return Setting(costs=costs, num_slots=num_slots, **{**values, **changes})  # type: ignore[arg-type]


def sweep(
    num_trials: int,
    *,
    max_epochs: int = 3,
    scheduler: SchedulerSettings | None = None,
    space: Space | None = None,
    depth: int = 5,
    sampler: str = "random",
    mode: str = "val_macro_f1",
) -> Sweep:
    return Sweep(
        name="planned",
        metric=mode,
        data=DataSettings(path="/nowhere"),
        params=TrialParams(unfreeze_depth=depth),
        space=space or {"dropout": Float(low=0.1, high=0.6)},
        training=TrainingSettings(max_epochs=max_epochs),
        search=SearchSettings(num_trials=num_trials, sampler=sampler),
        scheduler=scheduler,
    )


def played(searched: Sweep, chosen: Setting, number: int = 0) -> Simulation:
    return Simulation(searched, chosen, number, BlindDraws(searched))


@pytest.fixture(autouse=True)
def _no_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "EPOCH_OVERHEAD_S", 0.0)
    monkeypatch.setattr(simulation, "TRIAL_OVERHEAD_S", 0.0)


def test_a_trial_that_trains_everything_computes_every_epoch_anew() -> None:
    costs = {("mobilenet_v2", 5): cost(build_s=5, compute_s=1, train_s=3, val_s=1, save_s=4)}
    outcome = played(sweep(2), setting(costs, worker_start_s=7)).run()
    # An epoch: 10 images x (1 + 3), 2 x (1 + 1), and 4 to save.
    assert outcome.duration_s == 7 + 2 * (5 + 3 * (40 + 4 + 4))
    assert outcome.epochs == 6
    assert outcome.feature_bytes == 0


def test_features_are_computed_by_the_first_trial_at_each_epoch_and_read_by_the_next() -> None:
    costs = {("mobilenet_v2", 0): cost(compute_s=10, is_shared=True, read_s=2, feature_bytes=8)}
    outcome = played(sweep(2, depth=0), setting(costs)).run()
    # First trial, an epoch: 10 images computed and written, 10 + 2; validation, 2 images, once: 24.
    first = 3 * 10 * 12 + 24 + 2 * 2 * 1  # in its other two epochs validation is read: 2 / 2 each
    second = 3 * 10 * 1 + 3 * 2 * 1
    assert outcome.duration_s == first + second
    assert outcome.feature_bytes == (3 * 10 + 2) * 8


def test_features_that_earlier_sweeps_have_stored_are_read_by_the_first_trial() -> None:
    costs = {("mobilenet_v2", 0): cost(compute_s=10, is_shared=True, read_s=2, feature_bytes=8)}
    # Depth 0 cuts after stage 5. Two of three epochs are there, and validation's images.
    there = [("train", 0), ("train", 1), ("val", 0)]
    stored = frozenset(("mobilenet_v2", split, epoch, 5) for split, epoch in there)
    one = setting(costs)
    outcome = played(sweep(1, depth=0), dataclasses.replace(one, stored=stored)).run()
    assert outcome.duration_s == 2 * 10 * 1 + 10 * 12 + 3 * 2 * 1
    assert outcome.feature_bytes == (3 * 10 + 2) * 8


def test_features_that_earlier_sweeps_have_stored_take_room() -> None:
    costs = {("mobilenet_v2", 0): cost(compute_s=10, is_shared=True, read_s=2, feature_bytes=8)}
    stored = frozenset(("mobilenet_v2", "train", epoch, 5) for epoch in (0, 1))
    one = setting(costs, store_bytes=2 * 10 * 8)
    outcome = played(sweep(1, depth=0), dataclasses.replace(one, stored=stored)).run()
    assert outcome.duration_s == 2 * 10 * 1 + 10 * 10 + 3 * 2 * 10


def test_features_of_cuts_that_a_sweep_does_not_have_are_nothing_to_it() -> None:
    costs = {("mobilenet_v2", 0): cost(compute_s=10, is_shared=True, read_s=2, feature_bytes=8)}
    stored = frozenset({("mobilenet_v2", "train", 0, 2), ("resnet50", "val", 0, 5)})
    with_stored = dataclasses.replace(setting(costs), stored=stored)
    assert (
        played(sweep(1, depth=0), with_stored).run()
        == played(sweep(1, depth=0), setting(costs)).run()
    )


def test_features_that_find_no_room_are_computed_by_every_trial() -> None:
    costs = {("mobilenet_v2", 0): cost(compute_s=10, is_shared=True, read_s=2, feature_bytes=8)}
    outcome = played(sweep(2, depth=0), setting(costs, store_bytes=0)).run()
    assert outcome.duration_s == 2 * 3 * (10 + 2) * 10
    assert outcome.feature_bytes == 0


def test_a_deeper_cut_starts_from_the_features_of_a_shallower_one() -> None:
    deep = cost(compute_s=10, is_shared=True, feature_bytes=1)
    shallow = cost(compute_s=4, is_shared=True, feature_bytes=1)
    costs = {("mobilenet_v2", 0): deep, ("mobilenet_v2", 3): shallow}
    one = played(sweep(1, depth=0), setting(costs))
    assert one._features_s(("mobilenet_v2", 3), "train", 0) == 40
    assert one._features_s(("mobilenet_v2", 0), "train", 0) == 60


def test_a_shallower_cut_is_stored_on_the_way_to_a_deeper_one() -> None:
    deep = cost(compute_s=10, is_shared=True, feature_bytes=1, read_s=2)
    shallow = cost(compute_s=4, is_shared=True, feature_bytes=3, read_s=1)
    unshared = cost(compute_s=7, feature_bytes=0)
    costs = {("mobilenet_v2", 0): deep, ("mobilenet_v2", 1): unshared, ("mobilenet_v2", 3): shallow}
    one = played(sweep(1, depth=0), setting(costs))
    # Ten images: 4 + 1 to the shallower cut, 6 + 2 from there.
    assert one._features_s(("mobilenet_v2", 0), "train", 0) == 130
    assert one._features_s(("mobilenet_v2", 3), "train", 0) == 10 / 2
    assert one._stored_bytes == 40
    # No room for the shallower: straight to the deeper.
    little = played(sweep(1, depth=0), setting(costs, store_bytes=39))
    assert little._features_s(("mobilenet_v2", 0), "train", 0) == 120
    assert little._features_s(("mobilenet_v2", 3), "train", 0) == 40


def test_as_many_slots_take_that_much_less_time() -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    durations = [
        played(sweep(6), setting(costs, num_slots=slots)).run().duration_s
        for slots in (1, 2, 3, 6, 12)
    ]
    assert durations == [180, 90, 60, 30, 30]


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["val_macro_f1", "val_loss"])
def test_simulated_epochs_are_those_of_chance_where_the_sampler_does_not_learn(
    metric: str,
) -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    rules = SchedulerSettings(grace_period_epochs=3, reduction_factor=3)
    searched = sweep(32, max_epochs=12, scheduler=rules, mode=metric)
    epochs, _, _ = foretell(searched, setting(costs))
    expected = forecast(
        [Rung(epoch=3, num_values=0, cutoff=None), Rung(epoch=9, num_values=0, cutoff=None)],
        epochs_done=[],
        num_waiting=32,
        max_epochs=12,
        reduction_factor=3,
    )
    assert epochs.middle == pytest.approx(expected.epochs, rel=0.15)
    assert 32 * 3 <= epochs.low < epochs.middle < epochs.high <= 32 * 12


@pytest.mark.slow
def test_a_sampler_that_learns_runs_more_epochs() -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    rules = SchedulerSettings(grace_period_epochs=1, reduction_factor=3)
    learning, chance = (
        sum(
            played(sweep(64, max_epochs=9, scheduler=rules, sampler=name), setting(costs), number)
            .run()
            .epochs
            for number in range(16)
        )
        for name in ("gp", "random")
    )
    assert learning > chance


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_trials_that_no_result_decides_are_foreseen_with_their_own_params(
    sampler: str, tmp_path: Path
) -> None:
    space: Space = {
        "backbone": Choice(choices=("mobilenet_v2", "resnet50")),
        "unfreeze_depth": Int(low=0, high=5),
        "lr": Float(low=1e-4, high=1e-2, log=True),
    }
    searched = sweep(24, max_epochs=2, space=space, sampler=sampler)
    searched = dataclasses.replace(searched, storage=str(tmp_path))
    searched.folder.mkdir()
    draws = BlindDraws(searched)
    record = Record.create(searched, {})
    num_foreseen = 0
    with record.being_written():
        record.draw()
        for number in range(1, 24):
            num_observed = number - 1  # all but the baseline, which runs all the time
            trial = record.draw()
            drawn = {name: getattr(trial.params, name) for name in space}
            foreseen = draws.params(number, num_observed)
            num_foreseen += foreseen is not None
            # Without observations all are foreseen; what a model proposed is something else.
            assert (drawn == draws.params(number, 0)) == (foreseen is not None)
            metrics: dict[str, float | None] = {"val_macro_f1": number / 24}
            for epoch, stopped in ((1, ""), (2, "max_epochs")):
                record.add_epoch(
                    number,
                    Epoch(
                        epoch=epoch,
                        metrics=metrics,
                        confusion=[],
                        last=None,
                        best=None,
                        stopped=stopped,
                        features="",
                        ran_on="here",
                    ),
                )
    if sampler == "random":
        assert num_foreseen == 23
    else:
        # Those before the model, and one in ten, or in three, after it.
        assert 5 <= num_foreseen < 20


def test_a_simulated_sampler_has_observed_what_a_real_one_would_have() -> None:
    class Asked(BlindDraws):
        def params(self, number: int, num_observed: int) -> None:
            asked.append((number, num_observed))

    asked: list[tuple[int, int]] = []
    # Two at a time, all alike, and each is observed at its first rung, after two of four epochs.
    rules = SchedulerSettings(grace_period_epochs=2, reduction_factor=3)
    searched = sweep(6, max_epochs=4, scheduler=rules, sampler="gp")
    chosen = setting({("mobilenet_v2", 5): cost(train_s=1)}, num_slots=2)
    Simulation(searched, chosen, 0, Asked(searched)).run()
    assert [number for number, _ in asked] == [1, 2, 3, 4, 5]
    # The second starts beside the baseline. One that takes a place sees the one that left it.
    assert asked[0] == (1, 0)
    assert all(number - 1 <= observed <= number for number, observed in asked[1:])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("num_backbones", [2, 3])
def test_kinds_are_dealt_so_that_no_worker_measures_one_backbone_alone(
    num_workers: int, num_backbones: int
) -> None:
    backbones = ("mobilenet_v2", "resnet50", "vgg16")[:num_backbones]
    kinds = [(backbone, depth) for depth in DEPTHS for backbone in backbones]
    dealt = deal(kinds, num_workers)
    assert len(dealt) == num_workers
    assert sorted(kind for hand in dealt for kind in hand) == sorted(kinds)
    for hand in dealt:
        assert [depth for _, depth in hand] == sorted(depth for _, depth in hand)
        shares = [sum(name == backbone for name, _ in hand) for backbone in backbones]
        assert max(shares) - min(shares) <= 1


@pytest.mark.parametrize("sampler", ["grid", "cma_es"])
def test_what_a_sampler_leaves_open_is_not_foreseen(sampler: str) -> None:
    assert BlindDraws(sweep(4, sampler=sampler)).params(1, 0) is None


def test_a_forecast_of_known_trials_is_of_those_trials() -> None:
    # Depth 5 takes ten times what the others take, and 16 trials at random have few or many of it.
    space: Space = {"unfreeze_depth": Int(low=0, high=5)}
    searched = sweep(16, max_epochs=1, space=space)
    costs = {("mobilenet_v2", depth): cost(train_s=1 + 9 * (depth == 5)) for depth in DEPTHS}
    draws = BlindDraws(searched)
    depths = [5, *((draws.params(number, 0) or {})["unfreeze_depth"] for number in range(1, 16))]
    outcome = played(searched, setting(costs), number=7).run()
    assert outcome.duration_s == sum(100 if depth == 5 else 10 for depth in depths)


def test_a_plan_is_the_same_every_time() -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    searched = sweep(8, max_epochs=9, scheduler=SchedulerSettings(), sampler="gp")
    assert foretell(searched, setting(costs)) == foretell(searched, setting(costs))


@pytest.mark.parametrize(
    ("long_s", "enough_s", "passes"),
    [(math.inf, math.inf, [4, 4, 64, 64, 64, 64]), (0.0, 1e-9, [4, 4, 64])],
)
def test_work_that_takes_long_is_done_to_all_images_once(
    monkeypatch: pytest.MonkeyPatch, long_s: float, enough_s: float, passes: list[int]
) -> None:
    monkeypatch.setattr(kind_cost, "LONG_S", long_s)
    monkeypatch.setattr(kind_cost, "ENOUGH_S", enough_s)
    done: list[int] = []
    kind_cost._time(done.append, 64, torch.device("cpu"))
    assert done == passes


@pytest.mark.slow
def test_a_budget_gets_the_most_trials_whose_upper_bound_fits() -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    chosen = fitting_num_trials(sweep(4), setting(costs), 600.0)

    def upper_s(num_trials: int) -> float:
        return foretell(sweep(num_trials), setting(costs))[1].high

    assert upper_s(chosen) <= 600 < upper_s(chosen + 1)
    # Each takes 30 s, so that 20 would fit if that were certain.
    assert 10 < chosen < 20


def test_a_budget_that_has_no_room_for_a_trial_is_refused() -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    with pytest.raises(InputError, match=r"--budget must have room for one trial.*; got 10 s"):
        fitting_num_trials(sweep(4), setting(costs), 10.0)


def test_a_grid_is_not_planned_beyond_its_points() -> None:
    costs = {("mobilenet_v2", 5): cost(train_s=1)}
    grid = sweep(2, sampler="grid", space={"dropout": Choice(choices=(0.1, 0.2, 0.3))})
    assert fitting_num_trials(grid, setting(costs), 1e6) == 3


def test_every_kind_of_trial_that_the_space_has_is_measured() -> None:
    space: Space = {
        "backbone": Choice(choices=("mobilenet_v2", "resnet50")),
        "unfreeze_depth": Int(low=0, high=1),
    }
    assert kinds_of(sweep(2, space=space, depth=1)) == [
        ("mobilenet_v2", 0),
        ("resnet50", 0),
        ("mobilenet_v2", 1),
        ("resnet50", 1),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("30m", 1800), ("1.5h", 5400), ("90s", 90), ("1 m", 60)]
)
def test_a_time_is_read_as_written(text: str, seconds: float) -> None:
    assert parse_duration(text, "--budget") == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "-2h", "0s", "0.5s", "2 days", "1e9h", "nan h"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--budget must be a time of a second or more"):
        parse_duration(text, "--budget")


def test_times_are_told_in_one_unit() -> None:
    told = [in_words(seconds) for seconds in (0.04, 42, 1320, 9000, 400000)]
    assert told == ["0.04 s", "42 s", "22 min", "2.5 h", "4.6 days"]


def test_a_space_is_told_in_words() -> None:
    space: Space = {
        "backbone": Choice(choices=("mobilenet_v2", "resnet50")),
        "unfreeze_depth": Int(low=0, high=5),
        "lr": Float(low=1e-4, high=1e-2, log=True),
    }
    assert describe_space(sweep(1, space=space)) == (
        "backbone one of mobilenet_v2, resnet50; unfreeze_depth 0 to 5; "
        "lr 0.0001 to 0.01, by factors"
    )


def test_forecast_and_actual_stand_beside_each_other() -> None:
    told = {
        "duration_s": {"low": 600, "middle": 1200, "high": 1800},
        "epochs": {"low": 40, "middle": 50, "high": 60},
    }
    actual = {"duration_s": 1500, "epochs": 55}
    assert compare_with_actual({"forecast": told}) is None
    assert compare_with_actual({"forecast": told, "actual": actual}) == (
        "forecast 20 min [10 min, 30 min], epochs 50 [40, 60]; actual 25 min (+25%), epochs 55"
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--budget", "soon"], "--budget must be a time of a second or more"),
        (["--budget", "2h", "--set", "search.num_trials=4"], "got search.num_trials too"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    (tmp_path / "sweep.yaml").write_text(TINY_SWEEP)
    storage = tmp_path / "sweeps"
    with pytest.raises(SystemExit) as end:
        main(["launch", str(tmp_path / "sweep.yaml"), "--storage", str(storage), *more])
    assert end.value.code == 2
    assert says in capsys.readouterr().err
    assert not storage.exists()


@pytest.mark.slow
def test_a_launch_records_its_forecast_beside_what_became_of_it(tiny_sweeps: Path) -> None:
    record = Record.open(open_sweep("tiny", tiny_sweeps))
    told, actual = record.facts["forecast"], record.facts["actual"]
    assert told["num_trials"] == 4
    assert told["num_slots"] == 2
    # Three epochs each; the first trials are not stopped.
    assert 4 <= told["epochs"]["low"] <= told["epochs"]["high"] <= 12
    assert 0 < told["duration_s"]["low"] < told["duration_s"]["high"]
    assert actual["epochs"] == sum(len(trial.epochs) for trial in record.trials())
    assert actual["duration_s"] > 0
    json.dumps(told)


@pytest.mark.slow
def test_a_plan_says_what_to_expect_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(TINY_SWEEP)
    storage = tmp_path / "sweeps"
    main(["plan", str(tmp_path / "sweep.yaml"), "--storage", str(storage)])
    told = capsys.readouterr().out
    assert "space   lr 0.0001 to 0.1, by factors" in told
    assert "plan    4 trials, 2 at a time; epochs " in told
    assert " of 12 possible" in told
    assert "mobilenet_v2       0" in told
    assert list(storage.iterdir()) == []


@pytest.mark.slow
def test_a_budget_without_room_for_one_trial_is_refused_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    (tmp_path / "sweep.yaml").write_text(f"{TINY_SWEEP}study_url: {url}\n")
    storage = tmp_path / "sweeps"
    with pytest.raises(SystemExit) as end:
        main(["launch", str(tmp_path / "sweep.yaml"), "--storage", str(storage), "--budget", "1s"])
    assert end.value.code == 2
    assert "--budget must have room for one trial, which takes up to " in capsys.readouterr().err
    assert list(storage.iterdir()) == []
    assert optuna.study.get_all_study_names(url) == []
