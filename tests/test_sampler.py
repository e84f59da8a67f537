"""The samplers: the same params after a kill, spread, and a model that looks at the right rung."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.samplers.gp_sampler import RungGPSampler
from search.samplers.sampler import SAMPLERS, build_sampler, num_grid_points
from search.samplers.space_sampler import rung_values
from search.samplers.surrogate import Surrogate
from search.space import Choice, Float, Int, Space, to_distributions

Params = dict[str, Any]
RUNGS = (1, 2, 3)
MODELS = ("tpe", "gp")
SPACE = {
    "lr": Float(low=1e-4, high=1e-1, log=True),
    "dropout": Float(low=0.0, high=0.5),
    "unfreeze_depth": Int(low=0, high=5),
    "backbone": Choice(choices=("resnet50", "mobilenet_v2")),
}
NUMBERS = {"x": Float(low=0.0, high=1.0), "y": Float(low=0.0, high=1.0)}


def build(kind: str, space: Space, number: int, seed: int = 3, mode: str = "max") -> BaseSampler:
    return build_sampler(
        kind, space=space, seed=seed, trial_number=number, mode=mode, rung_epochs=RUNGS
    )


def ask(
    study: Study, kind: str = "tpe", space: Space = SPACE, seed: int = 3, mode: str = "max"
) -> Trial:
    study.sampler = build(kind, space, len(study.get_trials(deepcopy=False)), seed, mode)
    return study.ask(to_distributions(space))


def train(study: Study, trial: Trial) -> None:
    """Trains to one of the rungs: every third trial to the end, and some diverge."""
    score = sum(value for value in trial.params.values() if not isinstance(value, str))
    epochs = RUNGS[-(trial.number % 3)]
    for epoch in range(1, epochs + 1):
        trial.report(score - 1 / epoch, epoch)
    if trial.number % 7 == 5:
        study.tell(trial, state=TrialState.FAIL)
    elif epochs == RUNGS[-1]:
        study.tell(trial, score)
    else:
        study.tell(trial, state=TrialState.PRUNED)


def run(study: Study, kind: str, trials: int, space: Space = SPACE) -> list[Params]:
    drawn = []
    for _ in range(trials):
        trial = ask(study, kind, space)
        drawn.append(trial.params)
        train(study, trial)
    return drawn


def add(
    study: Study, params: Params, *values: float, state: TrialState = TrialState.PRUNED
) -> None:
    """Adds a trial with one value for each epoch."""
    study.add_trial(
        create_trial(
            state=state,
            value=values[-1] if state == TrialState.COMPLETE else None,
            params=params,
            distributions=to_distributions(NUMBERS),
            intermediate_values=dict(enumerate(values, start=1)),
        )
    )


def add_points(study: Study, *peaks: tuple[float, float], count: int = 40, **state: Any) -> None:
    """Adds trials all over the square, best at the first peak after epoch 1, and so on."""
    for x, y in np.random.default_rng(0).random((count, 2)).tolist():
        values = [epoch - math.hypot(x - a, y - b) for epoch, (a, b) in enumerate(peaks)]
        add(study, {"x": x, "y": y}, *values, **state)


def distance_to(
    peak: tuple[float, float], study: Study, kind: str = "tpe", mode: str = "max"
) -> float:
    """The median distance to a point of what sweeps with several seeds would draw next."""
    trials = study.get_trials(deepcopy=False)
    distances = []
    for seed in range(20):
        copy = optuna.create_study(direction=study.direction.name.lower())
        copy.add_trials(trials)
        copy.sampler = build(kind, NUMBERS, len(trials), seed, mode)
        params = copy.ask(to_distributions(NUMBERS)).params
        distances.append(math.hypot(params["x"] - peak[0], params["y"] - peak[1]))
    return float(np.median(distances))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_resumed_sweep_draws_the_params_of_an_unkilled_one(kind: str, tmp_path: Path) -> None:
    unkilled = run(optuna.create_study(direction="maximize"), kind, 15)
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(direction="maximize", storage=storage, study_name="sweep")
    resumed = run(optuna.load_study(study_name="sweep", storage=storage), kind, 8)
    resumed += run(optuna.load_study(study_name="sweep", storage=storage), kind, 7)
    assert resumed == unkilled


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_kill_in_the_middle_of_a_trial_changes_nothing(kind: str) -> None:
    unkilled, killed = (optuna.create_study(direction="maximize") for _ in range(2))
    run(unkilled, kind, 12)
    run(killed, kind, 11)
    half_trained = ask(killed, kind)
    resumed = Trial(killed, half_trained._trial_id)  # trains on under its own number and params
    train(killed, resumed)
    assert resumed.params == unkilled.trials[-1].params
    assert ask(killed, kind).params == ask(unkilled, kind).params


def test_a_seed_is_the_same_in_every_process() -> None:
    code = "from lightning_modules.seeds import derive_seed; print(derive_seed(7, 'trial', 3))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(printed.stdout) == derive_seed(7, "trial", 3)


def test_seeds_differ_and_fit_in_32_bits() -> None:
    seeds = {derive_seed(sweep, trial) for sweep in range(50) for trial in range(50)}
    assert len(seeds) == 2500
    assert 0 <= min(seeds) <= max(seeds) < 2**32
    assert derive_seed(1, 23) != derive_seed(12, 3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_params_stay_inside_the_space_and_differ_by_seed(kind: str) -> None:
    draws = [ask(optuna.create_study(), kind, seed=seed).params for seed in range(30)]
    for params in draws:
        assert 1e-4 <= params["lr"] <= 1e-1
        assert 0 <= params["dropout"] <= 0.5
        assert params["unfreeze_depth"] in range(6)
        assert params["backbone"] in {"resnet50", "mobilenet_v2"}
    assert len({tuple(params.values()) for params in draws}) > 15


def test_the_first_trials_cover_every_part_of_each_range() -> None:
    study = optuna.create_study(direction="maximize")
    drawn = [ask(study, "tpe", NUMBERS).params for _ in range(8)]  # none has reported yet
    for name in NUMBERS:
        assert sorted(int(params[name] * 8) for params in drawn) == list(range(8))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_enqueued_trial_keeps_its_params(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    baseline = {"lr": 1e-3, "dropout": 0.2, "unfreeze_depth": 0, "backbone": "resnet50"}
    study.enqueue_trial(baseline)
    study.sampler = build(kind, SPACE, number=0)
    assert study.ask(to_distributions(SPACE)).params == baseline


@pytest.mark.parametrize("kind", ["tpe", "gp", "cma_es", "random"])
def test_trials_that_run_at_once_spread(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.5, 0.5))
    running = [ask(study, kind, NUMBERS).params for _ in range(4)]
    points = np.array([[params["x"], params["y"]] for params in running])
    gaps = np.linalg.norm(points[:, None] - points, axis=2)[np.triu_indices(4, 1)]
    assert gaps.min() > 0.001


@pytest.mark.parametrize("kind", MODELS)
def test_running_trials_push_the_next_proposal_away(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.5, 0.5))
    alone = distance_to((0.5, 0.5), study, kind)
    for offset in np.linspace(-0.05, 0.05, 5).tolist():
        add(study, {"x": 0.5 + offset, "y": 0.5 - offset}, state=TrialState.RUNNING)
    assert distance_to((0.5, 0.5), study, kind) > 1.5 * alone


@pytest.mark.parametrize("kind", MODELS)
def test_a_higher_rung_overrules_a_lower_one(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.2, 0.2), (0.8, 0.8))  # epoch 1 misleads, epoch 2 tells the truth
    assert distance_to((0.8, 0.8), study, kind) < 0.2


@pytest.mark.parametrize(("count", "where"), [(15, 0.2), (16, 0.8)])
def test_tpe_models_a_higher_rung_once_enough_trials_have_reached_it(
    count: int, where: float
) -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.2, 0.2))
    add_points(study, (0.8, 0.8), (0.8, 0.8), count=count)
    assert distance_to((where, where), study) < 0.2


@pytest.mark.parametrize("kind", MODELS)
def test_a_running_trial_counts_at_the_rungs_it_has_passed(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.8, 0.8), state=TrialState.RUNNING)
    assert distance_to((0.8, 0.8), study, kind) < 0.2


@pytest.mark.parametrize("kind", MODELS)
def test_a_trial_that_ended_early_by_itself_counts_at_the_rungs_above(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.8, 0.8), state=TrialState.COMPLETE)
    add_points(study, (0.2, 0.2))
    assert distance_to((0.8, 0.8), study, kind) < 0.2


def reporting(values: dict[int, float], state: TrialState = TrialState.PRUNED) -> FrozenTrial:
    value = 0.0 if state == TrialState.COMPLETE else None
    return create_trial(state=state, value=value, intermediate_values=values)


def test_the_value_at_a_rung_is_the_best_so_far_and_unknown_above_the_last_report() -> None:
    values = {1: 0.3, 2: math.nan, 3: 0.1, 4: 0.9}
    trials = [
        reporting(values),
        reporting({1: 0.5}, TrialState.COMPLETE),  # ended by itself: it had no more to gain
        reporting({1: 0.5, 3: 0.7}, TrialState.FAIL),  # diverged: what it had is no value
        reporting({1: math.nan, 3: -math.inf}),
        reporting({}),
        reporting(values),
    ]
    nan = math.nan
    unknown = [nan, nan, nan]
    of_first = [0.3, 0.3, nan]
    expected = [of_first, [0.5, 0.5, 0.5], unknown, unknown, unknown, of_first]
    np.testing.assert_array_equal(rung_values(trials, (1, 3, 9), "max"), expected)
    # Where less is better, the third epoch's 0.1 is the best.
    np.testing.assert_array_equal(rung_values(trials[:1], (1, 3, 9), "min"), [[0.3, 0.1, nan]])
    assert rung_values([], (1, 3, 9), "max").shape == (0, 3)


@given(
    reports=st.lists(
        st.tuples(
            st.dictionaries(st.integers(1, 12), st.floats(width=32), max_size=12),
            st.sampled_from([s for s in TrialState if s.is_finished()]),
        ),
        max_size=6,
    ),
    mode=st.sampled_from(["max", "min"]),
)
def test_values_at_the_rungs_are_those_of_each_trial_alone(
    reports: list[tuple[dict[int, float], TrialState]], mode: str
) -> None:
    trials = [reporting(values, state) for values, state in reports]
    got = rung_values(trials, (2, 5, 9), mode)
    for (values, state), row in zip(reports, got, strict=True):
        finite = {epoch: value for epoch, value in values.items() if math.isfinite(value)}
        for rung, value in zip((2, 5, 9), row.tolist(), strict=True):
            so_far = [value for epoch, value in finite.items() if epoch <= rung]
            is_reached = state == TrialState.COMPLETE or max(finite, default=0) >= rung
            if state == TrialState.FAIL or not so_far or not is_reached:
                assert math.isnan(value)
            else:
                assert value == (max(so_far) if mode == "max" else min(so_far))


@pytest.mark.parametrize("kind", MODELS)
def test_the_direction_of_the_metric_is_kept(kind: str) -> None:
    study = optuna.create_study(direction="minimize")
    for x, y in np.random.default_rng(0).random((40, 2)).tolist():
        add(study, {"x": x, "y": y}, math.hypot(x - 0.8, y - 0.8))
    assert distance_to((0.8, 0.8), study, kind, mode="min") < 0.2


@pytest.mark.parametrize("kind", MODELS)
def test_diverged_trials_are_avoided(kind: str) -> None:
    study = optuna.create_study(direction="maximize")
    for x, y in np.random.default_rng(0).random((40, 2)).tolist():
        if x > 0.5:
            add(study, {"x": x, "y": y}, math.nan, state=TrialState.FAIL)
        else:
            add(study, {"x": x, "y": y}, y)
    assert distance_to((0.25, 1.0), study, kind) < 0.3


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("kind", ["tpe", "gp", "cma_es", "random"])
def test_trials_without_a_usable_value_do_no_harm(kind: str, mode: str) -> None:
    study = optuna.create_study(direction=f"{mode}imize")
    for number, x in enumerate(np.linspace(0, 1, 24)):
        params = {"x": x, "y": x}
        match number % 5:
            case 0:
                add(study, params, math.nan, state=TrialState.FAIL)
            case 1:
                add(study, params, 0.5, math.nan, math.inf)
            case 2:
                add(study, params, -math.inf)
            case 3:
                add(study, params)
            case 4:
                add(study, params, 0.5, 0.5, 0.5, state=TrialState.COMPLETE)
    params = ask(study, kind, NUMBERS, mode=mode).params
    assert all(0 <= value <= 1 for value in params.values())


def test_trials_stopped_below_tell_the_gp_about_the_top() -> None:
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.8, 0.8), count=30)  # stopped at the first rung
    add_points(study, (0.8, 0.8), (0.8, 0.8), (0.8, 0.8), count=2)  # too few for a model alone
    assert distance_to((0.8, 0.8), study, "gp") < 0.1


def test_the_gp_takes_the_ends_of_stopped_and_running_trials_as_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    assume = Surrogate.assume

    def record(model: Surrogate, points: np.ndarray, values: np.ndarray) -> None:
        ends, _ = model.predict(np.vstack([points, [[0.8, 0.8]]]))
        calls.append((points, values, ends))
        assume(model, points, values)

    monkeypatch.setattr(Surrogate, "assume", record)
    study = optuna.create_study(direction="maximize")
    add_points(study, (0.8, 0.8), count=20)  # stopped
    add_points(study, (0.8, 0.8), (0.8, 0.8), (0.8, 0.8), count=5, state=TrialState.COMPLETE)
    add(study, {"x": 0.1, "y": 0.1}, math.nan, state=TrialState.FAIL)
    for x in (0.3, 0.6):
        add(study, {"x": x, "y": x}, state=TrialState.RUNNING)
    study.sampler = build("gp", NUMBERS, number=3)  # not one of the random ones
    study.ask(to_distributions(NUMBERS))
    [(points, values, ends)] = calls
    unfinished = [
        t for t in study.trials[:-1] if t.state in (TrialState.PRUNED, TrialState.RUNNING)
    ]
    assert sorted(points.tolist()) == sorted([t.params["x"], t.params["y"]] for t in unfinished)
    assert sorted(points[:2].tolist()) == [[0.3, 0.3], [0.6, 0.6]]  # running trials come first
    assert (values <= ends[:-1] + 1e-9).all()


@pytest.mark.parametrize("kind", MODELS)
def test_a_space_of_choices_alone_is_searched(kind: str) -> None:
    space: Space = {name: Choice(choices=("a", None, 1)) for name in "uvw"}
    study = optuna.create_study(direction="maximize")
    for _ in range(25):
        trial = ask(study, kind, space)
        score = float(sum(value == "a" for value in trial.params.values()))
        for epoch in RUNGS:
            trial.report(score, epoch)
        study.tell(trial, score)
    assert study.best_value == 3


def test_the_gp_repeats_nothing_before_everything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RungGPSampler, "random_share", 0.0)
    space: Space = {"u": Choice(choices=("a", "b", "c", "d")), "n": Int(low=1, high=3)}
    study = optuna.create_study(direction="maximize")
    tried: list[tuple[Any, ...]] = []
    while len(set(tried)) < 12:
        trial = ask(study, "gp", space)
        params = tuple(trial.params.values())
        assert len(tried) < RungGPSampler.min_observations or params not in tried
        tried.append(params)
        train(study, trial)


def test_a_grid_tries_every_point_once_and_then_says_so() -> None:
    study = optuna.create_study(direction="maximize")
    points = [tuple(ask(study, "grid").params.values()) for _ in range(num_grid_points(SPACE))]
    assert len(set(points)) == len(points) == 3 * 3 * 3 * 2
    with pytest.raises(InputError, match="a grid of 54 points gives 54 trials"):
        ask(study, "grid")


def test_an_enqueued_trial_takes_no_point_of_the_grid() -> None:
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"x": 0.3, "y": 0.3})
    points = [tuple(ask(study, "grid", NUMBERS).params.values()) for _ in range(9)]
    # The number of the enqueued trial was taken when it was put in the queue.
    assert (0.3, 0.3) in points


def test_the_order_of_a_grid_is_shuffled_by_the_seed() -> None:
    def order(seed: int) -> list[tuple[Any, ...]]:
        study = optuna.create_study(direction="maximize")
        return [tuple(ask(study, "grid", NUMBERS, seed).params.values()) for _ in range(9)]

    assert order(1) == order(1) != order(2)
    assert set(order(1)) == set(order(2))


def test_a_grid_too_large_to_list_is_no_problem() -> None:
    space = {f"x{index}": Float(low=0, high=1) for index in range(50)}
    study = optuna.create_study(direction="maximize")
    first, second = (ask(study, "grid", space).params for _ in range(2))
    assert first != second


def test_cma_es_closes_in_although_most_trials_are_stopped() -> None:
    study = optuna.create_study(direction="maximize")
    for _ in range(60):
        trial = ask(study, "cma_es", NUMBERS)
        trial.report(-((trial.params["x"] - 0.8) ** 2) - (trial.params["y"] - 0.2) ** 2, 1)
        study.tell(trial, state=TrialState.PRUNED)
    last = np.array([[t.params["x"], t.params["y"]] for t in study.trials[-12:]])
    assert np.abs(np.median(last, axis=0) - [0.8, 0.2]).max() < 0.1


def test_an_unknown_sampler_and_an_unfit_space_are_named() -> None:
    with pytest.raises(InputError, match=r"sampler must be one of tpe, gp, .*, got 'bayes'"):
        build("bayes", SPACE, number=0)
    with pytest.raises(InputError, match="cma_es needs at least one float or int parameter"):
        build("cma_es", {"backbone": SPACE["backbone"]}, number=0)
