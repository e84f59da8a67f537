"""The space: what a parameter may be, and what a sampler draws from it."""

import math
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.errors import InputError
from search.space import Choice, Float, Int, from_unit, grid_of, to_distributions, to_unit

SPACE = {
    "lr": Float(low=1e-5, high=1e-1, log=True),
    "dropout": Float(low=0, high=0.5),
    "unfreeze_depth": Int(low=0, high=5),
    "backbone": Choice(choices=("resnet50", "mobilenet_v2")),
}


def draws_of(name: str, count: int = 1000) -> list:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    distributions = to_distributions({name: SPACE[name]})
    return [study.ask(distributions).params[name] for _ in range(count)]


def test_draws_stay_inside_the_range() -> None:
    assert all(1e-5 <= lr <= 1e-1 for lr in draws_of("lr"))
    assert all(0 <= dropout <= 0.5 for dropout in draws_of("dropout"))


def test_both_ends_of_an_int_occur_and_all_between() -> None:
    assert set(draws_of("unfreeze_depth")) == {0, 1, 2, 3, 4, 5}


def test_every_choice_occurs() -> None:
    assert set(draws_of("backbone")) == {"resnet50", "mobilenet_v2"}


def test_log_range_gives_every_decade_its_share() -> None:
    decades = np.floor(np.log10(draws_of("lr")))
    shares = [np.mean(decades == decade) for decade in (-5, -4, -3, -2)]
    assert shares == pytest.approx([0.25] * 4, abs=0.05)


def test_distributions_keep_the_order_of_the_space() -> None:
    assert list(to_distributions(SPACE)) == list(SPACE)


@given(position=st.floats(0, 1))
def test_from_unit_stays_inside(position: float) -> None:
    assert 1e-5 <= from_unit(SPACE["lr"], position) <= 1e-1
    assert 0 <= from_unit(SPACE["dropout"], position) <= 0.5
    assert from_unit(SPACE["unfreeze_depth"], position) in range(6)
    assert from_unit(SPACE["backbone"], position) in {"resnet50", "mobilenet_v2"}


@given(position=st.floats(0, 1))
def test_to_unit_reverses_from_unit(position: float) -> None:
    for name in ("lr", "dropout"):
        value = from_unit(SPACE[name], position)
        assert to_unit(SPACE[name], value) == pytest.approx(position, abs=1e-9)
    depth = from_unit(SPACE["unfreeze_depth"], position)
    assert from_unit(SPACE["unfreeze_depth"], to_unit(SPACE["unfreeze_depth"], depth)) == depth


def test_grid_holds_both_ends_and_is_even() -> None:
    grid = grid_of(SPACE)
    assert grid["lr"] == pytest.approx([1e-5, 1e-3, 1e-1])
    assert grid["dropout"] == [0, 0.25, 0.5]
    assert grid["unfreeze_depth"] == [0, 2, 5]
    assert grid["backbone"] == ["resnet50", "mobilenet_v2"]


def test_grid_of_a_short_int_range_is_the_range() -> None:
    assert grid_of({"depth": Int(low=1, high=2)})["depth"] == [1, 2]
    assert grid_of(SPACE, points=6)["unfreeze_depth"] == [0, 1, 2, 3, 4, 5]


def test_grid_values_are_legal_for_the_study() -> None:
    for name, values in grid_of(SPACE, points=4).items():
        distribution = to_distributions(SPACE)[name]
        assert all(distribution._contains(distribution.to_internal_repr(v)) for v in values)


def error_of(make: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(low=1, high=1), "low must be below high, got 1 and 1"),
        (lambda: Float(low=2.0, high=1.0), "low must be below high, got 2.0 and 1.0"),
        (lambda: Int(low=3, high=3), "low must be below high, got 3 and 3"),
        (lambda: Float(low=0, high=1, log=True), "low must be above 0 with log, got 0"),
        (lambda: Float(low=math.nan, high=1), "low must be finite, got nan"),
        (lambda: Float(low=0, high=math.inf), "high must be finite, got inf"),
        (lambda: Float(low=0, high=10**400), "high must be finite, got 1000"),
        (lambda: Float(low=-1e308, high=1e308), "high - low must be finite"),
        (lambda: Float(low=False, high=1), "low must be a number, got False"),
        (lambda: Float(low=0, high="1e-3"), "high must be a number, got '1e-3'"),
        (lambda: Float(low=1, high=2, log=1), "log must be true or false, got 1"),
        (lambda: Int(low=False, high=True), "low must be a whole number, got False"),
        (lambda: Int(low=0, high=1.5), "high must be a whole number, got 1.5"),
        (lambda: Int(low=0, high=2**54), "high must be within ±2**53"),
        (lambda: Choice(choices=()), "choices must be a list with at least one value, got ()"),
        (lambda: Choice(choices="ab"), "choices must be a list with at least one value, got 'ab'"),
        (lambda: Choice(choices=("a", "a")), "choices must be unique, got 'a' twice"),
        (lambda: Choice(choices=(1, True)), "choices must be unique, got True twice"),
        (lambda: Choice(choices=([1],)), "choices must be text, numbers, true, false or null"),
        (lambda: Choice(choices=(math.nan,)), "choices must be finite, got nan"),
        (lambda: grid_of(SPACE, points=1), "points must be at least 2, got 1"),
    ],
)
def test_mistakes_are_named_with_what_was_found_and_a_remedy(
    make: Callable[[], object], message: str
) -> None:
    found = error_of(make)
    assert found.startswith(message)
    assert ": " in found  # the remedy
