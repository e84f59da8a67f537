"""Metric against cost: which trials are on the front, go on at a rung, and are drawn next."""

import dataclasses
import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from lightning_modules.network_cost import NetworkCost, measure_costs
from search import pareto
from search.cost_levels import CostLevels
from search.samplers.gp_sampler import RungGPSampler, _best_by_level
from search.samplers.sampler import build_sampler
from search.space import Choice, Float, Space, to_distributions
from search.study.recorded import Epoch, State, Trial
from search.sweep import DataSettings, SchedulerSettings, Sweep, TrainingSettings, TrialParams
from search.tuning.scheduler import ResumableASHA

LATENCY_MS = {"mobilenet_v2": 2.0, "efficientnet_b0": 4.0, "resnet50": 16.0}
COSTS = {name: {"latency_ms": ms, "size_mib": 10 * ms} for name, ms in LATENCY_MS.items()}
SWEEP = Sweep(
    name="s",
    objectives=("val_macro_f1", "latency_ms"),
    data=DataSettings(path="images"),
    training=TrainingSettings(max_epochs=4),
    scheduler=SchedulerSettings(grace_period_epochs=1, reduction_factor=2),
)


def trial_of(
    number: int, backbone: str, value: float | None, metric: str = "val_macro_f1"
) -> Trial:
    epoch = Epoch(
        epoch=1,
        metrics={metric: value},
        confusion=[],
        last=None,
        best=None,
        stopped="asha",
        features="",
        ran_on="",
    )
    state: State = "pruned"
    return Trial(
        number=number,
        params=TrialParams(backbone=backbone),
        seed=0,
        view_seed=0,
        state=state,
        epochs=(epoch,),
        attempt=0,
        reason="asha",
    )


def front_of(*given: tuple[str, float | None], sweep: Sweep = SWEEP) -> list[int]:
    trials = [trial_of(n, *pair, metric=sweep.metric) for n, pair in enumerate(given)]
    return [p.trial.number for p in pareto.place(trials, sweep, COSTS) if p.on_front]


def test_the_front_is_what_none_beats_in_both() -> None:
    assert front_of(
        ("resnet50", 0.9),
        ("resnet50", 0.8),  # dearer and worse than 3
        ("mobilenet_v2", 0.7),
        ("efficientnet_b0", 0.85),
        ("mobilenet_v2", 0.6),
    ) == [0, 3, 2]


def test_of_equals_the_cheaper_and_then_the_earlier_is_on_the_front() -> None:
    assert front_of(("resnet50", 0.9), ("mobilenet_v2", 0.9), ("mobilenet_v2", 0.9)) == [1]


def test_a_trial_without_a_value_is_on_no_front() -> None:
    assert front_of(("mobilenet_v2", None), ("resnet50", 0.1)) == [1]


def test_a_loss_is_better_where_it_is_small() -> None:
    sweep = dataclasses.replace(SWEEP, metric="val_loss", objectives=("val_loss", "size_mib"))
    assert front_of(("resnet50", 0.3), ("mobilenet_v2", 0.5), ("resnet50", 0.6), sweep=sweep) == [
        0,
        1,
    ]


# The scheduler


class Rungs:
    """A scheduler that is told values and says who goes on."""

    def __init__(self, costs: dict[str, float], trials: tuple[Trial, ...] = ()) -> None:
        self.scheduler = ResumableASHA(SWEEP, trials, costs)
        self.numbers = itertools.count(10)

    def goes_on(self, backbone: str, value: float, epoch: int = 1) -> bool:
        config = {"number": next(self.numbers), "params": {"backbone": backbone}}
        trial: Any = SimpleNamespace(trial_id=f"{config['number']}", config=config)
        self.scheduler.on_trial_add(None, trial)
        metrics = dict.fromkeys(("train_loss", "val_loss", "val_accuracy"), 1.0)
        result = {"epoch": epoch, "val_macro_f1": value, **metrics}
        return self.scheduler.on_trial_result(None, trial, result) == "CONTINUE"


def test_a_cheap_network_goes_on_although_dear_ones_are_better() -> None:
    with_costs, without = Rungs(LATENCY_MS), Rungs({})
    for rungs, expected in ((with_costs, True), (without, False)):
        for value in (0.8, 0.9):
            rungs.goes_on("resnet50", value)
        assert rungs.goes_on("mobilenet_v2", 0.5) is expected


def test_a_dear_network_has_to_beat_the_cheap_ones() -> None:
    rungs = Rungs(LATENCY_MS)
    for value in (0.6, 0.8):
        rungs.goes_on("mobilenet_v2", value)
    # The median of what costs no more, 0.7; Ray takes the percentile 1 - 1 / reduction_factor.
    assert not rungs.goes_on("efficientnet_b0", 0.69)
    assert rungs.goes_on("resnet50", 0.71)


