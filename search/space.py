"""The search space: which values a parameter may take, and how a sampler sees them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from lightning_modules.errors import InputError

# Samplers compute in double precision, which holds every integer exactly only up to this size.
_LARGEST_INT = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class Float:
    """A real number in [low, high].

    Args:
        low: The smallest value.
        high: The largest value.
        log: Whether every decade is equally likely, as suits a learning rate.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for bound, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"{bound} must be a number, got {value!r}: write one like 1.0e-3")
            if not _is_finite(value):
                raise InputError(f"{bound} must be finite, got {value!r}: write a number")
        if not isinstance(self.log, bool):
            raise InputError(f"log must be true or false, got {self.log!r}: write one of them")
        _check_order(self.low, self.high)
        if self.log and self.low <= 0:
            raise InputError(
                f"low must be above 0 with log, got {self.low!r}: raise it, or set log to false"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Int:
    """A whole number in [low, high], both included.

    Args:
        low: The smallest value.
        high: The largest value.
    """

    low: int
    high: int

    def __post_init__(self) -> None:
        for bound, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise InputError(
                    f"{bound} must be a whole number, got {value!r}: write one like 3, "
                    "or use a float range"
                )
            if abs(value) > _LARGEST_INT:
                raise InputError(f"{bound} must be within ±2**53, got {value!r}: narrow the range")
        _check_order(self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One of several values without an order.

    Args:
        choices: The values: text, numbers, true, false or null.
    """

    choices: tuple[str | int | float | bool | None, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.choices, tuple) or not self.choices:
            raise InputError(
                f"choices must be a list with at least one value, got {self.choices!r}: add values"
            )
        for position, value in enumerate(self.choices):
            if value is not None and not isinstance(value, str | int | float):
                raise InputError(
                    f"choices must be text, numbers, true, false or null, got {value!r}: "
                    "replace it by a name"
                )
            if isinstance(value, int | float) and not _is_finite(value):
                raise InputError(f"choices must be finite, got {value!r}: write a number")
            # By equality, since a study looks a value up by equality: 1, 1.0 and true are one.
            if value in self.choices[:position]:
                raise InputError(f"choices must be unique, got {value!r} twice: remove one")


Domain = Float | Int | Choice
Space = dict[str, Domain]


def to_distributions(space: Space) -> dict[str, BaseDistribution]:
    """Translate a space into Optuna's terms.

    Args:
        space: The domain of each parameter.

    Returns:
        The Optuna distribution of each parameter, in the same order.
    """
    return {name: _to_distribution(domain) for name, domain in space.items()}


def grid_of(space: Space, points: int = 3) -> dict[str, list[str | int | float | bool | None]]:
    """Lists the values a grid search tries for each parameter.

    Args:
        space: The domain of each parameter.
        points: How many values stand for a range; a range of fewer integers gives all of them.

    Returns:
        The values of each parameter: ranges evenly spaced with both ends (in the logarithm for
        log ranges), choices in full.

    Raises:
        InputError: Fewer than two points, which could not hold both ends of a range.
    """
    if points < 2:
        raise InputError(f"points must be at least 2, got {points!r}: both ends are grid points")
    return {name: _grid_values(domain, points) for name, domain in space.items()}


def from_unit(domain: Domain, position: float) -> str | int | float | bool | None:
    """Return the value at a position of a domain, so that equal steps are equally likely.

    Args:
        domain: The domain of the parameter.
        position: From 0 to 1.

    Returns:
        The value; `from_unit` of uniform positions is the domain's prior.
    """
    match domain:
        case Float(low=low, high=high, log=log):
            if log:
                value = math.exp(math.log(low) + position * (math.log(high) - math.log(low)))
            else:
                value = low + position * (high - low)
            return min(max(value, float(low)), float(high))  # rounding may step over an end
        case Int(low=low, high=high):
            return min(low + int(position * (high - low + 1)), high)
        case Choice(choices=choices):
            return choices[min(int(position * len(choices)), len(choices) - 1)]


def to_unit(domain: Domain, value: Any) -> float:
    """Return the position of a value: the reverse of `from_unit`.

    Args:
        domain: The domain of the parameter.
        value: A value in it.

    Returns:
        From 0 to 1; for an integer or a choice the middle of its share.
    """
    return to_units(domain, [value])[0]


def to_units(domain: Domain, values: Iterable[Any]) -> list[float]:
    """Return the positions of many values: `to_unit` of each, with the domain taken apart once.

    Args:
        domain: The domain of the parameter.
        values: In it.

    Returns:
        Of each value.
    """
    match domain:
        case Float(low=low, high=high, log=True):
            start, length = math.log(low), math.log(high) - math.log(low)
            return [(math.log(value) - start) / length for value in values]
        case Float(low=low, high=high):
            return [float((value - low) / (high - low)) for value in values]
        case Int(low=low, high=high):
            return [float((value - low + 0.5) / (high - low + 1)) for value in values]
        case Choice(choices=choices):
            return [(choices.index(value) + 0.5) / len(choices) for value in values]


def _to_distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case Float(low=low, high=high, log=log):
            return FloatDistribution(float(low), float(high), log=log)
        case Int(low=low, high=high):
            return IntDistribution(low, high)
        case Choice(choices=choices):
            return CategoricalDistribution(choices)


def _grid_values(domain: Domain, points: int) -> list[str | int | float | bool | None]:
    match domain:
        case Float():
            return [from_unit(domain, index / (points - 1)) for index in range(points)]
        case Int(low=low, high=high):
            count = min(points, high - low + 1)
            return [low + round(index * (high - low) / (count - 1)) for index in range(count)]
        case Choice(choices=choices):
            return list(choices)


def _check_order(low: float, high: float) -> None:
    if low >= high:
        raise InputError(
            f"low must be below high, got {low!r} and {high!r}: widen the range, or give a single "
            "value as a fixed setting"
        )
    if not _is_finite(high - low):
        raise InputError(f"high - low must be finite, got {low!r} and {high!r}: narrow the range")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False
