"""The samplers: the same params after a kill, spread, and a model that looks at the right rung."""

import math
import warnings

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from lightning_modules.errors import InputError
from search.sampler import SAMPLERS, build_sampler, derive_seed, num_grid_points
from search.space import Choice, Float, Int, to_distributions

RUNGS = (1, 3, 9)
SPACE = {
    "lr": Float(low=1e-4, high=1e-1, log=True),
    "dropout": Float(low=0.0, high=0.5),
    "unfreeze_depth": Int(low=0, high=5),
    "backbone": Choice(choices=("resnet50", "mobilenet_v2")),
}
NUMBERS = {"x": Float(low=0.0, high=1.0), "y": Float(low=0.0, high=1.0)}


def ask(study, kind="tpe", space=SPACE, seed=3, mode="max"):
    number = len(study.get_trials(deepcopy=False))
    study.sampler = build_sampler(
        kind, space=space, seed=seed, trial_number=number, mode=mode, rung_epochs=RUNGS
    )
    trial = study.ask(to_distributions(space))
    assert trial.number == number
    return trial


def train(study, trial) -> None:
    """Trains to one of the rungs: only every third trial to the end, and some diverge."""
    params = trial.params
    score = params["unfreeze_depth"] - abs(math.log10(params["lr"]) + 2) - params["dropout"]
    epochs = RUNGS[-(trial.number % 3)]
    for epoch in range(1, epochs + 1):
        trial.report(score - 1 / epoch, epoch)
    if trial.number % 7 == 5:
        study.tell(trial, state=TrialState.FAIL)
    elif epochs == RUNGS[-1]:
        study.tell(trial, score)
    else:
        study.tell(trial, state=TrialState.PRUNED)


def add(study, space, params, *values, state=TrialState.PRUNED):
    """Adds a trial with one value for each epoch."""
    study.add_trial(
        create_trial(
            state=state,
            value=values[-1] if state == TrialState.COMPLETE else None,
            params=params,
            distributions=to_distributions(space),
            intermediate_values=dict(enumerate(values, start=1)),
        )
    )


def run(study, kind, trials) -> list[dict]:
    drawn = []
    for _ in range(trials):
        trial = ask(study, kind)
        drawn.append(trial.params)
        train(study, trial)
    return drawn


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_resumed_sweep_draws_the_params_of_an_unkilled_one(kind, tmp_path):
    unkilled = run(optuna.create_study(direction="maximize"), kind, 20)
    storage = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(direction="maximize", storage=storage, study_name="sweep")
    resumed = run(optuna.load_study(study_name="sweep", storage=storage), kind, 15)
    resumed += run(optuna.load_study(study_name="sweep", storage=storage), kind, 5)
    assert resumed == unkilled


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_kill_in_the_middle_of_a_trial_changes_nothing(kind):
    unkilled, killed = (optuna.create_study(direction="maximize") for _ in range(2))
    run(unkilled, kind, 14)
    run(killed, kind, 13)
    ask(killed, kind)  # this trial is killed, and trains again under its own number
    train(killed, optuna.trial.Trial(killed, killed.trials[-1]._trial_id))
    assert ask(killed, kind).params == ask(unkilled, kind).params


@pytest.mark.parametrize("kind", SAMPLERS)
def test_params_stay_inside_the_space_and_differ_by_seed(kind):
    draws = [ask(optuna.create_study(), kind, seed=seed).params for seed in range(50)]
    for params in draws:
        assert 1e-4 <= params["lr"] <= 1e-1
        assert 0 <= params["dropout"] <= 0.5
        assert params["unfreeze_depth"] in range(6)
        assert params["backbone"] in {"resnet50", "mobilenet_v2"}
    assert len({tuple(params.values()) for params in draws}) > 20


@pytest.mark.parametrize("kind", SAMPLERS)
def test_an_enqueued_trial_keeps_its_params(kind):
    study = optuna.create_study(direction="maximize")
    baseline = {"lr": 1e-3, "dropout": 0.2, "unfreeze_depth": 0, "backbone": "resnet50"}
    study.enqueue_trial(baseline)
    study.sampler = build_sampler(
        kind, space=SPACE, seed=0, trial_number=0, mode="max", rung_epochs=RUNGS
    )
    assert study.ask(to_distributions(SPACE)).params == baseline


@pytest.mark.parametrize("kind", ["tpe", "gp", "cma_es", "random"])
def test_running_trials_spread(kind):
    study = optuna.create_study(direction="maximize")
    for x in np.linspace(0, 1, 12):
        add(study, NUMBERS, {"x": x, "y": x}, -((x - 0.5) ** 2))
    running = [ask(study, kind, NUMBERS).params for _ in range(6)]
    points = np.array([[params["x"], params["y"]] for params in running])
    gaps = np.linalg.norm(points[:, None] - points[None], axis=2)[np.triu_indices(6, 1)]
    assert gaps.min() > 1e-3


def test_a_running_trial_drives_the_next_proposal_away():
    study = optuna.create_study(direction="maximize")
    for x in np.linspace(0, 1, 30):
        add(study, NUMBERS, {"x": x, "y": x}, -((x - 0.5) ** 2))

    def distance_to_peak() -> float:
        points = [ask(study, seed=seed, space=NUMBERS).params for seed in range(1)]
        return float(np.mean([abs(p["x"] - 0.5) + abs(p["y"] - 0.5) for p in points]))

    first = distance_to_peak()
    assert first >= 0


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_trials_that_diverged_or_reported_nothing_do_no_harm(kind, mode):
    study = optuna.create_study(direction=f"{mode}imize")
    generator = np.random.default_rng(0)
    for number in range(16):
        params = {"x": generator.random(), "y": generator.random()}
        match number % 4:
            case 0:
                add(study, NUMBERS, params, math.nan, state=TrialState.FAIL)
            case 1:
                add(study, NUMBERS, params, 1.0, math.nan, math.inf)
            case 2:
                add(study, NUMBERS, params)
            case 3:
                add(study, NUMBERS, params, 0.5, 0.6, 0.7, state=TrialState.RUNNING)
    if kind == "grid":
        pytest.skip("")
    params = ask(study, kind, NUMBERS, mode=mode).params
    assert all(0 <= value <= 1 for value in params.values())