def test_rungs_are_filled_from_the_record_by_cost() -> None:
    recorded = (trial_of(0, "resnet50", 0.9), trial_of(1, "mobilenet_v2", 0.6))
    rungs = Rungs(LATENCY_MS, recorded)
    assert not rungs.goes_on("mobilenet_v2", 0.59)
    assert rungs.goes_on("mobilenet_v2", 0.61)
    # 0.9, 0.6, 0.59, and 0.61 cost no more: their median is 0.605.
    assert not rungs.goes_on("resnet50", 0.604)


# The sampler


def test_the_gain_is_the_hypervolume_that_is_expected() -> None:
    sampler = sampler_of(LATENCY_MS)
    best = np.array([0.2, 0.2, 0.6])
    mean, std = np.array([0.3, 0.5]), np.array([0.2, 0.1])
    levels = np.array([0, 2])
    found = np.exp(sampler._log_gain(mean, std, levels, best))

    # Between two costs a new value adds the strip above the best of what costs no more.
    draws = mean + std * np.random.default_rng(0).standard_normal((400_000, 2))
    widths = np.array([np.log(2), np.log(4), np.log(8) / 2])
    widths /= widths.sum()
    gained = [
        np.mean(sum(widths[k] * np.maximum(draws[:, 0] - best[k], 0) for k in range(3))),
        np.mean(widths[2] * np.maximum(draws[:, 1] - best[2], 0)),
    ]
    np.testing.assert_allclose(found, gained, rtol=0.02)


def test_the_best_at_a_level_counts_for_all_that_cost_more() -> None:
    ends, levels = np.array([0.5, 0.3, 0.4]), np.array([1, 1, 2])
    assert _best_by_level(ends, levels, 4).tolist() == [0.3, 0.5, 0.5, 0.5]


SPACE: Space = {
    "x": Float(low=0.0, high=1.0),
    "backbone": Choice(choices=("mobilenet_v2", "resnet50")),
}


def sampler_of(costs: dict[str, float], number: int = 0) -> Any:
    return build_sampler(
        "gp",
        space=SPACE,
        seed=1,
        trial_number=number,
        mode="max",
        rung_epochs=(1,),
        costs=costs,
    )


def drawn(costs: dict[str, float], num_trials: int = 40) -> list[dict[str, Any]]:
    """A search in which the dear backbone is always the better one."""
    study = optuna.create_study(direction="maximize")
    for number in range(num_trials):
        study.sampler = sampler_of(costs, number)
        trial = study.ask(to_distributions(SPACE))
        is_dear = trial.params["backbone"] == "resnet50"
        peak = 0.3 if is_dear else 0.7
        value = (0.5 if is_dear else 0.0) - (trial.params["x"] - peak) ** 2
        trial.report(value, 1)
        study.tell(trial, value, state=TrialState.COMPLETE)
    return [trial.params for trial in study.trials]


@pytest.mark.slow
def test_both_backbones_are_tuned_where_cost_counts_and_one_where_it_does_not() -> None:
    both = drawn({"mobilenet_v2": 2.0, "resnet50": 16.0})
    cheap = [p["x"] for p in both[10:] if p["backbone"] == "mobilenet_v2"]
    dear = [p["x"] for p in both[10:] if p["backbone"] == "resnet50"]
    assert min(len(cheap), len(dear)) >= 5
    assert min(abs(x - 0.7) for x in cheap) < 0.05
    assert min(abs(x - 0.3) for x in dear) < 0.05
    alone = [p["backbone"] for p in drawn({})[10:]]
    assert alone.count("mobilenet_v2") < len(cheap)


def test_one_cost_is_no_objective() -> None:
    equal = dict.fromkeys(("mobilenet_v2", "resnet50"), 3.0)
    assert drawn(equal, 12) == drawn({}, 12)
    assert isinstance(sampler_of(equal), RungGPSampler)
    assert len(CostLevels(equal)) == len(CostLevels({})) == 1


def test_the_last_level_counts_as_much_as_the_others_on_average() -> None:
    widths = CostLevels({"a": 1.0, "b": math.e, "c": math.e**4}).widths()
    np.testing.assert_allclose(widths, np.array([1, 3, 2]) / 6)


# Costs


@pytest.mark.slow
def test_costs_are_measured_once_and_of_the_network_that_is_exported(tmp_path: Path) -> None:
    told: list[str] = []

    def measured() -> dict[str, NetworkCost]:
        return measure_costs(
            ("mobilenet_v2", "resnet50"),
            num_classes=5,
            image_size_px=64,
            cache_dir=tmp_path,
            tell=told.append,
        )

    costs = measured()
    assert len(told) == 2
    assert measured() == costs
    assert len(told) == 2
    # Float32 weights: 2.2 million without torchvision's head of 1,000, and 23.5 million.
    assert costs["mobilenet_v2"].size_mib == pytest.approx((2_223_872 + 1281 * 5) * 4 / 2**20, 0.03)
    assert costs["resnet50"].size_mib == pytest.approx((23_508_032 + 2049 * 5) * 4 / 2**20, 0.03)
    assert 0 < costs["mobilenet_v2"].latency_ms < costs["resnet50"].latency_ms
